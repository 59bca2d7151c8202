"""The clumsy user: whatever is wrong ends in one line that says what is wrong and what to do, and nothing half-written stays."""
import json, os, shutil, subprocess, sys
from pathlib import Path
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from seqwarm.batch.cli import main
from seqwarm.core import files
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.corpus import Corpus
from seqwarm.core.errors import Refusal
from seqwarm.core.figures import by_setting, loss_curves, saved_bars, scores
from seqwarm.core.overlap import overlap
from seqwarm.core.pictures import saving
from seqwarm.core.plan import Plan
from seqwarm.core.record import Run
from seqwarm.core.train import Stage, train
from seqwarm.core.vocab import load_tokenizer, train_tokenizer
from seqwarm.core.write import save, write
from seqwarm.methods.clp import clp
from seqwarm.methods.depth import depth
from seqwarm.methods.experts import aggregate, prune, upcycle
from seqwarm.methods.graft import extract, graft
from seqwarm.methods.grow import grow
from seqwarm.methods.ligo import ligo
from seqwarm.methods.width import width
sys.path.insert(0, str(Path(__file__).parent))
from tiny import notebook

FFN = "transformer.h.0.mlp.c_fc.weight"

def listing(folder: Path) -> set[str]: return {str(p.relative_to(folder)) for p in folder.rglob("*")}

def refused(does, *says: str) -> str:
    "The one line of a refusal, which says all of `says`, in two halves."
    with pytest.raises(Refusal) as caught: does()
    line = str(caught.value)
    assert "\n" not in line and "; " in line, line
    for word in says: assert word in line, line
    return line

def gpt(tokenizer, width: int = 16, positions: int = 16) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=width, n_layer=1, n_head=2, bos_token_id=0,
                                      eos_token_id=1))

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with two texts, two tokenizers, a source and a helper."
    home = tmp_path_factory.mktemp("made")
    for name, words in {"a": "and are not", "b": "und sind nicht"}.items():
        x, y, z = words.split()
        (home/f"{name}.txt").write_text("\n".join(f"{i} {x} {j} {y} {i + j} , {z} {i * j}" for i in range(15) for j in range(15)))
    ta, tb = (train_tokenizer((home/f"{n}.txt").read_text().splitlines(), 300) for n in "ab")
    save(gpt(ta), ta, home/"source", Card.child("source", "found")); save(gpt(tb, 8), tb, home/"helper", Card.child("helper", "found"))
    return home, ta, tb

@pytest.fixture
def here(tmp_path, monkeypatch, made):
    "An empty folder to work in, with a cache of its own."
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("SEQWARM_CACHE", str(tmp_path/"cache"))
    for f in made[0].glob("*.txt"): shutil.copy(f, tmp_path)
    return tmp_path

@pytest.mark.parametrize("spec, says", [
    ("wrld:a", "did you mean 'world:'?"), ("a.txt", "is no corpus"), ("world:", "names nothing"), ("hub:", "names nothing"),
    ("world:q", "there are: a, b, c"),
    ("text:nowhere.txt", "there is no file nowhere.txt"), ("text:empty.txt", "holds no text"), ("text:bytes.txt", "can't be read as txt"),
    ("text:torn.jsonl", "can't be read as jsonl"), ("text:column.jsonl", "did you mean 'txt'?"), ("text:x.pdf", "ends in .pdf"),
    ("world:a?wrds=9", "did you mean 'words'?"), ("world:a?words=many", "words=many"),
    ("world:a?words=9&words=8", "twice"), ("world:a?weight=nan", "weight=nan"),
    ("world:a?size=lrge", "did you mean 'large'?"), (None, "is no corpus")])
def test_corpus_strings(here, made, spec, says):
    Path("empty.txt").write_text(""); Path("bytes.txt").write_bytes(b"\xff\xfe\xad")
    Path("torn.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("column.jsonl").write_text('{"txt": "a"}\n'); Path("x.pdf").write_text("x")
    before = listing(here)
    refused(lambda: Corpus(spec, made[1], 16), says)
    assert listing(here) == before

def test_corpus_numbers(here, made):
    for kw in (dict(length=0), dict(length=1), dict(length="x"), dict(length=2.5), dict(seed=-1),
               dict(alpha=float("nan")), dict(alpha="x")):
        refused(lambda kw=kw: Corpus("text:a.txt", made[1], **dict(length=16) | kw), f"cannot be {next(iter(kw.values()))!r}")
    refused(lambda: Corpus("text:a.txt", made[1], 16, split="tain"), "did you mean 'train'?")
    assert not Path("cache").exists()

def test_damaged_cache_is_made_again(here, made):
    good = Corpus("text:a.txt", made[1], 16).fingerprint
    entry = next(Path("cache/tokens").iterdir())
    for name in ("ids.npy", "starts.npy", "words.npy", "fingerprint"):
        whole = (entry/name).read_bytes()
        for content in (None, b"", b"junk", whole[:-8]):
            (entry/name).unlink()   # not in place: it may be mapped
            if content is not None: (entry/name).write_bytes(content)
            assert Corpus("text:a.txt", made[1], 16).fingerprint == good
            assert (entry/name).read_bytes() == whole
    shutil.rmtree("cache"); Path("cache").write_text("x")
    refused(lambda: Corpus("text:a.txt", made[1], 16), "cannot be written")

@pytest.mark.parametrize("wrong, says", [
    (lambda t: t.pop(FFN), "lacks transformer.h.0.mlp.c_fc.weight"), (lambda t: t.update(strange=torch.ones(2)), "holds strange"),
    (lambda t: t.update({FFN: torch.ones(3, 4)}), "has the shape (3, 4) and not (16, 64)")])
def test_tensors(here, made, wrong, says):
    shutil.copytree(made[0]/"source", "bad")
    tensors = load_file("bad/model.safetensors"); wrong(tensors); save_file(tensors, "bad/model.safetensors")
    refused(lambda: Checkpoint("bad"), says)

@pytest.mark.parametrize("config, says", [
    (dict(model_type="gpt3"), "there is no family 'gpt3'; did you mean 'gpt2'?"), (dict(n_embd="x"), "not valid"),
    (dict(n_head=3), "cannot be cut"), (dict(n_head=0), "cannot be cut"),
    ([], "holds a list"), (dict(architectures=["GPT2LMHead"]), "did you mean 'GPT2LMHeadModel'?")])
def test_configs(here, made, config, says):
    shutil.copytree(made[0]/"source", "bad")
    old = json.loads(Path("bad/config.json").read_text())
    Path("bad/config.json").write_text(json.dumps(old | config if isinstance(config, dict) else config))
    refused(lambda: Checkpoint("bad"), says)

def test_transfer(here, made):
    s, h = Checkpoint(made[0]/"source"), Checkpoint(made[0]/"helper")
    refused(lambda: clp(s, h, "gaurded"), "did you mean 'guarded'?")
    refused(lambda: clp(s, h, "softmax", topk=3), "did you mean 'top_k'?")
    for kw in (dict(temperature=0), dict(temperature="x"), dict(top_k=0), dict(top_k=-1)):
        refused(lambda kw=kw: clp(s, h, "softmax", **kw), "cannot be")
    for kw in (dict(pad_to=0), dict(seed="x")): refused(lambda kw=kw: clp(s, h, **kw), "cannot be")
    refused(lambda: clp(s, s), "knows every token")
    chars = train_tokenizer(["щщ жж"] * 5, 260, "unigram")
    own = {t for t in chars.get_vocab() if t not in chars.all_special_tokens} & set(made[1].get_vocab())
    assert not own   # else this tests nothing
    refused(lambda: overlap(chars, made[1]), "share no ordinary token")
    refused(lambda: load_tokenizer("./nowhere"), "not a folder")
    P, sources, before = clp(s, h), {"source": s, "helper": h}, listing(here)
    Path("there").mkdir()
    for place, says in {"there": "there exists", "a.txt": "a.txt exists", "a.txt/new": "cannot be written",
                        "/proc/nowhere": "cannot be written"}.items():
        refused(lambda place=place: write(P, sources, place), says)
    P.save(here/"there"); Path("there/plan.safetensors").write_bytes(b"junk")
    refused(lambda: Plan.load("there"), "not a plan")
    shutil.rmtree("there"); assert listing(here) == before

@pytest.mark.parametrize("call", [lambda x: clp(x, x), lambda x: clp(Checkpoint(x), x), graft, extract, lambda x: width(x, hidden=32), depth,
    lambda x: grow(x, layers=2), lambda x: upcycle(x, 4), lambda x: prune(x, {}, 2), lambda x: aggregate(x, x), lambda x: ligo(x, None, None, hidden=32)],
    ids="source helper graft extract width depth grow upcycle prune aggregate ligo".split())
def test_a_folder_is_opened_before_a_method_takes_it(made, call):
    refused(lambda: call(str(made[0]/"source")), "cannot be a str; open a folder first: Checkpoint(FOLDER)")

def test_figures_name_the_column_that_is_not_there():
    table = pd.DataFrame(dict(arm=["scratch", "warm"], seed=0, step=1, loss=1.0, saved=0.5, setting="one"))
    for call in (lambda: loss_curves(table, "stpe"), lambda: loss_curves(table.rename(columns=dict(arm="name")), "step"),
                 lambda: saved_bars(table, {"savd": "x"}), lambda: scores(table, ["savd"]), lambda: by_setting(table, "arm")):
        refused(call, "there is no column in the table")
    refused(lambda: saving(table, "step", reference="scrtch"), "did you mean 'scratch'?")

def test_full_disk(here, made, monkeypatch):
    s, h = Checkpoint(made[0]/"source"), Checkpoint(made[0]/"helper")
    P, before = clp(s, h), listing(here)
    def fsync(_): raise OSError(28, "No space left on device")
    def full(*_, **__): raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as m:
        m.setattr(files.os, "fdatasync", fsync)
        refused(lambda: write(P, {"source": s, "helper": h}, "out"), "the disk of out is full")
        m.setattr(GPT2LMHeadModel, "save_pretrained", full)
        refused(lambda: save(gpt(made[1]), None, "out", Card.child("x", "y")), "the disk of out is full")
    with monkeypatch.context() as m:
        m.setattr(files.os, "fsync", fsync)
        refused(lambda: files.write_whole("record.json", {}), "the disk of record.json is full")
        refused(lambda: Corpus("text:a.txt", made[1], 16), "is full")
    assert listing(here) == before
    with pytest.raises(RuntimeError, match="ours"):   # another failure is not taken for a full disk
        with files.whole_folder("out"): raise RuntimeError("ours")
    assert listing(here) == before

def test_training(here, made):
    c, v = (Corpus("text:a.txt", made[1], 16, split) for split in ("train", "valid"))
    go = lambda **kw: train(**dict(model=gpt(made[1]), tokenizer=made[1], corpus=c, valid=v, stages=[Stage(steps=12)],
                                   store="store", batch=4, sequences=4) | kw)
    for kw in (dict(steps=0), dict(steps=-3), dict(steps="3"), dict(steps=1.5), dict(lr=-1), dict(lr="x"),
               dict(lr=float("nan")), dict(warmup=2), dict(weight_decay=-1)):
        refused(lambda kw=kw: Stage(**dict(steps=3) | kw), f"{next(iter(kw))} of a stage cannot be")
    for frozen in (None, 3, [None]): refused(lambda frozen=frozen: Stage(3, frozen=frozen), f"frozen of a stage cannot be {frozen!r}", "name roles")
    refused(lambda: Stage(3, objective="causl"), "did you mean 'causal'?")
    refused(lambda: Stage(3, schedule="cosin"), "did you mean 'cosine'?")
    for kw in (dict(batch=0), dict(batch=-4), dict(batch="x"), dict(accumulate=0), dict(seed=-1),
               dict(seed=1 << 40), dict(every=0), dict(save_every=0), dict(sequences=0)):
        refused(lambda kw=kw: go(**kw), f"{next(iter(kw))} cannot be")
    for key, wrong, says in (("model", "gpt2", "the model of a training cannot be a str; open it"), ("corpus", "text:a.txt", "cannot be a str; make it"),
                             ("valid", None, "the corpus of a training cannot be a NoneType"), ("tokenizer", None, "cannot be a NoneType; load it"),
                             ("stages", Stage(3), "the stages of a training cannot be a Stage; give a list"), ("stages", ["mlm"], "cannot be a str; give a list")):
        refused(lambda key=key, wrong=wrong: go(**{key: wrong}), says)
    refused(lambda: go(batch=5, accumulate=2), "choose a multiple"); refused(lambda: go(stages=[]), "without stages")
    refused(lambda: go(track="tensorbord"), "'tensorboard'?")
    refused(lambda: go(model=gpt(made[1], positions=8)), "8 positions")
    refused(lambda: go(stages=[Stage(3, frozen=("atn",))]), "did you mean 'attn")
    small = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    refused(lambda: go(model=small), "rows for 50"); refused(lambda: go(store="a.txt"), "cannot be written")
    refused(lambda: go(stages=[Stage(12, lr=1e6)]), "the loss became", "lower the learning rate")
    # nothing was kept yet, so nothing stays
    assert not Path("store").exists()

def test_run_folders(here):
    run = Run("clp", {}, "x")
    refused(lambda: Run("clp", {}, "x"), "runs/x is in use"); run.lock.release()
    refused(lambda: Run("clp", {}, "x", "a.txt"), "cannot be written")

def test_refused_in_a_cell_and_corrected(here, capsys):
    "Exit code 2 and the one line; what the recipe had written stays, and the corrected call may use the name."
    notebook(here/"10_tiny.ipynb", "from seqwarm.core.errors import Refusal\n"
             "if share > 0.6: raise Refusal('share is too large', 'give less')")
    assert main(["run", "10_tiny.ipynb", "-p", "share", "0.9"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "seqwarm: share is too large; give less"
    assert Path("runs/tiny/begun").exists()
    assert main(["run", "10_tiny.ipynb", "-p", "share", "0.5"]) == 0
    assert json.loads(Path("runs/tiny/record.json").read_text())["parameters"]["share"] == 0.5
    assert main(["run", "10_tiny.ipynb", "-p", "share", "0.4"]) == 2   # a finished run is safe
    assert "other parameters" in capsys.readouterr().err

def test_recipe_from_the_shell(here):
    "The real recipe in a process of its own: one line, exit code 2, no traceback, nothing left."
    before = listing(here)
    done = subprocess.run([sys.executable, "-c", "from seqwarm.batch.cli import main; main()", "run", "clp", "-p", "words", "5000",
                           "-p", "target_text", "wrld:b"],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert (done.returncode, done.stderr.strip()) == (2, "seqwarm: there is no corpus 'wrld:b'; did you mean 'world:'?")
    assert listing(here) == before

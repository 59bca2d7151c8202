"The command clp as its user meets it: every option, the same from Python and by the recipe, and every mistake one line that leaves nothing behind."
import errno, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from seqwarm.batch import cli
from seqwarm.batch.cli import main
from seqwarm.core import files
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.world import World
from seqwarm.core.write import save
from seqwarm.methods.embed import METHODS
from seqwarm.methods.transfer import transfer

WTE, BODY, EMBED = "transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight", "model.embed_tokens.weight"
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Folders source (untied, bfloat16) and helper; nobody writes into them."
    home, world = tmp_path_factory.mktemp("made"), World()
    ta, tb = (train_tokenizer(list(world.documents(lang, words=6000)), 400) for lang in "ab")
    torch.manual_seed(0)
    save(GPT2LMHeadModel(GPT2Config(vocab_size=len(ta), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1,
                                    tie_word_embeddings=False)).bfloat16(), ta, home/"source", Card("source", "scratch"))
    save(LlamaForCausalLM(LlamaConfig(vocab_size=len(tb), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                      num_key_value_heads=1, bos_token_id=0, eos_token_id=1)), tb, home/"helper", Card("helper", "scratch"))
    return home

@pytest.fixture
def here(tmp_path, monkeypatch, made):
    "A folder of one's own with links to source and helper; what passes through the folder of temporary files is seen too."
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path/"tmp").mkdir(); monkeypatch.setenv("TMPDIR", str(tmp_path/"tmp")); monkeypatch.setattr("tempfile.tempdir", None)
    for name in ("source", "helper"): os.symlink(made/name, name)
    return tmp_path

def listing(folder: Path) -> set[str]: return {str(p.relative_to(folder)) for p in folder.rglob("*")}

def refused(here: Path, capsys, *words: str) -> str:
    "The one line on stderr; exit code 2, and no file more or less."
    before = listing(here)
    assert main(["clp", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("seqwarm: ") and err.count("\n") == 1 and len(err) < 700, err
    assert listing(here) == before
    return err

def copied(name: str, of: str = "source") -> Path: return Path(shutil.copytree(of, name))

def changed(folder: Path, name: str | None = None, at=None, value=None, **config) -> None:
    "Set a number of a tensor, or entries of the config (None takes one away)."
    if name:
        held = load_file(folder/"model.safetensors"); held[name][at] = value
        save_file(held, folder/"model.safetensors", metadata={"format": "pt"})
    old = json.loads((folder/"config.json").read_text()) | config
    (folder/"config.json").write_text(json.dumps({k: v for k, v in old.items() if v is not None}))

# ---- what it does -----------------------------------------------------------------------------------------------------------

def test_help_names_the_methods_and_is_light():
    assert cli._METHODS.split(", ") == list(METHODS)
    code = "import sys\nfrom seqwarm.batch.cli import main\nprint(main(['clp', '--help']), sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV | {"COLUMNS": "400"})
    assert done.stdout.splitlines()[-1] == "0 []" and not done.stderr and cli._METHODS in " ".join(done.stdout.split())
    for option in "method match top-k temperature ridge norm-correct corpus source-vectors helper-vectors dictionary pad-to seed dry-run".split(): assert f"--{option} " in done.stdout

OPTIONS = [("--method", "softmax", "--top-k", "3", "--temperature", "0.2"), ("--method", "lstsq", "--ridge", "0.01", "--match", "canonical"),
           ("--norm-correct", "--pad-to", "64", "--corpus", "world:b?words=500"), ("--method", "random", "--seed", "7"), ("--method", "clp+", "--temperature", "0.5")]
PYTHON = [dict(method="softmax", top_k=3, temperature=0.2), dict(method="lstsq", ridge=0.01, match="canonical"), dict(norm=True, pad_to=64, corpus="world:b?words=500"),
          dict(method="random", seed=7), dict(method="clp+", temperature=0.5)]

@pytest.mark.parametrize("typed,called", zip(OPTIONS, PYTHON), ids=[o[1] for o in OPTIONS])
def test_options_are_those_of_the_call(here, capsys, typed, called):
    assert main(["clp", "source", "helper", "new/out", *typed]) == 0
    out, err = capsys.readouterr()
    transfer("source", "helper", **called).write("new/again")
    for f in Path("new/out").iterdir():     # bit for bit, but for the name on card and README
        if f.name not in ("seqwarm.json", "README.md"): assert f.read_bytes() == Path("new/again", f.name).read_bytes(), f.name
    assert out.splitlines()[-1] == "written to new/out; open new/out/report.html" and not err and listing(here/"tmp") == set()

def test_a_dry_run_prints_the_same_and_writes_nothing(here, capsys):
    before = listing(here)
    assert main(["clp", "source", "helper", "--dry-run"]) == 0 and main(["clp", "source", "helper", "new/out", "--dry-run"]) == 0
    first, second = (half.splitlines() for half in capsys.readouterr().out.split("GPT2LMHeadModel from ")[1:])
    assert first == second and any("tokens:" in line for line in first) and any(line.startswith("plan:") for line in first) and listing(here) == before
    assert main(["clp", "source", "helper", "new/out"]) == 0 and capsys.readouterr().out.splitlines()[1:-1] == first[1:]

def test_what_was_written_loads_and_speaks(here):
    assert main(["clp", "source", "helper", "out"]) == 0
    model, tok = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
    ids = tok(next(World().documents("b", "valid")), return_tensors="pt").input_ids[:, :9]
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == len(tok) == len(AutoTokenizer.from_pretrained("helper"))
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2).shape[1] > 9
    old, new = load_file("source/model.safetensors"), load_file("out/model.safetensors")
    assert set(old) == set(new) and all(torch.equal(old[n], new[n]) for n in old if old[n].shape == new[n].shape and n not in (WTE, "lm_head.weight"))

def test_at_a_terminal_and_for_a_reader_who_has_seen_enough(here):
    "It says what it does; and with `| head -1` the checkpoint is written all the same."
    import pty
    a, b = pty.openpty()
    head = f"{sys.executable} -c 'from seqwarm.batch.cli import main; main()' clp source helper out | head -c 1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", head], env=ENV, stderr=b)
    os.close(b); said = os.read(a, 1 << 16).decode(); os.close(a)
    assert done.returncode == 0 and Checkpoint("out").card.recipe == "clp"
    assert [line.strip() for line in said.splitlines()] == ["seqwarm: reading source and helper ...", "seqwarm: writing out ..."]

SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's job in the background inherits its deafness
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.batch.cli import main
real = Checkpoint.pieces
def pieces(self, name, **kw): time.sleep(0.3); yield from real(self, name, **kw)
Checkpoint.pieces = pieces
for _ in range(2):
    try: main()
    except SystemExit as e: print(e.code, file=sys.stderr, flush=True)
"""

def test_stopped_in_the_middle_of_writing(here):
    before = listing(here)
    p = subprocess.Popen([sys.executable, "-c", SLOW, "clp", "source", "helper", "new/out"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENV)
    for sent, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        for _ in range(2400):
            if any(f.endswith("model.safetensors") and ".part" in f for f in listing(here)): break
            time.sleep(0.02)
        else: p.kill(); pytest.fail("it never began to write")
        p.send_signal(sent)
        assert [p.stderr.readline() for _ in range(2)] == ["seqwarm: stopped; nothing was written\n", f"{code}\n"] and listing(here) == before
    assert p.communicate(timeout=30)[1] == ""

def test_the_recipe_takes_paths(here, made):
    tiny = dict(source_steps=2, helper_steps=2, horizons=4, words=3000, length=16, batch=4, source=made/"source", helper=made/"helper", arms="guarded", target_text="world:b")
    done = subprocess.run([sys.executable, "-c", "from seqwarm.batch.cli import main; main()", "run", "clp", *(w for k, v in tiny.items() for w in ("-p", k, str(v)))],
                          capture_output=True, text=True, env=ENV | {"SEQWARM_CACHE": str(here/"cache")})
    assert done.returncode == 0, done.stderr
    record = json.loads(Path("runs/clp/record.json").read_text())
    assert str(made/"source") in record["lines"][0] and f"words from {made/'helper'}" in record["lines"][0] and "GPT2LMHeadModel of 1 layers x 16" in record["lines"][1]
    [warm] = Path("runs/store").glob("start-*")
    transfer(made/"source", made/"helper", method="guarded").write("out")
    assert (warm/"model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()

# ---- mistakes ---------------------------------------------------------------------------------------------------------------

TYPED = {   # what is typed -> what the line says
    (): "Missing argument", ("source",): "Missing argument", ("source", "helper"): "no folder is named to write to; add OUT, or --dry-run",
    ("source", "helper", "out", "more"): "unexpected extra argument", ("source", "helper", ""): "cannot name a folder", ("source", "helper", "a\0b"): "cannot name a folder",
    ("source", "helper", "x"*300): "cannot name a folder", ("source", "helper", "."): ". exists", ("source", "helper", "tmp"): "tmp exists", ("source", "helper", "file"): "file exists",
    ("source", "helper", "dangling"): "dangling exists", ("source", "helper", "file/out"): "file is no folder", ("source", "helper", "dangling/out"): "dangling is no folder",
    ("source", "helper", "tmp", "--dry-run"): "tmp exists", ("", "helper", "out"): "the name of the source is empty", ("source", " ", "out"): "the name of the helper is empty",
    ("./nope", "helper", "out"): "./nope is not a folder", ("file", "helper", "out"): "file is not a folder", ("tmp", "helper", "out"): "holds no config.json",
    ("source", "nobody/nothing", "out"): "there is no folder nobody/nothing, and the hub does not give it", ("source", "halper", "out"): "did you mean helper?", ("no such name", "helper", "out"): "the hub does not give it",
    ("source", "source", "out"): "knows every token", ("source", "helper", "out", "--method", "gaurded"): "did you mean 'guarded'?", ("source", "helper", "out", "--methd", "clp"): "No such option",
    ("source", "helper", "out", "--match", "cannonical"): "did you mean 'canonical'?", ("source", "helper", "out", "--top-k", "3"): "procrustes has no top_k; leave it out, or take a method that has one: wechsel, softmax",
    ("source", "helper", "out", "--method", "softmax", "--ridge", "1"): "softmax has no ridge", ("source", "helper", "out", "--method", "softmax", "--top-k", "0"): "top_k cannot be 0",
    ("source", "helper", "out", "--method", "softmax", "--top-k", "x"): "Invalid value for '--top-k'", ("source", "helper", "out", "--method", "softmax", "--temperature", "nan"): "temperature cannot be nan",
    ("source", "helper", "out", "--method", "lstsq", "--ridge", "-1"): "ridge cannot be -1", ("source", "helper", "out", "--seed", "-1"): "seed cannot be -1",
    ("source", "helper", "out", "--pad-to", "0"): "pad_to cannot be 0", ("source", "helper", "out", "--pad-to", "1000000000000"): "pad_to cannot be 1000000000000",
    ("source", "helper", "out", "--corpus", "wrld:b"): "did you mean 'world:'?", ("source", "helper", "out", "--corpus", ""): "is no corpus", ("source", "helper", "out", "--corpus", "text:no.txt"): "there is no file"}

@pytest.mark.parametrize("typed", TYPED, ids=lambda t: " ".join(t)[:60].replace("\0", "0") or "nothing")
def test_what_is_typed(here, capsys, typed):
    Path("file").write_text("x"); os.symlink("nowhere", "dangling")
    assert TYPED[typed] in refused(here, capsys, *typed)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("who,name", [("source", WTE), ("source", "lm_head.weight"), ("source", BODY), ("helper", EMBED)])
def test_not_finite(here, capsys, who, name, dtype):
    bad = copied("bad", who)
    held = load_file(bad/"model.safetensors"); save_file({k: x.to(dtype) for k, x in held.items()}, bad/"model.safetensors", metadata={"format": "pt"})
    for value in (float("nan"), float("-inf")):
        changed(bad, name, (-1, 2), value)
        assert f"{name} in bad/model.safetensors holds NaN or infinity" in refused(here, capsys, *(("bad", "helper") if who == "source" else ("source", "bad")), "out")

def sharded(folder: Path) -> tuple[Path, dict]:
    "The folder's weights in two shards; their index and where each tensor lies."
    held = load_file(folder/"model.safetensors"); (folder/"model.safetensors").unlink()
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(held)}
    for shard in set(where.values()): save_file({n: x for n, x in held.items() if where[n] == shard}, folder/shard, metadata={"format": "pt"})
    (folder/"model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder/"model.safetensors.index.json", where

@pytest.mark.parametrize("who", ["source", "helper"])
def test_damaged_files(here, capsys, who):
    bad = copied("bad", who); pair = ("bad", "helper") if who == "source" else ("source", "bad")
    weights = bad/"model.safetensors"; whole = weights.read_bytes()
    for content, says in {whole[:len(whole)//2]: "is damaged", whole[:-1]: "is damaged", whole + b"0": "is damaged", b"junk"*99: "is not a safetensors file", b"": "is not a safetensors file"}.items():
        weights.write_bytes(content); assert says in refused(here, capsys, *pair, "out")
    weights.write_bytes(whole); index, where = sharded(bad)
    first, text = bad/min(where.values()), index.read_text()
    index.write_text(json.dumps({"weight_map": where | {"ghost.weight": first.name}})); assert "places ghost.weight in" in refused(here, capsys, *pair, "out")
    index.write_text(text.replace(first.name, "../" + first.name)); assert "is no file of this folder" in refused(here, capsys, *pair, "out")
    index.write_text("{}"); assert "has no weight_map" in refused(here, capsys, *pair, "out")
    index.write_text(text); held = first.read_bytes()
    first.write_bytes(held[:-7]); assert "is damaged" in refused(here, capsys, *pair, "out")
    first.unlink(); assert f"lacks the shard {first.name}" in refused(here, capsys, *pair, "out")
    first.write_bytes(held); assert main(["clp", *pair, "out"]) == 0     # mended, it serves

def test_checkpoints_of_other_kinds(here, capsys):
    for name, config, says in [("code", dict(model_type="strange", auto_map={"AutoModel": "modeling_x.X"}), "run code of its own"), ("mamba", dict(model_type="mamba"), "no family 'mamba'"),
                               ("few", dict(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "is quantised"), ("mute", dict(architectures=None), "names no architecture")]:
        changed(copied(name), **config); assert says in refused(here, capsys, name, "helper", "out")
    (copied("pickled")/"model.safetensors").rename("pickled/pytorch_model.bin"); assert "pickled weights only" in refused(here, capsys, "pickled", "helper", "out")
    Path("lora").mkdir(); Path("lora/adapter_config.json").write_text("{}"); assert "an adapter and no model" in refused(here, capsys, "lora", "helper", "out")
    (copied("lora2")/"model.safetensors").unlink(); Path("lora2/adapter_config.json").write_text("{}"); assert "an adapter and no model" in refused(here, capsys, "source", "lora2", "out")
    held = load_file("source/model.safetensors"); save_file(held | {WTE: held[WTE].to(torch.float8_e4m3fn)}, copied("small")/"model.safetensors", metadata={"format": "pt"})
    assert "is stored as float8_e4m3fn" in refused(here, capsys, "small", "helper", "out")
    changed(copied("wide"), n_embd=32); assert "has the shape" in refused(here, capsys, "wide", "helper", "out")
    (copied("card")/"seqwarm.json").write_text('{"name": 1, "recipe": "x"}'); assert "is no card" in refused(here, capsys, "card", "helper", "out")

def test_a_head_without_a_vocabulary_is_copied(here):
    tok = AutoTokenizer.from_pretrained("source")
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tok), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    save(model, tok, "judge", Card("judge", "scratch"))
    assert main(["clp", "judge", "helper", "out"]) == 0
    new = BertForSequenceClassification.from_pretrained("out")
    assert torch.equal(new.classifier.weight, model.classifier.weight) and new.get_input_embeddings().weight.shape == (len(AutoTokenizer.from_pretrained("out")), 8)

def test_tokenizers_that_are_not_there_or_not_their_models(here, capsys):
    for who in ("source", "helper"):
        pair = lambda bad, who=who: (bad, "helper") if who == "source" else ("source", bad)
        for f in copied(f"none{who}", who).glob("tokenizer*"): f.unlink()
        assert "holds no tokenizer" in refused(here, capsys, *pair(f"none{who}"), "out")
        (copied(f"torn{who}", who)/"tokenizer.json").write_text("{"); assert "is not readable JSON" in refused(here, capsys, *pair(f"torn{who}"), "out")
        own = copied(f"own{who}", who); (own/"tokenizer.json").unlink(); (own/"vocab.json").write_text("{}"); (own/"tok.py").write_text("open('code was run', 'w')")
        (own/"tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tok.X", None]}, "tokenizer_class": "X"}))
        assert f"the tokenizer of own{who} cannot be loaded" in refused(here, capsys, *pair(f"own{who}"), "out")
    short = copied("short", "helper"); held = load_file(short/"model.safetensors")
    save_file({k: x[:390].clone() if len(x) == 400 else x for k, x in held.items()}, short/"model.safetensors", metadata={"format": "pt"}); changed(short, vocab_size=390)
    assert "(id 390) and its model only 390 rows" in refused(here, capsys, "source", "short", "out")
    added = copied("added", "helper"); tok = AutoTokenizer.from_pretrained("added"); tok.add_tokens(["<one>", "two"]); tok.save_pretrained(added)
    assert main(["clp", "source", "added", "out"]) == 0      # added tokens beyond the rows are allowed, and reported
    out = capsys.readouterr().out
    assert "2 new tokens have a helper row of zeros, or none" in out and Checkpoint("out").shape(WTE) == (402, 16)
    assert json.loads(Path("out/report.json").read_text())["tokens"]["zero_helper"] == 2

def test_disks(here, capsys, monkeypatch):
    usage = shutil.disk_usage(here)
    with monkeypatch.context() as m:
        m.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=10**6)); assert "make room" in refused(here, capsys, "source", "helper", "a/b/out")
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for call in ("fdatasync", "fsync"):
        with monkeypatch.context() as m: m.setattr(os, call, full); assert "is full" in refused(here, capsys, "source", "helper", "a/out")

def test_a_parent_that_is_closed(here, capsys, monkeypatch):
    Path("closed").mkdir(mode=0o555)
    if os.geteuid() == 0:   # who may write everywhere
        monkeypatch.setattr(os, "access", lambda p, mode, real=os.access: Path(p).name != "closed" and real(p, mode))
    assert "closed to you" in refused(here, capsys, "source", "helper", "closed/deep/out")

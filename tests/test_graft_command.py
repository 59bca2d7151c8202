"The commands graft and extract as their user meets them: every option, the same from Python, and every mistake one line that leaves nothing behind."
import json, os, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, BertForSequenceClassification, ElectraConfig, ElectraModel, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging
from seqwarm.batch.cli import main
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.write import save
from seqwarm.methods.decoder import DECODERS
from seqwarm.methods.graft import NATIVE, carry_out, extract, graft

logging.set_verbosity_error(); logging.disable_progress_bar()
TEXT = ["the moon is up and the wood is black and still"]*4
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}

pytestmark = pytest.mark.usefixtures("quick")

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A masked LM with a tokenizer (eps 1e-5), and models that are no encoder for a graft; nobody writes into them."
    home, tok = tmp_path_factory.mktemp("made"), train_tokenizer(TEXT, 290)
    torch.manual_seed(0)
    size = dict(vocab_size=len(tok), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20, pad_token_id=tok.pad_token_id)
    bert = BertConfig(**size, layer_norm_eps=1e-5, initializer_range=0.3)
    for name, model in {"encoder": BertForMaskedLM(bert), "fine": BertForMaskedLM(BertConfig(**size)), "classifier": BertForSequenceClassification(bert),
                        "narrow": ElectraModel(ElectraConfig(**size, embedding_size=8, layer_norm_eps=1e-5)),
                        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)),
                        "bart": BartForConditionalGeneration(BartConfig(vocab_size=len(tok), d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                                                                        encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=20, pad_token_id=tok.pad_token_id))}.items():
        save(model, tok, home/name, Card(name, "scratch", cost={"tokens": 7}))
    return home

@pytest.fixture
def here(tmp_path, monkeypatch, made):
    "A folder of one's own with links to all of them."
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path/"tmp").mkdir(); monkeypatch.setenv("TMPDIR", str(tmp_path/"tmp")); monkeypatch.setattr("tempfile.tempdir", None)
    for f in made.iterdir(): os.symlink(f, f.name)
    return tmp_path

def listing(folder: Path) -> set[str]: return {str(p.relative_to(folder)) for p in folder.rglob("*")}

def refused(here: Path, capsys, *words: str) -> str:
    "The one line on stderr; exit code 2, and no file more or less."
    before = listing(here)
    assert main(list(words)) == 2
    err = capsys.readouterr().err
    assert err.startswith("seqwarm: ") and err.count("\n") == 1 and len(err) < 700, err
    assert listing(here) == before
    return err

# ---- what they do ------------------------------------------------------------------------------------------------------------

OPTIONS = {   # what is typed -> the same from Python
    (): {}, ("--decoder-layers", "3", "--seed", "4"): dict(layers=3, seed=4), ("--decoder", "copy", "--cross", "attn", "--decoder-layers", "1"): dict(decoder="copy", cross="attn", layers=1),
    ("--decoder", "interleave"): dict(decoder="interleave"), ("--family", "encoder-decoder"): dict(family="encoder-decoder"), ("--architecture", "BertModel"): {}}

@pytest.mark.parametrize("typed", OPTIONS, ids=" ".join)
def test_options_are_those_of_the_call(here, capsys, typed):
    assert main(["graft", "encoder", "new/out", *typed]) == 0
    out, err = capsys.readouterr()
    source = Checkpoint("encoder", "BertModel" if "--architecture" in typed else None)
    carry_out(graft(source, **OPTIONS[typed]), source, "new/again")
    for f in Path("new/out").iterdir():     # bit for bit, but for the name on card and README
        if f.name not in ("seqwarm.json", "README.md"): assert f.read_bytes() == Path("new/again", f.name).read_bytes(), f.name
    assert out.splitlines()[-1] == "written to new/out" and not err and listing(here/"tmp") == set()
    model, tok = AutoModelForSeq2SeqLM.from_pretrained("new/out"), AutoTokenizer.from_pretrained("new/out")
    given = tok(TEXT[:1], return_tensors="pt")                                           # what it hands out, the model takes
    ids = given.input_ids
    assert (model.get_encoder()(ids).last_hidden_state - AutoModel.from_pretrained("encoder")(ids).last_hidden_state).abs().max() < 1e-5
    assert model(**given, labels=ids).loss > 0 and model.generate(**given, max_new_tokens=3).shape[1] > 1 and tok.get_vocab() == AutoTokenizer.from_pretrained("encoder").get_vocab()
    ids = {k: getattr(tok, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert {k: getattr(model.generation_config, k) for k in ids} == ids

def test_there_and_back(here, capsys):
    assert main(["graft", "encoder", "g"]) == 0 and main(["extract", "g", "e"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "BertForMaskedLM (encoder) becomes BartForConditionalGeneration: 2 + 2 layers" and said[2] == "hidden states: the encoder's own"
    assert said[3] == "kept in origin.safetensors: embed.position, embed.type, head, head.dense, head.norm"
    assert "from origin.safetensors, as when the decoder was grafted: embed.type, head, head.dense, head.norm" in said and "written to e" == said[-1]
    a, b = (load_file(f"{n}/model.safetensors") for n in ("encoder", "e"))
    assert set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)
    assert AutoTokenizer.from_pretrained("e").model_input_names == AutoTokenizer.from_pretrained("encoder").model_input_names
    assert Checkpoint("e").card.parents == [Checkpoint("g").card.id] and Checkpoint("g").card.parents == [Checkpoint("encoder").card.id]
    shutil.move("g", "moved")
    shutil.copytree("moved", "later"); Path("later/origin.safetensors").unlink()        # as after training
    assert main(["extract", "later", "e2", "--origin", "moved"]) == 0 and main(["extract", "later", "e3"]) == 0
    assert Path("e2/model.safetensors").read_bytes() == Path("e/model.safetensors").read_bytes()
    assert json.loads(Path("e3/config.json").read_text())["architectures"] == ["BertModel"] and "without origin.safetensors" in capsys.readouterr().out

def test_a_plain_seq2seq_model(here, capsys):
    assert main(["extract", "bart", "out"]) == 0
    source = Checkpoint("bart")
    carry_out(extract(source), source, "again")
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    ids = AutoTokenizer.from_pretrained("out")(TEXT[:1], return_tensors="pt").input_ids
    assert (AutoModel.from_pretrained("out")(ids).last_hidden_state - AutoModelForSeq2SeqLM.from_pretrained("bart").get_encoder()(ids).last_hidden_state).abs().max() < 1e-5

def test_a_dry_run_prints_the_same_and_writes_nothing(here, capsys):
    before = listing(here)
    for command, of in (("graft", "encoder"), ("extract", "bart")):
        assert main([command, of, "--dry-run"]) == 0 and main([command, of, "out", "--dry-run"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[:len(said)//2] == said[len(said)//2:] and listing(here) == before
        assert main([command, of, command]) == 0 and capsys.readouterr().out.splitlines()[:-1] == said[:len(said)//2]
        shutil.rmtree(command)

def test_where_the_native_class_is_not_exact(here, capsys):
    assert main(["graft", "fine", "--dry-run"]) == 0 and main(["graft", "fine", "--dry-run", "--family", "bart"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "becomes EncoderDecoderModel" in said[0] and said[2] == "hidden states: the encoder's own"
    native = [s for s in said if "about 1e-4" in s]
    assert len(native) == 1 and "encoder-decoder would hold it as it is" in native[0]

def test_help_is_light_and_names_what_there_is():
    code = "import sys\nfrom seqwarm.batch.cli import main\nprint(main(['graft', '--help']), main(['extract', '--help']), sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV | {"COLUMNS": "400"})
    assert done.stdout.splitlines()[-1] == "0 0 []" and not done.stderr
    for option in "decoder-layers decoder family cross architecture seed dry-run origin".split(): assert f"--{option} " in done.stdout
    for word in (*DECODERS, *set(NATIVE.values()), "encoder-decoder"): assert word in done.stdout

# ---- mistakes ----------------------------------------------------------------------------------------------------------------

TYPED = {   # what is typed -> what the line says
    ("graft",): "Missing argument", ("graft", "encoder"): "no folder is named to write to; add OUT, or --dry-run", ("graft", "encoder", "out", "more"): "unexpected extra argument",
    ("graft", "", "out"): "the name of the encoder is empty", ("graft", "encoder", ""): "cannot name a folder", ("graft", "encoder", "bart"): "bart exists; choose another place or remove it",
    ("graft", "./nowhere", "out"): "./nowhere is not a folder", ("graft", "encoder", "out", "--decoder-layers", "0"): "the number of decoder layers cannot be 0",
    ("graft", "encoder", "out", "--decoder-layers", "two"): "Invalid value for '--decoder-layers'", ("graft", "encoder", "out", "--decoder", "fresh"): "there is no beginning of a decoder 'fresh'",
    ("graft", "encoder", "out", "--decoder", "copy", "--decoder-layers", "3"): "a decoder of 3 layers cannot be made by 'copy' from an encoder of 2; give at most 2",
    ("graft", "encoder", "out", "--decoder", "interleave", "--decoder-layers", "2"): "give at most 1", ("graft", "encoder", "out", "--family", "barf"): "did you mean 'bart'?",
    ("graft", "encoder", "out", "--family", "t5"): "a bert encoder does not fit into t5", ("graft", "encoder", "out", "--cross", "attn"): "leave cross out",
    ("graft", "encoder", "out", "--seed", "-1"): "seed cannot be -1", ("graft", "encoder", "out", "--architecture", "BertModle"): "did you mean 'BertModel'?",
    ("graft", "gpt2", "out"): "gpt2 is no encoder but a GPT2LMHeadModel", ("graft", "bart", "out"): "is a seq2seq model already", ("graft", "classifier", "out"): "open it as BertModel (--architecture)",
    ("graft", "narrow", "out", "--family", "bart"): "narrower than its layers", ("graft", "encoder", "out", "--architecture", "BertLMHeadModel"): "looks back only",
    ("extract",): "Missing argument", ("extract", "bart"): "no folder is named", ("extract", "encoder", "out"): "is a BertForMaskedLM, and no seq2seq model whose encoder is known here",
    ("extract", "bart", "gpt2"): "gpt2 exists", ("extract", "bart", "out", "--origin", "encoder"): "is not what a graft keeps of its encoder", ("extract", " ", "out"): "is empty",
    ("extract", "bart", "encoder/config.json/x"): "is no folder", ("extract", "gpt2", "out"): "no seq2seq model"}

@pytest.mark.parametrize("typed", TYPED, ids=" ".join)
def test_a_mistake_is_one_line(here, capsys, typed): assert TYPED[typed] in refused(here, capsys, *typed)

def test_an_encoder_without_a_tokenizer_or_with_a_broken_number(here, capsys):
    Path("bare").mkdir()
    for f in ("config.json", "model.safetensors"): shutil.copy(f"encoder/{f}", "bare")
    assert "has no token for a decoder to begin with" in refused(here, capsys, "graft", "bare", "out")
    from safetensors.torch import save_file
    shutil.copytree("encoder", "broken")
    held = load_file("broken/model.safetensors")
    held["bert.encoder.layer.1.output.dense.weight"][0, 0] = float("inf")
    save_file(held, "broken/model.safetensors", metadata={"format": "pt"})
    assert "holds NaN or infinity" in refused(here, capsys, "graft", "broken", "new/out")

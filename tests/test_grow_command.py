"The commands grow and upcycle as their user meets them: what they write and say, and every mistake one line that leaves nothing behind."
import json, os, shutil
from pathlib import Path
import pytest, torch
from transformers import (AutoModel, AutoModelForCausalLM, AutoTokenizer, BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, BertForPreTraining, BertModel,
                          GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration)
from transformers.utils import logging
from seqwarm.batch.cli import main
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.write import save, write
from seqwarm.methods.experts import upcycle
from seqwarm.methods.grow import grow

logging.set_verbosity_error(); logging.disable_progress_bar()
TEXT = ["the moon is up and the wood is black and still"]*40
pytestmark = pytest.mark.usefixtures("quick")

def noisy(model):
    "With random numbers in all places, so that no norm or bias is at its beginning."
    torch.manual_seed(1)
    for x in model.parameters(): x.data += torch.randn(x.shape)*0.2
    return model

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Small models of several families, most of them with a tokenizer; nobody writes into them."
    home, tok = tmp_path_factory.mktemp("made"), train_tokenizer(TEXT, 290)
    sentinels = train_tokenizer(TEXT, 300, extra=[f"<extra_id_{i}>" for i in range(30)])
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20, pad_token_id=tok.pad_token_id,
                bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, vocab_size=len(tok) + 5)
    llama, seq = size | dict(num_key_value_heads=1), dict(vocab_size=len(sentinels), d_model=16, pad_token_id=tok.pad_token_id, decoder_start_token_id=tok.pad_token_id)
    bart = dict(encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=30)
    t5 = dict(d_kv=8, d_ff=24, num_layers=1, num_heads=2, eos_token_id=tok.eos_token_id)
    for name, model in {"llama": LlamaForCausalLM(LlamaConfig(**llama)), "bert": BertForMaskedLM(BertConfig(**size)), "plain": BertModel(BertConfig(**size)),
                        "both": BertForPreTraining(BertConfig(**size)), "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=2, n_head=2, n_positions=70)),
                        "mixtral": MixtralForCausalLM(MixtralConfig(**llama, num_local_experts=2)), "bart": BartForConditionalGeneration(BartConfig(**seq | bart)),
                        "t5": T5ForConditionalGeneration(T5Config(**seq | t5))}.items():
        save(noisy(model), tok if "seq" not in name and name not in ("bart", "t5") else sentinels, home/name, Card(name, "scratch", cost={"tokens": 7}))
    for name, of in (("bare", "llama"), ("quantised", "llama"), ("stranger", "llama")): shutil.copytree(home/of, home/name)
    for f in (home/"bare").iterdir():
        if f.name not in ("config.json", "model.safetensors"): f.unlink()
    for name, more in (("quantised", dict(quantization_config={"quant_method": "gptq", "bits": 4})), ("stranger", dict(model_type="rwkv", architectures=["RwkvForCausalLM"]))):
        config = json.loads((home/name/"config.json").read_text()); (home/name/"config.json").write_text(json.dumps(config | more))
    (home/"nothing").mkdir(); (home/"text.txt").write_text("\n\n".join(TEXT)); (home/"short.txt").write_text("moon")
    return home

@pytest.fixture
def here(tmp_path, monkeypatch, made):
    "A folder of one's own with links to all of them."
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("HF_HUB_OFFLINE", "1"); monkeypatch.setenv("SEQWARM_CACHE", str(made/"cache"))
    (tmp_path/"tmp").mkdir(); monkeypatch.setenv("TMPDIR", str(tmp_path/"tmp")); monkeypatch.setattr("tempfile.tempdir", None)
    for f in made.iterdir(): os.symlink(f, f.name)
    return tmp_path

def listing(folder: Path) -> set[str]: return {str(p.relative_to(folder)) for p in folder.rglob("*")}

def beside_the_bar(err: str) -> str:
    "What is said besides the bar of a text that is read, which shows itself where that takes long."
    return err.split("\r")[-1]

def refused(here: Path, capsys, *words: str) -> str:
    "The one line on stderr; exit code 2, and no file more or less."
    before = listing(here)
    assert main(list(words)) == 2
    out, err = capsys.readouterr(); err = beside_the_bar(err)
    assert err.startswith("seqwarm: ") and err.count("\n") == 1 and len(err) < 500 and not out, err
    assert listing(here) == before
    return err

def done(capsys, *words: str) -> tuple[list[str], dict]:
    "What a command says, and its receipt if it wrote one."
    assert main(list(words)) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert not beside_the_bar(err)
    receipt = Path(words[2])/"receipt.json"
    return out.splitlines(), json.loads(receipt.read_text()) if receipt.exists() else {}

# ---- what they do ------------------------------------------------------------------------------------------------------------

def test_a_llama_becomes_wider_and_deeper_and_stays_what_it_was(here, capsys):
    said, seen = done(capsys, "grow", "llama", "new/out", "--hidden-size", "32", "--num-layers", "4", "--depth", "identity", "--check", "--text", "text:text.txt")
    source, big = Checkpoint("llama"), Checkpoint("new/out")
    plan = grow(source, 32, layers=4, deep="identity")
    assert set(seen) == {"recipe", "ways", "exact", "to_train", "fingerprint", "largest_logit", "largest_difference", "text", "loss_before", "loss_after"}
    assert seen | dict(recipe="grow", ways=["fpi", "identity"], exact=True, to_train=["@1", "@3"], fingerprint=plan.fingerprint, text="text:text.txt") == seen
    assert 0 < seen["largest_difference"] < 1e-5*seen["largest_logit"] and seen["loss_after"] == pytest.approx(seen["loss_before"], abs=1e-4) and seen["loss_before"] > 1
    assert said[0] == f"LlamaForCausalLM by fpi and identity: 4 layers x 32, {sum(t.size for t in big.layout.stored().values()):,} parameters"
    assert said[1] == "the function is kept" and said[2] == "new, and to be trained: @1, @3" and said[3].startswith("tensors: widen ") and said[-1] == "written to new/out"
    assert f"largest difference: {seen['largest_difference']:.4g}" in said and f"loss after: {seen['loss_after']:.4g}" in said
    write(plan, {"source": source}, "again")
    assert Path("new/out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    model, tok = AutoModelForCausalLM.from_pretrained("new/out"), AutoTokenizer.from_pretrained("new/out")
    given = tok(TEXT[:1], return_tensors="pt")
    with torch.no_grad(): want, got = (m(given.input_ids).logits for m in (AutoModelForCausalLM.from_pretrained("llama"), model))
    assert (want - got).abs().max() < 1e-5*want.abs().max() and tok.get_vocab() == AutoTokenizer.from_pretrained("llama").get_vocab()
    assert AutoModel.from_pretrained("new/out").config.hidden_size == 32 and model.config.num_key_value_heads == 2 and model.generate(**given, max_new_tokens=2).shape[1] > 2
    assert big.card.parents == [source.card.id] and big.card.recipe == "grow" and big.card.ancestors[source.card.id]["cost"] == {"tokens": 7}
    assert listing(here/"tmp") == set()

def test_options_are_those_of_the_call(here, capsys):
    done(capsys, "grow", "llama", "out", "--hidden-size", "32", "--num-heads", "4", "--num-kv-heads", "4", "--intermediate-size", "50", "--num-layers", "3", "--width", "aki", "--depth", "stack",
         "--seed", "3", "--architecture", "LlamaModel")
    source = Checkpoint("llama", "LlamaModel")
    write(grow(source, 32, 4, 4, 50, 3, "aki", "stack", seed=3), {"source": source}, "again")
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes() and not Path("out/receipt.json").exists()

def test_what_is_not_kept_is_said(here, capsys):
    said, seen = done(capsys, "grow", "llama", "out", "--hidden-size", "32", "--num-layers", "3", "--width", "aki", "--check")
    assert not seen["exact"] and seen["largest_difference"] > 0.01*seen["largest_logit"] and "loss_before" not in seen
    assert said[1] == "the function is not kept: new units come from the layer above; layers were added that do something, moved or left out (identity adds layers that at first do nothing)"
    said, seen = done(capsys, "grow", "llama", "other", "--num-layers", "3", "--depth", "stack", "--check")
    assert said[1] == "the function is not kept: layers were added that do something, moved or left out (identity adds layers that at first do nothing)" and seen["to_train"] == ["@2"] and seen["ways"] == ["stack"]

KINDS = {   # what is typed -> the words of its text's loss must be there
    ("bert", "--hidden-size", "32", "--width", "fpi"): True, ("bert", "--intermediate-size", "40"): True, ("both", "--hidden-size", "32"): False, ("plain", "--hidden-size", "32"): False,
    ("gpt2", "--hidden-size", "24", "--width", "lemon", "--num-heads", "3"): True, ("bare", "--num-layers", "3", "--depth", "identity"): False,
    ("bart", "--hidden-size", "32"): True, ("t5", "--hidden-size", "24", "--width", "lemon"): True, ("mixtral", "--num-layers", "3", "--depth", "identity"): True}

@pytest.mark.parametrize("typed", KINDS, ids=" ".join)
def test_each_kind_of_model_is_checked(here, capsys, typed):
    of, *options = typed
    asks = ["--text", "text:text.txt"] if KINDS[typed] else []
    _, seen = done(capsys, "grow", of, "out", *options, "--check", *asks)
    assert seen["exact"]
    if of == "plain": assert seen["measured"].startswith("nothing")
    else: assert seen["largest_difference"] < 1e-4*seen["largest_logit"] > 0
    if asks: assert seen["loss_after"] == pytest.approx(seen["loss_before"], abs=2e-4) and seen["loss_before"] > 0.5
    loaded = AutoModel.from_pretrained("out", output_loading_info=True)[1] if of == "plain" else {"missing_keys": []}
    assert not loaded["missing_keys"] and Path("out/tokenizer.json").exists() == (of != "bare")

def test_an_order_is_written_as_ranges(here, capsys):
    said, _ = done(capsys, "grow", "gpt2", "out", "--order", "0-1, 1,0 - 1")
    new, old = Checkpoint("out"), Checkpoint("gpt2")
    assert new.layout.layers == {"": 5} and new.card.plan["notes"]["layers"] == {"": [0, 1, 1, 0, 1]} and said[2] == "new, and to be trained: @2, @3, @4"
    for i, k in enumerate([0, 1, 1, 0, 1]): assert torch.equal(new.read(f"transformer.h.{i}.mlp.c_fc.weight"), old.read(f"transformer.h.{k}.mlp.c_fc.weight"))

def test_a_model_with_experts(here, capsys):
    said, seen = done(capsys, "upcycle", "llama", "out", "--experts", "4", "--check", "--text", "text:text.txt")
    assert said[0].startswith("MixtralForCausalLM by 4 experts, 2 a token: 2 layers x 16, ") and said[1] == "the function is kept" and said[2] == "new, and to be trained: router"
    assert (seen["recipe"], seen["exact"], seen["to_train"]) == ("upcycle", True, ["router"]) and seen["largest_difference"] < 1e-5*seen["largest_logit"]
    assert seen["loss_after"] == pytest.approx(seen["loss_before"], abs=1e-4)
    assert AutoModelForCausalLM.from_pretrained("out").config.num_local_experts == 4 and AutoTokenizer.from_pretrained("out") and Checkpoint("out").card.parents == [Checkpoint("llama").card.id]
    done(capsys, "upcycle", "llama", "fine", "--experts", "2", "--top-k", "1", "--family", "qwen2_moe", "--fine", "2", "--every", "2", "--noise", "0.1", "--seed", "5")
    source = Checkpoint("llama")
    write(upcycle(source, 2, 1, "qwen2_moe", every=2, fine=2, noise=0.1, seed=5), {"source": source}, "again")
    assert Path("fine/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()
    said, seen = done(capsys, "upcycle", "t5", "switch", "--experts", "2", "--top-k", "1", "--check", "--text", "text:text.txt")
    assert not seen["exact"] and "the function is not kept: about the dense model's" in said[1] and seen["loss_after"] == pytest.approx(seen["loss_before"], rel=0.05)

def test_a_dry_run_prints_the_same_and_writes_nothing(here, capsys):
    before = listing(here)
    for words in (("grow", "llama", "--num-layers", "3"), ("upcycle", "llama")):
        plain, _ = done(capsys, words[0], words[1], "--dry-run", *words[2:])
        assert done(capsys, words[0], words[1], "out", "--dry-run", "--check", *words[2:])[0] == plain and listing(here) == before
        assert done(capsys, words[0], words[1], words[0], *words[2:])[0][:-1] == plain
        shutil.rmtree(words[0])

# ---- mistakes ----------------------------------------------------------------------------------------------------------------

TYPED = {   # what is typed -> what the line says
    "grow": "Missing argument", "grow llama": "no folder is named to write to; add OUT, or --dry-run", "grow llama out more": "unexpected extra argument", "grow llama out": "nothing is to grow; give a hidden size",
    "grow llama bert --num-layers 3": "bert exists; choose another place or remove it", "grow ./nowhere out --num-layers 3": "./nowhere is not a folder", "grow nothing out --num-layers 3": "config.json",
    "grow llama out --hidden-size 8": "the hidden size 8 is below the 16 that there are, and growth only adds; give at least 16", "grow llama out --num-heads 1": "give at least 2",
    "grow llama out --intermediate-size 20": "give at least 24", "grow llama out --num-layers 1": "growing makes none fewer", "grow llama out --num-layers 2": "has 2 layers already; give a larger number",
    "grow llama out --hidden-size many": "Invalid value for '--hidden-size'", "grow llama out --num-layers 0": "the number of layers cannot be 0",
    "grow llama out --hidden-size 20": "a hidden size of 20 cannot be cut into heads of 8; give 16 or 24", "grow gpt2 out --hidden-size 33": "give 32 or 40",
    "grow llama out --num-heads 3": "a llama of the hidden size 16 cannot have 3 heads, which do not divide it; give 2 or 4 heads, or a hidden size of 18",
    "grow bert out --num-heads 3": "as bert wants it; give 2 heads, or a hidden size of 24", "grow bert out --num-kv-heads 2": "the number of key-value heads of a bert cannot be chosen; leave it out",
    "grow llama out --num-heads 4 --num-kv-heads 3": "4 heads cannot share 3 key-value heads; give 3 or 6 heads, or 2 or 4 for keys and values",
    "grow bert out --hidden-size 32 --width lemon": "(post-norm), so no unit stays silent; take fpi with a multiple of 16, which is exact", "grow gpt2 out --hidden-size 32 --width zero": "lemon may do",
    "grow bert out --num-layers 3 --depth identity": "take 'interpolate' or 'stack'", "grow bart out --num-layers 3 --depth identity": "take 'interpolate' or 'stack'",
    "grow quantised out --num-layers 3": "quantised is quantised", "grow stranger out --num-layers 3": "there is no family 'rwkv'", "grow bert out --num-layers 3 --architecture BertModle": "did you mean 'BertModel'?",
    "grow llama out --order 0,2": "there is no layer 2: LlamaForCausalLM has 2; name layers from 0 to 1", "grow llama out --order 1-0": "'1-0' is no order of layers; write it as 0-11,4-15",
    "grow llama out --order two": "'two' is no order of layers", "grow llama out --order 0,,1": "is no order of layers", "grow llama out --order 0-99999999999": "is no order of layers",
    "grow llama out --order 0-1 --num-layers 4": "give one of the two", "grow llama out --hidden-size 32 --width fpii": "did you mean 'fpi'?", "grow llama out --num-layers 3 --width fpii": "did you mean 'fpi'?",
    "grow llama out --num-layers 3 --depth stak": "did you mean 'stack'?", "grow llama out --hidden-size 32 --depth stak": "did you mean 'stack'?", "grow llama out --num-layers 3 --seed -1": "seed cannot be -1",
    "grow llama out --num-layers 3 --text text:text.txt": "nothing is to be checked on it; add --check", "grow llama out --num-layers 3 --check --text text:none.txt": "none.txt",
    "grow llama out --num-layers 3 --check --text txt:text.txt": "there is no corpus 'txt:text.txt'", "grow llama out --num-layers 3 --check --text text:short.txt": "shorter than one sequence of 64 tokens",
    "grow bare out --num-layers 3 --check --text text:text.txt": "bare holds no tokenizer", "grow plain out --hidden-size 32 --check --text text:text.txt": "leave the text out",
    "grow both out --hidden-size 32 --check --text text:text.txt": "leave the text out", "grow mixtral out --hidden-size 32": "mixtral has experts; make the dense model wider, and upcycle it then",
    "upcycle": "Missing argument", "upcycle llama": "no folder is named", "upcycle llama out --experts 1": "experts cannot be 1", "upcycle llama out --experts 2 --top-k 3": "give a top_k of at most 2",
    "upcycle bert out": "no sparse family here computes what a bert does", "upcycle mixtral out": "is sparse already", "upcycle llama out --family mixtrel": "did you mean 'mixtral'?",
    "upcycle llama out --fine 5": "cannot be cut into 5 pieces", "upcycle llama out --every 2": "the nearest is every=1", "upcycle llama out --noise -1": "noise cannot be -1", "upcycle t5 out": "give top_k=1",
    "upcycle llama bert": "bert exists", "upcycle llama out --seed -1": "seed cannot be -1", "upcycle llama out --text text:text.txt": "add --check", "upcycle quantised out": "quantised"}

@pytest.mark.parametrize("typed", TYPED)
def test_a_mistake_is_one_line(here, capsys, typed): assert TYPED[typed] in refused(here, capsys, *typed.split())

def test_a_name_that_is_empty(here, capsys):
    for command in ("grow", "upcycle"):
        assert "the name of the source is empty" in refused(here, capsys, command, "", "out") and "cannot name a folder" in refused(here, capsys, command, "llama", "")
    assert "is no order of layers" in refused(here, capsys, "grow", "llama", "out", "--order", "") and refused(here, capsys, "grow", "llama", "out", "--num-layers", "3", "--check", "--text", "")

def test_two_models_in_one(here, capsys):
    assert main(["graft", "bert", "pair", "--family", "encoder-decoder"]) == 0
    capsys.readouterr()
    for size in ("--hidden-size", "--num-layers"): assert "is two models in one; grow each of them, and graft them anew" in refused(here, capsys, "grow", "pair", "out", size, "32")

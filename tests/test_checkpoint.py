"Checkpoints: the same bits by every path, refusals for what is broken, nothing half-written."
import json
import pytest, torch
import transformers as hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from seqwarm.core.checkpoint import Card, Checkpoint, finite
from seqwarm.core.errors import Refusal
from seqwarm.core.plan import Plan, Row
from seqwarm.core.vocab import load_tokenizer, train_tokenizer
from seqwarm.core.write import build, save, write

def gpt2(tied=True): return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied))
def llama(tied=False): return LlamaForCausalLM(LlamaConfig(vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied))
def bert(tied=True): return BertForMaskedLM(BertConfig(vocab_size=17, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16))
def t5(tied=True): return T5ForConditionalGeneration(T5Config(vocab_size=17, d_model=8, d_ff=12, d_kv=4, num_layers=1, num_heads=2, decoder_start_token_id=0))

def copies(c, **kw): return Plan("copy", c.config, c.architecture, [Row(n, "copy", f"s:{n}") for n in c.names], untied=c.untied, **kw)

@pytest.mark.parametrize("make,dtype", [(gpt2, torch.float32), (lambda: gpt2(False), torch.float16), (llama, torch.bfloat16),
                                        (lambda: llama(True), torch.float32), (bert, torch.float32), (t5, torch.float32)])
def test_every_path_gives_the_same_bits(make, dtype, tmp_path):
    model = make().to(dtype).eval()
    c = save(model, None, tmp_path/"a", Card("a", "scratch"))
    assert set(c.names) == set(load_file(tmp_path/"a"/"model.safetensors")) and all(c.dtype(n) == dtype for n in c.names)
    out = write(copies(c), {"s": c}, tmp_path/"b", shard=600)
    loaded = type(model).from_pretrained(tmp_path/"b").eval()
    built, state = build(copies(c), {"s": c}), model.state_dict()
    assert set(loaded.state_dict()) == set(built.state_dict()) == set(state)
    for n, x in state.items():
        for other in loaded, built: assert torch.equal(other.state_dict()[n], x) and other.state_dict()[n].dtype == dtype, n
    for n in out.names: assert torch.equal(out.read(n), state[n]) and out.shape(n) == tuple(state[n].shape)
    inputs = dict(input_ids=torch.arange(8)[None]) | ({"decoder_input_ids": torch.arange(4)[None]} if make is t5 else {})
    with torch.no_grad(): want, got, mem = (m(**inputs).logits for m in (model, loaded, built))
    assert torch.equal(want, got) and torch.equal(want, mem)  # buffers (rotary, position ids) are right too

def test_shards_are_bounded_and_indexed(tmp_path):
    c = save(gpt2(), None, tmp_path/"a", Card("a", "scratch"))
    write(copies(c), {"s": c}, tmp_path/"b", shard=1500)
    files = sorted((tmp_path/"b").glob("model-*.safetensors"))
    assert len(files) > 3 and all(f.name.endswith(f"of-{len(files):05}.safetensors") for f in files)
    for f in files:
        held = load_file(f)
        assert len(held) == 1 or sum(x.numel()*4 for x in held.values()) <= 1500
    index = json.loads((tmp_path/"b"/"model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(c.names) and index["metadata"]["total_size"] == sum(c.read(n).numel()*4 for n in c.names)

def test_beside_the_weights(tmp_path):
    tok = train_tokenizer(["a small text"]*3, 280)
    c = save(gpt2(), tok, tmp_path/"a", Card("a", "scratch", cost={"tokens": 7}))
    plan = copies(c, generation={"eos_token_id": 1, "bos_token_id": 0, "max_new_tokens": 3})
    out = write(plan, {"s": c}, tmp_path/"b", tokenizer=tok)
    assert Plan.load(tmp_path/"b").rows == plan.rows and load_tokenizer(tmp_path/"b").get_vocab() == tok.get_vocab()
    assert out.generation["max_new_tokens"] == 3 and AutoModelForCausalLM.from_pretrained(tmp_path/"b").generation_config.max_new_tokens == 3
    assert out.card.parents == [c.card.id] and out.card.ancestors[c.card.id]["cost"] == {"tokens": 7} and out.card.plan["recipe"] == "copy"
    assert out.card.id != c.card.id and c.card.id and out.config["vocab_size"] == 17

def test_card_ids_follow_the_bits(tmp_path):
    torch.manual_seed(0); m = gpt2()
    a, b = (save(m, None, tmp_path/n, Card(n, "scratch")).card.id for n in "ab")
    with torch.no_grad(): m.transformer.wte.weight[0, 0] += 1
    assert a == b != save(m, None, tmp_path/"c", Card("c", "scratch")).card.id
    (tmp_path/"a"/"seqwarm.json").unlink()
    assert Checkpoint(tmp_path/"a").card.recipe == "found" and Checkpoint(tmp_path/"a").card.parents == []

def rename(folder, f):
    held = load_file(folder/"model.safetensors")
    save_file({f(n): x for n, x in held.items()}, folder/"model.safetensors", metadata={"format": "pt"})

def test_names_of_old_files(tmp_path):
    m = bert(); c = save(m, None, tmp_path/"a", Card("a", "scratch"))
    rename(tmp_path/"a", lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
    again = Checkpoint(tmp_path/"a")
    assert again.names == c.names and all(torch.equal(again.read(n), m.state_dict()[n]) for n in again.names)
    g = gpt2(); save(g, None, tmp_path/"g", Card("g", "scratch"))
    rename(tmp_path/"g", lambda n: n.removeprefix("transformer."))
    again = Checkpoint(tmp_path/"g")
    assert all(torch.equal(again.read(n), g.state_dict()[n]) for n in again.names) and "transformer.wte.weight" in again.names

def test_a_tied_head_stored_or_on_its_own(tmp_path):
    save(gpt2(), None, tmp_path/"a", Card("a", "scratch"))
    held = load_file(tmp_path/"a"/"model.safetensors")
    save_file(held | {"lm_head.weight": held["transformer.wte.weight"].clone()}, tmp_path/"a"/"model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" not in Checkpoint(tmp_path/"a").names
    save_file(held | {"lm_head.weight": held["transformer.wte.weight"] + 1}, tmp_path/"a"/"model.safetensors", metadata={"format": "pt"})
    own = Checkpoint(tmp_path/"a")
    assert own.untied == ["lm_head.weight"] and "lm_head.weight" in own.names

def edit(folder, **kw): (folder/"config.json").write_text(json.dumps(json.loads((folder/"config.json").read_text()) | kw))

def drop_shard(p): sorted(p.glob("model-*"))[1].unlink()
def cut_shard(p): f = sorted(p.glob("model-*"))[1]; f.write_bytes(f.read_bytes()[:-3])
def cut_header(p): f = sorted(p.glob("model-*"))[1]; f.write_bytes(f.read_bytes()[:20])
def noise(p): sorted(p.glob("model-*"))[1].write_bytes(b"version https://git-lfs.github.com/spec/v1")
def reindex(p, change):
    i = p/"model.safetensors.index.json"; d = json.loads(i.read_text()); change(d["weight_map"]); i.write_text(json.dumps(d))
def absent(p): reindex(p, lambda w: w.update({max(w, key=w.get): min(w.values())}))
def rehead(p, change):
    "Change the header of the first shard, keeping its length."
    f = min(p.glob("model-*")); raw = f.read_bytes(); n = int.from_bytes(raw[:8], "little"); head = json.loads(raw[8:8+n]); change(list(head.values())[1:], head)
    text = json.dumps(head, separators=(",", ":")).encode(); assert len(text) <= n, "no room"
    f.write_bytes(raw[:8] + text.ljust(n) + raw[8+n:])
def swapped(t, head): t[0]["data_offsets"], t[1]["data_offsets"] = t[1]["data_offsets"], t[0]["data_offsets"]
def overlapping(t, head): t[1]["data_offsets"] = t[0]["data_offsets"]
def gap(t, head): t[0]["data_offsets"][1] -= 4
def wide(t, head): t[0]["dtype"] = "F64"
def odd(t, head): t[0]["dtype"] = "F4"
def negative(t, head): t[0]["data_offsets"] = [-4, t[0]["data_offsets"][1] - 4]
def wordy(t, head): t[0]["data_offsets"] = ["0", "4"]
def pickled(p):
    for f in p.glob("model*"): f.unlink()
    (p/"pytorch_model.bin").write_bytes(b"x")
def lost(p): reindex(p, lambda w: w.pop("transformer.ln_f.bias"))

@pytest.mark.parametrize("spoil,words", [
    (drop_shard, "lacks the shard"), (cut_shard, "is damaged"), (cut_header, "not a safetensors file"), (noise, "not a safetensors file"),
    (absent, "which does not hold it"), (pickled, "pickled weights only.*convert"), (lost, "lacks transformer.ln_f.bias"),
    *((lambda p, bad=bad: reindex(p, lambda w: w.update({max(w): bad})), "no file of this folder")
      for bad in ("../a/model.safetensors", "/etc/passwd", "..", "", 3, None)),
    (lambda p: (p/"model.safetensors.index.json").write_text('{"weight_map": ["x"]}'), "has no weight_map"),
    *((lambda p, f=f: rehead(p, f), words) for f, words in [(swapped, "is damaged: .* should lie"), (overlapping, "is damaged"), (gap, "is damaged"),
        (wide, "is damaged"), (odd, "dtype F4"), (negative, "is damaged"), (wordy, "not a safetensors file")]),
    (lambda p: edit(p, n_embd=16), "has the shape"), (lambda p: edit(p, model_type="gtp2"), "did you mean 'gpt2'"),
    (lambda p: edit(p, model_type="mine", auto_map={"AutoModel": "x.Y"}), "code of its own"),
    (lambda p: (p/"config.json").write_text("{"), "cannot be read as JSON"), (lambda p: (p/"config.json").unlink(), "holds no config.json"),
])
def test_broken_checkpoints_are_refused(spoil, words, tmp_path):
    c = save(gpt2(), None, tmp_path/"a", Card("a", "scratch"))
    write(copies(c), {"s": c}, tmp_path/"b", shard=1500)
    spoil(tmp_path/"b")
    with pytest.raises(Refusal, match=words) as e: Checkpoint(tmp_path/"b")
    assert "\n" not in str(e.value)

@pytest.mark.parametrize("call", [Checkpoint, load_tokenizer], ids=["checkpoint", "tokenizer"])
def test_what_is_no_path_is_refused(call):
    for thing, kind in ((None, "NoneType"), (gpt2(), "GPT2LMHeadModel"), (3, "int")):
        with pytest.raises(Refusal, match=f"a {kind}; give"): call(thing)

def test_nothing_is_left_behind(tmp_path):
    c = save(gpt2(), None, tmp_path/"a", Card("a", "scratch"))
    (tmp_path/"there").mkdir()
    with pytest.raises(Refusal, match="exists"): write(copies(c), {"s": c}, tmp_path/"there")
    class Bad:
        names, shape, dtype = c.names, staticmethod(c.shape), staticmethod(c.dtype)
        def read(self, n):
            if n == c.names[-1]: raise Refusal("the disk broke")
            return c.read(n)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refusal, match="broke"): write(copies(c), {"s": Bad()}, tmp_path/"out", shard=1000)
    with pytest.raises(Refusal, match="explain"): write(Plan("x", c.config, c.architecture, []), {"s": c}, tmp_path/"out")
    assert sorted(tmp_path.rglob("*")) == before

def test_not_finite_and_not_there(tmp_path, monkeypatch):
    m = gpt2()
    with torch.no_grad(): m.transformer.wte.weight[3, 2] = float("nan")
    c = save(m, None, tmp_path/"a", Card("a", "scratch"))
    with pytest.raises(Refusal, match="transformer.wte.weight in .*/a/model.safetensors holds NaN or infinity"): c.read("transformer.wte.weight", finite=True)
    with pytest.raises(Refusal, match="NaN or infinity"): list(c.pieces("transformer.wte.weight", finite=True))
    with pytest.raises(Refusal, match="has no tensor x"): c.read("x")
    with pytest.raises(Refusal, match="is not a folder"): Checkpoint(tmp_path/"nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refusal, match="the hub does not give it"): Checkpoint("nobody-here/no-such-model")

def test_pieces_are_the_tensor(tmp_path, monkeypatch):
    import seqwarm.core.checkpoint as mod
    monkeypatch.setattr(mod, "_PIECE", 64)
    for dtype in torch.float32, torch.bfloat16:
        c = save(gpt2().to(dtype), None, tmp_path/str(dtype), Card("a", "scratch"))
        for n in c.names:
            parts = [x.clone() for x in c.pieces(n)]
            assert all(x.dtype == dtype and x.nbytes <= 64 for x in parts) and torch.equal(torch.cat(parts), c.read(n).flatten())
    f = tmp_path/str(dtype)/"model.safetensors"
    f.write_bytes(f.read_bytes()[:-1000])   # cut after it was opened
    with pytest.raises(Refusal, match="is damaged: it ends at byte"): [list(c.pieces(n)) for n in c.names]

def test_tied_tensors_are_compared_to_the_last_piece(tmp_path, monkeypatch):
    import seqwarm.core.checkpoint as mod
    monkeypatch.setattr(mod, "_PIECE", 64)
    save(gpt2(), None, tmp_path/"a", Card("a", "scratch"))
    held = load_file(tmp_path/"a"/"model.safetensors")
    for change, own in [(lambda x: x, []), (lambda x: x.half(), ["lm_head.weight"]), (lambda x: (x[-1, -1].add_(1), x)[1], ["lm_head.weight"])]:
        save_file(held | {"lm_head.weight": change(held["transformer.wte.weight"].clone())}, tmp_path/"a"/"model.safetensors", metadata={"format": "pt"})
        assert Checkpoint(tmp_path/"a").untied == own

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_is_isfinite(dtype):
    "Every bit pattern of 16, and of the upper 16 of the wider ones; then one bad number anywhere in many."
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    bits = torch.arange(-32768, 32768).to(whole) << 8*(dtype.itemsize - 2)
    for low in (0, 1) if dtype.itemsize > 2 else (0,):
        x = (bits | low).view(dtype)
        bad = ~torch.isfinite(x)
        assert bad.any() and finite(x[~bad])
        for one in x[bad][:: max(1, int(bad.sum())//40)]: assert not finite(one) and not finite(torch.stack([x[~bad][0], one]))
    many = torch.zeros(700_001, dtype=dtype)
    for i in (0, 131_071, 131_072, 262_144, 700_000): many[i] = float("-inf"); assert not finite(many); many[i] = 0
    assert finite(many) and finite(torch.arange(5)) and finite(torch.zeros(0, dtype=dtype)) and not finite(torch.full((3, 4), float("nan"), dtype=dtype).T)

def test_generation_of_old_checkpoints_stands_in_their_config(tmp_path):
    "Before there was a generation_config.json, the settings lay in config.json; ids of tokens come with them."
    model = hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=30, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                                                          decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=16))
    model.save_pretrained(tmp_path); (tmp_path/"generation_config.json").unlink()
    assert Checkpoint(tmp_path).generation is None
    config = json.loads((tmp_path/"config.json").read_text())
    (tmp_path/"config.json").write_text(json.dumps(config | dict(num_beams=4, no_repeat_ngram_size=3, max_length=142)))
    found = Checkpoint(tmp_path).generation
    assert {k: found[k] for k in ("num_beams", "no_repeat_ngram_size", "max_length")} == dict(num_beams=4, no_repeat_ngram_size=3, max_length=142)
    assert found["eos_token_id"] == model.config.eos_token_id and "vocab_size" not in found

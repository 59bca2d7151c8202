"""Grafts and what comes out of them, against transformers' own forward, initialisation and loading, on tiny models whose every number matters."""
import json, shutil
import pytest, torch, transformers as hf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.write import build, save
from seqwarm.methods.graft import NATIVE, Origin, carry_out, extract, graft, told

hf.logging.set_verbosity_error(); hf.logging.disable_progress_bar(); torch.set_num_threads(1)
V, D, L, LENGTH = 40, 16, 4, 12
SIZES = dict(vocab_size=V, hidden_size=D, num_hidden_layers=L, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20,
             layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0, eos_token_id=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
T5 = dict(vocab_size=V, d_model=D, d_kv=6, d_ff=24, num_layers=L, num_heads=2, dropout_rate=0.0, relative_attention_num_buckets=8, relative_attention_max_distance=9)
ENCODERS = {   # config, how its classes begin, what differs from SIZES
    "bert": (hf.BertConfig, "Bert", dict(pad_token_id=0, bos_token_id=3)), "roberta": (hf.RobertaConfig, "Roberta", dict(type_vocab_size=1)),
    "roberta, pad 3": (hf.RobertaConfig, "Roberta", dict(pad_token_id=3)), "xlm-roberta": (hf.XLMRobertaConfig, "XLMRoberta", {}),
    "electra": (hf.ElectraConfig, "Electra", dict(embedding_size=D)), "roberta-prelayernorm": (hf.RobertaPreLayerNormConfig, "RobertaPreLayerNorm", {}),
    "xlm-roberta-xl": (hf.XLMRobertaXLConfig, "XLMRobertaXL", {}), "t5": (hf.T5Config, "T5", None),
    "mt5": (hf.MT5Config, "MT5", dict(feed_forward_proj="gated-gelu")),
    "electra, narrow": (hf.ElectraConfig, "Electra", dict(embedding_size=6)), "mpnet": (hf.MPNetConfig, "MPNet", {}),
    "deberta-v2": (hf.DebertaV2Config, "DebertaV2", dict(pad_token_id=0)),
    "modernbert": (hf.ModernBertConfig, "ModernBert", dict(pad_token_id=1, cls_token_id=0, sep_token_id=2, global_attn_every_n_layers=2, local_attention=4, attn_implementation="eager"))}
EXACT = [k for k in ENCODERS if k.split(",")[0] in NATIVE and "narrow" not in k]

pytestmark = pytest.mark.usefixtures("quick")

def random(model: torch.nn.Module) -> torch.nn.Module:
    "No number is left that is zero, one or small by its first draw."
    with torch.no_grad():
        for n, p in model.named_parameters(): p.normal_(1.0 if "norm" in n.lower() and p.dim() == 1 and n.endswith("weight") else 0.0, 0.25)
    return model.eval()

def encoder(kind: str, folder, end: str = "Model", dtype=torch.float64, seed: int = 0, tokenizer=None, **config) -> Checkpoint:
    "A tiny encoder of random numbers, saved."
    make, begin, own = ENCODERS[kind]
    given = (T5 | (own or {}) if make in (hf.T5Config, hf.MT5Config) else SIZES | own) | config
    if begin in ("T5", "MT5") and end == "Model": end = "EncoderModel"
    torch.manual_seed(seed)
    return save(random(getattr(hf, begin + end)(make(**given))).to(dtype), tokenizer, folder, Card(kind, "scratch", cost={"tokens": 5}))

def batch(pad: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    "Three texts of 12, 7 and 4 tokens, and their mask."
    ids, mask = torch.randint(4, V, (3, LENGTH), generator=torch.Generator().manual_seed(3)), torch.ones(3, LENGTH, dtype=torch.long)
    for row, n in ((1, 7), (2, 4)): mask[row, slice(0, LENGTH - n) if left else slice(n, None)] = 0
    return torch.where(mask.bool(), ids, pad), mask

def states(model, ids, mask) -> torch.Tensor:
    "(real tokens, D): the last hidden states."
    with torch.no_grad(): return model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]

def both(old: Checkpoint, new: Checkpoint, dtype, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    "Hidden states of an encoder and of its graft, each as transformers loads it."
    ids, mask = batch(old.config.get("pad_token_id") or 0, left)
    load = hf.AutoModelForTextEncoding if old.config["model_type"] in ("t5", "mt5") else hf.AutoModel
    return (states(load.from_pretrained(old.path, dtype=dtype), ids, mask),
            states(hf.AutoModelForSeq2SeqLM.from_pretrained(new.path, dtype=dtype).get_encoder(), ids, mask))

def put(enc: Checkpoint, out, **how) -> Checkpoint: return carry_out(graft(enc, **how), enc, out)

# ---- the encoder stays what it is --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype,most", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", EXACT)
def test_hidden_states_of_a_native_pair(tmp_path, kind, dtype, most):
    enc = encoder(kind, tmp_path/"e", dtype=dtype)
    new = put(enc, tmp_path/"g", layers=1)
    assert new.config["model_type"] == NATIVE[kind.split(",")[0]] and new.dtype(new.layout.one("embed.token").name) == dtype
    was, now = both(enc, new, dtype)
    assert was.std() > 0.1 and (was - now).abs().max() < most*max(1, was.abs().max())
    if kind in ("bert", "electra", "t5", "mt5"):   # the others count positions from what is not padding
        was, now = both(enc, new, dtype, left=True)
        assert (was - now).abs().max() < most*max(1, was.abs().max())

@pytest.mark.parametrize("kind", [k for k in ENCODERS if "t5" not in k])
def test_hidden_states_of_any_encoder_within_an_encoder_decoder(tmp_path, kind):
    enc = encoder(kind, tmp_path/"e", **({"layer_norm_eps": 1e-12} if kind != "modernbert" else {}))
    plan = graft(enc, layers=1)                                                       # the default, since the native one is not exact
    new = carry_out(plan, enc, tmp_path/"g")
    assert new.architecture == "EncoderDecoderModel" and any("the encoder's own" in line for line in told(plan))
    for left in (False, True):
        was, now = both(enc, new, torch.float64, left)
        assert was.std() > 0.1 and (was - now).abs().max() < 1e-10

@pytest.mark.parametrize("kind", ["bert", "roberta-prelayernorm"])
def test_another_epsilon_by_request_only_and_said(tmp_path, kind):
    enc = encoder(kind, tmp_path/"e", layer_norm_eps=1e-12)
    plan = graft(enc, family=NATIVE[kind])
    was, now = both(enc, carry_out(plan, enc, tmp_path/"g"), torch.float64)
    assert 1e-7 < (was - now).abs().max() < 1e-2
    assert any("about 1e-4" in line and "1e-12" in line and "1e-05" in line for line in told(plan))
    assert not any("1e-4" in line for line in told(graft(enc)))

# ---- it is a seq2seq model ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind,family", [(k, None) for k in EXACT] + [("bert", "encoder-decoder"), ("electra, narrow", None), ("modernbert", None)])
def test_it_loads_generates_and_trains(tmp_path, kind, family):
    enc = encoder(kind, tmp_path/"e", dtype=torch.float32)
    new = put(enc, tmp_path/"g", family=family, layers=2)
    model, info = hf.AutoModelForSeq2SeqLM.from_pretrained(new.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids, mask = batch(model.config.pad_token_id)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert out.shape[0] == 3 and 2 <= out.shape[1] <= 5 and (out[:, 0] == model.config.decoder_start_token_id).all()
    model.train()
    rates, losses = torch.optim.SGD(model.parameters(), 0.05), []
    for _ in range(2):
        loss = model(input_ids=ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss
        losses.append(loss.item()); rates.zero_grad(); loss.backward(); rates.step()
    assert losses[1] < losses[0]
    idle = [n for n, p in model.named_parameters() if p.grad is None and "pooler" not in n]
    assert not idle, "a part that nothing reaches"

def test_built_in_memory_and_written_are_the_same(tmp_path):
    enc = encoder("bert", tmp_path/"e")
    plan = graft(enc, decoder="copy", layers=2, seed=5)
    model, held = build(plan, {"encoder": enc}), load_file(carry_out(plan, enc, tmp_path/"g").path/"model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[n], x) for n, x in held.items()) and plan.summary()["recipe"] == "graft"

def test_ids_come_from_the_tokenizer(tmp_path):
    words = {w: i for i, w in enumerate(["[PAD]", "x", "[CLS]", "[SEP]"])} | {f"w{i}": i for i in range(4, V)}
    tok = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "x")), pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    enc = encoder("bert", tmp_path/"e", tokenizer=tok, bos_token_id=None, eos_token_id=None)
    want = dict(bos_token_id=2, eos_token_id=3, pad_token_id=0)
    for family, start in (("bart", 3), ("encoder-decoder", 2)):
        new = put(enc, tmp_path/family, family=family, layers=1)
        model = hf.AutoModelForSeq2SeqLM.from_pretrained(new.path)
        assert {k: getattr(model.generation_config, k) for k in want} == want and model.config.pad_token_id == 0
        assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == start
        assert hf.AutoTokenizer.from_pretrained(new.path).get_vocab() == tok.get_vocab()
        if family == "bart": assert model.config.bos_token_id == 2 and model.config.forced_eos_token_id is None and not model.config.scale_embedding
    (tmp_path/"bare").mkdir()
    for f in ("config.json", "model.safetensors"): shutil.copy(tmp_path/"e"/f, tmp_path/"bare"/f)
    with pytest.raises(Refusal, match="has no token for a decoder to begin with; put a tokenizer beside it"): graft(Checkpoint(tmp_path/"bare"))

def test_the_encoder_is_the_parent(tmp_path):
    enc = encoder("roberta", tmp_path/"e")
    new = put(enc, tmp_path/"g", layers=1)
    back = carry_out(extract(new), new, tmp_path/"x")
    assert new.card.parents == [enc.card.id] and new.card.recipe == "graft" and new.card.ancestors[enc.card.id]["cost"] == {"tokens": 5}
    assert back.card.parents == [new.card.id] and set(back.card.ancestors) == {enc.card.id, new.card.id} and new.card.plan["notes"]["layers"] == [4, 1]

def test_sizes_and_dropout_go_along(tmp_path):
    enc = encoder("roberta", tmp_path/"e", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, hidden_act="relu", initializer_range=0.07)
    c = hf.AutoConfig.from_pretrained(put(enc, tmp_path/"g", layers=3).path)
    assert (c.dropout, c.attention_dropout, c.activation_dropout, c.activation_function, c.init_std) == (0.2, 0.3, 0.0, "relu", 0.07)
    assert (c.encoder_layers, c.decoder_layers, c.d_model, c.encoder_ffn_dim, c.decoder_ffn_dim, c.encoder_attention_heads) == (4, 3, D, 24, 24, 2)
    assert c.max_position_embeddings == 18 and c.vocab_size == V      # 20 rows, of which the first two are no positions

# ---- where the decoder comes from --------------------------------------------------------------------------------------------

def layers(model) -> tuple[list[dict], list[dict]]:
    "For each layer of encoder and decoder, its blocks as modules."
    if hasattr(model, "decoder") and hasattr(model.config, "decoder") and model.config.model_type == "encoder-decoder":
        decoder = getattr(model.decoder, model.decoder.base_model_prefix)
        return tuple([dict(attn=x.attention, up=x.intermediate, down=x.output) | ({"cross": x.crossattention} if hasattr(x, "crossattention") else {})
                      for x in half.encoder.layer] for half in (model.encoder, decoder))
    if "t5" in model.config.model_type:
        return ([dict(attn=x.layer[0], ffn=x.layer[1]) for x in model.encoder.block],
                [dict(attn=x.layer[0], cross=x.layer[1], ffn=x.layer[2]) for x in model.decoder.block])
    parts = lambda x: dict(attn=x.self_attn, norm=x.self_attn_layer_norm, up=x.fc1, down=x.fc2, last=x.final_layer_norm)
    return ([parts(x) for x in model.model.encoder.layers],
            [parts(x) | dict(cross=x.encoder_attn, crossnorm=x.encoder_attn_layer_norm) for x in model.model.decoder.layers])

def same(a, b) -> bool:
    "Whether two modules hold the same numbers; T5 calls its two attentions by different names, and keeps the positions in the first."
    a, b = ([(n.split(".")[-2:], x) for n, x in m.state_dict().items() if "relative" not in n] for m in (a, b))
    return len(a) == len(b) and all(n == m and torch.equal(x, y) for (n, x), (m, y) in zip(a, b))

def loaded(new: Checkpoint): return hf.AutoModelForSeq2SeqLM.from_pretrained(new.path).double()

SEQ2SEQ = [(k, None) for k in ("bert", "roberta-prelayernorm", "xlm-roberta-xl", "t5", "mt5")] + [("bert", "encoder-decoder"), ("electra", "encoder-decoder")]

@pytest.mark.parametrize("cross", ["random", "attn"])
@pytest.mark.parametrize("kind,family", SEQ2SEQ)
def test_a_copied_decoder(tmp_path, kind, family, cross):
    enc = encoder(kind, tmp_path/"e", "Model" if "t5" in kind else "ForMaskedLM")
    model = loaded(put(enc, tmp_path/"g", family=family, decoder="copy", layers=3, cross=cross))
    old, new = layers(model)
    assert len(new) == 3
    for mine, theirs in zip(new, (old[0], old[2], old[3])):
        assert all(same(mine[k], theirs[k]) for k in theirs)
        assert same(mine["cross"], theirs["attn"]) == (cross == "attn")
        if "crossnorm" in mine: assert same(mine["crossnorm"], theirs["norm"]) == (cross == "attn")
        if cross == "random": assert all(0 < x.abs().mean() < 0.3 for n, x in mine["cross"].state_dict().items() if x.dim() == 2)
    if kind == "bert" and family is None:
        assert same(model.model.decoder.embed_positions, model.model.encoder.embed_positions)
        assert same(model.model.decoder.layernorm_embedding, model.model.encoder.layernorm_embedding)
    if family and kind == "bert": assert same(model.decoder.cls, hf.BertForMaskedLM.from_pretrained(enc.path).cls)
    if kind in ("roberta-prelayernorm", "xlm-roberta-xl"): assert same(model.model.decoder.layer_norm, model.model.encoder.layer_norm)

@pytest.mark.parametrize("kind,family", SEQ2SEQ)
def test_an_interleaved_decoder(tmp_path, kind, family):
    enc = encoder(kind, tmp_path/"e")
    plan = graft(enc, family, "interleave")
    model = loaded(carry_out(plan, enc, tmp_path/"g"))
    old, new = layers(model)
    assert len(new) == L//2
    x = torch.randn(5, D, dtype=torch.float64)
    for i, mine in enumerate(new):
        low, high = old[2*i], old[2*i + 1]
        assert same(mine["attn"], low["attn"]) and same(mine["cross"], high["attn"])
        if "ffn" in mine: assert same(mine["ffn"], high["ffn"]); continue
        if "fc" in str(type(mine["up"])) or isinstance(mine["up"], torch.nn.Linear): net = lambda b: b["down"](torch.nn.functional.gelu(b["up"](x)))
        else: net = lambda b: b["down"].dense(b["up"](x))
        with torch.no_grad(): assert torch.allclose(net(mine), net(low) + net(high), atol=1e-12)
    used = {s for r in plan.rows if plan.layout.tensors[r.target].stack == "decoder" for s in r.sources}
    inside = {f"encoder:{n}": t.role for n, t in enc.layout.stored().items() if t.layer is not None}
    unused = {r for n, r in inside.items() if n not in used}
    if "t5" not in kind: assert unused == {"ffn.norm", "ffn.norm.bias"}     # of the lower layers, whose net has the upper one's norm
    else: assert any(line == "not in the decoder: the feed-forward nets of the layers 0, 2" for line in told(plan))

def test_t5_positions_look_back_as_the_encoders_do(tmp_path):
    model = loaded(put(encoder("t5", tmp_path/"e"), tmp_path/"g", decoder="copy"))
    enc, dec = model.encoder.block[0].layer[0].SelfAttention, model.decoder.block[0].layer[0].SelfAttention
    with torch.no_grad(): a, b = (x.compute_bias(12, 12)[0] for x in (enc, dec))   # heads, query, key
    for far in (0, 1): assert torch.equal(a.diagonal(-far, 1, 2), b.diagonal(-far, 1, 2))     # buckets of one distance
    rows = {tuple(r) for r in enc.relative_attention_bias.weight[:4].tolist()}                # those for what is before
    assert all(tuple(r) in rows for r in dec.relative_attention_bias.weight.tolist())

@pytest.mark.parametrize("kind,family", [("roberta", None), ("roberta-prelayernorm", None), ("xlm-roberta-xl", None), ("t5", None), ("mt5", None),
                                         ("bert", "encoder-decoder"), ("mpnet", None)])
def test_a_random_decoder_is_drawn_as_transformers_draws_it(tmp_path, kind, family):
    wide = dict(d_model=64, d_kv=24, d_ff=96) if "t5" in kind else dict(hidden_size=64, intermediate_size=96, initializer_range=0.05)
    enc = encoder(kind, tmp_path/"e", dtype=torch.float32, **wide)
    new = put(enc, tmp_path/"g", family=family, layers=1)
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(new.path)
    torch.manual_seed(1)
    fresh, seen = hf.AutoModelForSeq2SeqLM.from_config(model.config).state_dict(), 0
    for n, x in model.state_dict().items():
        if not n.startswith(("model.decoder", "decoder", "final_logits")) or "embed_tokens" in n or "word_embeddings" in n or n.endswith("lm_head.decoder.weight"): continue
        if n.endswith("predictions.decoder.weight"): continue                       # tied to the words
        y, seen = fresh[n], seen + 1
        if y.std() == 0 or y.numel() == 1: assert torch.equal(x, y), n
        else: assert 0.75 < x.std()/y.std() < 1.33 and x.mean().abs() < 5*y.std()/y.numel()**0.5 and not torch.equal(x, y), n
    assert seen > 10

def test_the_seed_decides_what_is_drawn(tmp_path):
    enc = encoder("roberta", tmp_path/"e")
    a, b, c = (dict(graft(enc, layers=1, seed=s).apply({"encoder": enc})) for s in (0, 0, 1))
    n = "model.decoder.layers.0.fc1.weight"
    assert all(torch.equal(a[m], b[m]) for m in a) and not torch.equal(a[n], c[n])
    assert not torch.equal(a[n].flatten(), a["model.decoder.layers.0.fc2.weight"].flatten())

def test_words_are_shared_where_the_class_shares_them(tmp_path):
    enc = encoder("roberta", tmp_path/"e")
    bart = loaded(put(enc, tmp_path/"bart"))
    assert bart.lm_head.weight is bart.model.shared.weight is bart.model.decoder.embed_tokens.weight
    pair = loaded(put(enc, tmp_path/"pair", family="encoder-decoder"))
    a, b = pair.encoder.embeddings.word_embeddings.weight, pair.decoder.roberta.embeddings.word_embeddings.weight
    assert torch.equal(a, b) and a is not b and pair.decoder.lm_head.decoder.weight is b

# ---- and back ----------------------------------------------------------------------------------------------------------------

def equal(a: Checkpoint, b: Checkpoint) -> None:
    "Two checkpoints hold the same bits, configs and classes; read by safetensors and transformers alone."
    x, y = (load_file(c.path/"model.safetensors") for c in (a, b))
    assert set(x) == set(y) and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)
    told = [hf.AutoConfig.from_pretrained(c.path).to_dict() | {"_name_or_path": ""} for c in (a, b)]
    assert told[0] == told[1] and told[0]["architectures"]
    spoken = [json.loads(f.read_text()) if (f := c.path/"generation_config.json").exists() else None for c in (a, b)]
    assert spoken[0] == spoken[1]

HEADS = [(k, end) for k in ENCODERS for end in (("Model",) if "t5" in k else ("Model", "ForMaskedLM"))] + [("bert", "ForPreTraining"), ("electra", "ForPreTraining")]

@pytest.mark.parametrize("kind,end", HEADS)
def test_the_encoder_comes_back_to_the_bit(tmp_path, kind, end):
    enc = encoder(kind, tmp_path/"e", end, torch.float32)
    native, pair = kind in EXACT, kind in EXACT and "t5" not in kind
    ways = [dict(layers=1)] if end != "ForMaskedLM" or not native else [dict(decoder="copy", layers=2, cross="attn")] + [dict(family="encoder-decoder", decoder="interleave")]*pair
    for i, how in enumerate(ways):
        new = put(enc, tmp_path/f"g{i}", **how)
        plan = extract(new)
        equal(enc, carry_out(plan, new, tmp_path/f"x{i}"))
        assert plan.notes["moved"] == 0

def test_another_dtype_since_rounds_and_no_more(tmp_path):
    enc = encoder("bert", tmp_path/"e", "ForMaskedLM", torch.float32)
    new = put(enc, tmp_path/"g", layers=1)
    half = save(hf.AutoModelForSeq2SeqLM.from_pretrained(new.path).bfloat16(), None, tmp_path/"half", Card("half", "train"))
    back = carry_out(extract(half, new.path), half, tmp_path/"x", new.path)
    model = hf.AutoModelForMaskedLM.from_pretrained(back.path)
    assert model.dtype == torch.bfloat16 and all(back.dtype(n) == torch.bfloat16 for n in back.names)
    for n in enc.names: assert torch.allclose(back.read(n).float(), enc.read(n), atol=0.02), n

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_comes_back_in_half_precision(tmp_path, dtype):
    enc = encoder("bert", tmp_path/"e", "ForMaskedLM", dtype)
    new = put(enc, tmp_path/"g")
    equal(enc, carry_out(extract(new), new, tmp_path/"x"))

@pytest.mark.parametrize("says", [False, True], ids=["config says so", "config says tied"])
def test_an_untied_head_and_a_generation_config_come_back(tmp_path, says):
    enc = encoder("roberta", tmp_path/"e", "ForMaskedLM", tie_word_embeddings=False)
    config = json.loads((tmp_path/"e"/"config.json").read_text())
    (tmp_path/"e"/"config.json").write_text(json.dumps(config | {"tie_word_embeddings": says}))
    enc = Checkpoint(tmp_path/"e")
    assert "lm_head.decoder.weight" in enc.names and bool(enc.untied) == says
    (tmp_path/"e"/"generation_config.json").write_text(json.dumps({"max_length": 9, "transformers_version": hf.__version__}))
    for family in ("bart", "encoder-decoder"):
        new = put(enc, tmp_path/family, family=family, layers=1)
        equal(enc, carry_out(extract(new), new, tmp_path/f"{family}-x"))

def trained(new: Checkpoint, out, asleep: tuple[str, ...] = (), steps: int = 2) -> Checkpoint:
    "A few steps of plain SGD, saved in a folder of its own, where nothing lies beside it."
    model = hf.AutoModelForSeq2SeqLM.from_pretrained(new.path)
    for n, p in model.named_parameters(): p.requires_grad_(not n.startswith(asleep))
    ids, mask = batch(model.config.pad_token_id)
    rates = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        rates.zero_grad(); model.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward(); rates.step()
    return save(model, None, out, Card.child("trained", "train", [new.card]))

@pytest.mark.parametrize("kind,family,asleep", [("bert", "bart", ("model.shared", "model.encoder")), ("xlm-roberta-xl", "blenderbot", ("model.shared", "model.encoder")),
                                                ("t5", "t5", ("shared", "encoder")), ("bert", "encoder-decoder", ("encoder.",))])
def test_a_sleeping_encoder_comes_back_to_the_bit_after_training(tmp_path, kind, family, asleep):
    enc = encoder(kind, tmp_path/"e", dtype=torch.float32)
    new = put(enc, tmp_path/"g", family=family, layers=1)
    later = trained(new, tmp_path/"t", asleep)
    assert any(not torch.equal(later.read(n), new.read(n)) for n in new.names)
    equal(enc, carry_out(extract(later, tmp_path/"g"), later, tmp_path/"x", tmp_path/"g"))
    plain = extract(later)                                                             # what was kept is not beside it, and not named
    assert not plain.notes["origin"] and any("without origin.safetensors" in line for line in told(plain))

def test_a_trained_encoder_comes_out_as_it_is(tmp_path):
    enc = encoder("bert", tmp_path/"e", "ForMaskedLM")
    new = put(enc, tmp_path/"g", layers=1)
    later = trained(new, tmp_path/"t")
    plan = extract(later, tmp_path/"g/origin.safetensors")
    back = carry_out(plan, later, tmp_path/"x", tmp_path/"g/origin.safetensors")
    assert plan.notes["moved"] == LENGTH and told(plan)[-2] == f"positions that have changed since, unfolded by subtraction: {LENGTH}"
    ids, mask = batch(0)
    a = states(hf.AutoModel.from_pretrained(back.path), ids, mask)
    b = states(hf.AutoModelForSeq2SeqLM.from_pretrained(later.path).get_encoder(), ids, mask)
    assert (a - b).abs().max() < 1e-10 and (a - states(hf.AutoModel.from_pretrained(enc.path), ids, mask)).abs().max() > 1e-3
    name = "bert.embeddings.position_embeddings.weight"
    same = (back.read(name) == enc.read(name)).all(1)
    assert not same[:LENGTH].any() and same[LENGTH:].all()
    shift = later.read("model.encoder.embed_positions.weight") - new.read("model.encoder.embed_positions.weight")
    assert torch.allclose((back.read(name) - enc.read(name))[:LENGTH], shift[2:LENGTH + 2], atol=1e-14)
    for n in ("bert.embeddings.token_type_embeddings.weight", "cls.predictions.bias"): assert torch.equal(back.read(n), enc.read(n))

# ---- a seq2seq model that was never grafted ----------------------------------------------------------------------------------

S2S = dict(vocab_size=V, d_model=D, encoder_layers=3, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=20, encoder_attention_heads=4, decoder_attention_heads=2,
           max_position_embeddings=16, dropout=0.2, attention_dropout=0.1, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, activation_function="relu", init_std=0.03)
PLAIN = {"bart": (hf.BartConfig(**S2S), "BertModel"), "bart, pad 3": (hf.BartConfig(**S2S | {"pad_token_id": 3}), "BertModel"),
         "bart, scaled": (hf.BartConfig(**S2S, scale_embedding=True), "BertModel"),
         "mbart": (hf.MBartConfig(**S2S, scale_embedding=True), "RobertaPreLayerNormModel"), "mbart, pad 0": (hf.MBartConfig(**S2S | {"pad_token_id": 0}), "RobertaPreLayerNormModel"),
         "blenderbot": (hf.BlenderbotConfig(**S2S), "XLMRobertaXLModel"), "t5": (hf.T5Config(**T5, num_decoder_layers=1), "T5EncoderModel"),
         "mt5": (hf.MT5Config(**T5, feed_forward_proj="gated-gelu"), "MT5EncoderModel"),
         "encoder-decoder": (hf.EncoderDecoderConfig(encoder=hf.ElectraConfig(**SIZES, embedding_size=6).to_dict(), pad_token_id=1, decoder_start_token_id=0,
                             decoder=hf.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True).to_dict()), "ElectraModel")}

@pytest.mark.parametrize("kind", PLAIN)
def test_the_encoder_of_a_plain_seq2seq_model(tmp_path, kind):
    config, want = PLAIN[kind]
    torch.manual_seed(2)
    new = save(random(hf.AutoModelForSeq2SeqLM.from_config(config)).double(), None, tmp_path/"s", Card("s", "scratch"))
    plan = extract(new)
    enc = carry_out(plan, new, tmp_path/"x")
    load = hf.AutoModelForTextEncoding if "t5" in kind else hf.AutoModel
    model, info = load.from_pretrained(enc.path, output_loading_info=True)
    assert type(model).__name__ == want and not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.float64
    for left in (False, True) if kind.startswith(("bart", "t5")) else (False,):
        ids, mask = batch(getattr(config, "pad_token_id", None) or 0, left)
        a, b = states(model, ids, mask), states(hf.AutoModelForSeq2SeqLM.from_pretrained(new.path).get_encoder(), ids, mask)
        assert b.std() > 0.1 and (a - b).abs().max() < 1e-10*max(1, b.abs().max())
    assert any("without origin.safetensors" in line for line in told(plan))
    if "bart" in kind:
        c = model.config
        assert (c.hidden_dropout_prob, c.attention_probs_dropout_prob, c.hidden_act, c.initializer_range, c.num_hidden_layers, c.num_attention_heads) == (0.2, 0.1, "relu", 0.03, 3, 4)
        assert (c.pad_token_id, c.bos_token_id, c.eos_token_id) == (config.pad_token_id, 0, 2) and any("never trained: pooler" in line for line in told(plan))
    if kind in ("mbart", "blenderbot"): put(enc, tmp_path/"again", layers=1)            # and it can be grafted again

def test_extracted_from_bart_it_can_be_grafted_and_extracted_again(tmp_path):
    first = save(random(hf.BartForConditionalGeneration(hf.BartConfig(**S2S))), None, tmp_path/"s", Card("s", "scratch"))
    enc = carry_out(extract(first), first, tmp_path/"e")
    new = put(enc, tmp_path/"g")
    assert new.config["model_type"] == "bart" and new.config["max_position_embeddings"] == 16
    for n, t in first.layout.stored().items():
        if t.stack == "encoder" and t.role != "embed.position": assert torch.equal(first.read(n), new.read(n))
    assert torch.equal(first.read("model.encoder.embed_positions.weight")[2:], new.read("model.encoder.embed_positions.weight")[2:])

# ---- mistakes ----------------------------------------------------------------------------------------------------------------

REFUSED = {   # what is wrong -> kind, class, config, how, what is said
    "classifier": ("bert", "ForSequenceClassification", {}, {}, "is a BertForSequenceClassification, and a seq2seq model has no place for its head; .* open it as BertModel"),
    "tagger": ("roberta", "ForTokenClassification", {}, {}, "open it as RobertaModel"),
    "causal": ("bert", "LMHeadModel", dict(is_decoder=True), {}, "is a causal LM \\(BertLMHeadModel\\) and looks back only"),
    "causal roberta": ("roberta", "ForCausalLM", {}, {}, "looks back only"),
    "family": ("bert", "Model", {}, dict(family="brat"), "there is no seq2seq family 'brat'; did you mean 'bart'\\?"),
    "other family": ("bert", "Model", {}, dict(family="mbart"), "a bert encoder does not fit into mbart; its families are: bart, encoder-decoder"),
    "t5 in a pair": ("t5", "Model", {}, dict(family="encoder-decoder"), "does not fit into encoder-decoder; its families are: t5"),
    "narrow": ("electra, narrow", "Model", {}, dict(family="bart"), "narrower than its layers, and bart has no projection"),
    "decoder": ("bert", "Model", {}, dict(decoder="copied"), "there is no beginning of a decoder 'copied'; did you mean 'copy'\\?"),
    "cross": ("bert", "Model", {}, dict(decoder="copy", cross="self"), "there is no beginning of cross-attention 'self'"),
    "cross of random": ("bert", "Model", {}, dict(cross="attn"), "a decoder that begins by 'random' has its cross-attention by 'random'"),
    "no layers": ("bert", "Model", {}, dict(layers=0), "the number of decoder layers cannot be 0; give a whole number of at least 1"),
    "half a layer": ("bert", "Model", {}, dict(layers=1.5), "the number of decoder layers cannot be 1.5"),
    "deep copy": ("bert", "Model", {}, dict(decoder="copy", layers=5), "a decoder of 5 layers cannot be made by 'copy' from an encoder of 4; give at most 4"),
    "deep interleaving": ("bert", "Model", {}, dict(decoder="interleave", layers=3), "a decoder of 3 layers cannot be made by 'interleave' from an encoder of 4; give at most 2"),
    "one layer": ("bert", "Model", dict(num_hidden_layers=1), dict(decoder="interleave"), "made of two layers of the encoder, which has but one"),
    "no such layers": ("modernbert", "Model", {}, dict(decoder="copy"), "no decoder has layers like those of modernbert, so none can begin from them; let it be random"),
    "seed": ("bert", "Model", {}, dict(seed=-1), "seed cannot be -1"),
    "nothing to begin with": ("bert", "Model", dict(bos_token_id=None, eos_token_id=None), {}, "has no token for a decoder to begin with")}

@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_grafted(tmp_path, case):
    kind, end, config, how, said = REFUSED[case]
    enc = encoder(kind, tmp_path/"e", end, **config)
    with pytest.raises(Refusal, match=said): graft(enc, **how)

def test_a_head_is_left_behind_if_one_says_so(tmp_path):
    encoder("bert", tmp_path/"e", "ForSequenceClassification")
    enc = Checkpoint(tmp_path/"e", "BertModel")
    was, now = both(enc, put(enc, tmp_path/"g", layers=1), torch.float64)
    assert (was - now).abs().max() < 1e-10

def test_what_is_no_encoder_or_no_seq2seq_model(tmp_path):
    gpt2 = save(hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)), None, tmp_path/"gpt2", Card("g", "scratch"))
    with pytest.raises(Refusal, match="is no encoder but a GPT2LMHeadModel"): graft(gpt2)
    with pytest.raises(Refusal, match="is a GPT2LMHeadModel, and no seq2seq model whose encoder is known here"): extract(gpt2)
    enc = encoder("bert", tmp_path/"e")
    with pytest.raises(Refusal, match="is a BertModel, and no seq2seq model"): extract(enc)
    with pytest.raises(Refusal, match="is a seq2seq model already \\(BartForConditionalGeneration\\); extract its encoder first"): graft(put(enc, tmp_path/"g"))

def test_an_origin_that_is_broken_missing_or_anothers(tmp_path):
    new = put(encoder("bert", tmp_path/"e"), tmp_path/"g", layers=1)
    other = put(encoder("bert", tmp_path/"e2", hidden_size=8), tmp_path/"g2", layers=1)
    pre = put(encoder("roberta-prelayernorm", tmp_path/"e3"), tmp_path/"g3", layers=1)
    for wrong in (other, pre):
        with pytest.raises(Refusal, match="tells of another model"): extract(new, wrong.path)
    with pytest.raises(Refusal, match="is not what a graft keeps"): extract(new, tmp_path/"e")
    with pytest.raises(Refusal, match="is not what a graft keeps"): extract(new, tmp_path/"g"/"model.safetensors")
    kept = tmp_path/"g"/"origin.safetensors"
    kept.write_bytes(kept.read_bytes()[:-3])
    with pytest.raises(Refusal, match="is not what a graft keeps"): extract(new)
    with pytest.raises(Refusal, match="is not what a graft keeps"): Origin(tmp_path/"nowhere")
    kept.unlink()
    assert extract(new).architecture == "BertModel"

def test_nothing_is_left_of_a_graft_that_fails(tmp_path):
    enc = encoder("bert", tmp_path/"e")
    plan = graft(enc, layers=1)
    put(enc, tmp_path/"g", layers=1)
    with pytest.raises(Refusal, match="exists"): carry_out(plan, enc, tmp_path/"g")
    held = load_file(tmp_path/"e"/"model.safetensors")
    for name in ("embeddings.token_type_embeddings.weight", "encoder.layer.1.output.dense.weight"):
        broken = {n: x.clone() for n, x in held.items()}
        broken[name][0, 0] = float("nan")
        from safetensors.torch import save_file
        save_file(broken, tmp_path/"e"/"model.safetensors", metadata={"format": "pt"})
        with pytest.raises(Refusal, match=f"{name}.* holds NaN"): carry_out(plan, Checkpoint(tmp_path/"e"), tmp_path/"out")
    assert {p.name for p in tmp_path.iterdir()} == {"e", "g"}

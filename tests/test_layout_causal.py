"The tables of bloom, opt, gemma, olmo2, mt5 and mbart against what transformers writes, and the ledger against torch's counter."
import json
import pytest, torch, transformers as hf
from safetensors import safe_open
from test_layout import BART, LLAMA, T5, TIES, make, shapes_of
from test_layout import test_table_is_what_is_written as written_as_told
from test_ledger import FROZEN, S, SEQ2SEQ, measured
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import layout
from seqwarm.core.ledger import describe, flops

BLOOM = dict(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
OPT = dict(vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=20)
GEMMA, OLMO = LLAMA | dict(head_dim=6), LLAMA | dict(pad_token_id=1, eos_token_id=2)
NARROW, BEHIND = dict(word_embed_proj_dim=8), dict(do_layer_norm_before=False)
OPTIONS = [{}, NARROW, BEHIND, NARROW | BEHIND, dict(enable_bias=False), dict(layer_norm_elementwise_affine=False),
           dict(_remove_final_layer_norm=True), NARROW | dict(enable_bias=False, layer_norm_elementwise_affine=False)]
PLAIN = dict(feed_forward_proj="relu")
CASES = [("BloomForCausalLM", BLOOM | t) for t in (*TIES, dict(apply_residual_connection_post_layernorm=True))] + [("BloomModel", BLOOM)]
CASES += [("OPTForCausalLM", OPT | o | t) for t in TIES for o in OPTIONS] + [("OPTModel", OPT | o) for o in OPTIONS[:4]]
CASES += [(k + "ForCausalLM", GEMMA | t | b) for k in ("Gemma2", "Gemma3") for t in TIES for b in ({}, dict(attention_bias=True))]
CASES += [("Gemma2Model", GEMMA), ("Gemma3TextModel", GEMMA), ("Olmo2Model", OLMO)]
CASES += [("Olmo2ForCausalLM", OLMO | t | b) for t in TIES for b in ({}, dict(attention_bias=True), dict(num_key_value_heads=None), dict(head_dim=6))]
CASES += [("MBart" + e, BART | t) for e in ("ForConditionalGeneration", "Model") for t in TIES]
CASES += [("MT5" + e, T5 | g) for e in ("ForConditionalGeneration", "Model", "EncoderModel") for g in ({}, PLAIN, dict(tie_word_embeddings=False))]
SHARED = BLOOM | OPT | GEMMA | OLMO | BART | T5
NAMES = [a + "".join(f"-{k}={v}" for k, v in kw.items() if k not in SHARED or SHARED[k] != v) for a, kw in CASES]

@pytest.mark.parametrize("architecture,kw", CASES, ids=NAMES)
def test_table_is_what_is_written(architecture, kw, tmp_path): written_as_told(architecture, kw, tmp_path)

def test_arrows_are_the_matrices_that_multiply():
    for architecture, kw in CASES:
        m = make(architecture, kw)
        linear = {f"{n}.weight": 0 for n, x in m.named_modules() if isinstance(x, torch.nn.Linear)}
        assert {n: t.out for n, t in layout(m.config, architecture).tensors.items() if t.out is not None} == linear, architecture

def test_axes_by_two_models():
    "Changing one size in the config changes exactly the axes that bear its name."
    opt, gemma, mbart = "OPTForCausalLM", "Gemma3ForCausalLM", "MBartForConditionalGeneration"
    for architecture, kw, change, axes in [
            ("BloomForCausalLM", BLOOM, dict(hidden_size=32), {"hidden", "heads", "ffn"}), ("BloomForCausalLM", BLOOM, dict(vocab_size=9), {"vocab"}),
            (opt, OPT | NARROW, dict(word_embed_proj_dim=10), {"embed"}), (opt, OPT | NARROW, dict(hidden_size=32), {"hidden", "heads"}),
            (opt, OPT, dict(max_position_embeddings=9), {"position"}), (opt, OPT, dict(ffn_dim=31), {"ffn"}),
            (gemma, GEMMA, dict(head_dim=8), {"heads", "kv_heads", "head"}), (gemma, GEMMA, dict(num_key_value_heads=1), {"kv_heads"}),
            (gemma, GEMMA, dict(hidden_size=32), {"hidden"}), (gemma, GEMMA, dict(num_attention_heads=8), {"heads"}),
            ("Olmo2ForCausalLM", OLMO, dict(num_key_value_heads=4), {"kv_heads"}), ("Olmo2ForCausalLM", OLMO | dict(head_dim=6), dict(hidden_size=32), {"hidden"}), ("Olmo2ForCausalLM", OLMO, dict(intermediate_size=9), {"ffn"}),
            (mbart, BART, dict(vocab_size=9), {"vocab"}), ("MT5EncoderModel", T5, dict(num_heads=3), {"heads", "n_heads"})]:
        old, new = make(architecture, kw).state_dict(), make(architecture, kw | change).state_dict()
        changed = {(n, i) for n in old for i, (a, b) in enumerate(zip(old[n].shape, new[n].shape)) if a != b}
        lay = layout(getattr(hf, architecture).config_class(**kw), architecture)
        told = {(n, i) for n, t in lay.tensors.items() for i, a in enumerate(t.axes) if axes & set(a.replace("&", "+").split("+"))}
        assert changed == told, (architecture, change)

@pytest.mark.parametrize("architecture,kw", [("BloomForCausalLM", BLOOM), ("GPT2LMHeadModel", dict(vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2))])
def test_a_fused_axis_is_cut_as_the_table_says(architecture, kw):
    "Queries, keys and values cut out of the fused matrix by its axis are those with which the model attends."
    m = make(architecture, kw).eval(); m.set_attn_implementation("eager")
    lay = layout(m.config, architecture); t = lay.one("attn.qkv", layer=0); d, H = lay.sizes["head"], lay.sizes["heads"] // lay.sizes["head"]
    got = {}
    block = m.transformer.h[0]; inner = getattr(block, "self_attention", None) or block.attn
    fused = getattr(inner, "query_key_value", None) or inner.c_attn
    fused.register_forward_hook(lambda _, i, o: got.update(x=i[0], y=o))
    with torch.no_grad(): weights = m(torch.arange(7)[None], output_attentions=True).attentions[0]
    W = m.state_dict()[t.name]; W = W if t.out == 0 else W.T                      # (3 D, D)
    woven = "&" in t.axes[t.out]
    q, k, _ = W.view(H, 3, d, -1).transpose(0, 1) if woven else W.view(3, H, d, -1)
    q, k = (torch.einsum("hdD,sD->hsd", w, got["x"][0]) for w in (q, k))          # biases are zero at the start
    scores = q @ k.transpose(1, 2) / d**.5
    if woven: scores = scores + torch.tensor([2.**-4, 2.**-8])[:, None, None] * torch.arange(7.)   # ALiBi, two heads
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=bool).tril(), float("-inf"))
    assert torch.allclose(scores.softmax(-1), weights[0], atol=1e-6)
    assert woven == (architecture == "BloomForCausalLM")

@pytest.mark.parametrize("head,base,kw", [
    ("BloomForCausalLM", "BloomModel", BLOOM), ("OPTForCausalLM", "OPTModel", OPT | NARROW), ("Gemma2ForCausalLM", "Gemma2Model", GEMMA),
    ("Gemma3ForCausalLM", "Gemma3TextModel", GEMMA), ("Olmo2ForCausalLM", "Olmo2Model", OLMO), ("MBartForConditionalGeneration", "MBartModel", BART)])
def test_with_and_without_prefix(head, base, kw):
    head, base = (layout(getattr(hf, a).config_class(**kw), a) for a in (head, base))
    prefix = head.table.prefix + "."
    assert set(head.check({n.removeprefix(prefix): s for n, s in shapes_of(head).items()}).values()) == set(head.stored())
    known = base.check(shapes_of(head))
    assert {n for n in known.values() if n} == {n for n, t in base.stored().items() if not t.optional}
    assert all(known[n] is None for n in head.stored() if not n.startswith(prefix))

@pytest.mark.parametrize("architecture,kw,spare", [
    ("BloomForCausalLM", BLOOM, {"h.1.self_attention.scale_mask_softmax.causal_mask": (1, 1, 20, 20), "transformer.h.0.self_attention.masked_bias": ()}),
    ("OPTForCausalLM", OPT, {"decoder.version": (1,)}), ("Olmo2ForCausalLM", OLMO | TIES[0], {"model.layers.1.self_attn.rotary_emb.inv_freq": (2,)}),
    ("Gemma3ForCausalLM", GEMMA, {"model.rotary_emb.inv_freq": (3,), "model.rotary_emb_local.inv_freq": (3,)}),
    ("MBartForConditionalGeneration", BART, {"model.encoder.version": (1,), "model.decoder.version": (1,)}),
    ("MT5ForConditionalGeneration", T5, {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 4)})])
def test_names_as_they_lie_on_the_hub(architecture, kw, spare):
    "Strays mean nothing; copies of a tied tensor are told; any other name is refused."
    lay = layout(getattr(hf, architecture).config_class(**kw), architecture)
    copies = {n: t.shape for n, t in lay.tensors.items() if t.tied}
    known = lay.check(shapes_of(lay) | copies | spare)
    assert copies and {known[n] for n in spare} == {None} and all(known[n] == n for n in copies)
    head = lay.one("head")                                                      # the head's copy alone was kept
    source = lay.storage(head).name
    assert lay.check({(head.name if n == source else n): s for n, s in shapes_of(lay).items()})[head.name] == source
    with pytest.raises(Refusal, match="does not have"): lay.check(shapes_of(lay) | {next(iter(spare)) + "x": ()})

def test_what_a_file_may_lack():
    lay = layout(hf.MBartConfig(**BART), "MBartForConditionalGeneration"); shapes = shapes_of(lay)
    assert lay.check({n: s for n, s in shapes.items() if n != "final_logits_bias"})
    del shapes["model.decoder.embed_positions.weight"]                          # as files of before 4.2
    with pytest.raises(Refusal, match=r"lacks model.decoder.embed_positions.weight \(embed.position\)"): lay.check(shapes)

@pytest.mark.parametrize("begin", ["", "model."])
@pytest.mark.parametrize("end", ["ForCausalLM", "Model"])
def test_opt_under_both_names_is_loaded_as_transformers_loads_it(begin, end, tmp_path):
    "A file with or without `model.` before `decoder.`: our names for its tensors are those under which transformers has the same numbers."
    from safetensors.torch import save_file
    m = make("OPTForCausalLM", OPT | NARROW)
    file = {begin + n.removeprefix("model."): v.clone() for n, v in m.state_dict().items() if n != "lm_head.weight"}
    m.config.architectures = ["OPT" + end]; m.config.save_pretrained(tmp_path); save_file(file, tmp_path/"model.safetensors", metadata=dict(format="pt"))
    loaded = getattr(hf, "OPT" + end).from_pretrained(tmp_path).state_dict()
    with safe_open(tmp_path/"model.safetensors", "pt") as f: shapes = {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}
    lay = layout(json.loads((tmp_path/"config.json").read_text()))
    known = lay.check(shapes)
    assert set(known.values()) == set(lay.stored()) and all(torch.equal(file[n], loaded[k]) for n, k in known.items())

def test_where_norms_stand():
    "Told from the numbers: a gain of zero in a norm does what the family says it does."
    kinds = {("BloomForCausalLM", ""): "pre", ("OPTForCausalLM", ""): "pre", ("OPTForCausalLM", "behind"): "post", ("Gemma2ForCausalLM", ""): "both",
             ("Gemma3ForCausalLM", ""): "both", ("Olmo2ForCausalLM", ""): "out", ("MBartForConditionalGeneration", ""): "pre",
             ("MT5ForConditionalGeneration", ""): "pre", ("BertForMaskedLM", ""): "post", ("LlamaForCausalLM", ""): "pre"}
    from test_layout import BERT
    config = dict(Bloom=BLOOM, OPT=OPT, Gemma2=GEMMA, Gemma3=GEMMA, Olmo2=OLMO, MBart=BART, MT5=T5, Bert=BERT, Llama=LLAMA)
    for (architecture, option), said in kinds.items():
        kw = config[architecture.split("For")[0]] | (BEHIND if option else {})
        m = make(architecture, kw).eval(); lay = layout(m.config, architecture)
        assert lay.norm == said
        stack = "encoder" if "encoder" in lay.layers else ""
        gains = {r: [m.get_parameter(t.name) for t in lay.find(r, stack, 1)] for r in ("attn.norm", "attn.norm.out", "ffn.norm", "ffn.norm.out")}
        assert {r for r, g in gains.items() if g} == ({"attn.norm", "ffn.norm"} if said != "out" else set()) | ({"attn.norm.out", "ffn.norm.out"} if said in ("out", "both") else set())
        state = []
        body = m.get_encoder() if stack else m.base_model
        layers = next(x for x in body.modules() if isinstance(x, torch.nn.ModuleList) and len(x) == 2)
        layers[1].register_forward_hook(lambda _, i, o, state=state: state.append((i[0], o[0] if isinstance(o, tuple) else o)))
        nothing = -1. if "Gemma" in architecture else 0.                        # Gemma's gain is 1 + w
        biases = [p for n, p in m.named_parameters() if ".1." in n and n.endswith("bias") and "norm" not in n.lower() and p.ndim == 1]
        with torch.no_grad():
            for p in biases: p.zero_()
            for g in sum((gains[r] for r in (("attn.norm.out", "ffn.norm.out") if said in ("out", "both") else ("attn.norm", "ffn.norm"))), []): g.fill_(nothing)
            body(torch.arange(3, 9)[None])
        x, y = state[0]
        if said == "post": assert y.abs().max() == 0                            # the state itself was normed away
        else: assert torch.allclose(x, y, atol=1e-6) and y.abs().max() > 0      # only what the blocks give

BIG = dict(vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
WIDE = BIG | dict(intermediate_size=96, num_key_value_heads=2, pad_token_id=1, bos_token_id=2, eos_token_id=3)
O = BIG | dict(ffn_dim=96, max_position_embeddings=40, dropout=0.)
BB = dict(vocab_size=97, d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=80, encoder_layers=2, decoder_layers=3, encoder_attention_heads=2,
          decoder_attention_heads=4, max_position_embeddings=40)
TT = dict(vocab_size=97, d_model=64, d_ff=96, d_kv=24, num_layers=2, num_decoder_layers=3, num_heads=4)
LEDGER = [("BloomForCausalLM", dict(vocab_size=97, hidden_size=64, n_layer=3, n_head=4)), ("OPTForCausalLM", O), ("OPTForCausalLM", O | dict(word_embed_proj_dim=24)),
          ("OPTModel", O | dict(word_embed_proj_dim=24) | BEHIND), ("OPTForCausalLM", O | dict(tie_word_embeddings=False) | BEHIND),
          ("Gemma2ForCausalLM", WIDE | dict(head_dim=24, sliding_window=8)), ("Gemma3ForCausalLM", WIDE | dict(head_dim=24, sliding_window=8)),
          ("Gemma3TextModel", WIDE | dict(head_dim=24)), ("Olmo2ForCausalLM", WIDE), ("MBartForConditionalGeneration", BB),
          ("MT5ForConditionalGeneration", TT), ("MT5EncoderModel", TT)]
MORE = {"all but one norm behind": lambda t: t.role != "ffn.norm.out" or t.layer != 1, "all but the projection": lambda t: t.role != "embed.project",
        "all but the last projection": lambda t: t.role != "head.project", "all but positions": lambda t: t.role != "embed.position",
        "all but tokens": lambda t: t.role != "embed.token", "all but the norm of the embeddings": lambda t: t.role != "embed.norm",
        "all but gains of keys": lambda t: t.role != "attn.k_norm", "all but norms behind": lambda t: t.role.endswith("norm.out")}

@pytest.mark.parametrize("architecture,kw", LEDGER, ids=lambda v: v if isinstance(v, str) else "")
def test_flops_as_torch_counts(architecture, kw):
    for train in (False, True):
        lay, t, counted = measured(architecture, kw, [], train)
        assert flops(lay, S, t, train) == pytest.approx(counted, rel=1e-6), train
    table = describe(lay, S)
    assert table.flops.sum() * S == pytest.approx(flops(lay, S, S if t else None, train=False))

@pytest.mark.parametrize("architecture,kw", LEDGER, ids=lambda v: v if isinstance(v, str) else "")
def test_frozen_flops_as_torch_counts(architecture, kw):
    for name, frozen in (FROZEN | MORE | (SEQ2SEQ if "Conditional" in architecture else {})).items():
        if name == "values" and architecture.startswith("Bloom"): continue      # which has them in one matrix with queries and keys
        lay, t, counted = measured(architecture, kw, frozen, True)
        assert flops(lay, S, t, frozen=frozen) == pytest.approx(counted, rel=1e-6), name

@pytest.mark.parametrize("architecture,kw", [
    ("OPTForCausalLM", OPT | NARROW), ("OPTForCausalLM", OPT | BEHIND), ("Gemma2ForCausalLM", GEMMA | dict(sliding_window=4)),
    ("Gemma3ForCausalLM", GEMMA | dict(sliding_window=4, num_hidden_layers=6)), ("Olmo2ForCausalLM", OLMO)], ids=lambda v: v if isinstance(v, str) else "")
def test_packed_documents_are_read_as_if_alone(architecture, kw):
    from test_objectives import Tok, documents
    from seqwarm.core.objectives import Draws, causal
    m = make(architecture, kw | dict(vocab_size=60)).eval(); m.set_attn_implementation("eager")
    docs, packed = documents(5, 12, 3)
    batch = causal(packed, Draws(0, 0, packed.samples), m.config, Tok()); batch.pop("labels"); begin = 0
    with torch.no_grad():
        together = m(**batch).logits[0]
        for d in docs:
            alone = m(input_ids=torch.from_numpy(d)[None]).logits[0]
            assert torch.allclose(together[begin:begin + len(d)], alone, atol=2e-5)
            begin += len(d)

def test_bloom_is_not_packed():
    "Its slopes are computed from a mask with one number a token."
    from test_objectives import Tok, documents
    from seqwarm.core.objectives import Draws, causal
    _, packed = documents(5, 12)
    with pytest.raises(Refusal, match="bloom model cannot keep packed documents apart"):
        causal(packed, Draws(0, 0, packed.samples), hf.BloomConfig(**BLOOM), Tok())

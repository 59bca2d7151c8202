"Encoders after BERT: their tables against what transformers writes, files as they lie on the hub, and FLOPs as torch counts them."
import numpy as np
import pytest, torch, transformers as hf
from torch.utils.flop_counter import FlopCounterMode
from seqwarm.core.corpus import Packed
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import family, layout
from seqwarm.core.ledger import describe, flops
from seqwarm.core.objectives import _inputs
from seqwarm.core.overlap import overlap
from test_clp import de, en, go, gpt2
from test_layout import as_written, BERT, LABELS, TIES, make, shapes_of

TINY = BERT | dict(bos_token_id=None, eos_token_id=None)
ELECTRA, MPNET, MODERN = TINY | dict(embedding_size=8), TINY, TINY | dict(pad_token_id=0, cls_token_id=None, sep_token_id=None, num_hidden_layers=3)
V3 = TINY | dict(relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=6,
                 norm_rel_ebd="layer_norm", max_relative_positions=-1)
OWN = V3 | dict(share_att_key=False)                                 # projections of their own for relative positions
BIASED = {f"{k}_bias": True for k in ("attention", "mlp", "norm", "classifier")} | dict(decoder_bias=False)
CLASSIFY = ("Model", "ForSequenceClassification", "ForTokenClassification")
CASES = [("Electra" + e, ELECTRA | t | dict(embedding_size=w)) for e in ("ForMaskedLM", "ForCausalLM") for t in TIES for w in (8, 16)]
CASES += [("Electra" + e, ELECTRA | LABELS | dict(embedding_size=w)) for e in ("ForPreTraining", *CLASSIFY) for w in (8, 16)]
CASES += [("MPNetForMaskedLM", MPNET | t) for t in TIES] + [("MPNet" + e, MPNET | LABELS) for e in CLASSIFY]
CASES += [("MPNetModel", MPNET | dict(relative_attention_num_buckets=40))]
CASES += [("DebertaV2ForMaskedLM", TINY | t | k) for k in (dict(legacy=True), dict(legacy=False)) for t in TIES]
CASES += [("DebertaV2ForMaskedLM", V3 | t | dict(legacy=False)) for t in TIES] + [("DebertaV2" + e, V3 | LABELS) for e in CLASSIFY]
CASES += [("DebertaV2Model", kw) for kw in (
    OWN, OWN | dict(pos_att_type="c2p"), OWN | dict(pos_att_type=["p2c"]), OWN | dict(pos_att_type=None), OWN | dict(position_buckets=-1),
    OWN | dict(position_buckets=-1, max_relative_positions=9), OWN | dict(relative_attention=False), V3 | dict(norm_rel_ebd="none"),
    V3 | dict(type_vocab_size=2, position_biased_input=True), V3 | dict(conv_kernel_size=3), V3 | dict(conv_kernel_size=5, conv_groups=2))]
CASES += [("ModernBertForMaskedLM", MODERN | t | b) for t in TIES for b in ({}, BIASED)]
CASES += [("ModernBert" + e, MODERN | LABELS | b) for e in CLASSIFY for b in ({}, BIASED)]
CASES += [("ModernBertForMaskedLM", MODERN | {k: v}) for k, v in BIASED.items()] + [("ModernBertModel", MODERN | dict(num_hidden_layers=1))]
COMMON = TINY | LABELS | MODERN | V3
NAMES = [a + "".join(f"-{k}={v}" for k, v in kw.items() if k not in COMMON or COMMON[k] != v) for a, kw in CASES]

@pytest.mark.parametrize("architecture,kw", CASES, ids=NAMES)
def test_table_is_what_is_written(architecture, kw, tmp_path):
    m, lay, state = as_written(architecture, kw, tmp_path)
    assert list(lay.tensors) == list(state)                                             # in the model's order
    linear = {f"{n}.weight": 0 for n, x in m.named_modules() if isinstance(x, (torch.nn.Linear, torch.nn.Conv1d))}
    assert {n: t.out for n, t in lay.tensors.items() if t.out is not None} == linear    # arrows are the matrices that multiply

def test_all_classes_are_tested():
    tested = {a for a, _ in CASES}
    for kind in ("electra", "mpnet", "deberta-v2", "modernbert"): assert set(family(kind).architectures(kind)) <= tested, kind

def test_axes_by_two_models():
    "Changing one size in the config changes exactly the axes that bear its name."
    modern = MODERN | BIASED
    for architecture, kw, change, axes in [
            ("ElectraForMaskedLM", ELECTRA, dict(embedding_size=4), {"embed"}), ("ElectraForMaskedLM", ELECTRA, dict(vocab_size=9), {"vocab"}),
            ("ElectraForPreTraining", ELECTRA, dict(hidden_size=32), {"hidden", "heads"}), ("ElectraModel", ELECTRA, dict(type_vocab_size=3), {"type"}),
            ("ElectraForMaskedLM", ELECTRA, dict(intermediate_size=31), {"ffn"}), ("ElectraModel", ELECTRA, dict(max_position_embeddings=9), {"position"}),
            ("ElectraForMaskedLM", ELECTRA | dict(embedding_size=16), dict(embedding_size=32, hidden_size=32), {"hidden", "heads"}),
            ("MPNetForMaskedLM", MPNET, dict(relative_attention_num_buckets=9), {"buckets"}),
            ("MPNetForMaskedLM", MPNET, dict(num_attention_heads=8), {"n_heads"}), ("MPNetForMaskedLM", MPNET, dict(vocab_size=9), {"vocab"}),
            ("DebertaV2ForMaskedLM", OWN, dict(position_buckets=4), {"buckets"}), ("DebertaV2ForMaskedLM", OWN, dict(vocab_size=9), {"vocab"}),
            ("DebertaV2ForMaskedLM", OWN | dict(legacy=False), dict(vocab_size=9), {"vocab"}),
            ("DebertaV2Model", OWN | dict(conv_kernel_size=3), dict(conv_kernel_size=5), {"kernel"}),
            ("DebertaV2Model", OWN | dict(conv_kernel_size=3, conv_groups=2), dict(conv_groups=4), {"group"}),
            ("DebertaV2Model", OWN | dict(conv_kernel_size=3), dict(hidden_size=32), {"hidden", "heads"}),
            ("ModernBertForMaskedLM", modern, dict(intermediate_size=31), {"ffn"}),
            ("ModernBertForMaskedLM", modern, dict(hidden_size=32), {"hidden", "heads"}),
            ("ModernBertForTokenClassification", modern, LABELS, {"labels"})]:
        old, new = make(architecture, kw).state_dict(), make(architecture, kw | change).state_dict()
        changed = {(n, i) for n in old for i, (a, b) in enumerate(zip(old[n].shape, new[n].shape)) if a != b}
        lay = layout(getattr(hf, architecture).config_class(**kw), architecture)
        told = {(n, i) for n, t in lay.tensors.items() for i, a in enumerate(t.axes) if axes & set(a.split("+"))}
        assert changed == told, (architecture, change)

def test_fused_pieces_lie_in_the_order_of_the_table():
    "Silenced where the table says gate, queries, keys or values, ModernBERT's block says what it must."
    m = make("ModernBertModel", MODERN).eval(); block = m.layers[1]
    lay = layout(m.config, "ModernBertModel"); ids = torch.arange(6)[None]
    assert lay.one("ffn.gate_up", layer=1).axes[0] == "ffn+ffn" and lay.one("attn.qkv", layer=1).axes[0] == "heads+heads+heads"
    x = torch.randn(1, 4, 16)
    with torch.no_grad():
        gate, up = block.mlp.Wi(x).chunk(2, -1)
        assert torch.allclose(block.mlp(x), block.mlp.Wo(torch.nn.functional.gelu(gate) * up))
        attentions = []
        for first in (0, 16):                                        # without queries or without keys all tokens weigh alike
            other = make("ModernBertModel", MODERN).eval(); other.set_attn_implementation("eager")
            other.layers[0].attn.Wqkv.weight[first:first+16] = 0
            attentions.append(other(ids, output_attentions=True).attentions[0])
        assert all(torch.allclose(a, torch.full_like(a, 1/6)) for a in attentions)

# ---- as they lie on the hub

def old(n): return n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

@pytest.mark.parametrize("head,base,kw", [("ElectraForMaskedLM", "ElectraModel", ELECTRA), ("MPNetForMaskedLM", "MPNetModel", MPNET),
    ("ElectraForPreTraining", "ElectraModel", ELECTRA), ("DebertaV2ForMaskedLM", "DebertaV2Model", V3),
    ("DebertaV2ForMaskedLM", "DebertaV2Model", V3 | dict(legacy=False)), ("ModernBertForMaskedLM", "ModernBertModel", MODERN)])
def test_with_and_without_prefix_and_legacy_norms(head, base, kw):
    head, base = (layout(getattr(hf, a).config_class(**kw), a) for a in (head, base))
    prefix = head.table.prefix + "."
    assert set(head.check({old(n.removeprefix(prefix)): s for n, s in shapes_of(head).items()}).values()) == set(head.stored())
    known = base.check(shapes_of(head))
    assert {n for n in known.values() if n} == {n for n, t in base.stored().items() if not t.optional}
    assert all(known[n] is None for n in head.stored() if not n.startswith(prefix))

def test_electra_halves_in_one_file():
    "A file of either half, asked for as the other, as a body, or for a task."
    lays = {e: layout(hf.ElectraConfig(**ELECTRA), "Electra" + e) for e in ("ForMaskedLM", "ForPreTraining", "Model", "ForCausalLM")}
    both = shapes_of(lays["ForMaskedLM"]) | shapes_of(lays["ForPreTraining"]) | {"electra.embeddings.position_ids": (1, 20)}
    for lay in lays.values(): assert {n for n in lay.check(both).values() if n} == set(lay.stored())
    assert lays["ForMaskedLM"].check(both | {"generator_lm_head.weight": (50, 8)})["generator_lm_head.weight"] == "generator_lm_head.weight"
    with pytest.raises(Refusal, match="lacks generator_predictions.LayerNorm.weight"): lays["ForMaskedLM"].check(shapes_of(lays["ForPreTraining"]))
    wide = layout(hf.ElectraConfig(**ELECTRA | dict(embedding_size=16)), "ElectraModel")
    with pytest.raises(Refusal, match="embeddings_project"): wide.check(shapes_of(lays["Model"]))

def test_mpnet_published():
    lay = layout(hf.MPNetConfig(**MPNET), "MPNetForMaskedLM")
    spare = {"mpnet.pooler.dense.weight": (16, 16), "mpnet.pooler.dense.bias": (16,), "mpnet.embeddings.position_ids": (1, 20)}
    known = lay.check(shapes_of(lay) | spare | {"lm_head.decoder.weight": (50, 16), "lm_head.decoder.bias": (50,)})
    assert all(known[n] is None for n in spare) and known["lm_head.decoder.bias"] == "lm_head.decoder.bias"
    body = layout(hf.MPNetConfig(**MPNET), "MPNetModel")
    assert {n for n in body.check(shapes_of(lay)).values() if n} == {n for n, t in body.stored().items() if not t.optional}

def test_deberta_published():
    "Files with the heads of pre-training, of which no class has the second; positions that a config without them leaves unused."
    body, bert, own = (layout(hf.DebertaV2Config(**V3 | k), a) for a, k in (
        ("DebertaV2Model", {}), ("DebertaV2ForMaskedLM", {}), ("DebertaV2ForMaskedLM", dict(legacy=False))))
    lm = {n: s for n, s in shapes_of(own).items() if n.startswith("lm_predictions.")}
    mask = {f"mask_predictions.{n}": s for n, s in {"dense.weight": (16, 16), "dense.bias": (16,), "LayerNorm.weight": (16,),
            "LayerNorm.bias": (16,), "classifier.weight": (1, 16), "classifier.bias": (1,)}.items()}
    spare = mask | {"deberta.embeddings.position_ids": (1, 20), "deberta.embeddings.position_embeddings.weight": (20, 16)}
    published = {n: s for n, s in shapes_of(own).items() if n not in lm} | lm | spare
    known = own.check(published)
    assert all(known[n] is None for n in spare) and all(known[n] == n for n in lm) and len(lm) == 5
    assert {n for n in body.check(published).values() if n} == set(body.stored())
    with pytest.raises(Refusal, match="lacks cls.predictions.bias"): bert.check(published)          # never had BERT's head
    assert {n for n in bert.check(published | shapes_of(bert)).values() if n} == set(bert.stored())
    placed = layout(hf.DebertaV2Config(**V3 | dict(position_biased_input=True)), "DebertaV2Model")
    assert placed.check(published)["deberta.embeddings.position_embeddings.weight"] == "embeddings.position_embeddings.weight"

def test_modernbert_published():
    lay = layout(hf.ModernBertConfig(**MODERN), "ModernBertForMaskedLM"); there = shapes_of(lay)
    assert "decoder.weight" not in there and lay.check(there | {"decoder.weight": (50, 16)})["decoder.weight"] == "decoder.weight"
    headed = {("decoder.weight" if n == "model.embeddings.tok_embeddings.weight" else n): s for n, s in there.items()}
    assert lay.check(headed)["decoder.weight"] == "model.embeddings.tok_embeddings.weight"
    with pytest.raises(Refusal, match="attn_norm.weight, which"): lay.check(there | {"model.layers.0.attn_norm.weight": (16,)})

# ---- where positions begin

def test_positions_begin_where_the_model_begins_them():
    "The model, given no positions, says the same as given those that the table tells; and something else with others."
    for architecture, kw in [("RobertaModel", TINY | dict(pad_token_id=1)), ("RobertaModel", TINY | dict(pad_token_id=4)),
                             ("XLMRobertaModel", TINY | dict(pad_token_id=0)),
                             ("RobertaPreLayerNormModel", TINY | dict(pad_token_id=4)), ("XLMRobertaXLModel", TINY | dict(pad_token_id=2)), ("MPNetModel", MPNET | dict(pad_token_id=1)),
                             ("MPNetModel", MPNET | dict(pad_token_id=7)), ("ElectraModel", ELECTRA | dict(pad_token_id=3)),
                             ("BertModel", TINY | dict(pad_token_id=3))]:
        m = make(architecture, kw).eval(); ids = torch.arange(10, 16)[None]
        first = family(m.config.model_type).first_position(m.config.pad_token_id)
        with torch.no_grad(): alone, told, other = (m(ids, **p)[0] for p in (
            {}, dict(position_ids=torch.arange(6)[None] + first), dict(position_ids=torch.arange(6)[None] + first + 1)))
        assert torch.allclose(alone, told, atol=1e-6) and not torch.allclose(alone, other, atol=1e-3), (architecture, kw["pad_token_id"])
    with pytest.raises(Refusal, match="did you mean 'roberta'"): family("robberta")

# ---- FLOPs

B, S = 2, 24
WIDE = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=40)
DEB = {k: v for k, v in V3.items() if k not in TINY} | WIDE
MODELS = {f"Electra{e}-{w}": WIDE | dict(embedding_size=w) for e in ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification") for w in (24, 64)}
MODELS |= {"MPNetForMaskedLM": WIDE, "MPNetForSequenceClassification": WIDE, "MPNetModel": WIDE}
MODELS |= {"DebertaV2ForMaskedLM-plain": WIDE, "DebertaV2ForMaskedLM": DEB | dict(legacy=False), "DebertaV2ForMaskedLM-own": DEB | dict(share_att_key=False),
           "DebertaV2ForMaskedLM-c2p": DEB | dict(share_att_key=False, pos_att_type=["c2p"]), "DebertaV2ForTokenClassification": DEB,
           "DebertaV2ForSequenceClassification-p2c": DEB | dict(pos_att_type=["p2c"]), "DebertaV2Model-conv": DEB | dict(conv_kernel_size=3)}
MODELS |= {f"ModernBert{e}": WIDE | dict(pad_token_id=0, local_attention=w) for e, w in (
    ("ForMaskedLM", 64), ("ForTokenClassification", 64), ("ForSequenceClassification", 64), ("Model", 8))}
FROZEN = {"nothing": [], "embeddings": ["embed"], "body": ["attn", "ffn"], "lower layers": ["embed", "attn@0-1", "ffn@0-1"],
          "all but norms": lambda t: not t.role.startswith(("attn.norm", "ffn.norm")),
          "all but one norm": lambda t: t.role != "ffn.norm" or t.layer != 1, "all but positions": lambda t: "relative" not in t.role,
          "all but the projection": lambda t: not t.role.startswith(("embed.project", "conv")),
          "all but keys of positions": lambda t: t.role not in ("attn.pos_k", "attn.k.bias"),
          "all but the head": lambda t: not t.role.startswith(("head", "pooler", "tags", "detect")),
          "all but norms of heads": lambda t: t.role not in ("head.norm", "pooler.norm", "tags.norm"),
          "all but the convolution's norm": lambda t: t.role != "conv.norm", "all but the norm of positions": lambda t: t.role != "embed.relative_norm",
          "all but what widens": lambda t: t.role not in ("ffn.up", "ffn.gate_up")}

def once(lay, asleep):
    "What projecting relative positions takes, forward and backward, in a batch of any size; the ledger leaves it out."
    kinds, total = {"c2p", "p2c"} & set(lay.sizes), [0, 0]
    own = bool(lay.find("attn.pos_*"))
    roles = {"c2p": "attn.pos_k", "p2c": "attn.pos_q"}
    awake = lambda role, layer=None: any(t.name not in asleep for r in (role, f"{role}.bias") for t in lay.find(r, layer=layer))
    moves = awake("embed.relative") or awake("embed.relative_norm")
    for layer in range(lay.layers[""]) if kinds and lay.find("embed.relative") else ():
        used = {roles[k] for k in kinds} if own else {"attn.k", "attn.q"}     # shared ones are both projected, used or not
        for role in used:
            t = lay.one(role, layer=layer); n = 2 * t.size * lay.size("buckets")
            total[0] += n
            if own or {"attn.k": "c2p", "attn.q": "p2c"}[role] in kinds: total[1] += n * (moves + (t.name not in asleep))
    return total

@pytest.mark.parametrize("name", MODELS)
def test_flops_as_torch_counts(name):
    torch.set_num_threads(1); torch.manual_seed(0)
    cls = getattr(hf, name.split("-")[0]); kw = MODELS[name] | dict(bos_token_id=None, eos_token_id=None)
    model = cls(cls.config_class(**kw)); model.set_attn_implementation("eager"); lay = layout(model.config, cls.__name__)
    ids = torch.randint(5, 97, (B, S))
    for what, frozen in FROZEN.items():
        asleep = {n for n, t in lay.stored().items() if frozen(t)} if callable(frozen) else set(lay.select(frozen))
        if len(asleep) == len(lay.stored()): continue                # a part that this model has not
        for n, p in model.named_parameters(): p.requires_grad_(n not in asleep); p.grad = None
        for train in (False, True) if what == "nothing" else (True,):
            with FlopCounterMode(display=False) as counter:
                out = model(input_ids=ids)
                loss = sum(out[k].float().square().sum() for k in ("logits", "last_hidden_state", "pooler_output") if k in out)
                if train and loss.requires_grad: loss.backward()
            extra = once(lay, asleep)
            assert flops(lay, S, None, train, frozen) * B == pytest.approx(counter.get_total_flops() - extra[0] - extra[1]*train, rel=1e-6), (what, train)
    table = describe(lay, S)
    assert table.flops.sum() * S == pytest.approx(flops(lay, S, train=False)) and table.parameters.sum() == model.num_parameters()

def test_relative_positions_cost_as_many_as_there_are():
    "With 12 relative positions the two products beside the scores cost S x 12 pairs each; the contents' own cost S x S."
    lay = layout(hf.DebertaV2Config(**DEB), "DebertaV2Model"); table = describe(lay, S).set_index("role").flops
    assert table["c2p"] == table["p2c"] == 3 * 2 * 12 * 64 and table["attn (scores, values)"] == 3 * 4 * S * 64

# ---- packed texts

T4 = TINY | dict(num_hidden_layers=4)
WINDOWS = {"RobertaPreLayerNormForMaskedLM": T4, "XLMRobertaXLForMaskedLM": T4, "ModernBertForMaskedLM": MODERN | dict(num_hidden_layers=4, local_attention=4),
           "ElectraForMaskedLM": ELECTRA, "MPNetForMaskedLM": MPNET,
           "MistralForCausalLM": T4 | dict(sliding_window=3, num_key_value_heads=2),
           "Qwen2ForCausalLM": T4 | dict(use_sliding_window=True, sliding_window=3, max_window_layers=2, num_key_value_heads=2)}

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", WINDOWS)
def test_a_packed_text_is_read_as_the_model_reads_it_alone(architecture, attention):
    "Windows, relative positions and first positions included; and the window matters."
    torch.manual_seed(0)
    m = make(architecture, WINDOWS[architecture] | dict(initializer_range=0.5)).eval(); m.set_attn_implementation(attention)
    texts, causal = [list(range(11, 21)), [5, 6, 7, 8]], "Causal" in architecture
    row = lambda f: np.array([[x for i, t in enumerate(texts) for x in f(i, t)]])
    packed = Packed(row(lambda i, t: t), row(lambda i, t: [i]*len(t)), row(lambda i, t: range(len(t))), np.array([0]))
    inputs = {k: v for k, v in _inputs(packed, packed.ids, packed.ids, m.config, causal).items() if k != "labels"}
    with torch.no_grad():
        together, alone = m(**{k: v.to("cpu") for k, v in inputs.items()}).logits, [m(torch.tensor([t])).logits for t in texts]
        assert torch.allclose(together[:, :10], alone[0], atol=1e-4) and torch.allclose(together[:, 10:], alone[1], atol=1e-4)
        if hasattr(m.config, "sliding_window"):
            m.config.sliding_window = 100
            wide = m(**{k: v for k, v in _inputs(packed, packed.ids, packed.ids, m.config, causal).items() if k != "labels"}).logits
            assert not torch.allclose(together, wide, atol=1e-2)

def test_deberta_is_not_packed():
    m = make("DebertaV2ForMaskedLM", V3); one = np.array([[5, 6, 7]])
    with pytest.raises(Refusal, match="deberta-v2 model cannot keep packed documents apart"):
        _inputs(Packed(one, one*0, one - 5, np.array([0])), one, one, m.config, False)

# ---- transferred

@pytest.mark.parametrize("architecture,kw", [("ElectraForMaskedLM", ELECTRA), ("MPNetForMaskedLM", MPNET),
    ("DebertaV2ForMaskedLM", V3), ("DebertaV2ForMaskedLM", V3 | dict(legacy=False)), ("ModernBertForMaskedLM", MODERN | dict(local_attention=4))])
@pytest.mark.parametrize("tied", [True, False])
def test_a_new_vocabulary_leaves_shared_tokens_what_they_were(architecture, kw, tied, tmp_path):
    "On a text of shared tokens the transferred model says what the source says, although the padding id has moved."
    torch.manual_seed(0)
    size = dict(vocab_size=len(en), max_position_embeddings=40, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    big = make(architecture, kw | size).eval()
    _, _, out = go(tmp_path, big, gpt2(de, 8), "overlap")
    model, both = hf.AutoModelForMaskedLM.from_pretrained(tmp_path/"out").eval(), overlap(en, de)
    t, s = torch.tensor([both.shared_target[20:40]]), torch.tensor([both.shared_source[20:40]])
    with torch.no_grad(): new, old = (m(input_ids=i).logits for m, i in ((model, t), (big, s)))
    assert type(model) is type(big) and new.shape[-1] == len(de) and model.config.pad_token_id == 2
    assert torch.allclose(new[0][:, both.shared_target], old[0][:, both.shared_source], atol=1e-5)
    assert bool(out.layout.find("head") and out.layout.one("head").tied) == (tied and kw.get("legacy", True))

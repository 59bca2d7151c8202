"Wider models: which family keeps which promise at which growth, told by its logits; what the maps, the shares and the refusals are."
from dataclasses import dataclass, field
from functools import cache
import pytest, torch, transformers as hf
from families import FAMILIES, model
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.write import build, write
from seqwarm.methods.axes import shares
from seqwarm.methods.width import width

pytestmark = pytest.mark.usefixtures("quick")
D, F = 24, 41    # widths of the small models

@dataclass(frozen=True)
class Case:
    "A family and what sets this model of it apart."
    kind: str; tied: bool = True; architecture: str | None = None
    more: dict = field(default_factory=dict, hash=False)
    def __str__(self): return "-".join([self.kind, "tied" if self.tied else "untied", *([self.architecture] if self.architecture else []), *map(str, self.more)])
    def make(self): return model(self.kind, D, False, self.tied, 3, self.architecture, **self.more)

SPARSE = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "switch_transformers"}                          # refused: grow first, and upcycle then
CASES = [Case(k, t) for k in FAMILIES if k not in SPARSE for t in (True, False)] + [
    Case("llama", more=dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)), Case("llama", more=dict(num_attention_heads=4, num_key_value_heads=2)),
    Case("opt", more=dict(word_embed_proj_dim=D)), Case("opt", more=dict(word_embed_proj_dim=D, do_layer_norm_before=False)),
    Case("electra", more=dict(embedding_size=D)), Case("electra", architecture="ElectraForPreTraining"), Case("bert", architecture="BertForSequenceClassification"),
    Case("bert", architecture="BertForPreTraining"), Case("xlm-roberta-xl", architecture="XLMRobertaXLForTokenClassification"),
    Case("deberta-v2", more=dict(conv_kernel_size=3)), Case("deberta-v2", more=dict(legacy=False)),
    Case("t5", False, more=dict(feed_forward_proj="gated-gelu")), Case("bart", more=dict(scale_embedding=True)), Case("blenderbot", more=dict(scale_embedding=True))]

FREE = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "t5", "mt5"}      # the number of heads is free
RMS, PRE = FREE, FREE | {"gpt2", "opt", "blenderbot"}                                             # silent units are possible
EXACT, CHANGED, REFUSED = "exact", "changed", "refused"

def promises(case: Case) -> dict[str, tuple[dict, str]]:
    "Growth by name: what is asked for, and what comes of it."
    k, c = case.kind, case.more
    pre = k in PRE and c.get("do_layer_norm_before", True) or case.architecture == "XLMRobertaXLForTokenClassification"
    heads = 6 if c.get("num_attention_heads") == 4 else 3
    heads = dict(heads=heads, hidden=None if D % heads == 0 else 2*D)
    found = {"ffn": (dict(ffn=4*D + 13), REFUSED if k == "bloom" else EXACT),
             "ffn silent": (dict(ffn=4*D + 13, method="zero"), REFUSED if k == "bloom" else EXACT),
             "heads": (heads, EXACT if k in FREE else REFUSED),
             "twice": (dict(hidden=2*D), EXACT), "three times": (dict(hidden=3*D), EXACT),
             "half more": (dict(hidden=D + D//2), CHANGED),
             "half more, lemon": (dict(hidden=D + D//2, method="lemon"), EXACT if pre else REFUSED),
             "twice, lemon": (dict(hidden=2*D, method="lemon"), EXACT if pre else REFUSED),
             "half more, silent": (dict(hidden=D + D//2, method="zero"), EXACT if k in RMS else REFUSED),
             "twice, aki": (dict(hidden=2*D, method="aki"), CHANGED), "twice, direct": (dict(hidden=2*D, method="direct"), CHANGED)}
    if case.tied and not c and not case.architecture: return found
    return {name: found[name] for name in ("twice", "half more, lemon", *(["heads", "ffn"] if c else []))}      # what a head or a config changes

def plain(m):
    "The same model with all of its arithmetic in float64: RMS norms compute in float32, and Gemma's embeddings hold their factor so."
    for part in m.modules():
        if "RMSNorm" in type(part).__name__ or type(part).__name__ in ("T5LayerNorm", "MT5LayerNorm"):
            def forward(x, part=part):
                gain = part.weight + 1 if "Gemma" in type(part).__name__ else part.weight
                return x*(x.pow(2).mean(-1, keepdim=True) + getattr(part, "variance_epsilon", getattr(part, "eps", None))).rsqrt()*gain
            part.forward = forward
        if hasattr(part, "scalar_embed_scale"): part.embed_scale = torch.tensor(part.scalar_embed_scale, dtype=torch.float64)
    return m

@torch.no_grad()
def logits(m):
    "Of three rows, one of them padded."
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(6, m.config.vocab_size, (3, n), generator=g) for n in (9, 5))
    mask = torch.ones_like(x); mask[1, 6:] = 0
    out = m(input_ids=x, attention_mask=mask, **({"decoder_input_ids": y} if m.config.is_encoder_decoder else {}))
    return out.logits if "logits" in out else out.prediction_logits

def apart(a, b): return float((a - b).abs().max()/a.abs().max())
def load(c): return getattr(hf, c.architecture).from_pretrained(c.path, dtype=torch.float64).eval()

@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_promised_holds(case, tmp_path):
    case.make().double().save_pretrained(tmp_path/"small"); small = Checkpoint(tmp_path/"small")
    library = logits(load(small)); exact = logits(plain(load(small)))
    for name, (ask, what) in promises(case).items():
        if what == REFUSED:
            with pytest.raises(Refusal): width(small, **ask)
            continue
        plan = width(small, **ask)
        assert plan.notes["exact"] == (what == EXACT) and bool(plan.notes["why"]) == (what == CHANGED), name
        big = load(write(plan, {"source": small}, tmp_path/name)) if "lemon" in name else build(plan, {"source": small})
        if what == EXACT: assert apart(library, logits(big)) < 1e-5, name
        far = apart(exact, logits(plain(big)))
        assert far < 1e-10 if what == EXACT else 1e-3 < far < 100, (name, far)

@cache
def small(tmp, kind="llama", dtype=torch.float32, **more):
    model(kind, D, False, False, 3, **more).to(dtype).save_pretrained(tmp/kind)
    return Checkpoint(tmp/kind)

@pytest.mark.parametrize("kind,method", [("llama", "fpi"), ("llama", "aki"), ("t5", "zero"), ("gpt2", "lemon"), ("bloom", "fpi"), ("deberta-v2", "fpi")])
def test_the_numbers_do_not_depend_on_how_they_are_made(tmp_path, monkeypatch, kind, method):
    c = small(tmp_path, kind, torch.bfloat16, **({"conv_kernel_size": 3} if kind == "deberta-v2" else {}))
    plan = width(c, method, hidden=2*D, seed=5)
    monkeypatch.setattr("seqwarm.core.write._BLOCK", 200)    # numbers: a few rows
    out = write(plan, {"source": c}, tmp_path/method, shard=20_000)
    for n in out.names: assert torch.equal(out.read(n), plan.make(n, {"source": c})) and out.dtype(n) == torch.bfloat16
    if kind == "llama":
        again = width(c, method, hidden=2*D, seed=5)
        assert again.fingerprint == plan.fingerprint != width(c, method, hidden=2*D, seed=6).fingerprint

def test_sixteen_bits_are_rounded_once(tmp_path):
    c = small(tmp_path, dtype=torch.bfloat16)
    plan, name = width(c, ffn=2*F), "model.layers.0.mlp.down_proj.weight"
    r, x, wide = plan.row(name), c.read(name), plan.make(name, {"source": c})
    g, d = (plan.arrays[r.arrays[k]] for k in ("index1", "by1"))
    want = x.double()[:, g.long()]*torch.cat([d[:1].expand(D//2, -1), d[1:].expand(D//2, -1)])
    assert torch.equal(wide, want.bfloat16())

def test_shares_sum_to_one_and_differ():
    index = torch.randint(0, 7, (40,), generator=torch.Generator().manual_seed(0)).numpy()
    d = shares(index, 1)
    for u in set(index):
        mine = d[torch.from_numpy(index == u)]
        assert mine.sum() == 1 and (mine > 0).all() and len(set(mine.tolist())) == len(mine)
    assert torch.equal(d.half().float(), d) and torch.equal(d.bfloat16().float(), d)

def test_copies_are_told_apart_by_the_first_step(tmp_path):
    c = small(tmp_path)
    plan, up = width(c, ffn=2*F), "model.layers.0.mlp.up_proj.weight"
    index = plan.arrays[plan.row(up).arrays["index0"]].long()
    for even in (False, True):
        if even: plan.arrays |= {k: torch.full_like(x, 0.5) for k, x in plan.arrays.items() if k.startswith("share")}
        m = build(plan, {"source": c}).train()
        step, x = torch.optim.AdamW(m.parameters(), 1e-3), torch.randint(6, 90, (4, 12), generator=torch.Generator().manual_seed(1))
        m(input_ids=x, labels=x).loss.backward(); step.step()
        w = m.get_parameter(up).detach()
        assert torch.equal(w[F:], w[index[F:]]) if even else (w[F:] - w[index[F:]]).abs().mean() > 1e-4

def test_aki_takes_both_ends_from_the_layer_above(tmp_path):
    c = small(tmp_path, num_attention_heads=4, num_key_value_heads=2)
    plan, head = width(c, "aki", hidden=D, heads=8, kv_heads=4, ffn=2*F), D//4
    here, name = {"source": c}, "model.layers.{}.{}.weight".format
    for part in ("mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        n = c.shape(name(0, part))[0]
        for layer, above in ((0, 1), (1, 1)):     # the last layer copies its own
            new, old, key = plan.make(name(layer, part), here), c.read(name(above, part)), plan.row(name(layer, part)).arrays["index0"]
            index = plan.arrays[key].long()
            assert sum((index < n).tolist()) == (n if layer == 0 else 2*n)
            assert torch.equal(new[n:] if "q_proj" not in part else new[index >= n], old[index[n:] % n if "q_proj" not in part else index[index >= n] % n]) or layer
            assert torch.equal(new[index < n], c.read(name(layer, part))[index[index < n]])
    for part in ("mlp.down_proj", "self_attn.o_proj"):
        r = plan.row(name(0, part)); index, d = (plan.arrays[r.arrays[k]] for k in ("index1", "by1"))
        n, new = c.shape(name(0, part))[1], plan.make(name(0, part), here)
        both = torch.stack([c.read(name(i, part)) for i in (0, 1)])
        want = both[(index >= n).long(), :, (index % n).long()].T*d.repeat_interleave(D//2, 0)
        assert torch.equal(new, want) and head*8 in (new.shape[1], 8*head)

def test_queries_go_with_their_keys(tmp_path):
    c = small(tmp_path, num_attention_heads=4, num_key_value_heads=2)
    plan, head = width(c, heads=8, kv_heads=4), D//4
    q, k = (plan.arrays[plan.row(f"model.layers.0.self_attn.{p}_proj.weight").arrays["index0"]].view(-1, head)[:, 0]//head for p in "qk")
    assert sorted(q.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3] and torch.equal(q//2, k[torch.arange(8)//2])

@pytest.mark.parametrize("kind,more,ask,said", [
    ("llama", {}, dict(hidden=12), "below"), ("llama", {}, dict(), "nothing is to become wider"), ("llama", {}, dict(hidden=48, method="fp"), "did you mean 'fpi'"),
    ("llama", {}, dict(ffn=40), "at least 41"), ("bert", {}, dict(hidden=30), "24 or 36"), ("gpt2", {}, dict(heads=3), "36"),
    ("llama", dict(num_attention_heads=4, num_key_value_heads=1), dict(heads=6, kv_heads=4), "give 4 or 8 heads"),
    ("llama", dict(num_attention_heads=8, num_key_value_heads=2), dict(heads=8, kv_heads=4, method="aki"), None),
    ("llama", dict(num_attention_heads=6, num_key_value_heads=2), dict(heads=6, kv_heads=3), "heads"),
    ("bert", {}, dict(hidden=36, method="lemon"), "multiple of 24"), ("modernbert", {}, dict(hidden=36, method="lemon"), "embeddings.norm"),
    ("gpt2", {}, dict(hidden=36, method="zero"), "lemon"), ("bloom", {}, dict(ffn=200), "leave it out"),
    ("deberta-v2", dict(conv_kernel_size=3, conv_groups=2), dict(hidden=48), "conv")])
def test_what_cannot_be_is_refused_in_a_line(tmp_path, kind, more, ask, said):
    c = small(tmp_path, kind, **more)
    if said is None: width(c, **ask).check({"source": c}); return
    with pytest.raises(Refusal, match=said) as e: width(c, **ask)
    assert "\n" not in str(e.value) and "; " in str(e.value)

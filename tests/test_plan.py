"Plans: complete or refused, random rows that do not depend on order, files that give the same plan back."
from dataclasses import replace
import pytest, torch
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import layout
from seqwarm.core.plan import OPS, Plan, Row, operation
from seqwarm.core.write import build

TINY = dict(model_type="gpt2", vocab_size=11, n_embd=6, n_layer=2, n_head=2, n_positions=8)

class Bag(dict):
    reads = 0
    names = property(lambda self: list(self))
    def read(self, name): self.reads += 1; return self[name]
    def shape(self, name): return self[name].shape

@operation("test.pick")
def _pick(x, *, ids, scale=1.0): return x[ids]*scale

@pytest.fixture
def source():
    g = torch.Generator().manual_seed(3)
    return Bag({n: torch.randn(t.shape, generator=g, dtype=torch.bfloat16) for n, t in layout(TINY, "GPT2LMHeadModel").stored().items()})

@pytest.fixture
def plan(source):
    rows = [Row(n, "copy", f"s:{n}") for n in source]
    rows[0] = Row("transformer.wte.weight", "test.pick", "s:transformer.wte.weight", {"scale": 2.0}, {"ids": "ids"})
    rows[1] = Row(rows[1].target, "normal", (), {"std": 0.5})
    return Plan("test", TINY, "GPT2LMHeadModel", rows, {"ids": torch.arange(10, -1, -1)}, {"s": {"name": "toy"}},
                {f"s:{rows[1].target}": "positions are new"}, seed=7)

def test_applied_against_plain_code(plan, source):
    made = dict(plan.check({"s": source}).apply({"s": source}))
    assert list(made) == list(source)
    for n, x in source.items():
        if n == "transformer.wte.weight": assert torch.equal(made[n], x.flip(0)*2) and made[n].dtype == torch.bfloat16
        elif n == plan.rows[1].target: assert made[n].dtype == torch.float32 and 0.3 < made[n].std() < 0.7
        else: assert torch.equal(made[n], x)

def test_lazy_one_row_at_a_time(plan, source):
    it = plan.apply({"s": source})
    assert source.reads == 0
    next(it); assert source.reads == 1

def test_random_rows_depend_on_seed_and_name_only(plan, source):
    n = plan.rows[1].target
    first = dict(plan.apply({"s": source}))[n]
    turned = replace(plan, rows=plan.rows[::-1])
    assert torch.equal(dict(turned.apply({"s": source}))[n], first)
    assert not torch.equal(dict(replace(plan, seed=8).apply({"s": source}))[n], first)

def test_saved_and_loaded(plan, source, tmp_path):
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.rows == plan.rows and again.summary() == plan.summary() and again.dropped == plan.dropped
    a, b = dict(plan.apply({"s": source})), dict(again.apply({"s": source}))
    assert all(torch.equal(a[n], b[n]) for n in a)

def change(plan, k, **kw): return replace(plan, rows=[replace(r, **kw) if i == k else r for i, r in enumerate(plan.rows)])

@pytest.mark.parametrize("spoil,words", [
    (lambda p: replace(p, rows=p.rows[:-1]), "does not explain transformer.ln_f.bias"),
    (lambda p: replace(p, rows=p.rows + [p.rows[3]]), "twice"),
    (lambda p: replace(p, rows=p.rows + [Row("lm_head.weight", "zeros")]), "tied"),
    (lambda p: change(p, 2, op="cpoy"), "did you mean 'copy'"),
    (lambda p: change(p, 2, sources=()), "takes 1 tensors"),
    (lambda p: change(p, 1, args={"sdt": 1}), "no argument sdt"),
    (lambda p: change(p, 0, arrays={}), "needs the argument ids"),
    (lambda p: change(p, 0, arrays={"ids": "idx"}), "no array in the plan 'idx'; did you mean 'ids'"),
    (lambda p: replace(p, arrays=p.arrays | {"other": torch.ones(1)}), "which no row uses"),
    (lambda p: replace(p, dropped={}), "neither uses nor drops s:transformer.wpe.weight"),
    (lambda p: replace(p, dropped=p.dropped | {"s:transformer.ln_f.bias": "?"}), "drops s:transformer.ln_f.bias and uses it"),
    (lambda p: change(p, 2, sources=("t:" + p.rows[2].target,)), "no source 't'"),
    (lambda p: change(p, 2, sources=("s:transformer.h.0.ln_1.wight",)), "did you mean 's:transformer.h.0.ln_1.weight'"),
    (lambda p: replace(change(p, 2, sources=("s:transformer.h.0.attn.c_attn.weight",)), dropped={"s:*": "?"}), "to be a copy of"),
])
def test_refused(spoil, words, plan, source):
    with pytest.raises(Refusal, match=words) as e: spoil(plan).check({"s": source})
    assert "\n" not in str(e.value)

def test_wrong_shape_is_refused_when_applied(plan, source):
    bad = replace(plan, arrays={"ids": torch.arange(4)})
    with pytest.raises(Refusal, match="of the shape"): dict(bad.apply({"s": source}))

def test_bad_files_and_sources(tmp_path):
    with pytest.raises(Refusal, match="holds no plan.json"): Plan.load(tmp_path)
    (tmp_path/"plan.json").write_text('{"rows": [')
    with pytest.raises(Refusal, match="not a plan that can be read"): Plan.load(tmp_path)
    with pytest.raises(Refusal, match="alias:tensor"): Row("x", "copy", "y")

def test_sources_go_by_the_names_of_the_plan(plan, source):
    for act in (plan.check, lambda s: plan.make("transformer.wte.weight", s), lambda s: dict(plan.apply(s)), lambda s: build(plan, s)):
        with pytest.raises(Refusal, match="sources of a plan cannot be a list; give them by name"): act([source])
    with pytest.raises(Refusal, match="there is no source 's'"): plan.make("transformer.wte.weight", {"source": source})

def test_a_name_belongs_to_one_operation():
    with pytest.raises(ValueError, match="two operations"):
        @operation("copy")
        def other(x): return x
    assert OPS["copy"](torch.ones(2)).sum() == 2

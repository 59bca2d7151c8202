"The growth recipe: its wishes, what its arms begin from and cost, what sleeps in their first half, and the arithmetic of its claims."
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from seqwarm.batch.parameters import find_recipe, parameters
from seqwarm.core.arms import best_rate
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.fresh import apart_first
from seqwarm.core.ledger import lineage
from seqwarm.core.masked import Masked
from seqwarm.core.stages import Stage, chains
from seqwarm.core.text import Text
from seqwarm.core.train import train
from seqwarm.methods.grow import grow
from seqwarm.recipes.growth import (_CAUSAL, _CLASSES, _FORBIDDEN, _SIZES, Models, _dense, _fresh, _order, _parts, _sparse, _told, _top_first, _ways, claims_of, compared, results, sized, trained)

pytestmark = pytest.mark.usefixtures("quick")
WISH = dict(seeds=[0], text="world:a", valid=None, kind="gpt2", arms=None, shares=None, rates=None, warm_rate=None, small_rate=None, small_steps=None, steps=None, words=None, vocab=None, length=None,
            batch=None, width=None, layers=None, small_width=None, small_layers=None, head=16, experts=4, apart=1.0)

@pytest.mark.parametrize("wish, says", [
    (dict(arms=["fip+stack"]), "did you mean"), (dict(arms=["fpi+"]), "there is no way to grow 'fpi"), (dict(arms=["fpi+fpi"]), "there is no way to grow"), (dict(arms=["fpi+stack+stack"]), "there is no way"),
    (dict(arms=["fpi+stack/up"]), "there is no way to grow"), (dict(arms=["fpi+stack/"]), "there is no way to grow"), (dict(arms=[]), "arms is an empty list"), (dict(seeds=[1, 1]), "seeds names something twice"),
    (dict(arms=["fpi"]), "the arm fpi does not say how to grow in depth; add one of interpolate, stack, identity"), (dict(arms=["stack"]), "does not say how to grow in width"),
    (dict(arms=["fpi+stack"], layers=1), "grows in depth, and both models have the same; leave stack out"), (dict(arms=["fpi+stack"], width=32), "grows in width, and both models have the same"),
    (dict(arms=["lemon+stack"], kind="bert"), "the norms of a bert stand in the way of lemon"), (dict(arms=["zero+stack"]), "the norms of a gpt2"), (dict(arms=["fpi+identity"], kind="mpnet"), "in the way of identity"),
    (dict(arms=["fpi/twice"], layers=1), "grows twice, and here one axis grows"), (dict(arms=["fpi+stack/upcycle"]), "a gpt2 has no relative with experts; give kind llama"), (dict(arms=["upcycle"]), "has no relative"),
    (dict(arms=["ligo+identity"]), "ligo cannot begin with layers of zeros"), (dict(experts=0), "experts cannot be 0"), (dict(arms=["upcycle/top"]), "there is no way to grow"), (dict(arms=["fpi/top"], layers=1), "trains upper layers first, and there is one"), (dict(kind="gtp2"), "did you mean 'gpt2'"), (dict(text="wrld:a"), "did you mean 'world:'"),
    (dict(rates=[]), "rates is an empty list"), (dict(rates=[0.0]), "a learning rate cannot be 0"), (dict(warm_rate=-1.0), "a learning rate cannot be -1"), (dict(small_rate=float("nan")), "a learning rate cannot be nan"),
    (dict(shares=[0.0]), "shares cannot hold 0"), (dict(shares=[1.5]), "shares cannot hold 1.5"), (dict(apart=1.5), "apart cannot be 1.5"), (dict(width=40), "width cannot be 40; give a multiple of the head size 16"),
    (dict(small_width=128), "small_width is above width"), (dict(small_layers=3), "small_layers is above layers"), (dict(steps=0), "steps cannot be 0"), (dict(small_steps=0), "small_steps cannot be 0"),
    (dict(length=4), "length cannot be 4"), (dict(vocab=100), "vocab cannot be 100"), (dict(head=0), "head cannot be 0")])
def test_wishes_that_cannot_be(wish, says):
    with pytest.raises(Refusal, match=says.replace("+", r"\+")): sized("smoke", **WISH | wish)

def test_every_scale_can_be_wished_for_with_every_kind():
    for scale, sizes in _SIZES.items():
        for kind in _CLASSES:
            p = sized(scale, **WISH | dict(kind=kind))
            assert set(p.arms) <= set(sizes["arms"]) and len(p.arms) > 1 and p.text == f"world:a?words={sizes['words']}" and p.small_rate in p.rates
    assert "zero" in sized("full", **WISH | dict(kind="llama")).arms and "zero" not in sized("full", **WISH).arms
    with pytest.raises(Refusal, match="there is no scale"): sized("tiny", **WISH)

def test_every_kind_can_be_named_in_a_shell(): assert set(parameters(find_recipe("growth"))["kind"].allowed) == set(_CLASSES)

def test_ways():
    assert _ways("fpi") == ("fpi", None, "") and _ways("stack") == (None, "stack", "") and _ways("aki+interpolate") == _ways("interpolate+aki") == ("aki", "interpolate", "")
    assert _ways("lemon+identity/top") == ("lemon", "identity", "top") and _ways("ligo+stack/upcycle") == ("ligo", "stack", "upcycle") and _ways("upcycle") == (None, None, "upcycle")
    assert _parts("aki+stack/twice") == ["aki", "stack"] and _parts("aki+stack/top") == ["aki+stack/top"]

SMALL = dict(words=6000, steps=8, small_steps=6, layers=2, width=32, small_width=16, head=8, length=16, batch=4, vocab=300, rates=[1e-3, 4e-3], shares=[0.5, 1.0], save_every=100)

@pytest.fixture(scope="module")
def text(): torch.set_num_threads(1); return Text("world:a?words=6000", None, 16, 300)

def models(tmp_path_factory, text, **wish):
    p = sized("smoke", **WISH | SMALL | wish)
    return Models(p, tmp_path_factory.mktemp("store"), text, 0)

@pytest.fixture(scope="module")
def causal(tmp_path_factory, text): return models(tmp_path_factory, text, arms=["fpi+identity", "lemon+identity", "aki+stack", "fpi+interpolate/top"])

@pytest.fixture(scope="module")
def done(causal): return trained(causal.p, causal, best_rate(causal.p.rates, causal.scratch))

def test_what_norms_forbid_is_what_growing_refuses(tmp_path, text):
    for kind in _CLASSES:
        p = sized("smoke", **WISH | SMALL | dict(kind=kind))
        _fresh(p, text, 0, 16, 1).save_pretrained(tmp_path/kind)
        small, no = Checkpoint(tmp_path/kind), set()
        for way, sizes in dict(fpi={}, aki={}, direct={}, lemon={}, zero={}, stack=dict(layers=2), interpolate=dict(layers=2), identity=dict(layers=2)).items():
            try: grow(small, **dict(deep=way) | sizes if sizes else dict(wide=way, hidden=32))
            except Refusal: no.add(way)
        assert no == {way for way, kinds in _FORBIDDEN.items() if kind in kinds}, kind

def test_what_is_exact_begins_where_the_small_model_ended(causal, done):
    end = causal.small().history.loss.iloc[-1]
    for arm in causal.p.arms:
        exact = causal.grown(arm).card.plan["notes"]["exact"]
        assert exact == arm.endswith("+identity") and (abs(done[arm, 0.5].history.loss.iloc[0] - end) < 1e-4) == exact
    assert done["small", 0.5].history.loss.iloc[0] == pytest.approx(end, abs=1e-5) and done["scratch", 1.0].history.loss.iloc[0] > end

def test_what_an_arm_comes_from_and_costs(causal, done):
    small, p = causal.small(), causal.p
    scratch = done["scratch", 1.0].card
    assert not scratch.parents and scratch.cost["flops"] > 0 and set(done) == {("scratch", 1.0)} | {(a, s) for a in ("small", *p.arms) for s in (0.5, 1.0)}
    for (arm, share), t in done.items():
        if arm == "scratch": continue
        whole, own = lineage(t.card), t.card.cost["flops"]
        assert small.card.id in t.card.ancestors and whole.flops == pytest.approx(own + lineage(small.card).flops)
        assert own == pytest.approx(share*scratch.cost["flops"], rel=0.2 if arm.endswith("/top") else 0.05 if arm == "small" else 1e-6)     # the control: within half a step
        if arm != "small": assert t.history.step.iloc[-1] == share*p.steps and t.card.parents == [causal.grown(arm).card.id]
    assert done["fpi+interpolate/top", 1.0].card.cost["flops"] < scratch.cost["flops"]
    assert done["small", 1.0].history.step.iloc[-1] > p.steps

@pytest.mark.parametrize("kind, arms", [("llama", ["ligo+stack", "fpi+identity/twice", "upcycle", "fpi+identity/upcycle"]), ("bert", ["ligo+interpolate", "aki+stack/twice"])])
def test_all_that_growing_takes_is_part_of_an_arm(tmp_path_factory, text, kind, arms):
    m = models(tmp_path_factory, text, kind=kind, arms=arms, shares=[1.0], steps=40)
    rate, small = 1e-3, m.small()
    scratch = m.scratch(rate)
    for arm in arms:
        t = m.arm(arm, 1.0, rate)
        h, own = t.history, lineage(t.card) - lineage(small.card)
        assert h.flops.iloc[-1] == pytest.approx(own.flops, rel=1e-9) and h.tokens.iloc[-1] == pytest.approx(own.tokens) and h.flops.is_monotonic_increasing and h.step.is_monotonic_increasing, arm
        assert own.flops == pytest.approx(scratch.card.cost["flops"], rel=0.05), arm
        if "ligo" in arm: assert h.flops.iloc[0] > 0 and h.step.iloc[-1] < 40
        if "twice" in arm: assert [x["recipe"] for x in t.card.ancestors.values()].count("growth") == 4 and h.flops.iloc[0] == 0 and h.step.iloc[0] == 0       # small, wider, trained, deeper
        if "upcycle" in arm: assert Checkpoint(t.path).layout.find("router") and len(t.card.ancestors) == 1 + (arm != "upcycle") + 1
        if arm == "upcycle" or "identity" in arm: assert h.loss.iloc[0] == pytest.approx(small.history.loss.iloc[-1], abs=1e-4)

def test_what_was_made_is_found_again(causal, done):
    arm = causal.p.arms[0]
    before = {f: f.stat().st_mtime_ns for f in causal.store.rglob("*.safetensors")}
    again = Models(causal.p, causal.store, causal.text, 0)
    assert again.arm(arm, 0.5, best_rate(causal.p.rates, again.scratch)).path == done[arm, 0.5].path and {f: f.stat().st_mtime_ns for f in causal.store.rglob("*.safetensors")} == before

@pytest.mark.parametrize("kind, apart", [("gpt2", 1.0), ("llama", 1.0), ("bert", 1.0), ("pre", 0.25), ("mpnet", 0.75)])
def test_the_lower_half_sleeps_in_the_first_half(tmp_path_factory, text, monkeypatch, kind, apart):
    "In the stages of such an arm; the upper half and the head learn, and then all."
    m = models(tmp_path_factory, text, kind=kind, apart=apart, arms=["fpi+stack/top"], steps=8, layers=4)
    seen = []
    monkeypatch.setattr("seqwarm.recipes.growth.train", lambda module, *a, **kw: seen.append((module, a, kw)) or train(module, *a, **kw))
    begin = m.grown("fpi+stack/top")
    m.arm("fpi+stack/top", 1.0, 1e-2)
    module, (tokenizer, corpus, valid, stages, *_), how = seen[-1]
    assert sum(s.steps for s in stages) == 8 and sum(s.steps for s in stages if s.frozen) == 4 and len(chains(stages)) == 1
    asleep = [s for s in stages if s.frozen]
    auto = AutoModelForCausalLM if kind in _CAUSAL else AutoModelForMaskedLM
    fresh = auto.from_pretrained(begin.path)
    half = train(fresh if kind in _CAUSAL else Masked(fresh), tokenizer, corpus, valid, asleep, tmp_path_factory.mktemp("half"), "half", "growth", (), batch=4, sequences=4)
    old, new = (Checkpoint(path) for path in (begin.path, half.path))
    moved = {t.name: not torch.equal(old.read(t.name), new.read(t.name)) for t in old.layout.stored().values() if t.name in old.names and "type" not in t.name}
    for n, t in old.layout.stored().items():
        lower = t.layer is not None and t.layer < 2 or t.layer is None and t.role.split(".")[0] in ("embed", "attn") and t.role != "embed.token"
        if n in moved and not t.role.endswith("k.bias"): assert moved[n] == (not lower), n          # the keys' biases have no gradient
    assert any(moved.values()) and not all(moved.values())
    if kind == "mpnet": assert not moved["mpnet.encoder.relative_attention_bias.weight"]
    end = Checkpoint(m.arm("fpi+stack/top", 1.0, 1e-2).path)
    assert all(not torch.equal(old.read(t.name), end.read(t.name)) for t in old.layout.find("attn.q") + old.layout.find("ffn.down"))

def test_halves_of_stages():
    steps = lambda stages: [(s.steps, bool(s.frozen), s.objective.partition("rows=")[2], s.continues) for s in _top_first(stages, ("ffn@0",))]
    assert steps([Stage(9)]) == [(4, True, "", False), (5, False, "", True)] and steps([Stage(1)]) == [(1, False, "", False)]
    cut = lambda share: steps(apart_first(10, 1e-3, "mlm", share))
    assert cut(0.2) == [(2, True, "apart", False), (3, True, "whole", True), (5, False, "whole", True)]
    assert cut(0.8) == [(5, True, "apart", False), (3, False, "apart", True), (2, False, "whole", True)]
    both = _top_first(apart_first(10, 1e-3, "mlm", 0.5), ("ffn@0",))
    assert [(s.steps, bool(s.frozen)) for s in both] == [(5, True), (5, False)] and both[1].warmup == both[0].warmup > 0        # what wakes is warmed up

# ---- arithmetic ----------------------------------------------------------------------------------------------------------------

def history(*loss, flops=10.0): return pd.DataFrame(dict(step=np.arange(len(loss)), flops=flops*np.arange(len(loss)), loss=loss, tokens=0))
def run(*loss, flops=10.0): return SimpleNamespace(history=history(*loss, flops=flops), card=SimpleNamespace(cost=dict(flops=10.0, tokens=1), ancestors={}, parents=[], id="x"))

def test_a_row_says_what_was_saved(monkeypatch):
    monkeypatch.setattr("seqwarm.recipes.growth.lineage", lambda card: SimpleNamespace(flops=10.0))
    done = {("scratch", 1.0): run(6.0, 4.0, 3.0, 2.0, 1.0), ("aki", 0.5): run(3.0, 1.0, 0.5), ("small", 0.5): run(2.5, 2.0, 1.5)}
    rows = pd.DataFrame(results(done, run(5.0, 2.5), 7)).set_index("arm")
    assert rows.loc["scratch", ["first_loss", "last_loss", "saved", "saved_all", "to_reach", "flops", "seed"]].tolist() == [6.0, 1.0, 0.0, 0.0, 40.0, 40.0, 7]
    assert rows.loc["aki", ["first_loss", "last_loss", "scratch_loss", "small_loss", "to_reach", "steps"]].tolist() == [3.0, 0.5, 1.0, 2.5, 10.0, 2]
    assert rows.saved["aki"] == pytest.approx(1 - 10/40) and rows.saved_all["aki"] == pytest.approx(1 - (10 + 10)/40)
    assert pd.isna(rows.saved["small"]) and pd.isna(rows.saved_all["small"]) and pd.isna(rows.to_reach["small"])

def table(**arms):
    "arm -> for each seed (first loss, saved)."
    return pd.DataFrame([dict(arm=a, share=0.5, seed=s, first_loss=first, last_loss=1.0, scratch_loss=1.0, small_loss=2.0, saved=x, saved_all=None if x is None else x - 0.1)
                         for a, rows in arms.items() for s, (first, x) in enumerate(rows)])

def test_the_best_arm_has_to_get_there_on_every_seed():
    t = table(scratch=[(6, 0.0)]*2, aki=[(3, 0.9), (3, None)], fpi=[(2, 0.3), (2, 0.5)], small=[(2, 0.2), (2, 0.4)])
    assert claims_of(t, "llama") == {"growth-gpt": pytest.approx(0.4), "growth-paid": pytest.approx(0.3), "growth-order": None, "growth-control": pytest.approx(0.1), "growth-copies": None, "growth-sparse": None}
    never = table(scratch=[(6, 0.0)], fpi=[(2, 0.3)], small=[(2, None)])
    assert claims_of(never, "bert") == {"growth-bert": pytest.approx(0.3), "growth-paid": pytest.approx(0.2), "growth-order": None, "growth-control": pytest.approx(0.3), "growth-copies": None, "growth-sparse": None}
    slow = table(scratch=[(6, 0.0)], fpi=[(2, 0.3)], small=[(2, -0.5)])
    assert claims_of(slow, "gpt2")["growth-control"] == pytest.approx(0.3)         # who takes longer than scratch saves nothing
    once = table(scratch=[(6, 0.0)]*2, fpi=[(2, 0.5)]*2, small=[(2, 0.4), (2, None)])
    assert claims_of(once, "bert")["growth-control"] == pytest.approx(0.3)         # the control got there on one seed of two
    assert claims_of(table(scratch=[(6, 0.0)], fpi=[(2, None)], small=[(2, 0.1)]), "gpt2") == {"growth-gpt": None, "growth-paid": None, "growth-order": None, "growth-control": None, "growth-copies": None, "growth-sparse": None}

def test_copies_have_to_beat_drawn_numbers():
    lead = lambda **arms: claims_of(table(scratch=[(6, 0.0)]*2, small=[(2, None)]*2, **arms), "gpt2")["growth-copies"]
    assert lead(aki=[(3, 0.5)]*2, fpi=[(3, 0.3)]*2, lemon=[(2, 0.9)]*2, direct=[(5, 0.2), (5, 0.4)]) == pytest.approx(0.2)
    assert lead(fpi=[(3, 0.3)]*2, direct=[(5, 0.8), (5, None)]) == pytest.approx(-0.1) and lead(fpi=[(3, 0.3)]*2, direct=[(5, None)]*2) == pytest.approx(0.3)
    assert lead(fpi=[(3, 0.3)]*2) is None and lead(fpi=[(3, None)]*2, direct=[(5, 0.4)]*2) is None

def test_a_goal_behind_the_small_model_gives_no_verdict():
    behind = table(scratch=[(6, 0.0)], fpi=[(2, 1.0)], small=[(2, 1.0)]).assign(small_loss=0.5)
    assert set(claims_of(behind, "gpt2").values()) == {None}

def test_upcycled_models_are_set_against_the_dense_ones_they_were():
    t = table(small=[(2, 0.1)]*2, aki=[(3, 0.2)]*2, upcycle=[(2, 0.1)]*2, **{"aki/upcycle": [(3, 0.4)]*2, "fpi/upcycle": [(3, 0.4)]*2})
    t["last_loss"] = t.arm.map(dict(small=2.0, aki=1.5, upcycle=1.9, **{"aki/upcycle": 1.2, "fpi/upcycle": 0.1})) + 0.1*t.seed
    assert _sparse(t) == pytest.approx(0.3) and _sparse(t[t.arm.isin(["small", "upcycle"])]) == pytest.approx(0.1) and _sparse(t[t.arm != "aki"]) == pytest.approx(0.1) and _sparse(t[t.arm == "aki"]) is None
    assert set(_dense(t).arm) == {"aki"} and claims_of(t.assign(small_loss=9.0), "gpt2")["growth-gpt"] == pytest.approx(0.2)       # what has experts is no larger dense model

def test_order_counts_neighbours():
    firsts = lambda *x: table(**{a: [(f, 0.0)] for a, f in zip(["small", "fpi+interpolate", "fpi+stack", "aki+interpolate", "scratch"], x)})
    assert _order(firsts(1, 2, 3, 4, 5)) == 1 and _order(firsts(1, 3, 2, 4, 5)) == 0.75 and _order(firsts(5, 4, 3, 2, 1)) == 0 and _order(firsts(1, 2, 3, 4)) is None

def test_runs_are_set_beside_by_what_they_save():
    record = lambda t, **p: dict(parameters=dict(name=str(p), steps=10, seeds=[0]) | p, table=t.to_dict("records"))
    t = table(scratch=[(6, 0.0)], fpi=[(2, 0.25)], small=[(2, None)])
    got = compared([record(table(scratch=[(6, 0.0)], fpi=[(2, 0.5)], aki=[(2, 0.75)], small=[(2, 0.1)]), steps=20), record(t)])
    assert got.values.tolist() == [["steps 20", "the best arm", 75.0], ["steps 20", "small, trained on", pytest.approx(10.0)], ["this run", "the best arm", 25.0]]
    assert list(compared([record(table(scratch=[(6, 0.0)]))]).columns) == ["setting", "arm", "value"]

def test_lines_say_never_where_an_arm_did_not_get_there():
    t = table(scratch=[(6, 0.0)]*2, fpi=[(2, 0.25)]*2, aki=[(3, None), (3, 0.5)])
    lines = _told(sized("smoke", **WISH), t, claims_of(t, "gpt2"), [1e-3])
    assert len(lines) == 7 and lines[4].split() == ["fpi", "0.50", "2.000", "1.000", "25", "%", "15", "%"] and lines[5].split()[-2:] == ["never", "never"] and "growth-order: no verdict" in lines[-1]

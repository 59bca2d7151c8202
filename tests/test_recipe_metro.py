"""The METRO recipe: its wishes, equal compute by the lineage, what its arms learn from, and the arithmetic of its claims."""
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM
from seqwarm.core.errors import Refusal
from seqwarm.core.ledger import lineage
from seqwarm.core.masked import Masked
from seqwarm.core.noise import Draws
from seqwarm.core.objectives import objective
from seqwarm.core.record import settings
from seqwarm.core.stages import chains, optimizer
from seqwarm.core.text import Text
from seqwarm.recipes.metro import (_FATES, Models, _encoder, _exited, _lead, _points, _step_flops, _whose, claims_of, compared, measure, proposals, reopened,
                                   sized)

WISH = dict(seeds=[0], text="world:a + world:b", valid=None, sleeping=False, kind="mpnet", mask_rate=0.15, apart=0.5, rtd=50.0, clm=1.0, auxiliary=None,
            heat=2.0, tau=0.1, ramp=None, prior=None, auxiliary_rate=None, exit_every=None, exit_threshold=None, exit_by=None, exit_flops=None, ahead=0.2, before=0.5, heads=4)
ARMS = ["random", "mlm", "electra", "metro", "metro+copy", "metro+contrast", "fast", "fast.frozen", "fast.offline", "mlm+metro", "mlm+fast.frozen"]
EXITS = ["metro+exit", "fast.frozen+exit"]

@pytest.mark.parametrize("wish, says", [
    (dict(arms=["mtero"]), "did you mean 'metro'"), (dict(arms=[]), "arms is an empty list"), (dict(seeds=[1, 1]), "seeds names something twice"),
    (dict(tasks=["poss"]), "did you mean 'pos'"), (dict(tasks=["translation"]), "an encoder writes none"), (dict(text="wrld:a"), "did you mean 'world:'"),
    (dict(mask_rate=0.0), "rate=0 of the objective mlm"), (dict(mask_rate=1.0), "rate=1 of the objective mlm"), (dict(heat=0.0), "heat=0"), (dict(tau=0.0), "tau=0"),
    (dict(width=36), "width cannot be 36"), (dict(rate=-1.0), "rate cannot be -1"), (dict(metro_rate=0.0), "metro_rate cannot be 0"), (dict(apart=2.0), "apart cannot be 2"), (dict(ahead=0.0), "ahead cannot be 0"),
    (dict(before=1.0), "before cannot be 1"), (dict(kind="gpt"), "kind of encoder"), (dict(auxiliary=0), "auxiliary cannot be 0"), (dict(rtd=-1.0), "rtd cannot be -1"),
    (dict(ramp=0.0), "ramp cannot be 0"), (dict(ramp=2.0), "ramp cannot be 2"), (dict(prior=1.0), "prior cannot be 1"), (dict(auxiliary_rate=0.0), "auxiliary_rate cannot be 0"),
    (dict(exit_flops=1.5), "exit_flops cannot be 1.5"), (dict(arms=EXITS, exit_threshold=0.0), "threshold cannot be 0"), (dict(arms=EXITS, exit_by="tokens"), "did you mean 'token'"),
    (dict(arms=EXITS, exit_every=2), "exit_every cannot be 2; give less than the 2 layers"), (dict(arms=EXITS, exit_every=0), "every cannot be 0"),
    (dict(arms=EXITS, rtd=0.0), "leave out the arms with .exit"), (dict(vocab=100), "vocab cannot be 100"), (dict(steps=0), "steps cannot be 0")])
def test_wishes_that_cannot_be(wish, says):
    with pytest.raises(Refusal, match=says): sized("smoke", **WISH | wish)

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    p = sized("smoke", **WISH | dict(words=6000, steps=20, probe_steps=2, examples=16, tasks=["pos"], vocab=400, arms=ARMS + EXITS, layers=3, exit_threshold=0.6))
    return Models(p, tmp_path_factory.mktemp("store"), Text(p.text, None, p.length, p.vocab), 0)

def test_all_arms_cost_the_same(models):
    price = _step_flops(models.p, Masked(_encoder(models.p, models.text, 0)))
    assert models["mlm"].card.cost["flops"] == models.budget == 20*price
    for arm in ARMS[2:]:
        assert abs(lineage(models[arm].card).flops/models.budget - 1) < 0.06, arm     # half a step of twenty, twice where it had a beginning
    steps = {arm: models[arm].history.step.iloc[-1] for arm in ARMS}
    assert steps["mlm"] == 20 > steps["electra"] > steps["metro"] == steps["fast"] > steps["mlm+metro"]
    with pytest.raises(Refusal, match="nothing of the budget is left"): models._stages("metro", Masked(_encoder(models.p, models.text, 0)), 0)

def test_early_exit_costs_what_it_computed(models):
    price = {arm: _step_flops(models.p, models.pair(arm)[0]) for arm in EXITS}
    for arm in EXITS:
        row, without = measure(models, arm), models[arm.removesuffix("+exit")]
        assert row["step"] == without.history.step.iloc[-1] and 0.3 < row["computed"] < 1 and 0.3 < row["kept"] < row["flops_kept"] < 1
        assert models[arm].card.cost["flops"] == pytest.approx(row["computed"]*row["step"]*price[arm]) and row["total_flops"] < 0.97*models.budget
        table = _exited(models, arm, 8)
        assert table.flops.is_monotonic_increasing and table.flops.iloc[-1] == table.kept.iloc[-1] == 1 and table.threshold[table.own].tolist() == [0.6]
    half = changed(models, exit_flops=0.5)
    assert [sum(s.steps for s in half._stages(arm, half.pair(arm)[0], 100*price["metro+exit"])) for arm in ("metro+exit", "metro")] == [200, pytest.approx(100, abs=1)]
    other = changed(models, exit_by="sequence", exit_threshold=0.7, exit_every=2, rtd=7.0).pair("metro+exit")[0]
    assert other.signals["exits"].told == dict(every=2, threshold=0.7, by="sequence") and other.weights["exits"] == other.weights["rtd"] == 7

def changed(models, **wish):
    "The same models, of other wishes; what was trained is found."
    return Models(SimpleNamespace(**vars(models.p) | wish), models.store, models.text, 0)

def test_what_is_wished_for_reaches_where_it_should(models, monkeypatch):
    "And what is not leaves no trace in an address."
    begin = lambda m, arm="metro": (both := m.pair(arm)[0], m._stages(arm, both, 5*models.budget, both.idle))
    both, stages = begin(models)
    assert not both.ramp and both.detect.bias.item() == 0 and "ramp" not in both.told and all("rates" not in s.told for s in stages)
    ramp, prior, rate, hot = (changed(models, **w) for w in (dict(ramp=0.25), dict(prior=0.1), dict(auxiliary_rate=3.0), dict(tau=1e8, heat=3.0)))
    assert ramp.pair("metro")[0].ramp == {"rtd": 0.25} and ramp.pair("metro+exit")[0].ramp == {"rtd": 0.25, "exits": 0.25}
    assert prior.pair("metro")[0].detect.bias.item() == pytest.approx(-2.1972246)
    both, stages = begin(rate)
    factor = {id(p): g.get("factor", 1) for g in optimizer(both, both.layout, chains(stages)[0]).param_groups for p in g["params"]}
    words = both.main.get_input_embeddings().weight
    assert {factor[id(p)] for p in both.auxiliary.parameters() if p is not words} == {3.0} and {factor[id(p)] for p in both.main.parameters()} == {1} and factor[id(both.detect.weight)] == 1
    assert all("rates" not in s.told for s in begin(rate, "fast.frozen")[1])      # what sleeps has no rate
    packed, t = models.text.valid.sample(np.arange(2)), models.text
    for arm, heats in (("fast", [3.0, 3.0]), ("metro", [1.0, 1.0])):
        name = begin(hot, arm)[1][0].objective
        assert [objective(name)(packed, Draws(0, 0, packed.samples, share), both.config, t.tokenizer)["temperature"][0].item() for share in (0.0, 1.0)] == heats
    kept, found = [], Models._train
    monkeypatch.setattr(Models, "_train", lambda self, arm, module, *a: kept.append(module) if arm == "fast.offline" else found(self, arm, module, *a))
    changed(models, ramp=0.25, prior=0.1)["fast.offline"]
    assert kept[-1].ramp == {"rtd": 0.25} == kept[-1].told["ramp"] and kept[-1].detect.bias.item() == pytest.approx(-2.1972246)

def test_whose_gradient_it_is(models):
    for arm in ("metro", "metro+copy", "electra", "fast.frozen", "metro+exit"):
        told = _whose(models, arm); assert list(told) == [f"{arm} begins", f"{arm} ended"]
        for of in told.values():
            assert sum(of.values()) == pytest.approx(1) and (of["aux"] > 0) == (arm not in ("electra", "fast.frozen"))      # electra's shares no words
            assert ("copying" in of) == (arm == "metro+copy") and (of.get("exits", 0) > 0) == (arm == "metro+exit")
    assert _whose(changed(models, ramp=0.5), "metro")["metro begins"]["rtd"] == 0
    both, other = reopened(models, "metro+copy"), reopened(models, "metro+exit")
    assert both.signals["copying"].gate.bias.item() == load_file(models["metro+copy"].path/"detect.safetensors")["copying.gate.bias"].item() != 0
    assert torch.equal(other.signals["exits"].heads[1].weight, load_file(models["metro+exit"].path/"detect.safetensors")["exits.heads.1.weight"])

def test_random_is_not_trained(models):
    fresh, kept = _encoder(models.p, models.text, 0).state_dict(), AutoModelForMaskedLM.from_pretrained(models["random"].path).state_dict()
    assert all(torch.equal(fresh[n], x) for n, x in kept.items())

def test_a_sleeping_auxiliary_is_the_one_that_was_trained_ahead(models):
    made = models["fast.frozen"]
    asleep = reopened(models, "fast.frozen").auxiliary.state_dict()
    assert all(torch.equal(x, asleep[n]) for n, x in AutoModelForMaskedLM.from_pretrained(models.helper().path).state_dict().items())
    offline = models["fast.offline"]
    assert offline.history.step.iloc[-1] == made.history.step.iloc[-1] and not (offline.path/"auxiliary").exists()
    assert lineage(offline.card).flops == pytest.approx(lineage(made.card).flops, rel=0.02)      # the guesses cost the same, once
    assert len(models["mlm+fast.frozen"].card.parents) == 2
    assert not (made.path/"auxiliary").exists() and len(made.card.parents) == 1
    assert lineage(made.card).flops - made.card.cost["flops"] == pytest.approx(models.p.ahead*models.budget, rel=0.2)

def test_what_continues_begins_from_the_masked_lm(models):
    start = models._masked("before", models.p.before*models.budget)
    assert models["mlm+metro"].history.aux.iloc[0] > 0 and models["mlm+metro"].card.parents == [start.card.id]

def test_a_reopened_pair_says_what_the_trained_one_said(models):
    made, t = models["metro"], models.text
    both = reopened(models, "metro")
    n = min(64, len(t.valid)); packed = t.valid.sample(np.arange(n))
    inputs = objective(f"metro?rate={models.p.mask_rate:g}&rows=whole")(packed, Draws(0, 0, packed.samples), both.config, t.tokenizer)
    told = both.read(both.tally(**inputs))
    assert told["loss"] == pytest.approx(made.history.loss.iloc[-1], rel=1e-4)
    assert torch.equal(both.detect.weight, load_file(made.path/"detect.safetensors")["weight"])

def test_proposals_tell_the_fate_of_each_token(models):
    both = reopened(models, "metro")
    seen, was, fate = proposals(both, models.text, models.p, 3)
    same = np.array(seen) == was
    assert fate.shape == was.shape == (3, models.p.length) and set(np.unique(fate)) <= set(range(len(_FATES)))
    assert (same[np.isin(fate, (0, 1, 2))]).all() and (~same[np.isin(fate, (3, 4))]).all() and np.isin(fate, (3, 4)).any()

def test_a_row_has_costs_detection_and_probes(models):
    row, plain = measure(models, "metro"), measure(models, "mlm")
    assert row["total_flops"] == models["metro"].card.cost["flops"] and 0 <= row["auc"] <= 1 and isinstance(row["pos/a accuracy"], float)
    assert "auc" not in plain and 0 <= plain["restored"] <= 1 and row["step"] < plain["step"] == 20

def table(**arms):
    return pd.DataFrame([dict(arm=arm, seed=s, points=x) for arm, values in arms.items() for s, x in enumerate(values)])

def test_a_lead_counts_in_pooled_deviations():
    t = table(mlm=[50.0, 52.0, 54.0], metro=[54.0, 55.0, 56.0])
    assert _lead(t, "metro", "mlm") == pytest.approx(3/np.sqrt((2**2 + 1**2)/2)) and _lead(t[t.seed == 0], "metro", "mlm") is None
    assert claims_of(t) == {"metro-mlm": pytest.approx(_lead(t, "metro", "mlm")), "metro-frozen": None, "metro-after": None}
    assert _points(pd.DataFrame({"arm": ["x"], "pos/a accuracy": [40.0], "topic/b accuracy": [60.0]})).tolist() == [50.0]

def test_runs_are_set_beside_by_their_lead():
    record = lambda more, **p: dict(parameters=dict(name=str(p), steps=10, seeds=[0]) | p, table=table(mlm=[50.0, 51.0], metro=[50.0 + more, 51.0 + more]).to_dict("records"))
    got = compared([record(-2.0, steps=20), record(3.0)])
    assert got.groupby("setting", sort=False).value.first().to_dict() == {"steps 20": -2.0, "this run": 3.0} and set(got.arm) == {"metro"} and len(got) == 4

def test_what_is_off_makes_no_setting():
    "A record of before these parameters is of the same setting."
    p = vars(sized("smoke", **WISH)); off = ("ramp", "prior", "auxiliary_rate", "exit_every", "exit_threshold", "exit_by", "exit_flops")
    assert settings([{k: x for k, x in p.items() if k not in off}, p])[0] == "this run"

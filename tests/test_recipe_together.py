"The recipe of growth and transfer: its wishes, what its chains are made of and cost, that their steps commute, and the arithmetic of its claims."
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM
from seqwarm.core.arms import best_rate
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.ledger import lineage
from seqwarm.core.text import Text
from seqwarm.core.vocab import load_tokenizer
from seqwarm.recipes.together import _CHAINS, _CONTROLS, _SIZES, Models, _apart, _parts, _told, claims_of, results, sized, start, trained

pytestmark = pytest.mark.usefixtures("quick")
WISH = dict(seeds=[0], source_text="world:a", target_text="world:b", source_valid=None, target_valid=None, arms=None, share=0.5, between=0.2, method="procrustes", wide="fpi", deep="identity",
            rates=None, small_rate=None, small_steps=None, helper_steps=None, steps=None, words=None, vocab=None, length=None, batch=None, width=None, layers=None, small_width=None,
            small_layers=None, head=16)

@pytest.mark.parametrize("wish, says", [
    (dict(arms=["grow+clip"]), "there is no chain 'grow+clip'; did you mean 'grow+clp'"), (dict(arms=["helper"]), "there is no chain 'helper'"), (dict(arms=[]), "arms is an empty list"),
    (dict(arms=["grow+clp"]*2), "arms names something twice"), (dict(seeds=[1, 1]), "seeds names something twice"), (dict(seeds=[-1]), "seeds cannot be -1"), (dict(rates=[]), "rates is an empty list"),
    (dict(rates=[0.0]), "a learning rate cannot be 0"), (dict(small_rate=-1.0), "a learning rate cannot be -1"), (dict(share=0.0), "share cannot be 0"), (dict(between=1.5), "between cannot be 1.5"),
    (dict(method="procrustus"), "did you mean 'procrustes'"), (dict(method="wechsel"), "needs word vectors"), (dict(wide="fip"), "did you mean 'fpi'"), (dict(wide="zero"), "the norms of a GPT-2"),
    (dict(deep="stak"), "did you mean 'stack'"), (dict(width=40), "width cannot be 40; give a multiple of the head size 16"), (dict(small_width=32), "small_width is not below width"),
    (dict(small_layers=2), "small_layers is not below layers"), (dict(target_text="world:a"), "source and target are both"), (dict(target_text="wrld:b"), "did you mean 'world:'"),
    (dict(vocab=100), "vocab cannot be 100"), (dict(length=4), "length cannot be 4"), (dict(helper_steps=0), "helper_steps cannot be 0"), (dict(head=0), "head cannot be 0")])
def test_wishes_that_cannot_be(wish, says):
    with pytest.raises(Refusal, match=says.replace("+", r"\+")): sized("smoke", **WISH | wish)

def test_every_scale_can_be_wished_for():
    for scale, sizes in _SIZES.items():
        p = sized(scale, **WISH)
        assert p.source_text == f"world:a?words={sizes['words']}" and p.target_valid is None and p.small_rate in p.rates and set(p.arms) <= set(_CHAINS)
    with pytest.raises(Refusal, match="there is no scale"): sized("tiny", **WISH)

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    p = sized("smoke", **WISH | dict(words=6000, steps=8, small_steps=6, helper_steps=4, width=32, small_width=16, head=8, length=16, batch=4, vocab=300, rates=[1e-3, 4e-3], small_rate=2e-3,
                                     share=0.5, between=0.25, arms=list(_CHAINS)))
    return Models(p, tmp_path_factory.mktemp("store"), *(Text(f"world:{x}?words=6000", None, 16, 300) for x in "ab"), 0)

@pytest.fixture(scope="module")
def rate(models): return best_rate(models.p.rates, models.scratch)

@pytest.fixture(scope="module")
def done(models, rate): return trained(models, rate)

def logits(c: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(): return AutoModelForCausalLM.from_pretrained(c.path, dtype=torch.float32).eval()(ids).logits

def test_the_order_alone_makes_no_difference(models, rate):
    ids = torch.randint(0, len(models.b.tokenizer), (2, 16), generator=torch.Generator().manual_seed(0))
    small, way, back = (start(models, arm, rate) for arm in ("clp", "grow+clp", "clp+grow"))
    assert _apart(way, back) < 1e-5 and _apart(way, way) == 0
    for c in (way, back): assert torch.allclose(logits(c, ids), logits(small, ids), atol=1e-5)     # and growth keeps the function
    assert _apart(way, start(models, "grow+train+clp", rate)) > 1e-3 and _apart(way, start(models, "clp+train+grow", rate)) > 1e-3

def test_an_arm_begins_as_a_large_model_of_the_helper_s_language(models, rate):
    p = models.p
    for arm in (*_CHAINS, *_CONTROLS):
        c, large = start(models, arm, rate), arm != "helper"
        assert load_tokenizer(c.path).get_vocab() == models.b.tokenizer.get_vocab()
        assert (c.layout.size("hidden"), sum(c.layout.layers.values())) == ((p.width, p.layers) if large else (p.small_width, p.small_layers)), arm
    assert models.a.tokenizer.get_vocab() != models.b.tokenizer.get_vocab()

def test_what_an_arm_comes_from_and_costs(models, rate, done):
    p, scratch, old = models.p, done["scratch"].card.cost["flops"], {"small": models.small(), "helper": models.helper()}
    assert list(done) == ["scratch", *_CHAINS, *_CONTROLS] and not done["scratch"].card.parents
    for arm, t in done.items():
        spent = _parts(t, old)
        assert set(spent) - {"on the way", "last training"} == {"scratch": set(), **{a: {"helper"} for a in _CONTROLS}}.get(arm, {"small", "helper"}), arm
        assert sum(spent.values()) == pytest.approx(lineage(t.card).flops)
        assert spent["last training"] == pytest.approx(scratch*(1 if arm == "scratch" else p.share), rel=0.05 if arm == "helper" else 1e-6)     # half a step of a small model
        assert spent["on the way"] == pytest.approx(scratch*p.between if "train" in arm else 0, rel=0.1), arm
        if arm in _CHAINS or arm.endswith("grow"): assert t.history.step.iloc[-1] == p.share*p.steps
    first = lambda arm: done[arm].history.loss.iloc[0]
    assert first("helper+grow") == pytest.approx(first("helper"), abs=1e-4) == pytest.approx(models.helper().history.loss.iloc[-1], abs=1e-4)
    assert first("grow+clp") == pytest.approx(first("clp+grow"), abs=1e-4) and abs(first("grow+clp") - first("helper")) > 1e-3

def test_rates_go_by_size(models, monkeypatch, tmp_path):
    seen, begins = [], [start(models, arm, 1e-3) for arm in ("grow+clp", "clp")]
    monkeypatch.setattr("seqwarm.recipes.together.train", lambda model, *a, **kw: seen.append((model.config.n_embd, a[3][0].lr)) or SimpleNamespace(path=tmp_path))
    monkeypatch.setattr(models, "scratch", lambda rate: SimpleNamespace(card=SimpleNamespace(cost=dict(flops=1e9))))
    for begin in begins: models.on("x", begin, models.b, 0.5, 7e-3)
    assert seen == [(32, 7e-3), (16, 2e-3)]

def test_what_was_made_is_found_again(models, rate, done):
    before = {f: f.stat().st_mtime_ns for f in models.store.rglob("*.safetensors")}
    again = trained(Models(models.p, models.store, models.a, models.b, 0), rate)
    assert {a: t.path for a, t in again.items()} == {a: t.path for a, t in done.items()} and {f: f.stat().st_mtime_ns for f in models.store.rglob("*.safetensors")} == before

# ---- arithmetic ----------------------------------------------------------------------------------------------------------------

def model(name, *loss, cost=0.0, of=()):
    "A training that cost so much, of parents; its history has a measurement every 10 FLOPs."
    line = {k: v for m in of for k, v in (m.card.ancestors | {m.card.id: dict(cost=m.card.cost)}).items()}
    history = pd.DataFrame(dict(step=np.arange(len(loss)), flops=10.0*np.arange(len(loss)), loss=loss, tokens=0))
    return SimpleNamespace(history=history, card=SimpleNamespace(id=name, cost=dict(flops=cost), ancestors=line))

def test_a_row_counts_thrice():
    small, helper = model("small", 3.0, 2.5, cost=6.0), model("helper", 5.0, 3.0, cost=4.0)
    large = model("large", 3.0, 2.0, cost=5.0, of=[small])
    done = {"scratch": model("scratch", 6.0, 4.0, 3.0, 2.0, 1.0, cost=40.0), "grow+train+clp": model("x", 3.0, 1.0, cost=10.0, of=[large, helper]), "helper": model("y", 3.0, 2.0, cost=10.0, of=[helper])}
    rows = pd.DataFrame(results(done, small, helper, 7)).set_index("arm")
    assert rows.loc["scratch", ["saved", "saved_way", "saved_all", "to_reach", "way_flops", "old_flops", "seed"]].tolist() == [0, 0, 0, 40, 0, 0, 7]
    assert rows.loc["grow+train+clp", ["flops", "way_flops", "old_flops", "to_reach"]].tolist() == [10, 5, 10, 10]
    assert rows.loc["grow+train+clp", ["saved", "saved_way", "saved_all"]].tolist() == pytest.approx([1 - 10/40, 1 - 15/40, 1 - 25/40])
    assert rows.loc["helper", ["way_flops", "old_flops"]].tolist() == [0, 4] and rows.loc["helper", ["saved", "saved_way", "saved_all"]].isna().all()
    assert (rows.helper_loss == 3.0).all() and (rows.scratch_loss == 1.0).all()

def table(**arms):
    "arm (`_` for +) -> what it saves on each seed, what was trained on the way counted; a tenth less with all."
    return pd.DataFrame([dict(arm=a.replace("_", "+"), seed=s, first_loss=3.0, last_loss=1.0, scratch_loss=1.0, helper_loss=2.0, saved=x, saved_way=x, saved_all=None if x is None else x - 0.1)
                         for a, xs in arms.items() for s, x in enumerate(xs)])

def test_language_a_has_to_beat_the_helper():
    t = table(scratch=[0.0]*2, grow_clp=[0.5, 0.7], clp_grow=[0.9, None], helper=[0.2, 0.4], helper_grow=[0.8, None])
    assert claims_of(t) == {"together-language": pytest.approx(0.2), "together-paid": pytest.approx(0.5)}      # a control counts for the seed on which it got there, a chain must get there on all
    assert claims_of(table(grow_clp=[0.5], helper=[None])) == {"together-language": pytest.approx(0.5), "together-paid": pytest.approx(0.4)}
    assert claims_of(table(grow_clp=[0.5], helper=[-0.5]))["together-language"] == pytest.approx(0.5)       # who takes longer than scratch saves nothing
    assert claims_of(table(grow_clp=[None], helper=[0.4])) == {"together-language": pytest.approx(-0.4), "together-paid": None}
    assert claims_of(table(grow_clp=[None], helper=[None])) == {"together-language": None, "together-paid": None}
    assert set(claims_of(t.assign(helper_loss=[0.5] + [2.0]*9)).values()) == {None}                                  # the goal lies behind the helper

def test_lines_say_never_where_an_arm_did_not_get_there():
    t = table(scratch=[0.0]*2, grow_clp=[0.25]*2, helper=[None, 0.5])
    lines = _told(sized("smoke", **WISH), t, claims_of(t), [1e-3])
    assert len(lines) == 7 and lines[4].split()[0] == "grow+clp" and lines[4].split()[-6:] == ["25", "%", "25", "%", "15", "%"] and lines[5].split()[-3:] == ["never"]*3
    assert lines[-1] == "together-language: 0; together-paid: 0.15" and "together-language: no verdict" in _told(sized("smoke", **WISH), t, claims_of(t.assign(helper_loss=0.5)), [1e-3])[-1]

"""The recipe's arithmetic on histories made up for the purpose, and its wishes."""
from types import SimpleNamespace
import numpy as np
import pandas as pd
import pytest
from seqwarm.core.errors import Refusal
from seqwarm.core.ledger import Cost
from seqwarm.core.train import Stage
from seqwarm.recipes.clp import by_arm, claims_of, results, sized

def trained(*losses):
    "A history of one measurement every 10 steps of 5 tokens, 7 FLOPs a step."
    step = np.arange(len(losses)) * 10
    return SimpleNamespace(history=pd.DataFrame(dict(step=step, tokens=step * 5, flops=step * 7, loss=losses)))

@pytest.fixture
def table():
    done = {("scratch", 0): trained(9, 6, 5, 4), ("random", 0): trained(9, 5, 4.5, 3.5), ("warm", 0): trained(7, 4, 3, 3), ("late", 0): trained(9, 8, 7, 6),
            ("scratch", 1): trained(9, 6, 5, 4), ("random", 1): trained(9, 5, 4, 3), ("warm", 1): trained(7, 5, 3, 3), ("late", 1): trained(9, 3, 2, 1)}
    return results(done, Stage(30, 1e-3), {0: Cost(flops=21), 1: Cost(flops=105)})

def test_when_an_arm_reaches_scratch_s_end(table):
    row = lambda arm, seed: table[(table.arm == arm) & (table.seed == seed)].iloc[0]
    assert row("warm", 0).step_to_reach == 10 and row("warm", 1).step_to_reach == 15 and row("random", 0).step_to_reach == 25
    assert row("warm", 1).tokens_to_reach == 75 and row("warm", 1).flops_to_reach == 105 and row("warm", 0).horizon == 30
    assert row("warm", 0).saved == pytest.approx(2 / 3) and row("warm", 0).saved_with_helper == pytest.approx(1 - (70 + 21) / 210)
    assert row("warm", 1).saved_with_helper == pytest.approx(0) and row("scratch", 0).saved == 0
    assert pd.isna(row("late", 0).saved) and pd.isna(row("late", 0).step_to_reach)

def test_claims_take_the_best_arm_that_caught_up_on_every_seed(table):
    claims = claims_of(table)
    assert claims["arm"] == "warm" and claims["horizon"] == 30
    assert claims["clp-steps"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert claims["clp-embeddings"] == pytest.approx((2 / 3 + 1 / 2) / 2 - (1 / 6 + 1 / 3) / 2)
    assert by_arm(table).set_index("arm").saved.isna()["late"]   # it was fast on one seed, and never arrived on the other
    assert claims_of(table[table.arm.isin(["scratch", "late"])]) == {"clp-steps": None, "clp-embeddings": None}

WISH = dict(seeds=[0], heads=4, match="exact", wake=0, source_text="world:a", target_text="world:b", source_valid=None, target_valid=None)

def test_a_wish_takes_the_place_of_the_scale_s_size():
    p = sized("demo", **WISH | dict(target_text="world:b?words=7 + text:x.txt", words=50, arms=None, width=64))
    assert (p.width, p.layers, p.arms) == (64, 3, ["random", "overlap", "guarded", "procrustes"])
    assert (p.source_text, p.target_text, p.source_valid) == ("world:a?words=50", "world:b?words=7 + text:x.txt", None)

@pytest.mark.parametrize("wish, says", [
    (dict(arms=["gaurded"]), "did you mean 'guarded'"), (dict(arms=[]), "arms is an empty list"), (dict(seeds=[1, 1]), "seeds names something twice"),
    (dict(horizons=[0]), "horizons cannot be 0"), (dict(rates=[0.0]), "rates cannot hold 0"), (dict(width=30), "width cannot be 30"), (dict(vocab=3), "vocab cannot be 3"),
    (dict(length=1), "length cannot be 1"), (dict(batch=-4), "batch cannot be -4"), (dict(layers=0), "layers cannot be 0"), (dict(seeds=[-1]), "seeds cannot be -1"),
    (dict(wake=20), "wake cannot be 20; give fewer than the 20 steps"), (dict(wake=-1), "wake cannot be -1"), (dict(match="canon"), "did you mean 'canonical'"),
    (dict(arms=["wechsel"]), "needs word vectors"),
    (dict(target_text="world:a"), "source and target are both"), (dict(target_text="wrld:b"), "did you mean 'world:'")])
def test_wishes_that_cannot_be(wish, says):
    with pytest.raises(Refusal, match=says): sized("smoke", **WISH | wish)

def test_a_scale_that_is_not():
    with pytest.raises(Refusal, match="did you mean 'smoke'"): sized("smok", **WISH)

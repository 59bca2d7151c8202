"""The sequential recipe's arithmetic on rows made up for the purpose, its wishes, and its models at the smallest size."""
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModel, AutoModelForSeq2SeqLM
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.files import fingerprint
from seqwarm.core.text import Text
from seqwarm.methods.graft import graft
from seqwarm.recipes.sequential import Models, claims_of, compared, measure, pairs, shortfall, sized

WISH = dict(seeds=[0], text="world:a + world:b", valid=None, heads=4, mask_rate=0.15, apart=0.5, embeddings="sleep", norm="pre", family=None, two_steps=None)

def rows(**arms):
    "arm -> (kind, units, {measure: values of the seeds})"
    return pd.DataFrame([dict(arm=arm, kind=kind, seed=s, total_units=units, **{m: v[s] for m, v in measures.items()})
                         for arm, (kind, units, measures) in arms.items() for s in range(len(next(iter(measures.values()))))])

def test_a_shortfall_is_counted_in_pooled_standard_errors():
    t = rows(denoise=("seq2seq", 10, {"loss": [2.0, 2.2, 2.4], "parse/a exact": [50.0, 52.0, 54.0]}),
             open=("seq2seq", 8, {"loss": [2.1, 2.3, 2.5], "parse/a exact": [60.0, 62.0, 64.0]}))
    z = shortfall(t, "open")
    assert z["loss"] == pytest.approx(0.1/np.sqrt(2*0.2**2/3)) and z["parse/a exact"] == pytest.approx(-10/np.sqrt(2*2.0**2/3))
    assert shortfall(t[t.seed == 0], "open").isna().all()   # one seed has no spread

def test_claims_on_rows_made_up():
    some = {"parse/a exact": [50.0, 52.0, 54.0]}
    t = rows(mlm=("encoder", 5, {"pos/a accuracy": [80.0, 80.0, 80.0]}), denoise=("seq2seq", 10, {"loss": [2.0, 2.1, 2.2]} | some),
             **{"denoise.encoder": ("encoder", 10, {"pos/a accuracy": [70.0] * 3}), "denoise.encoder+mlm": ("encoder", 11, {"pos/a accuracy": [74.0] * 3}),
                "wake@0.5": ("seq2seq", 8, {"loss": [2.05, 2.15, 2.25]} | some), "frozen": ("seq2seq", 7, {"loss": [3.0, 3.1, 3.2]} | some)})
    paired = pd.DataFrame(dict(arm=["denoise", "wake@0.5", "frozen"], units_saved=[0.0, 0.2, 0.4], seed=0))
    assert claims_of(t, paired, ["pos"]) == {"seq-extract": pytest.approx(10), "seq-labelling": pytest.approx(10), "seq-remedies": pytest.approx(0.6), "seq-match": 1.0, "seq-cost": pytest.approx(0.2)}
    one = claims_of(t[t.seed == 0], paired, [])
    assert one["seq-match"] is None and one["seq-cost"] is None and one["seq-extract"] == pytest.approx(10) and one["seq-labelling"] is None
    assert claims_of(t[t.arm != "wake@0.5"], paired[paired.arm != "wake@0.5"], ["pos"])["seq-cost"] is None   # nothing that matches

def test_runs_beside_each_other_are_told_by_what_they_differ_in():
    t = rows(mlm=("encoder", 5, {"pos/a accuracy": [80.0]}), denoise=("seq2seq", 10, {"loss": [2.0]}),
             **{"denoise.encoder": ("encoder", 10, {"pos/a accuracy": [70.0]}), "denoise.encoder+mlm": ("encoder", 11, {"pos/a accuracy": [74.0]}),
                "wake@0.5": ("seq2seq", 8, {"loss": [2.05]}), "open": ("seq2seq", 9, {"loss": [1.9]})}).to_dict("records")
    saved = [dict(arm=a, seed=0, units_saved=x) for a, x in (("denoise", 0.0), ("wake@0.5", 0.2), ("open", 0.1))]
    record = lambda **p: dict(parameters=dict(name=str(p), width=32, norm="pre", seeds=[0]) | p, table=t, pairs=saved, labelling=["pos"])
    got = compared([record(width=16), record(), record(norm="post", seeds=[1])])
    assert list(dict.fromkeys(got.setting)) == ["width 16, norm pre", "norm pre", "this run"]
    first = got[got.setting == "width 16, norm pre"].set_index(["claim", "arm"])
    assert first.value.to_dict() == pytest.approx({("seq-extract", "denoise.encoder"): 10, ("seq-remedies", "denoise.encoder+mlm"): 0.6,
        ("seq-match", "wake@0.5"): 0.05, ("seq-match", "open"): -0.1, ("seq-cost", "wake@0.5"): 20, ("seq-cost", "open"): 10})
    assert first.measure["seq-cost"].to_dict() == {"wake@0.5": "does not", "open": "matches"}
    assert list(compared([record()]).setting.unique()) == ["this run"]

@pytest.mark.parametrize("wish, says", [
    (dict(arms=["mml"]), "did you mean 'mlm'"), (dict(arms=["wake@1.0"]), "wakes its encoder at no moment"), (dict(arms=["wake@half"]), "wakes its encoder at no moment"),
    (dict(arms=[]), "arms is an empty list"), (dict(tasks=["poss"]), "did you mean 'pos'"), (dict(tasks=["x: labels:y"]), "says not what it is tested on"),
    (dict(text="text:x.txt", tasks=["pos"]), "one of the toy world"), (dict(text="world:a", tasks=["translation"]), "translation wants two languages"),
    (dict(width=30), "width cannot be 30"), (dict(seq_steps=0), "seq_steps cannot be 0"), (dict(rate=0.0), "rate cannot be 0"), (dict(mlm_rate=-1.0), "mlm_rate cannot be -1"), (dict(mask_rate=1.5), "rate=1.5"), (dict(apart=1.5), "apart cannot be 1.5"),
    (dict(embeddings="dream"), "way with the embeddings"), (dict(arms=["wake@0.99"]), "in step 17, and the last step is 16"), (dict(arms=["gradual@0.95"]), "step 17"), (dict(norm="before"), "place of the norms"), (dict(text="wrld:a"), "did you mean 'world:'")])
def test_wishes_that_cannot_be(wish, says):
    with pytest.raises(Refusal, match=says): sized("smoke", **WISH | wish)

def test_steps_of_the_second_stage_are_seven_tenths_unless_said():
    assert sized("smoke", **WISH).two_steps == 17 and sized("smoke", **WISH | dict(two_steps=5)).two_steps == 5
    p = sized("smoke", **WISH | dict(tasks=["upos: tags:a.jsonl?labels=upos -> en=tags:b.jsonl?labels=upos, de=tags:c.jsonl"]))
    assert p.tasks and p.text == "world:a?words=30000 + world:b?words=30000"

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.set_num_threads(1)
    p = sized("smoke", **WISH | dict(words=6000, mlm_steps=5, seq_steps=5, two_steps=4, probe_steps=2, examples=16, tasks=["pos"], vocab=400,
                                     arms=["mlm", "denoise", "denoise.encoder", "frozen", "wake@0.5", "gradual@0.25", "copy@0.5", "fuse@0.5",
                                           "spans", "small"]))
    text = Text(p.text, None, p.length, p.vocab, extra=("<extra_id_0>", "<extra_id_1>"))
    return Models(p, tmp_path_factory.mktemp("store"), text, 0)

def test_what_sleeps_stays_and_what_wakes_moves(models):
    encoder = Checkpoint(models["mlm"].path)
    states = {arm: AutoModelForSeq2SeqLM.from_pretrained(models[arm].path).state_dict() for arm in ("frozen", "wake@0.5", "copy@0.5")}
    q, theirs = "roberta_prelayernorm.encoder.layer.1.attention.self.query.weight", "model.encoder.layers.1.self_attn.q_proj.weight"
    assert torch.equal(states["frozen"][theirs], encoder.read(q)) and not torch.equal(states["wake@0.5"][theirs], encoder.read(q))
    down = "model.decoder.layers.1.fc2.weight"
    slow = models["gradual@0.25"].card.cost["units"]   # the top layer awake from the second step, the lower one from the third
    assert models["frozen"].card.cost["units"] > 0 and models["wake@0.5"].card.cost["units"] < slow < models["open"].card.cost["units"]
    near = (states["copy@0.5"][down] - encoder.read("roberta_prelayernorm.encoder.layer.1.output.dense.weight")).abs().max()
    assert near < 0.02 < (states["wake@0.5"][down] - encoder.read("roberta_prelayernorm.encoder.layer.1.output.dense.weight")).abs().max()

def test_a_fused_arm_learns_its_mix_and_the_others_have_none(models):
    made = {arm: Checkpoint(models[arm].path) for arm in ("wake@0.5", "fuse@0.5")}
    assert set(made["fuse@0.5"].names) - set(made["wake@0.5"].names) == {"model.decoder.mix"} and "layer_mix" not in made["wake@0.5"].config
    assert (made["fuse@0.5"].read("model.decoder.mix") != 0).all()
    plain, fused = (Checkpoint(models.store/f"start-{n}") for n in starts(models))
    assert all(torch.equal(plain.read(n), fused.read(n)) for n in plain.names)   # they began as one
    row = measure(models, "fuse@0.5")
    assert 0 < row["loss"] < 10 and models["fuse@0.5"].card.cost["units"] == models["wake@0.5"].card.cost["units"]

def starts(models) -> list[str]:
    "What the second stages of the two arms began from, as they are addressed."
    encoder = Checkpoint(models["mlm"].path)
    return [fingerprint([graft(encoder, seed=0, **fusion).fingerprint, encoder.card.id]) for fusion in ({}, {"fusion": True})]

def test_an_extracted_encoder_computes_what_the_seq2seq_model_s_did(models):
    whole, alone = AutoModelForSeq2SeqLM.from_pretrained(models["denoise"].path).eval(), AutoModel.from_pretrained(models["denoise.encoder"].path).eval()
    ids = torch.arange(5, 21)[None]
    with torch.no_grad(): assert torch.allclose(whole.get_encoder()(ids).last_hidden_state, alone(ids).last_hidden_state, atol=1e-5)

def test_costs_are_those_of_the_lineage(models):
    paired = pairs({0: models}).set_index("arm")
    cost = {a: models[a].card.cost["units"] for a in ("mlm", "denoise", "frozen", "wake@0.5")}
    assert paired.units["denoise"] == pytest.approx(cost["mlm"] + cost["denoise"])
    assert paired.units["frozen"] == pytest.approx(cost["mlm"] + cost["frozen"])   # its encoder is the one that is wanted anyway
    per_stack = 2/12/1e5                                                           # two layers, a step
    assert cost["frozen"] == pytest.approx(4*1.5*per_stack) and cost["wake@0.5"] == pytest.approx((2*1.5 + 2*2)*per_stack)
    row = measure(models, "wake@0.5")
    assert row["total_units"] == pytest.approx(cost["mlm"] + cost["wake@0.5"]) and 0 < row["loss"] < 10 and row["kind"] == "seq2seq"
    assert isinstance(models["mlm"].card, Card) and isinstance(measure(models, "mlm")["pos/a accuracy"], float)

"LiGO's maps: where they begin, that training them helps, and that what is folded is what was trained."
from dataclasses import replace
import pytest, torch, transformers as hf
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.losses import evaluate
from seqwarm.core.objectives import causal
from seqwarm.core.plan import Plan
from seqwarm.core.train import Stage, train
from seqwarm.core.write import build, write
from seqwarm.methods.depth import depth
from seqwarm.methods.ligo import _begin, _trained, _weights, carry_out, ligo
from seqwarm.methods.width import width
from test_depth import batch, load, logits, scale, source
from train_small import given

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("quick")
KINDS = ["gpt2", "llama", "gemma2", "olmo2", "bloom", "bert", "electra", "mpnet", "deberta", "t5", "bart", "mbart", "opt, post"]

def near(kind, x, y) -> bool: return (x - y).abs().max() < max(scale(kind), 2e-6)*x.abs().max()

@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_begins_as_fpi_and_the_order(kind, tmp_path):
    old = source(kind, tmp_path/"old")
    orders = {s: [*range(L), 0] for s, L in old.layout.layers.items()}
    plan = _begin(old, width(old, hidden=32), orders, 0, 0.0)
    deep = write(depth(old, order=orders), {"source": old}, tmp_path/"deep")
    assert near(kind, logits(load(deep)), logits(build(plan, {"source": old}).eval()))
    shared = [k for k in plan.arrays if k.startswith("hidden.")]
    assert {"hidden.out", "hidden.into"} <= set(shared) and len(shared) <= 3        # and that before a tied head
    assert sum(r.arrays.get("left") == "hidden.out" for r in plan.rows) > len(orders)*4

@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "bert", "t5", "modernbert"])
def test_what_is_folded_is_what_was_trained(kind, tmp_path):
    old = source(kind, tmp_path/"old")
    first = _begin(old, width(old, hidden=32), {s: [*range(L), L - 1] for s, L in old.layout.layers.items()}, 0, 0.05)
    feed = batch(model := build(first, {"source": old}).eval()); feed["labels"] = feed.get("decoder_input_ids", feed["input_ids"])
    maps, losses = _trained(first, old, model, lambda _: feed, 12, 0.01)
    plan = replace(first, arrays=maps)
    assert losses[-1] < losses[0] and all((maps[k] - x).abs().max() > 1e-4 for k, x in first.arrays.items())
    big, trained = build(first, {"source": old}).eval(), dict(_weights(plan, {n: old.read(n) for n in old.names}, maps))
    with torch.no_grad(): want = torch.func.functional_call(big, trained, (), batch(big)).logits
    plan.save(tmp_path)
    new = load(write(Plan.load(tmp_path), {"source": old}, tmp_path/"new"))
    assert torch.allclose(logits(new), want, atol=1e-9) and not near(kind, want, logits(big))

def test_training_the_maps_lowers_the_loss_and_costs(tmp_path):
    data = given(str(tmp_path)); tokenizer, valid = data["tokenizer"], data["valid"]
    torch.manual_seed(0)
    small = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=2, n_head=2,
                                             bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    old = Checkpoint(train(small, stages=[Stage(60, 5e-3)], store=tmp_path/"store", batch=4, sequences=8, **data).path)
    how = dict(hidden=32, layers=3, batch=8)
    first, plan = (ligo(old, tokenizer, data["corpus"], **how, **more) for more in (dict(steps=1, lr=0.0), dict(steps=30)))
    assert plan.layout.layers == {"": 3} and plan.layout.size("hidden") == 32 and not plan.notes["exact"]
    before, after = (evaluate(build(p, {"source": old}), valid, causal, tokenizer, 16) for p in (first, plan))
    assert after < before - 0.05
    card = carry_out(plan, old, tmp_path/"big", tokenizer).card
    assert card.recipe == "ligo" and card.parents == [old.card.id] and card.cost["tokens"] == 30*8*16 and card.cost["seconds"] > 0
    only = ligo(old, tokenizer, data["corpus"], layers=4, method="interpolate", steps=2, batch=4)
    assert {k.split(".")[0] for k in only.arrays} == {"mix"} and only.arrays["mix.attn.o"].shape == (4, 2)
    for more, said in ((dict(), "nothing is to grow"), (dict(layers=4, method="identity"), "cannot begin with layers of zeros"), (dict(layers=1), "none fewer"),
                       (dict(hidden=8), "give at least 16"), (dict(layers=4, steps=0), "steps cannot be 0")):
        with pytest.raises(Refusal, match=said): ligo(old, tokenizer, data["corpus"], **more)

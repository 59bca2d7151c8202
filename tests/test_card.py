"Every kind of training, and what is measured, on a card that is none: nothing of theirs is left behind on the CPU, and a step waits for no more than is known."
import pytest
import torch
import card, test_gpu, train_metro, train_seq2seq
from card import CARD, Elsewhere, pretended
from seqwarm.core import losses, train as module
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.masked import Masked
from seqwarm.core.objectives import objective
from seqwarm.core.stages import Stage
from seqwarm.core.train import _Loop, train
from seqwarm.methods import ligo, offline
from seqwarm.methods.exit import Early
from seqwarm.methods.metro import pair
from seqwarm.methods.signals import Contrast, Copying
from train_small import given

pytestmark = pytest.mark.usefixtures("quick")
METRO = "metro?rate=0.3&heat=2&tau=0.5"

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    threads = torch.get_num_threads()
    yield given(str(tmp_path_factory.mktemp("card")))
    torch.set_num_threads(threads)

@pytest.fixture
def on_card(monkeypatch):
    with pretended(monkeypatch, module, losses, offline): yield

KINDS = {     # the model, its stages, options, what a step waits for
    "causal": (lambda t: test_gpu.gpt2(t, 0.1), [Stage(2), Stage(2, frozen=("ffn",), continues=True)], dict(keep_moments=True), []),
    "spared": (lambda t: test_gpu.gpt2(t, 0.1), [Stage(2), Stage(2, frozen=("ffn",))], dict(chunked=True, checkpointing=True, accumulate=2), []),
    "guarded": (test_gpu.gpt2, [Stage(3)], dict(guard=5), ["tolist"]),
    "mlm": (lambda t: Masked(train_metro.mlm(t)), [Stage(2, objective="mlm"), Stage(2, objective="mlm?rows=whole")], {}, ["nonzero"]),
    "seq2seq": (train_seq2seq.model, [Stage(2, objective="omit"), Stage(2, objective="denoise")], {}, ["__bool__"]),    # transformers looks at the decoder's mask
    "kept": (train_seq2seq.model, [Stage(6, objective="denoise", frozen=("encoder/", "embed.token"), repeat=3, keep="float16")], {}, ["__bool__"]),
    "metro": (lambda t: pair(train_metro.mlm(t), still=True, dropout=0.1, ramp=dict(rtd=0.5)), [Stage(2, objective=METRO), Stage(2, objective="metro?rows=whole")], {}, ["nonzero"]),
    "signals": (lambda t: pair(train_metro.mlm(t), weights=dict(clm=0), signals=[Copying(), Contrast()]), [Stage(3, objective=METRO)], {}, None),
    "exits": (lambda t: pair(train_metro.mlm(t), signals=[Early(every=1, threshold=0.02)]), [Stage(3, objective=METRO)], {}, None)}

@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_on_the_card_alone(kind, data, on_card, monkeypatch, tmp_path):
    make, stages, how, waits = KINDS[kind]
    update, seen = _Loop.update, []
    def noted(self, *args):
        card.NOTES.clear(); out = update(self, *args); seen.append([*card.NOTES])
        assert all(p.device == CARD for p in self.model.parameters()) and out[0].device == CARD
        return out
    monkeypatch.setattr(_Loop, "update", noted)
    found = train(make(data["tokenizer"]), stages=stages, store=tmp_path, **data, **dict(batch=8, every=2, save_every=2, sequences=8) | how)
    assert found.history.loss.notna().all() and len(seen) == sum(s.steps for s in stages)
    assert waits is None or all(s == waits for s in seen), seen

def test_proposals_are_made_and_read_there(data, on_card, tmp_path):
    made = [train_metro.mlm(data["tokenizer"], layers) for layers in (1, 2)]
    kept = offline.propose(made[0], stages=[Stage(3, objective=METRO)], store=tmp_path, batch=4, sequences=8, k=5, **data)
    reads = offline.Offline(made[1], kept)
    assert train(reads, stages=[Stage(3, objective=METRO, frozen=reads.idle)], store=tmp_path, batch=4, sequences=8, **data).history.loss.notna().all()

def test_a_model_from_disk_is_measured_there(data, on_card):
    for model, name in ((train_seq2seq.model(data["tokenizer"]), "denoise"), (test_gpu.gpt2(data["tokenizer"]), "causal")):
        assert losses.evaluate(model, data["valid"], objective(name), data["tokenizer"], 8) > 5 and next(model.parameters()).device == CARD

def test_maps_are_trained_there_and_come_back(data, on_card, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None if check_available else CARD)
    old = Checkpoint(train(test_gpu.gpt2(data["tokenizer"]), stages=[Stage(2)], store=tmp_path, batch=4, sequences=8, **data).path)
    plan = ligo.ligo(old, data["tokenizer"], data["corpus"], hidden=64, layers=3, batch=8, steps=3)
    assert not any(map(card.there, plan.arrays.values()))

def test_a_pair_that_has_gone_to_pieces_is_told_so(data, monkeypatch, tmp_path):
    "Its samples stay ids: one beyond the vocabulary ends a GPU's process without a word of the loss."
    update = _Loop.update
    def spoilt(self, model, optimizer, feed, step, rates):
        out = update(self, model, optimizer, feed, step, rates)
        if step == 1: next(self.model.auxiliary.parameters()).data.fill_(torch.nan)
        return out
    monkeypatch.setattr(_Loop, "update", spoilt)
    with pytest.raises(Refusal, match="loss became nan in step 2"):
        train(pair(train_metro.mlm(data["tokenizer"])), stages=[Stage(6, objective=METRO)], store=tmp_path, every=6, batch=4, sequences=4, **data)

def test_validation_makes_few_logits_at_a_time(data, monkeypatch):
    model, rows = test_gpu.gpt2(data["tokenizer"]), []
    model.register_forward_pre_hook(lambda _, given, named: rows.append(len(named["input_ids"])), with_kwargs=True)
    told = lambda: losses.evaluate(model, data["valid"], objective("causal"), data["tokenizer"], 8)
    whole = told(); monkeypatch.setattr(losses, "_LOGITS", 3*16*len(data["tokenizer"]))
    assert abs(told() - whole) < 1e-6 and rows == [8, 3, 3, 2]

def test_it_would_be_seen(data, on_card):
    x, model = torch.ones(3).to(CARD), test_gpu.gpt2(data["tokenizer"])
    for wrong in (lambda: x + torch.ones(3), lambda: model.to(CARD)(torch.ones(1, 4, dtype=torch.long)), lambda: torch.cat([x, torch.zeros(2)])):
        with pytest.raises(Elsewhere): wrong()
    with pytest.raises(TypeError, match="no numpy"): x.numpy()
    card.NOTES.clear(); bool(x[0] > 0); x[x > 0]; x.cpu().numpy(); torch.tensor([1.0], device=CARD); (x * 2 + torch.tensor(1.0)).sum()
    assert card.NOTES == ["__bool__", "mask", "cpu", "tensor"]

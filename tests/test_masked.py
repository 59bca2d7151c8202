"""A head that works where it is asked: loss and gradients of the whole model's, its FLOPs by torch's counter, trained and saved as a plain model."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (AutoModelForMaskedLM, BertForMaskedLM, ElectraConfig, ElectraForMaskedLM, MPNetForMaskedLM, RobertaForMaskedLM,
                          RobertaPreLayerNormForMaskedLM)
from seqwarm.core.errors import Refusal
from seqwarm.core.fresh import apart_first, fresh_encoder
from seqwarm.core.ledger import flops
from seqwarm.core.masked import Masked
from seqwarm.core.stages import Stage
from seqwarm.core.train import train
from train_small import given, weights

KINDS = dict(bert=BertForMaskedLM, mpnet=MPNetForMaskedLM, roberta=RobertaForMaskedLM, prenorm=RobertaPreLayerNormForMaskedLM)

def made(kind: str, vocab: int = 40) -> torch.nn.Module:
    if kind == "electra":
        torch.manual_seed(0)
        return ElectraForMaskedLM(ElectraConfig(vocab_size=vocab, hidden_size=16, embedding_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                                                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return fresh_encoder(KINDS[kind], 0, 16, 2, 2, 24, vocab, pad_token_id=1)

def batch(asked: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, :asked] = ids[:, :asked]
    return ids, labels

@pytest.mark.parametrize("kind", [*KINDS, "electra"])
def test_sum_and_gradients_are_the_whole_model_s(kind):
    model, (ids, labels) = made(kind), batch()
    params = [p for p in model.parameters() if p.requires_grad]
    grads = []
    for loss in (F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), reduction="sum"), Masked(model)(labels, input_ids=ids).sum()):
        grads.append((loss, torch.autograd.grad(loss, params, allow_unused=True)))
    (one, whole), (other, asked) = grads
    assert other.item() == pytest.approx(one.item(), rel=1e-5)
    for a, b in zip(whole, asked): assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=2e-4))

@pytest.mark.parametrize("kind", [*KINDS, "electra"])
def test_flops_are_torch_s(kind):
    module, (ids, labels) = Masked(made(kind)), batch(4)
    module.main.set_attn_implementation("eager")   # whose products torch counts
    with FlopCounterMode(display=False) as counter: module(labels, input_ids=ids).sum().backward()
    assert flops(module.layout, 12, asked=4)*3 == counter.get_total_flops()

def test_trained_it_is_a_plain_checkpoint(tmp_path):
    data = given(str(tmp_path))
    model = made("prenorm", len(data["tokenizer"]))
    begun = {n: x.clone() for n, x in model.state_dict().items()}
    out = train(Masked(model), *data.values(), apart_first(6, 1e-2, "mlm?rate=0.3", 0.5), tmp_path/"store", batch=4, every=3, sequences=4)
    assert {"loss", "restored"} <= set(out.history.columns)
    kept = AutoModelForMaskedLM.from_pretrained(out.path).state_dict()
    assert all(torch.equal(x, kept[n]) for n, x in model.state_dict().items()) and any(not torch.equal(x, begun[n]) for n, x in kept.items())
    assert weights(out.path).keys() <= set(kept)
    assert out.history.flops.iloc[-1] == 6*4*flops(Masked(model).layout, 16, asked=round(0.3*16))

def test_it_is_trained_by_mlm_alone(tmp_path):
    data = given(str(tmp_path))
    with pytest.raises(Refusal, match="can't do metro"): train(Masked(made("bert", len(data["tokenizer"]))), *data.values(), [Stage(2, objective="metro")], tmp_path/"s", batch=4)

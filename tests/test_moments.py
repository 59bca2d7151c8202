"Moments that outlive a training: kept and gone on with to the bit, and grown with the weights as the gradient grows."
import numpy as np
import pytest, torch, transformers as hf
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from seqwarm.core.adam import KINDS, MOMENTS, Moments
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import layout
from seqwarm.core.objectives import causal
from seqwarm.core.train import Stage, _Loop, train
from train_small import equal, given, same, weights

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("quick")
STAGE = Stage(6, 5e-3, schedule="constant")

@pytest.fixture(scope="module")
def data(tmp_path_factory): return given(str(tmp_path_factory.mktemp("text")))

def model(data, **more):
    torch.manual_seed(0)
    ids = dict(bos_token_id=data["tokenizer"].bos_token_id, eos_token_id=data["tokenizer"].eos_token_id)
    return hf.GPT2LMHeadModel(hf.GPT2Config(**dict(vocab_size=len(data["tokenizer"]), n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.1,
                                                   embd_pdrop=0.0, attn_pdrop=0.0) | ids | more))

def run(m, data, store, stages=(STAGE,), **more): return train(m, stages=list(stages), store=store, batch=4, every=3, sequences=4, **data, **more)

def opened(path): return hf.GPT2LMHeadModel.from_pretrained(path)

def test_moments_are_kept_and_the_weights_are_the_same(data, tmp_path):
    stages = [Stage(4, 5e-3), Stage(4, 5e-3, frozen=("ffn", "embed.position"))]
    plain, kept = run(model(data), data, tmp_path, stages), run(model(data), data, tmp_path, stages, keep_moments=True)
    assert same(plain, kept) and plain.path != kept.path and not (plain.path/MOMENTS).exists()
    found = Moments(kept.path)
    awake = {n for n in weights(kept.path) if "mlp" not in n and "wpe" not in n and "ln_2" not in n}
    assert set(found.names) == awake and all(found.read(n, "step") == 4 for n in awake) and all(found.read(n, k).any() for n in awake for k in KINDS)
    assert run(model(data), data, tmp_path, stages, keep_moments=True).path == kept.path

def test_what_goes_on_with_moments_is_one_optimizer_that_goes_on(data, tmp_path):
    first = run(model(data, resid_pdrop=0.0), data, tmp_path, keep_moments=True)
    on, anew = (run(opened(first.path), data, tmp_path, moments=m) for m in (first.path, None))
    m = opened(first.path).train(); old = Moments(first.path)
    optimizer = torch.optim.AdamW([dict(params=[p for p in m.parameters() if (p.dim() > 1) == d], weight_decay=0.1*d) for d in (True, False)], 5e-3, (0.9, 0.98))
    for n, p in m.named_parameters(): optimizer.state[p] = {k: old.read(n, k) for k in (*KINDS, "step")}
    for i in range(6):
        packed = data["corpus"].sample(np.arange(i*4, i*4 + 4)); inputs = causal(packed, None, m.config, None); labels = inputs.pop("labels")
        optimizer.zero_grad(); F.cross_entropy(m(**inputs).logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0); optimizer.step()
    got, fresh = weights(on.path), weights(anew.path)
    for n, x in m.state_dict().items():
        if n not in got or n.endswith("c_attn.bias"): continue      # a key's bias has no gradient but rounding
        assert torch.allclose(got[n], x, atol=1e-5), n
        assert (fresh[n] - x).abs().max() > 1e-4, n

def test_broken_off_and_gone_on_is_bit_equal(data, tmp_path, monkeypatch):
    first = run(model(data), data, tmp_path/"first", keep_moments=True)
    how = dict(data=data, moments=first.path, keep_moments=True, stages=[STAGE, Stage(4, 1e-3)])
    whole, update = run(opened(first.path), store=tmp_path/"whole", **how), _Loop.update
    for at in (2, 5, 8):
        def strike(self, *a):
            if a[3] == at: raise KeyboardInterrupt
            return update(self, *a)
        monkeypatch.setattr(_Loop, "update", strike)
        with pytest.raises(KeyboardInterrupt): run(opened(first.path), store=tmp_path/"cut", save_every=1, **how)
        monkeypatch.setattr(_Loop, "update", update)
    cut = run(opened(first.path), store=tmp_path/"cut", save_every=1, **how)
    assert same(whole, cut) and equal(load_file(whole.path/MOMENTS), load_file(cut.path/MOMENTS))

def test_refusals(data, tmp_path):
    first, other = run(model(data), data, tmp_path, keep_moments=True), model(data, n_embd=32)
    with pytest.raises(Refusal, match="holds no optimizer.safetensors; train with keep_moments=True"): run(model(data), data, tmp_path/"n", moments=tmp_path)
    with pytest.raises(Refusal, match=r"have the shape .*; grow them like the weights"): run(other, data, tmp_path/"n", moments=first.path)
    with pytest.raises(Refusal, match="there is no tensor in BertForMaskedLM"):
        Moments(first.path).check(layout(hf.BertConfig(), "BertForMaskedLM"))
    save_file({"exp_avg:x": torch.ones(1)}, tmp_path/MOMENTS)
    with pytest.raises(Refusal, match="no moments by name"): Moments(tmp_path)
    assert not (tmp_path/"n").exists()

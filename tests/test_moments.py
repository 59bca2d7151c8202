"Moments that outlive a training: kept and gone on with to the bit, and grown with the weights as the gradient grows."
from dataclasses import replace
import numpy as np
import pytest, torch, transformers as hf
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from seqwarm.core.adam import KINDS, MOMENTS, Moments
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import layout
from seqwarm.core.objectives import causal
from seqwarm.core.train import Stage, _Loop, train
from seqwarm.core.write import write
from seqwarm.methods.depth import deepened, depth
from seqwarm.methods.moments import carry_moments, dual, evenly, grown
from seqwarm.methods.width import width
from test_depth import RMS, batch, load, source
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
        def strike(self, *a, at=at):
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

# ---- grown

class Held(dict):
    "Tensors by name, as a source of plans."
    def read(self, name, kind=None): return self[name if kind is None else (kind, name)]
    @property
    def names(self): return sorted({n for _, n in self})

def even(plan):
    "The plan with equal shares for all copies."
    arrays, rows = dict(plan.arrays), []
    for r in plan.rows:
        for i in (i for i in (0, 1) if f"by{i}" in r.arrays and not r.arrays[f"by{i}"].startswith("across.")):
            index = plan.arrays[r.arrays[f"index{i}"]].numpy()
            arrays[key := f"even.{r.target}"] = torch.from_numpy(evenly(index, np.ones(len(index), bool)))
            r = replace(r, arrays=r.arrays | {f"by{i}": key})
        rows.append(r)
    used = {k for r in rows for k in r.arrays.values()}
    return replace(plan, rows=rows, arrays={k: x for k, x in arrays.items() if k in used})

def loss(m): return m(**batch(m)).logits.tanh().square().sum(dim=-1).mul(batch(m)["attention_mask"][:, :m(**batch(m)).logits.shape[1]]).sum()

def gradients(m, lay) -> dict[str, torch.Tensor]:
    m.zero_grad(); loss(m).backward()
    return Held({n: p.grad for n, p in m.named_parameters(remove_duplicate=False) if n in lay.stored() and p.grad is not None})

def close(kind: str, x: torch.Tensor, y: torch.Tensor) -> bool:
    return (x - y).abs().max() <= (2e-5 if kind.startswith(RMS) else 1e-9)*max(float(y.abs().max()), 1e-3)

WIDE = ["gpt2", "olmo2, six heads of four", "llama", "qwen3", "gemma2", "olmo2", "bloom", "roberta-prelayernorm", "modernbert", "t5", "mbart", "bert", "electra", "mpnet", "bart", "deberta"]

@pytest.mark.parametrize("kind", WIDE)
def test_the_gradient_grows_by_the_dual_of_the_plan(kind, tmp_path):
    kind, _, uneven = kind.partition(", ")
    old = source(kind, tmp_path/"old"); plan = even(width(old, **dict(heads=6) if uneven else dict(hidden=32)))
    new = write(plan, {"source": old}, tmp_path/"new")
    assert not uneven or any(k.startswith("across.") for k in plan.arrays)
    small, big = gradients(load(old), old.layout), gradients(load(new), new.layout)
    by = dual(plan); by = replace(by, rows=[r for r in by.rows if r.target != "final_logits_bias"])     # a buffer
    found = dict(by.apply({"source": small}))
    assert set(found) == set(big)
    scale = max(float(g.abs().max()) for g in big.values())
    for n, x in found.items():
        role = new.layout.tensors[n].role
        if role in ("attn.k.bias", "cross.k.bias"): continue           # nothing but rounding
        if kind == "bloom": x, y = x[x.abs() > 0], big[n][x.abs() > 0]    # reading columns of silent heads have no history, and a gradient
        else: y = big[n]
        assert close(kind, x, y) or (x - y).abs().max() < 1e-7*scale, (n, float((x - y).abs().max()), float(y.abs().max()))

@pytest.mark.parametrize("kind,method", [(k, m) for k in ("llama", "gemma2", "t5", "qwen3") for m in ("lemon", "zero")])
def test_units_that_have_a_history_have_their_own(kind, method, tmp_path):
    old = source(kind, tmp_path/"old"); plan = even(width(old, method, hidden=32))
    new = write(plan, {"source": old}, tmp_path/"new")
    small, big = gradients(load(old), old.layout), gradients(load(new), new.layout)
    found = dict(dual(plan).apply({"source": small}))
    for n, x in found.items():
        there = x.abs() > 0
        assert there.any() and close(kind, x[there], big[n][there]), n
        assert there.sum() >= small[n].count_nonzero()

@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "t5"])
def test_layers_that_add_nothing_have_no_history_and_leave_the_others_theirs(kind, tmp_path):
    old = source(kind, tmp_path/"old"); plan = depth(old, method="identity")
    new = write(plan, {"source": old}, tmp_path/"new")
    small, big = gradients(load(old), old.layout), gradients(load(new), new.layout)
    found, fresh = dict(dual(plan).apply({"source": small})), plan.notes["new_layers"]
    assert set(big) - set(found) == {n for n, t in new.layout.stored().items() if t.layer in fresh.get(t.stack, ())}
    for n, x in found.items(): assert close(kind, x, big[n]), n
    for n in set(big) - set(found):
        silent = plan.row(n).op != "copy"
        assert new.layout.tensors[n].layer in fresh[new.layout.tensors[n].stack] and bool(big[n].any()) == silent, n

@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_grown_moments_are_those_that_the_large_model_would_have(kind, tmp_path):
    "Three steps of AdamW of the small model; the large one goes through the same weights, grown, with an optimizer of its own."
    old = source(kind, tmp_path/"old"); plan = even(width(old, hidden=32))
    small, big = load(old), load(write(plan, {"source": old}, tmp_path/"new"))
    first, second = (torch.optim.AdamW(m.parameters(), 0.01, (0.9, 0.98)) for m in (small, big))
    named = dict(big.named_parameters())
    for _ in range(3):
        with torch.no_grad():
            for n, x in plan.apply({"source": Held(small.state_dict())}): named[n].copy_(x)
        for m, adam in ((small, first), (big, second)): adam.zero_grad(); loss(m).backward(); adam.step()
    kept = Held({(k, n): first.state[p][k] for n, p in small.named_parameters() for k in (*KINDS, "step")})
    found = grown(plan, kept)
    for n, p in named.items():
        if p.grad.abs().max() < 1e-9: continue
        for k in KINDS: assert torch.allclose(found[f"{k}:{n}"], second.state[p][k], rtol=1e-6, atol=1e-9*float(second.state[p][k].abs().max())), (n, k)
        assert found[f"step:{n}"] == 3

def test_a_grown_model_goes_on(data, tmp_path, monkeypatch):
    first = run(model(data), data, tmp_path/"small", keep_moments=True)
    from_ = Checkpoint(first.path)
    plan = deepened(width(from_, hidden=32), method="identity")
    new = write(plan, {"source": from_}, tmp_path/"big")
    with pytest.raises(Refusal, match="grow them like the weights"): run(opened(new.path), data, tmp_path/"n", moments=first.path)
    whole = grown(plan, Moments(first.path))
    monkeypatch.setattr("seqwarm.methods.moments._BLOCK", 100)     # numbers: a few rows
    assert carry_moments(plan, first.path, new.path) == new.path/MOMENTS and equal(load_file(new.path/MOMENTS), whole)
    at = Moments(new.path)
    assert set(at.names) == {n for n in new.names if ".h.1." not in n} and at.shape("transformer.h.0.attn.c_attn.weight") == (32, 96)
    on, anew = (run(opened(new.path), data, tmp_path/"store", moments=m) for m in (new.path, None))
    assert on.path != anew.path and not equal(weights(on.path), weights(anew.path))
    assert on.history.loss.iloc[0] == anew.history.loss.iloc[0] and on.history.loss.iloc[-1] < on.history.loss.iloc[0]

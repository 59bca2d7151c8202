"""Copying and contrast: losses against plain loops, gradients where they belong, costs as torch counts them, resume exact."""
import math
from copy import deepcopy
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import family
from seqwarm.core.ledger import flops
from seqwarm.core.losses import surprisal
from seqwarm.core.stages import Chain, Stage, optimizer
from seqwarm.core.train import _Loop, train
from seqwarm.methods import metro, signals as module
from seqwarm.methods.metro import pair
from seqwarm.methods.signals import Contrast, Copying
import train_metro
from test_metro import B, S, V, batch, mlm
from train_small import equal, given, same, weights

def full(kind="bert", both=False, **more):
    "A pair that corrects all tokens; with `both`, one that contrasts as well."
    made = pair(mlm(kind), signals=[Copying(), Contrast()] if both else [Copying()], **more)
    made.signals["copying"].gate.weight.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return made

def padded(x):
    "The same rows, one shorter and one empty."
    real = torch.ones(B, S, dtype=torch.long); real[1, 9:] = 0; real[3] = 0
    return x | dict(input_ids=torch.where(real.bool(), x["input_ids"], 1), labels=torch.where(real.bool(), x["labels"], -100), attention_mask=real)


# ---------------------------------------------------------------- copying

@pytest.mark.parametrize("kind, rows", [("bert", "apart"), ("bert", "padded"), ("mpnet", "whole"), ("electra", "whole")])
def test_copying_is_a_plain_loop_over_probabilities(kind, rows):
    "In float64, token by token; and the simplified loss is read out of the same logits."
    made = full(kind); x, ids = batch("apart" if rows == "apart" else "whole", model=made.main)
    if rows == "padded": x = padded(x)
    sums, text, filled, _, _ = made.seen(x)
    slow = deepcopy(made).double(); gate = slow.signals["copying"].gate
    places = text.places + family(made.config.model_type).first_position(made.config.pad_token_id)
    given = dict(input_ids=filled, attention_mask=text.mask, position_ids=places)
    logits, states, total, masked = slow.main(**given).logits, slow.main.base_model(**given)[0], 0.0, 0.0
    for b in range(B):
        for s in range(S):
            if not text.real[b, s]: continue
            e = [math.exp(v) for v in logits[b, s].tolist()]; p = e[ids[b, s]] / sum(e)
            g = 1 / (1 + math.exp(-(gate.weight[0] @ states[b, s] + gate.bias[0]).item()))
            total -= math.log(g * (filled[b, s].item() == ids[b, s]) + (1 - g) * p)
            if x["labels"][b, s] != -100: masked -= math.log(p)
    assert sums[3].item() == pytest.approx(total, rel=1e-5) and sums[2].item() == pytest.approx(masked, rel=1e-5)
    assert made.counts(x)[3] == text.real.sum() and (filled != text.ids).sum() > 5
    simple = pair(mlm(kind)); assert torch.allclose(simple(**x), sums[:3], rtol=1e-5)     # the other losses are what they were

def test_an_extreme_gate_has_a_loss_and_a_slope():
    made = full(); x, _ = batch()
    for bias in (-1e4, 1e4):
        made.signals["copying"].gate.bias.data.fill_(bias); made.zero_grad()
        loss = made(**x)[3]; loss.backward()
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
        assert (made.signals["copying"].gate.bias.grad.abs() > 1) == (bias > 0)      # what was replaced can't be copied, however sure one is

def test_parts_are_one_large_batch():
    made = full(); x, _ = batch("whole"); x = padded(x); n = made.counts(x)
    w, parts = torch.tensor(list(made.weights.values())), [{k: v[i:j] for k, v in x.items()} for i, j in ((0, 2), (2, 5))]
    def grads(loss): made.zero_grad(); loss.backward(); return loss.item(), {k: p.grad.clone() for k, p in made.named_parameters() if p.grad is not None}
    one, whole = grads((made(**x) / n * w).sum())
    several, added = grads(sum((made(**p) / n * w).sum() for p in parts))
    assert sum(made.counts(p) for p in parts).tolist() == n.tolist() and several == pytest.approx(one, rel=1e-6) and whole.keys() == added.keys()
    for k in whole: assert torch.allclose(whole[k], added[k], atol=1e-6 * max(1, whole[k].abs().max().item())), k
    assert made.read(sum(made.tally(**p) for p in parts)) == pytest.approx(made.read(made.tally(**x)), rel=1e-6)

def test_logits_are_kept_once():
    made = full(); x, _ = batch(); kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t): made(**x)
    assert len([t for t in kept if t.numel() == B * S * V]) == 1
    z, at = torch.randn(2100, 5, dtype=torch.double, requires_grad=True), torch.arange(2100) % 5
    ours, theirs = surprisal(z, at), F.cross_entropy(z, at, reduction="none"); w = torch.rand(2100, dtype=torch.double)
    assert torch.allclose(ours, theirs) and torch.allclose(*(torch.autograd.grad((v * w).sum(), z)[0] for v in (ours, theirs)))
    assert surprisal(z[:0], at[:0]).shape == (0,)

# ---------------------------------------------------------------- contrast

def plain_contrast(made, x, ids, filled, share, tau):
    "Views row by row, cosines and quotients pair by pair, in float64."
    slow, views = deepcopy(made.main).double().base_model, []
    begin = family(made.config.model_type).first_position(made.config.pad_token_id)
    real = x["attention_mask"] if x.get("attention_mask") is not None and x["attention_mask"].dim() == 2 else torch.ones(B, S)
    docs = [0] * 8 + [1] * 6 if "position_ids" in x else [0] * S
    def mean(row, parts):
        here = [[i for i, d in enumerate(parts) if d == k] for k in dict.fromkeys(parts)]           # every document by itself
        h = [slow(input_ids=row[at][None], position_ids=torch.arange(len(at))[None] + begin)[0][0] for at in here]
        return torch.cat(h).mean(0)
    for b in range(B):
        if not (n := int(real[b].sum())): continue
        free = next(s for s in range(S) if x["labels"][b, s] == -100)
        m = round(share * n); at = math.ceil(x["chance"][b, free].item() * (n - m + 1)) - 1
        views += [mean(filled[b, :n], docs[:n]), mean(torch.as_tensor(ids[b, at:at + m]), docs[at:at + m])]
    total = 0.0
    for i, u in enumerate(views):
        close = {j: math.exp(F.cosine_similarity(u, v, 0).item() / tau) for j, v in enumerate(views) if j != i}
        total -= math.log(close[i ^ 1] / sum(close.values())) / 2
    return total, len(views) // 2

@pytest.mark.parametrize("kind, rows", [("bert", "apart"), ("mpnet", "whole"), ("bert", "padded"), ("mpnet", "apart")])
def test_contrast_is_a_plain_loop(kind, rows):
    made = pair(mlm(kind), signals=[Contrast(share=0.7, temperature=0.3)]).eval()
    x, ids = batch("apart" if rows == "apart" else "whole", model=made.main)
    if rows == "padded": x = padded(x)
    sums, _, filled, _, _ = made.seen(x)
    total, n = plain_contrast(made, x, ids, filled, 0.7, 0.3)
    assert sums[3].item() == pytest.approx(total, rel=1e-4) and made.counts(x)[3] == n == (4 if rows == "padded" else 5)

def test_a_row_is_cropped_alike_in_any_company_and_everywhere_in_time():
    main = mlm(); x, _ = batch("apart", model=main); text = metro._text(0, **x); whole = module._crop(text, 0.6); some = [4, 1]
    few = module._crop(metro._text(0, **{k: v[some] for k, v in x.items()}), 0.6)
    for name in ("ids", "places", "mask", "real"): assert torch.equal(getattr(few, name), getattr(whole, name)[some]), name
    begins = [module._window(metro._text(0, **batch("whole", step=k, model=main)[0]), 0.6)[0][:, 0] for k in range(100)]
    assert torch.bincount(torch.cat(begins), minlength=7).min() > 40 and torch.cat(begins).max() == S - round(0.6 * S)      # 500 in seven

def test_contrast_is_of_the_part():
    "The promise that others keep is not kept, and cannot be."
    made = pair(mlm(), signals=[Contrast()]).eval(); x, _ = batch("whole")
    halves = sum(made(**{k: v[i:j] for k, v in x.items()}) for i, j in ((0, 2), (2, 5)))
    whole = made(**x); assert torch.allclose(halves[:3], whole[:3], rtol=1e-5) and halves[3] < 0.8 * whole[3]
    assert abs(made(**{k: v[:1] for k, v in x.items()})[3]) < 1e-6

# ---------------------------------------------------------------- gradients, padding, names

def test_gradients_reach_gate_and_main_and_never_the_auxiliary():
    made = full(both=True); x, _ = batch(); words = made.main.get_input_embeddings().weight
    for k, name in ((3, "copying"), (4, "contrast")):
        made.zero_grad(); made(**x)[k].backward()
        assert all(p.grad is None or not p.grad.any() for p in made.auxiliary.parameters() if p is not words), name
        assert made.detect.weight.grad is None or not made.detect.weight.grad.any()
        assert words.grad.any() and made.main.base_model.encoder.layer[0].attention.self.query.weight.grad.any()
        gate = made.signals["copying"].gate.weight.grad; assert (gate is not None and gate.any()) == (name == "copying")
    told = made.shares(x); assert list(told) == ["aux", "rtd", "clm", "copying", "contrast"] and min(told.values()) > 0

def test_rows_of_padding_stay_finite():
    for kind in ("bert", "mpnet"):
        made = full(kind, both=True); x, _ = batch("whole", model=made.main); x = padded(x)
        found = made(**x); found.sum().backward()
        assert found.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
        some = [0, 1, 2, 4]; assert torch.allclose(made(**{k: v[some] for k, v in x.items()}), found, rtol=1e-5)
        assert all(math.isfinite(v) for v in made.read(made.tally(**x)).values())
        nothing = {k: v[[3, 3]] for k, v in x.items()}; found = made(**nothing); found.sum().backward()
        assert found.tolist() == [0] * 5 and made.counts(nothing).tolist() == [0] * 5

def test_a_pair_without_signals_is_what_it_was():
    bare = pair(mlm())
    for made in (pair(mlm(), signals=[Copying(0.0)]), pair(mlm(), signals=[Contrast()], weights=dict(contrast=0))):
        assert made.told == bare.told and list(made.weights) == ["aux", "rtd", "clm"] and made.state_dict().keys() == bare.state_dict().keys()
    assert "signals" not in bare.told and full().told["signals"] == dict(copying={})
    assert pair(mlm(), signals=[Contrast(temperature=0.1)]).told != pair(mlm(), signals=[Contrast()]).told
    with_more = full(both=True); assert torch.equal(with_more.detect.weight, bare.detect.weight)
    given = [Copying()]; one, two = (pair(mlm(), signals=given, seed=s) for s in (0, 1))
    assert not torch.equal(one.signals["copying"].gate.weight, two.signals["copying"].gate.weight) and not list(given[0].parameters())
    lay = with_more.layout; names = dict(with_more.named_parameters(remove_duplicate=False))
    assert set(names) <= set(lay.tensors) and set(lay.select("main/copy")) == {f"signals.copying.gate.{n}" for n in ("weight", "bias")}
    assert pair(mlm(), weights=dict(clm=0)).idle == ("main/head",) == pair(mlm(), weights=dict(clm=0), signals=[Contrast()]).idle
    assert full(weights=dict(clm=0)).idle == ()

# ---------------------------------------------------------------- cost

CASES = {"copying": (lambda: [Copying()], dict(weights=dict(clm=0)), ()), "copying and clm": (lambda: [Copying()], {}, ()),
         "contrast": (lambda: [Contrast()], {}, ()), "both": (lambda: [Contrast(share=0.5), Copying()], dict(weights=dict(clm=0)), ("embed.token",)),
         "contrast, head idle": (lambda: [Contrast()], dict(weights=dict(clm=0)), ("main/head",)),
         "gate asleep": (lambda: [Copying()], {}, ("main/copy", "main/attn"))}

@pytest.mark.parametrize("kind, case", [("bert", c) for c in CASES] + [("mpnet", "both"), ("electra", "both")])
def test_flops_as_torch_counts(kind, case):
    some, options, frozen = CASES[case]
    main = mlm(kind); main.set_attn_implementation("eager"); made = pair(main, signals=some(), **options).train()
    made.auxiliary.set_attn_implementation("eager"); lay = made.layout
    optimizer(made, lay, Chain((Stage(1, objective="metro", frozen=frozen),)))
    x, _ = batch(model=main); x["labels"][:] = -100; x["labels"][:, 2:5] = 7   # three a row
    between = 2 * (2 * B) ** 2 * main.config.hidden_size * ("contrast" in made.signals)      # cosines of all views, which belong to no sequence
    for times in (1, 3):
        with FlopCounterMode(display=False) as counter:
            loss = made(**x).sum()
            if times == 3: loss.backward()
        told = flops(lay, S, train=times == 3, frozen=frozen, asked=3)
        assert told == pytest.approx((counter.get_total_flops() - times * between) / B, rel=1e-6), times

# ---------------------------------------------------------------- training

def trained(folder, store, accumulate=1, **contrast):
    data = given(str(folder)); made = pair(train_metro.mlm(data["tokenizer"], dropout=0.1), signals=[Copying(), Contrast(**contrast)], weights=dict(clm=0))
    stages = [Stage(4, 5e-3, "metro?rate=0.3", frozen=made.idle)]
    return train(made, stages=stages, store=store, **data, batch=4, accumulate=accumulate, every=2, save_every=2, sequences=8), made

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("signals")
    torch.set_num_threads(threads)

def test_resumed_is_bit_equal_and_gate_and_cost_are_kept(folder, monkeypatch):
    calm, made = trained(folder, folder/"calm", accumulate=2); update = _Loop.update
    def struck(self, model, opt, feed, step, rates):
        if step == 3: raise KeyboardInterrupt
        return update(self, model, opt, feed, step, rates)
    monkeypatch.setattr(_Loop, "update", struck)
    with pytest.raises(KeyboardInterrupt): trained(folder, folder/"struck", accumulate=2)
    monkeypatch.setattr(_Loop, "update", update); again, _ = trained(folder, folder/"struck", accumulate=2)
    assert same(calm, again) and equal(weights(calm.path/"auxiliary"), weights(again.path/"auxiliary"))
    kept = load_file(calm.path/"detect.safetensors"); assert (again.path/"detect.safetensors").read_bytes() == (calm.path/"detect.safetensors").read_bytes()
    assert set(kept) == {"weight", "bias", "copying.gate.weight", "copying.gate.bias"} and torch.equal(kept["copying.gate.weight"], made.signals["copying"].gate.weight)
    assert {"copying", "contrast", "clm"} <= set(calm.history) and calm.history.copying.iloc[-1] < calm.history.copying.iloc[0]
    assert calm.card.cost["flops"] == 4 * 4 * flops(made.layout, 16, asked=5)

# ---------------------------------------------------------------- bad input

def test_refusals():
    x, _ = batch("whole")
    for says, call in {
        "share cannot be 0": lambda: Contrast(share=0), "share cannot be 1.5": lambda: Contrast(share=1.5), "temperature cannot be 0": lambda: Contrast(temperature=0),
        "two signals of one name": lambda: pair(mlm(), signals=[Copying(), Copying()]), "weight of copying cannot be -1": lambda: pair(mlm(), signals=[Copying(-1)]),
        "no loss of METRO 'contrast'": lambda: pair(mlm(), signals=[Copying()], weights=dict(contrast=1)),
        "no other rows": lambda: pair(mlm(), signals=[Contrast()]).train()(**{k: v[:1] for k, v in x.items()})}.items():
        with pytest.raises(Refusal, match=says): call()

"""What a GPU shall not change, and what spares its memory and time: here on a CPU with small models; where there is a GPU, there.

Losses in bfloat16 near those in float32, compiled equal to eager, resumed to the bit, sleepers untouched; the loss in parts and layers that are computed
twice equal to the plain ones, in every family; and a step that never waits for the device.
"""
import os
from functools import cache
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # torch reads it once, at the first product
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, GPT2Config, GPT2LMHeadModel
import families
import train_metro, train_seq2seq
from seqwarm.core import memory, train as module
from seqwarm.core.errors import Refusal
from seqwarm.core.feed import Feed
from seqwarm.core.losses import several, sums
from seqwarm.core.memory import checkpointed, linear_nll, thrifty
from seqwarm.core.stages import Stage
from seqwarm.core.train import _Loop, train
from train_small import given, same, weights

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")

@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick):
    threads = torch.get_num_threads()
    yield tmp_path_factory.mktemp("gpu")
    torch.set_num_threads(threads)

def gpt2(tokenizer, dropout: float = 0.0, width: int = 32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=width, n_layer=2, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout,
                                      attn_pdrop=dropout, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))

def trained(folder, store: str, stages=(Stage(50),), dropout: float = 0.0, **changed):
    "A row of history a step."
    data = given(str(folder))
    return train(gpt2(data["tokenizer"], dropout), stages=list(stages), store=folder/store, **data, **dict(batch=8, every=1, sequences=8) | changed)

def losses(t) -> np.ndarray: return t.history.train.to_numpy()[1:].astype(float)

# ---- the loss in parts

class Largest(TorchDispatchMode):
    "The largest floating tensor that anything made."
    numbers = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(x) and x.is_floating_point(): self.numbers = max(self.numbers, x.numel())
        return out

@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("asleep", [None, "states", "matrix"])
def test_the_loss_in_parts_is_the_plain_one_in_float64(monkeypatch, cap, asleep):
    monkeypatch.setattr(memory, "_PART", 40 * 6)     # six rows of 23 at a time, five at the end
    made = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, dtype=torch.float64, generator=made, requires_grad=n != asleep) for s, n in (((23, 8), "states"), ((40, 8), "matrix"), ((40,), "bias")))
    y = torch.randint(40, (23,), generator=made); y[::4] = -100
    z = F.linear(x, w, b)
    plain = F.cross_entropy(cap * torch.tanh(z / cap) if cap else z, y, reduction="sum")
    ours, awake = linear_nll(x, w, y, b, cap), [t for t in (x, w, b) if t.requires_grad]
    assert abs(ours - plain) <= 1e-12 * plain
    for one, other in zip(*(torch.autograd.grad(0.37 * loss, awake) for loss in (ours, plain))): assert (one - other).abs().max() <= 1e-12
    with torch.no_grad(): assert torch.equal(linear_nll(x, w, y, b, cap), ours)

def test_it_never_holds_the_logits(monkeypatch):
    monkeypatch.setattr(memory, "_PART", 50 * 10)
    x, w, y = torch.randn(200, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True), torch.randint(50, (200,))
    seen = {}
    for name, loss in dict(parts=lambda: linear_nll(x, w, y), plain=lambda: F.cross_entropy(x @ w.T, y, reduction="sum")).items():
        with Largest() as found: loss().backward()
        seen[name] = found.numbers
    assert seen == dict(parts=200 * 4, plain=200 * 50)      # the states' gradient is the largest that is left

@cache
def family(kind: str):
    model = families.model(kind, 24, False).to(DEVICE)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.1      # so that what is drawn twice matters
    model.config.use_cache = False
    ids = torch.randint(5, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels = ids.clone(); labels[:, ::3] = -100
    return model.train(), dict(input_ids=ids, labels=labels) | (dict(decoder_input_ids=ids.roll(1, 1)) if model.config.is_encoder_decoder else {})

def step(model, inputs) -> tuple[torch.Tensor, dict]:
    model.zero_grad(); torch.manual_seed(3)
    loss = sums(model, model, inputs).sum(); loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

def near(a: dict, b: dict, tol: float) -> bool:
    size = max(g.abs().max() for g in b.values())
    return a.keys() == b.keys() and all((a[n] - b[n]).abs().max() <= tol * size for n in b)

@pytest.mark.parametrize("kind", families.FAMILIES)
def test_every_family_has_its_loss_in_parts_and_its_layers_twice(kind, monkeypatch):
    "With what each does to its logits: BART's bias, Gemma's cap, T5's scale."
    monkeypatch.setattr(memory, "_PART", 1000)
    model, inputs = family(kind)
    loss, grads = step(model, inputs)
    with checkpointed(model) as layers: again, same_grads = step(model, inputs)
    assert torch.equal(again, loss) and near(same_grads, grads, 0) and len(layers) == model.config.num_hidden_layers * (1 + model.config.is_encoder_decoder)
    with thrifty(model, chunked=True, checkpointing=True): parts, part_grads = step(model, inputs)
    assert abs(parts - loss) <= 1e-5 * loss and near(part_grads, grads, 2e-5)
    assert not several(model) and not any("forward" in vars(m) for m in model.modules())

def test_what_has_no_head_of_its_own_is_refused_before_anything_is_written(folder):
    data = given(str(folder))
    new = DebertaV2ForMaskedLM(DebertaV2Config(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, legacy=False))
    for model, says in ((new, "no matrix of their own"), (train_metro.pair(train_metro.mlm(data["tokenizer"])), "brings its own losses")):
        with pytest.raises(Refusal, match=says): train(model, stages=[Stage(2, objective="mlm")], store=folder/"refused", **data, chunked=True)
    assert not (folder/"refused").exists()

def test_a_training_s_options_change_its_address_and_not_its_losses(folder):
    plain = trained(folder, "options", dropout=0.1)
    for options, tol in ((dict(checkpointing=True), 1e-5), (dict(chunked=True), 1e-5), (dict(chunked=True, checkpointing=True, accumulate=2), 2e-2)):
        other = trained(folder, "options", dropout=0.1, **options)
        assert other.path != plain.path and np.allclose(losses(other)[:1 if "accumulate" in options else None], losses(plain)[:1 if "accumulate" in options else None], rtol=tol, atol=0)
        assert other.card.cost["flops"] == plain.card.cost["flops"]     # what it is worth, not what was computed twice

def test_kept_outputs_and_pairs_are_spared_as_well(folder):
    data = given(str(folder))
    for name, make, how in (("seq2seq", train_seq2seq.model, dict(chunked=True, checkpointing=True)), ("pair", lambda t: train_metro.pair(train_metro.mlm(t)), dict(checkpointing=True))):
        stage = Stage(8, objective="denoise", frozen=("encoder/", "embed.token"), repeat=4, keep="float32") if name == "seq2seq" else Stage(8, objective="metro")
        one, other = (train(make(data["tokenizer"]), stages=[stage], store=folder/name, **data, batch=4, every=1, sequences=4, **h) for h in ({}, how))
        assert one.path != other.path and np.allclose(losses(one), losses(other), rtol=1e-5)

# ---- a step does not wait

class Waits(TorchDispatchMode):
    "What a device would be waited for: a number read from it, a shape that depends on its numbers, a copy to it."
    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) in self.NAMES: self.seen.append(name)
        return func(*args, **kwargs or {})

def test_a_step_reads_nothing_from_the_device(folder, monkeypatch):
    update, seen = _Loop.update, []
    def watched(self, model, optimizer, feed, step, rates):
        parts = feed.parts(step)
        with pytest.MonkeyPatch.context() as m, Waits() as waits:
            m.setattr(Feed, "parts", lambda *_: parts)
            if GPU and step > 2: torch.cuda.set_sync_debug_mode("error")
            try: out = update(self, model, optimizer, feed, step, rates)
            finally: GPU and torch.cuda.set_sync_debug_mode("default")
        seen.append(waits.seen); return out
    monkeypatch.setattr(_Loop, "update", watched)
    for chunked in (False, True): trained(folder, f"waits{chunked}", [Stage(5)], every=5, chunked=chunked)
    assert seen == [[]] * 10
    with Waits() as waits: torch.ones(1, device=DEVICE).item()
    assert waits.seen == ["_local_scalar_dense"]      # it would have been seen

def test_a_batch_that_is_made_beside_is_the_same(folder, monkeypatch):
    "As a GPU's feed does it; with the validation reading the same corpus meanwhile."
    data = given(str(folder)); data["valid"] = data["corpus"]
    run = lambda store: train(gpt2(data["tokenizer"]), stages=[Stage(30), Stage(10)], store=folder/store, **data, batch=32, every=2, sequences=8)
    monkeypatch.setattr(Feed, "_beside", False); calm = run("calm")
    made = []
    monkeypatch.setattr(Feed, "_beside", True); monkeypatch.setattr(Feed, "_made", lambda self, n, usual=Feed._made: made.append(n) or usual(self, n))
    assert same(run("beside"), calm) and made == [*range(31), *range(30, 41)]

# ---- what a GPU shall not change

@pytest.fixture
def precise(monkeypatch):
    "Trainings in a precision of the test's choice; accelerate keeps one for a process."
    def chosen(kind: str) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(module, "_accelerator", lambda *_: Accelerator(cpu=not GPU, mixed_precision=kind))
    yield chosen
    AcceleratorState._reset_state(reset_partial_state=True)

def test_bf16_begins_as_float32_does(folder, precise):
    found = {}
    for kind in ("no", "bf16"):
        precise(kind)
        for chunked in (False, True): found[kind, chunked] = losses(trained(folder, f"{kind}{chunked}", chunked=chunked))
    for chunked in (False, True): assert np.abs(found["bf16", chunked] / found["no", False] - 1).max() < 0.01 and (found["bf16", chunked] != found["no", False]).any()

@pytest.mark.parametrize("options", [{}, dict(chunked=True, checkpointing=True), dict(compile=True)], ids=["plain", "spared", "compiled"])
def test_every_stage_is_in_bf16(folder, precise, monkeypatch, options):
    "So a run that is broken off in the second one goes on to the same bits; and accelerate's wrapper is off the model afterwards."
    precise("bf16"); compile, update, seen = torch.compile, _Loop.update, []
    monkeypatch.setattr(torch, "compile", lambda m, **kw: compile(m, backend="eager", **kw))
    def noted(self, model, *args):
        hook = self.model.lm_head.register_forward_pre_hook(lambda _, given: seen.append(torch.is_autocast_enabled(given[0].device.type)))
        try: return update(self, model, *args)
        finally: hook.remove(); assert "_original_forward" in vars(self.model)
    def run(store, at=None):
        def struck(self, model, optimizer, feed, step, rates):
            if step == at: raise KeyboardInterrupt
            return (update if "compile" in options else noted)(self, model, optimizer, feed, step, rates)
        monkeypatch.setattr(_Loop, "update", struck)
        return trained(folder, store, [Stage(4), Stage(4, frozen=("ffn",))], 0.1, every=2, save_every=2, **options)
    calm = run(f"halves{len(options)}-calm")
    with pytest.raises(KeyboardInterrupt): run(f"halves{len(options)}-broken", 6)
    assert same(run(f"halves{len(options)}-broken"), calm) and all(seen) and len(seen) == (0 if "compile" in options else 16)
    model = gpt2(given(str(folder))["tokenizer"])
    forward = type(model).forward
    train(model, stages=[Stage(2)], store=folder/f"after{len(options)}", **given(str(folder)), batch=8, sequences=8, **options)
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(vars(model)) and model.forward.__func__ is forward

def test_each_stage_is_compiled(folder, monkeypatch):
    "Also where torch keeps no more than one way to compute a model at a time."
    compile, made = torch.compile, []
    def backend(graph, _): made.append(graph); return graph.forward
    monkeypatch.setattr(torch, "compile", lambda m, **kw: compile(m, backend=backend, **kw))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1): trained(folder, "each", [Stage(2), Stage(2, frozen=("ffn",)), Stage(2)], every=6, compile=True)
    assert len(made) == 3

@pytest.mark.parametrize("options", [{}, dict(chunked=True, checkpointing=True)], ids=["plain", "spared"])
def test_compiled_is_eager(folder, monkeypatch, options):
    "By inductor on a GPU; traced here, where building kernels would take minutes: benchmarks/gpu.py measures those."
    backend = "inductor" if GPU else "aot_eager"
    compile, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda m, **kw: compiled.append(m) or compile(m, backend=backend, **kw))
    torch._dynamo.reset()
    eager, other = (trained(folder, f"compiled{len(options)}", [Stage(12)], compile=c, **options) for c in (False, True))
    assert len(compiled) == 1 and eager.path != other.path and np.allclose(losses(eager), losses(other), rtol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1

def test_resumed_is_exact_with_deterministic_algorithms_and_sleepers_stay(folder, monkeypatch):
    torch.use_deterministic_algorithms(True)
    try:
        run = lambda store: trained(folder, store, [Stage(10, frozen=("ffn",)), Stage(10, frozen=("attn", "embed.token"))], 0.1, chunked=True, checkpointing=True, every=5, save_every=3)
        calm, update = run("steady"), _Loop.update
        for at in (7, 13):
            def struck(self, model, optimizer, feed, step, rates, at=at):
                if step == at: raise KeyboardInterrupt
                return update(self, model, optimizer, feed, step, rates)
            monkeypatch.setattr(_Loop, "update", struck)
            with pytest.raises(KeyboardInterrupt): run("broken")
        monkeypatch.setattr(_Loop, "update", update)
        assert same(run("broken"), calm)
        whole = trained(folder, "sleep", [Stage(10, 1e-2, frozen=("attn", "embed.token", "norm.final"))], chunked=True, checkpointing=True)
    finally: torch.use_deterministic_algorithms(False)
    lay, before, after = module.layout(gpt2(given(str(folder))["tokenizer"]).config, "GPT2LMHeadModel"), gpt2(given(str(folder))["tokenizer"]).state_dict(), weights(whole.path)
    asleep = lay.select(("attn", "embed.token", "norm.final"))
    assert len(asleep) > 8 and all(torch.equal(before[n], after[n]) == (n in asleep) for n in after if not n.endswith("attn.bias") or n in asleep)

"""Rates apart, weights that grow, skipped spikes, bf16: each against a loop by hand; killed and resumed to the last bit; without them all is as it was."""
import json, math, os, random, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM
from seqwarm import __version__
from seqwarm.core import train as module
from seqwarm.core.errors import Refusal
from seqwarm.core.feed import weights_fingerprint
from seqwarm.core.files import fingerprint
from seqwarm.core.layout import layout
from seqwarm.core.losses import measured
from seqwarm.core.noise import Draws
from seqwarm.core.objectives import causal, objective
from seqwarm.core.stages import Chain, Stage, optimizer
from seqwarm.core.train import _Loop, train
from seqwarm.core.vocab import tokenizer_fingerprint
from seqwarm.methods import metro
from seqwarm.methods.metro import pair
import train_guard
from train_guard import SKIPPED, SPIKES, spiking
from train_small import equal, given, same, weights

pytestmark = pytest.mark.usefixtures("quick")

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("guard")
    torch.set_num_threads(threads)

@pytest.fixture(scope="module")
def data(folder): return given(str(folder))

@pytest.fixture(scope="module")
def calm(folder): return train_guard.main(str(folder), str(folder/"calm"))

def struck_at(monkeypatch, at: int, run):
    "Run a training that is broken off before a step; then as it is."
    update = _Loop.update
    def struck(self, model, opt, feed, step, rates):
        if step == at: raise KeyboardInterrupt
        return update(self, model, opt, feed, step, rates)
    with monkeypatch.context() as m:
        m.setattr(_Loop, "update", struck)
        with pytest.raises(KeyboardInterrupt): run()
    return run()

def step_by_hand(model, data, step: int) -> torch.Tensor:
    "The mean causal loss of a step's four sequences."
    packed = data["corpus"].sample(np.arange(step * 4, step * 4 + 4)); inputs = causal(packed, None, model.config, None); labels = inputs.pop("labels")
    return F.cross_entropy(model(**inputs).logits.flatten(0, 1).float(), labels.flatten(), reduction="sum") / (labels != -100).sum()

def order(model, key):
    "Parameters in the order in which their norms are added up."
    return sorted(model.parameters(), key=lambda p: (key(p), p.dim() < 2))

def adamw(groups): return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), fused=True)

# ---------------------------------------------------------------- rates apart

RATES = [Stage(5, 4e-3, rates={"embed": 0.5, "ffn": 2, "ffn.up": 3}, frozen=("attn",)), Stage(6, 4e-3, warmup=0.5, continues=True, rates={"embed.token": 4.0})]

def factors(name: str, stage: int) -> float:
    "The factor of a tensor of GPT-2, read off RATES by eye; a norm belongs to what follows it."
    if stage: return 4.0 if "wte" in name else 1.0
    return 0.5 if "wte" in name or "wpe" in name else 3.0 if "c_fc" in name else 2.0 if "mlp" in name or "ln_2" in name else 1.0

def test_rates_are_plain_adamw_with_a_group_for_each_tensor(folder, data):
    "One optimizer throughout, each tensor a group of its own: so moments are handed over as they are, whatever the factor was and is."
    trained = train(train_guard.model(data["tokenizer"]), stages=RATES, store=folder/"rates", **data, batch=4, sequences=4)
    model = train_guard.model(data["tokenizer"]).train(); named = {id(p): n for n, p in model.named_parameters()}
    sleeper = lambda p: ".attn." in named[id(p)] or "ln_1" in named[id(p)]
    opt, whole = adamw([dict(params=[p], weight_decay=0.1 * (p.dim() > 1)) for p in model.parameters()]), Stage(11, 4e-3)
    for step in range(11):
        late = step >= 5
        for p in model.parameters(): p.requires_grad_(late or not sleeper(p))
        step_by_hand(model, data, step).backward()
        awake = [p for p in order(model, lambda p, late=late: (late and sleeper(p), factors(named[id(p)], late))) if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(awake, 1.0)
        for g in opt.param_groups:
            [p] = g["params"]
            g["lr"] = whole.lr_at(step) * (min(1.0, (step - 4) / 3) if late and sleeper(p) else 1.0) * factors(named[id(p)], late)
        opt.step(); opt.zero_grad(set_to_none=True)
    got, start = weights(trained.path), train_guard.model(data["tokenizer"])
    for n, p in model.named_parameters(): assert torch.equal(got[n], p) and not torch.equal(p, start.get_parameter(n)), n
    assert trained.history.lr.iloc[-1] == whole.lr_at(10)                       # the stage's own

def test_groups_are_by_woke_factor_and_decay(data):
    model = train_guard.model(data["tokenizer"]); lay = layout(model.config, type(model).__name__)
    found = [(g["woke"], g.get("factor"), g["weight_decay"] > 0) for g in optimizer(model, lay, Chain(tuple(RATES)), 1).param_groups]
    assert found == [(0, None, True), (0, None, False), (0, 4.0, True), (1, None, True), (1, None, False)]
    first = optimizer(model, lay, Chain(tuple(RATES)), 0)
    assert [(g.get("factor"), len(g["params"])) for g in first.param_groups] == [(0.5, 2), (None, 2), (2, 1), (2, 3), (3, 1), (3, 1)]
    assert all("factor" not in g for g in optimizer(model, lay, Chain((Stage(3),))).param_groups)   # states hold what they always held

def test_of_a_pair_the_auxiliary_and_the_detector_have_rates_of_their_own(data):
    made = pair(bert(data["tokenizer"])); chain = Chain((Stage(3, 1.0, "metro", rates={"auxiliary/": 2.0, "detect": 0.5}),))
    rate = {id(p): g.get("factor", 1.0) for g in optimizer(made, made.layout, chain).param_groups for p in g["params"]}
    for n, p in made.named_parameters():   # the words are one storage, the main model's
        assert rate[id(p)] == (2.0 if n.startswith("auxiliary.") else 0.5 if n.startswith("detect.") else 1.0), n
    assert rate[id(made.auxiliary.get_input_embeddings().weight)] == 1.0

@pytest.mark.parametrize("at", [4, 5, 8])
def test_rates_resumed_before_at_and_after_the_switch(folder, data, monkeypatch, at):
    run = lambda store: train(train_guard.model(data["tokenizer"]), stages=RATES, store=folder/store, **data, batch=4, sequences=4, save_every=1)
    assert same(struck_at(monkeypatch, at, lambda: run(f"rates-{at}")), run("rates-calm"))

# ---------------------------------------------------------------- as it was

OLD = dict(steps=3, lr=2e-3, objective="causal", schedule="linear", warmup=0.1, frozen=["attn"], weight_decay=0.1, continues=False, repeat=None, keep=None)

def test_a_training_without_all_this_lies_where_it_always_lay(folder, data):
    "The address, written out as it was before there were rates and guards."
    model = train_guard.model(data["tokenizer"])
    key = [weights_fingerprint(model), model.config.to_dict(), tokenizer_fingerprint(data["tokenizer"]), data["corpus"].fingerprint, data["valid"].fingerprint,
           [OLD], [], "train", 4, 1, 0, 1, 4, False, module._accelerator(None).device.type, torch.__version__, transformers.__version__, __version__]
    call = lambda **kw: train(train_guard.model(data["tokenizer"]), stages=[Stage(**OLD | kw.pop("stage", {}))], store=folder/"old", **data, batch=4, sequences=4, **kw)
    plain = call()
    assert plain.path.parent.name == fingerprint(key) and "skipped" not in plain.history
    others = {call(stage=dict(rates={"embed": 2})).path, call(guard=5).path, call(guard=6).path, plain.path}
    assert len(others) == 4 and call(guard=5.0).path in others
    made = pair(bert(data["tokenizer"]))
    assert made.told == dict(main=made.main.config.to_dict(), auxiliary=made.auxiliary.config.to_dict(), weights=dict(aux=1.0, rtd=50.0, clm=1.0), still=False)

def test_rates_as_they_are_written():
    one, other = Stage(3, rates={"embed": 2, "ffn": 0.5}), Stage(3, rates=[["embed", 2], ["ffn", 0.5]])   # as JSON has pairs
    assert one == other and hash(one) == hash(other) and one != Stage(3, rates={"ffn": 0.5, "embed": 2}) and Stage(3, rates={}) == Stage(3)

def test_a_guard_that_skips_nothing_changes_no_bit(folder, data):
    free, guarded = (train_guard.main(str(folder), str(folder/f"free-{g}"), {}, guard=g) for g in (None, 1e9))
    assert equal(weights(free.path), weights(guarded.path)) and free.path.parent.name != guarded.path.parent.name
    assert guarded.history.skipped.eq(0).all() and guarded.history.drop(columns=["skipped", "seconds"]).equals(free.history.drop(columns="seconds"))

# ---------------------------------------------------------------- the guard

def by_hand(data, spikes: dict, stages, guard: float = 5, upto: int = 1000):
    "Plain AdamW and plain clipping; updates left out by a rule written down once more. The model, and each step's loss, or None."
    model, step, told = train_guard.model(data["tokenizer"]).train(), 0, []
    for stage in stages:
        opt, usual = adamw([dict(params=[p for p in model.parameters() if (p.dim() > 1) == d], weight_decay=0.1 * d) for d in (True, False)]), []
        for i in range(min(stage.steps, upto)):
            loss = step_by_hand(model, data, step); (loss * spikes.get(step, 1.0)).backward()
            norm = torch.nn.utils.clip_grad_norm_(order(model, lambda p: 0), 1.0).item()
            last = sorted(usual[-50:]); n = len(last); middle = (last[n // 2] + last[(n - 1) // 2]) / 2 if n else 0
            good = math.isfinite(norm) and (n < 10 or norm <= guard * middle)
            for g in opt.param_groups: g["lr"] = stage.lr_at(i)
            if good: opt.step(); usual.append(norm)
            opt.zero_grad(set_to_none=True); told.append(loss.item() if good else None); step += 1
    return model, told

def test_the_guard_is_a_loop_that_leaves_updates_out(folder, data, calm):
    model, told = by_hand(data, SPIKES, train_guard.STAGES); got = weights(calm.path)
    assert [i for i, x in enumerate(told) if x is None] == [13, 14, 18]       # 23 is the fourth step of a stage, where nobody knows what is usual
    for n, p in model.named_parameters(): assert torch.equal(got[n], p), n
    h = calm.history.set_index("step")
    for end in (n for n in h.index if n):
        begin, made = h.index[h.index.get_loc(end) - 1], [x for x in told[:end] if x is not None]
        assert h.skipped[end] == end - len(made)
        assert h.train[end] == pytest.approx(np.mean([x for x in told[begin:end] if x is not None]), rel=1e-6)
    assert calm.card.cost["tokens"] == 34 * 4 * 16                             # what was skipped was paid for
    free, _ = by_hand(data, {}, train_guard.STAGES)
    assert not all(torch.equal(got[n], p) for n, p in free.named_parameters())

@pytest.mark.parametrize("at", [14, 15, 20, 24])
def test_resumed_it_knows_what_was_usual(folder, calm, monkeypatch, at):
    "Between two skipped ones, after them, at the switch and behind it."
    assert same(struck_at(monkeypatch, at, lambda: train_guard.main(str(folder), str(folder/f"guard-{at}"), save_every=1)),
                train_guard.main(str(folder), str(folder/"guard-calm"), save_every=1))
    assert equal(weights(calm.path), weights(train_guard.main(str(folder), str(folder/"guard-calm"), save_every=1).path))

def test_ten_in_a_row_pass_and_eleven_are_refused(folder, data):
    spikes = dict.fromkeys(range(12, 22), 1e4); stages = [Stage(26, 3e-3)]
    kept = train_guard.main(str(folder), str(folder/"ten"), spikes, stages)
    model, told = by_hand(data, spikes, stages)
    assert equal(weights(kept.path), {n: p for n, p in model.named_parameters()}) and kept.history.skipped.iloc[-1] == 10
    empty = kept.history.set_index("step").loc[20]                              # nothing was updated since the row before
    assert math.isnan(empty.train) and empty.skipped == 8 and empty.loss == kept.history.set_index("step").loss[15]
    with pytest.raises(Refusal, match=r"11 updates in a row were skipped, the last in step 22 .*lower the learning rate"):
        train_guard.main(str(folder), str(folder/"eleven"), spikes | {22: float("nan")}, stages)
    [state] = (folder/"eleven").glob("*/state-*"); book = json.loads((state/"book.json").read_text())
    assert book["step"] == 21 and book["guard"]["row"] == 9 and len(book["guard"]["norms"]) == 12
    assert not list((folder/"eleven").glob("*/model"))
    before, _ = by_hand(data, {}, stages, upto=12)                              # what is kept is what the last good update made
    for n, x in load_file(state/"model.safetensors").items(): assert torch.equal(x, before.get_parameter(n)), n

def test_without_a_guard_a_gradient_that_is_no_number_still_ends_it(folder):
    with pytest.raises(Refusal, match="became nan"): train_guard.main(str(folder), str(folder/"unguarded"), {14: float("inf")}, guard=None)

def test_two_ranks_skip_together_and_are_one(folder):
    "Only one of them has the spike in its share of the gradient."
    one = train_guard.main(str(folder), str(folder/"one"), SKIPPED)
    subprocess.run([sys.executable, Path(train_guard.__file__), folder, folder/"two", str(random.randint(20000, 60000))],
                   check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, capture_output=True)
    [history] = (folder/"two").glob("*/history.json"); rows = json.loads(history.read_text())
    assert [r["skipped"] for r in rows] == one.history.skipped.tolist() and rows[-1]["skipped"] == 3
    assert np.allclose([r["loss"] for r in rows], one.history.loss, rtol=1e-5)

# ---------------------------------------------------------------- weights that grow

def bert(tokenizer) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                      max_position_embeddings=20, pad_token_id=tokenizer.pad_token_id, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))

METRO = "metro?rate=0.3"
GROWING = [Stage(5, 3e-3, METRO), Stage(5, 3e-3, METRO, continues=True)]

def grown(folder, data, store, **changed):
    made = pair(bert(data["tokenizer"]), ramp=dict(rtd=0.4))
    return train(made, stages=GROWING, store=folder/store, **data, **dict(batch=4, every=1, save_every=2, sequences=8) | changed)

def test_a_weight_grows_over_its_share_of_the_chain(folder, data):
    "By hand, to the bit; what is told is weighed in full."
    trained, made = grown(folder, data, "grown"), pair(bert(data["tokenizer"])).train()
    opt, whole = adamw([dict(params=[p for p in made.parameters() if (p.dim() > 1) == d], weight_decay=0.1 * d) for d in (True, False)]), Stage(10, 3e-3)
    assert trained.history.loss.iloc[0] == measured(made, data["valid"], objective(METRO), data["tokenizer"], 8)["loss"]
    for step in range(10):
        packed = data["corpus"].sample(np.arange(step * 4, step * 4 + 4))
        x = objective(METRO)(packed, Draws(0, step, packed.samples, step / 10), made.config, data["tokenizer"]); n = made.counts(x)
        found, grows = made(**x), [0.0, 12.5, 25.0, 37.5][step] if step < 4 else 50.0
        (found / n * torch.tensor([1.0, grows, 1.0])).sum().backward()
        torch.nn.utils.clip_grad_norm_(order(made, lambda p: 0), 1.0)
        for g in opt.param_groups: g["lr"] = whole.lr_at(step)
        opt.step(); opt.zero_grad(set_to_none=True)
        assert trained.history.train.iloc[step + 1] == pytest.approx((found / n * torch.tensor([1.0, 50.0, 1.0])).sum().item(), rel=1e-6)
    got = weights(trained.path)
    for n, p in made.main.named_parameters(): assert torch.equal(got[n], p), n
    plain = train(pair(bert(data["tokenizer"])), stages=GROWING, store=folder/"ungrown", **data, batch=4, every=1, save_every=2, sequences=8)
    assert plain.path.parent.name != trained.path.parent.name and not equal(weights(plain.path), got)

def test_growing_guarded_and_apart_it_resumes_bit_equal(folder, data, monkeypatch):
    stages = [Stage(12, 3e-3, METRO, rates={"auxiliary/": 2.0, "detect": 0.5}), Stage(4, 3e-3, METRO, continues=True, rates={"auxiliary/": 2.0})]
    def run(store):
        made = pair(bert(data["tokenizer"]), ramp=dict(rtd=0.8, clm=0.1))
        with spiking({2: float("nan"), 11: 1e5}): return train(made, stages=stages, store=folder/store, **data, batch=4, every=3, save_every=1, sequences=4, guard=8)
    one, other = struck_at(monkeypatch, 12, lambda: run("all-struck")), run("all-calm")
    assert same(one, other) and equal(weights(one.path/"auxiliary"), weights(other.path/"auxiliary")) and one.history.skipped.iloc[-1] == 2

# ---------------------------------------------------------------- bf16

@pytest.fixture
def half(monkeypatch):
    "The loop in bf16, as on a GPU that has it; a process has one precision at a time."
    def switch(on: bool):
        AcceleratorState._reset_state(True)
        if on: monkeypatch.setattr(module, "_accelerator", lambda _: Accelerator(cpu=True, mixed_precision="bf16"))
    yield switch
    AcceleratorState._reset_state(True)

@pytest.mark.parametrize("kind", ["metro", "mlm"])
def test_in_bf16_the_first_steps_say_the_same(folder, data, half, kind):
    def run(store):
        made = bert(data["tokenizer"]) if kind == "mlm" else pair(bert(data["tokenizer"]))
        trained = train(made, stages=[Stage(3, 1e-3, kind)], store=folder/store, **data, batch=4, every=1, sequences=8, guard=5)
        assert {p.dtype for p in made.parameters()} == {torch.float32}
        return trained.history
    full = run(f"full-{kind}"); half(True); low = run(f"half-{kind}")
    for k in ("train", "loss", *(("aux", "rtd", "clm") if kind == "metro" else ())):
        a, b = full[k].dropna().to_numpy(), low[k].dropna().to_numpy()
        assert len(a) == len(b) >= 3 and np.isfinite(b).all() and np.allclose(a, b, rtol=0.02) and not np.array_equal(a, b), k   # and it was bf16
    assert low.skipped.eq(0).all()

def test_in_bf16_samples_come_from_a_float32_softmax(data, monkeypatch):
    def slow(logits, chance):
        p = torch.softmax(logits.double(), -1).cumsum(-1); return torch.searchsorted(p, chance.double()[:, None] * p[:, -1:])[:, 0]
    torch.manual_seed(0); logits, chance = (3 * torch.randn(4000, 300)).bfloat16(), 1 - torch.rand(4000)
    with torch.autocast("cpu", torch.bfloat16):
        drawn, rough = metro.sample(logits, chance), torch.searchsorted((q := torch.softmax(logits, -1).bfloat16().float().cumsum(-1)), chance[:, None] * q[:, -1:])[:, 0]
    right = slow(logits, chance)
    assert (drawn == right).float().mean() > 0.999 > 0.99 > (rough == right).float().mean()
    seen, sample = [], metro.sample
    monkeypatch.setattr(metro, "sample", lambda z, *rest: seen.append(z.dtype) or sample(z, *rest))
    packed = data["corpus"].sample(np.arange(4)); made = pair(bert(data["tokenizer"]))
    x = objective(METRO)(packed, Draws(0, 0, packed.samples), made.config, data["tokenizer"])
    with torch.autocast("cpu", torch.bfloat16): sums, score = made(**x), made.detect(torch.zeros(1, 16))
    assert seen == [torch.float32] and sums.dtype == torch.float32 and torch.isfinite(sums).all() and score.dtype == torch.bfloat16

# ---------------------------------------------------------------- bad input

def test_refusals(folder, data):
    main = bert(data["tokenizer"])
    call = lambda **kw: train(train_guard.model(data["tokenizer"]), store=folder/"refused", **data, **dict(stages=[Stage(2)], batch=4, sequences=4) | kw)
    for says, refused in {
        "rate of 'ffn' cannot be 0; put it into `frozen`": lambda: Stage(2, rates={"ffn": 0}), "rate of 'ffn' cannot be -1": lambda: Stage(2, rates={"ffn": -1}),
        "rate of 'ffn' cannot be '2'": lambda: Stage(2, rates={"ffn": "2"}),
        "did you mean 'attn": lambda: call(stages=[Stage(2), Stage(2, rates={"attm": 2})]), "'head' is tied to": lambda: call(stages=[Stage(2, rates={"head": 2})]),
        "guard cannot be 1": lambda: call(guard=1), "guard cannot be 0.5": lambda: call(guard=0.5), "guard cannot be True": lambda: call(guard=True),
        "no loss of METRO 'rdt'": lambda: pair(main, ramp=dict(rdt=0.2)), "ramp of rtd cannot be 0": lambda: pair(main, ramp=dict(rtd=0)),
        "ramp of rtd cannot be 20": lambda: pair(main, ramp=dict(rtd=20)), "ramp of rtd cannot be nan": lambda: pair(main, ramp=dict(rtd=float("nan")))}.items():
        with pytest.raises(Refusal, match=says): refused()
    assert not (folder/"refused").exists()

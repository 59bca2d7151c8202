"""Training: killed anywhere and resumed to the last bit, equal to a plain loop, equal over ranks, and stopped when the loss is no number."""
import json, os, random, re, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from seqwarm.core import train as module
from seqwarm.core.errors import Refusal
from seqwarm.core.objectives import causal
from seqwarm.core.state import State
from seqwarm.core.train import Stage, _Loop
import train_small
from train_small import equal, weights

SCRIPT = Path(train_small.__file__)

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    yield tmp_path_factory.mktemp("train")
    torch.set_num_threads(threads)

@pytest.fixture(scope="module")
def calm(folder): return train_small.main(str(folder), str(folder/"calm"), 0.1)


def test_sigkill_anywhere_and_resumed_is_bit_equal(folder, calm):
    store, rng, kills = folder/"struck", random.Random(0), 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, SCRIPT, folder, store, "0.1", "0.02"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if process.stdout.readline():  # the first step: from here on anywhere
            time.sleep(rng.uniform(0, 0.7)); process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL; process.stdout.close()
        if list(store.glob("*/model")): break
    trained = train_small.main(str(folder), str(store), 0.1)
    assert kills >= 2 and equal(weights(trained.path), weights(calm.path))
    assert trained.history.drop(columns="seconds").equals(calm.history.drop(columns="seconds"))
    assert trained.card.cost["tokens"] == 60 * 4 * 16 and not list(trained.path.parent.glob("state-*"))

@pytest.mark.parametrize("what", [signal.SIGTERM, signal.SIGUSR2])
def test_asked_to_end_it_keeps_every_step(folder, calm, what):
    store = folder/f"asked{what}"
    process = subprocess.Popen([sys.executable, SCRIPT, folder, store, "0.1", "0.02"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = 0
    for _ in process.stdout:
        done += 1
        if done == 23: process.send_signal(what)
    last = process.stderr.read().splitlines()[-1]; process.stderr.close(); process.stdout.close()
    assert process.wait() == 1 and 23 <= done < 60 and last.endswith(f"Stopped: stopped by {what.name} at step {done}, state kept; run again to resume"), last
    [state] = store.glob("*/state-*"); assert state.name == f"state-{done:09d}"
    assert train_small.same(train_small.main(str(folder), str(store), 0.1), calm)

def test_a_signal_to_one_rank_ends_both_at_one_step(folder):
    store, port = folder/"halved", str(random.randint(20000, 60000))
    common = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [subprocess.Popen([sys.executable, SCRIPT, folder, store, "0", "0.02"], env=common | {"RANK": r, "LOCAL_RANK": r}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in "01"]
    for _ in range(12): both[1].stdout.readline()
    both[1].send_signal(signal.SIGTERM)
    told = [p.communicate(timeout=200)[1] for p in both]
    at = [int(m[1]) for t in told for m in [re.search(r"at step (\d+), state kept", t)] if m]
    assert len(at) == 2 and len(set(at)) == 1 and "SIGTERM" in told[1] and "a signal to another rank" in told[0], told
    assert [s.name for s in store.glob("*/state-*")] == [f"state-{at[0]:09d}"]
    assert np.allclose(train_small.main(str(folder), str(store)).history.loss, train_small.main(str(folder), str(folder/"one")).history.loss, rtol=1e-5)

def test_what_was_trained_is_found_again(folder, calm, monkeypatch):
    monkeypatch.setattr(module, "_run_stage", lambda *_: pytest.fail("trained again"))
    assert train_small.main(str(folder), str(folder/"calm"), 0.1).path == calm.path

def test_the_loop_is_a_plain_loop(folder):
    "The same updates by hand: plain AdamW, plain clipping, plain masks, no accelerate."
    trained, seen = train_small.main(str(folder), str(folder/"plain")), {}
    def spy(model, tokenizer, corpus, valid, stages, *_, **kw): seen.update(model=model, tokenizer=tokenizer, corpus=corpus, stages=stages); raise KeyboardInterrupt
    try: train_small.train, keep = spy, train_small.train; train_small.main(str(folder), "unused")
    except KeyboardInterrupt: train_small.train = keep
    model, step = seen["model"].train(), 0
    for stage in seen["stages"]:
        for n, p in model.named_parameters(): p.requires_grad_(not stage.frozen or not ("mlp" in n or "ln_2" in n))  # the layout counts its norm to the ffn
        awake = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW([dict(params=[p for p in awake if p.dim() > 1], weight_decay=0.1), dict(params=[p for p in awake if p.dim() == 1], weight_decay=0.0)], betas=(0.9, 0.98))
        for i in range(stage.steps):
            packed = seen["corpus"].sample(np.arange(step * 4, step * 4 + 4)); inputs = causal(packed, None, model.config, None); labels = inputs.pop("labels")
            loss = F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())
            optimizer.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(awake, 1.0)
            for g in optimizer.param_groups: g["lr"] = stage.lr_at(i)
            optimizer.step(); step += 1
    got = weights(trained.path)
    for n, x in model.state_dict().items():
        if n.endswith("c_attn.bias"): got[n][16:32] = x[16:32] = 0  # a key's bias has no gradient but rounding, which Adam blows up
        if n in got: assert torch.allclose(got[n], x, atol=1e-5), n

def test_accumulated_parts_are_one_batch(folder):
    whole = train_small.main(str(folder), str(folder/"whole"))
    plain = train_small.train
    try:
        train_small.train = lambda *a, **kw: plain(*a, **kw, accumulate=4)
        parts = train_small.main(str(folder), str(folder/"parts"))
    finally: train_small.train = plain
    assert whole.path != parts.path and np.allclose(whole.history.loss, parts.history.loss, rtol=1e-5)

def test_two_ranks_are_one(folder):
    one = train_small.main(str(folder), str(folder/"one"))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(random.randint(20000, 60000)), SCRIPT, folder, folder/"two"],
                   check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, capture_output=True)
    [history] = (folder/"two").glob("*/history.json"); rows = json.loads(history.read_text())
    assert [r["step"] for r in rows] == one.history.step.tolist()
    assert np.allclose([r["loss"] for r in rows], one.history.loss, rtol=1e-5)

def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(folder, monkeypatch):
    update = _Loop.update
    def poisoned(self, model, optimizer, ask, step, lr):
        loss, norm = update(self, model, optimizer, ask, step, lr)
        return (loss * float("nan") if step == 33 else loss), norm
    monkeypatch.setattr(_Loop, "update", poisoned)
    with pytest.raises(Refusal, match="loss became nan in step 33"): train_small.main(str(folder), str(folder/"nan"))
    [state] = (folder/"nan").glob("*/state-*")
    assert state.name == "state-000000030" and json.loads((state/"book.json").read_text())["step"] == 30 and not list((folder/"nan").glob("*/model"))

def test_a_full_disk_leaves_the_earlier_state(folder, monkeypatch):
    write = State._write
    def full(self, tmp, book):
        write(self, tmp, book)
        if book["step"] == 15: raise OSError(28, "No space left on device")
    monkeypatch.setattr(State, "_write", full)
    with pytest.raises(Refusal, match="disk .* is full"): train_small.main(str(folder), str(folder/"full"))
    [place] = [p for p in (folder/"full").iterdir()]
    assert [p.name for p in place.iterdir() if p.name != ".lock"] == ["state-000000010"]

def test_refusals(folder):
    with pytest.raises(Refusal, match="did you mean 'cosine'"): Stage(steps=1, schedule="cosin")
    with pytest.raises(Refusal, match="steps of a stage cannot be 0"): Stage(steps=0)
    with pytest.raises(Refusal, match="objective"): Stage(steps=1, objective="clm")
    with pytest.raises(Refusal, match="share of its steps"): Stage(steps=100, warmup=10)
    one, plain = [Stage(steps=1)], train_small.train
    for changed, says in [(dict(stages=[Stage(steps=1, frozen=("attention",))]), "attn"), (dict(stages=[Stage(steps=1, frozen=("",))]), "nothing is awake"),
                          (dict(stages=[]), "without stages"), (dict(stages=one, batch=6, accumulate=4), "can't be cut"), (dict(stages=one, accumulate=0), "accumulate cannot be 0"),
                          (dict(stages=one, track="tensorbord"), "did you mean 'tensorboard'")]:
        train_small.train = lambda m, t, c, v, _, store, changed=changed, **kw: plain(m, t, c, v, store=store, **kw | changed)
        try:
            with pytest.raises(Refusal, match=says): train_small.main(str(folder), str(folder/"refused"))
        finally: train_small.train = plain

@pytest.fixture
def small(folder, monkeypatch):
    "A training of five steps, to be called with what shall be different."
    kept = {}
    monkeypatch.setattr(train_small, "train", lambda m, t, c, v, *_, **__: kept.update(model=m, tokenizer=t, corpus=c, valid=v))
    def call(store, **changed):
        train_small.main(str(folder), "unused")
        return module.train(**dict(stages=[Stage(steps=5)], store=folder/store, batch=4, sequences=4) | kept | changed)
    call.kept = kept
    return call

def test_a_model_that_does_not_fit_is_refused_before_anything_runs(small):
    from transformers import GPT2LMHeadModel
    for smaller, says in [(dict(n_positions=8), "16 tokens in a model with 8 positions"), (dict(vocab_size=100), "300 tokens, the model rows for 100")]:
        small("misfit", stages=[Stage(steps=1)]); config = type(small.kept["model"].config)(**small.kept["model"].config.to_dict() | smaller)
        with pytest.raises(Refusal, match=says): small("misfit", model=GPT2LMHeadModel(config))

def test_an_infinite_gradient_stops_before_its_weights_are_kept(folder, small, monkeypatch):
    "The loss of that step is still finite, and the state of that step would be written."
    backward = module.Accelerator.backward
    def burst(self, loss):
        backward(self, loss)
        if (calls := calls_of["n"]) == 3: small.kept["model"].transformer.wte.weight.grad.fill_(float("inf"))
        calls_of["n"] = calls + 1
    calls_of = {"n": 0}
    monkeypatch.setattr(module.Accelerator, "backward", burst)
    with pytest.raises(Refusal, match="gradient became inf in step 3"): small("burst", save_every=1)
    [state] = (folder/"burst").glob("*/state-*")
    assert state.name == "state-000000003"

def test_interrupted_in_a_notebook_it_goes_on_at_once_and_sweeps_up(folder, small, monkeypatch):
    "The kernel keeps the traceback, and with it whatever the frames hold; a kill leaves passing folders."
    update, kept = _Loop.update, None
    def struck(self, model, optimizer, ask, step, lr):
        if step == 3: raise KeyboardInterrupt
        return update(self, model, optimizer, ask, step, lr)
    monkeypatch.setattr(_Loop, "update", struck)
    try: small("cell", save_every=1)
    except KeyboardInterrupt as e: kept = e
    monkeypatch.setattr(_Loop, "update", update)
    [place] = (folder/"cell").iterdir(); (place/".state-000000004.x.part").mkdir()
    trained, undisturbed = small("cell", save_every=1), small("quiet")
    assert kept.__traceback__ and equal(weights(trained.path), weights(undisturbed.path)) and trained.path.parent == place
    assert sorted(p.name for p in place.iterdir()) == [".lock", "history.json", "model"]

def test_who_comes_for_the_lock_just_after_another_ended_trains_nothing(small, monkeypatch):
    held, update, steps = module.held, _Loop.update, []
    @contextmanager
    def late(folder):
        monkeypatch.setattr(module, "held", held); small("late")     # another comes first
        with held(folder): yield
    monkeypatch.setattr(module, "held", late)
    monkeypatch.setattr(_Loop, "update", lambda self, *args: steps.append(1) or update(self, *args))
    assert small("late").path.exists() and len(steps) == 5

def test_a_kill_between_the_end_and_the_clearing_up_leaves_nothing(small):
    trained = small("ended"); (trained.path.parent/"state-000000005").mkdir()
    assert small("ended").path == trained.path and sorted(p.name for p in trained.path.parent.iterdir()) == [".lock", "history.json", "model"]

def test_a_tracker_sees_every_measurement(folder, small, monkeypatch):
    "Also when the training has the name of a folder of the store; and the ranks stay joined for the next training."
    monkeypatch.setattr(module.Accelerator, "end_training", lambda _: pytest.fail("parts the ranks"))
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    trained = small("tracked", track="tensorboard", name="model")
    [events] = [e for e in trained.path.parent.glob("log/**/events*") if EventAccumulator(str(e)).Reload().Tags()["scalars"]]
    for tag, column in [("valid", "loss"), ("train", "train"), ("lr", "lr")]:
        seen = pd.DataFrame([(x.step, x.value) for x in EventAccumulator(str(events)).Reload().Scalars(tag)], columns=["step", "value"])
        asked = trained.history.dropna(subset=[column])
        assert seen.step.tolist() == asked.step.tolist() and np.allclose(seen.value, asked[column])

def test_a_tracker_that_is_not_installed_is_refused(small, monkeypatch):
    monkeypatch.setattr("seqwarm.core.trackers.get_available_trackers", lambda: [])
    with pytest.raises(Refusal, match="wandb is not installed"): small("untracked", track="wandb")

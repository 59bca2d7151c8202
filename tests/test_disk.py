"Room on the disk: how many checkpoints stay, where the store is, and what `seqwarm clear` takes away and what it never does."
import os, random, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest
import torch
from seqwarm.batch.cli import main
from seqwarm.core import store as module
from seqwarm.core.errors import Refusal
from seqwarm.core.files import Lock, _drop
from seqwarm.core.store import entries, mine, place, take_away, used
from seqwarm.core.state import State
import train_small
from tiny import notebook

SEQWARM = [sys.executable, "-c", "from seqwarm.batch.cli import main; main()"]
KEY = "{:032x}".format

@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    "No wishes from outside, and no run left over in this process."
    for name in ("SEQWARM_STORE", "SEQWARM_KEEP"): monkeypatch.setenv(name, ""); monkeypatch.delenv(name)
    monkeypatch.setattr(module, "_here", [])

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads()
    yield tmp_path_factory.mktemp("disk")
    torch.set_num_threads(threads)

def thing(path: Path, files: int = 1) -> Path:
    "Something in a store: so many files of 100 bytes."
    path.mkdir(parents=True)
    for i in range(files): (path/f"{i}.bin").write_bytes(b"x"*100)
    return path

def run_of(folder: Path, store: Path, *things: Path, finished: bool = True) -> Path:
    "A run that used these, and is not at work."
    folder.mkdir(parents=True); mine(folder, store)
    for x in things: used(x, f"what {folder.name} used")
    if finished: (folder/"record.json").write_text("{}")
    module._here.clear()
    return folder

# how many checkpoints stay

def test_the_newest_checkpoints_stay_and_open(folder, monkeypatch):
    "Three of them at every moment, the finished one among them; the result is that of a training that keeps one."
    counted, keep = [], State.keep
    def counting(self, book): keep(self, book); counted.append(sorted(int(p.name[6:]) for p in self.folder.glob("state-*")))
    monkeypatch.setattr(State, "keep", counting)
    one = train_small.main(str(folder), str(folder/"one"))
    monkeypatch.setenv("SEQWARM_KEEP", "3")
    three, later = train_small.main(str(folder), str(folder/"three")), counted[len(counted)//2:]
    assert counted[:12] == [[s] for s in range(5, 65, 5)] and later == [[t for t in (s - 10, s - 5, s) if t > 0] for s in range(5, 65, 5)]
    assert train_small.same(one, three) and one.path.parent.name == three.path.parent.name
    states = sorted(three.path.parent.glob("state-*"))
    assert [s.name for s in states] == ["state-000000050", "state-000000055"] and not list(one.path.parent.glob("state-*"))
    from transformers import AutoModelForCausalLM
    weights = [AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (*states, three.path)]
    assert all(not train_small.equal(a, b) for a, b in zip(weights, weights[1:]))
    from safetensors.torch import load_file
    raw = load_file(states[1]/"model.safetensors")
    assert len(raw) > 20 and all(torch.equal(weights[1][k], x) for k, x in raw.items())

def test_an_older_checkpoint_goes_only_when_the_newer_is_there(folder, monkeypatch):
    monkeypatch.setenv("SEQWARM_KEEP", "2"); write = State._write
    def full(self, tmp, book):
        write(self, tmp, book)
        if book["step"] == 20: raise OSError(28, "No space left on device")
    monkeypatch.setattr(State, "_write", full)
    with pytest.raises(Refusal, match="disk .* is full"): train_small.main(str(folder), str(folder/"full"))
    [place] = (folder/"full").iterdir()
    assert sorted(p.name for p in place.iterdir()) == [".lock", "state-000000010", "state-000000015"]

def test_goes_on_from_the_newest_and_from_an_older_one(folder, monkeypatch):
    "Whoever removes the newest state, because its disk is bad, goes on from the one before."
    monkeypatch.setenv("SEQWARM_KEEP", "2")
    def stop(self, *a): raise KeyboardInterrupt
    monkeypatch.setattr(train_small._Loop, "update", lambda self, *a, plain=train_small._Loop.update: stop(self) if self.book["step"] == 33 else plain(self, *a))
    with pytest.raises(KeyboardInterrupt): train_small.main(str(folder), str(folder/"struck"))
    monkeypatch.undo()
    [at] = (folder/"struck").iterdir(); assert sorted(s.name[-2:] for s in at.glob("state-*")) == ["25", "30"]
    shutil.rmtree(at/"state-000000030")
    assert train_small.same(train_small.main(str(folder), str(folder/"struck")), train_small.main(str(folder), str(folder/"one")))

@pytest.mark.parametrize("wish", ["0", "-1", "two", "1.5"])
def test_a_number_that_cannot_be_is_refused_before_anything_is_written(folder, monkeypatch, wish):
    monkeypatch.setenv("SEQWARM_KEEP", wish)
    with pytest.raises(Refusal, match=r"keep \(SEQWARM_KEEP\) cannot be"): train_small.main(str(folder), str(folder/"none"))
    assert not (folder/"none").exists()

# where the store is

USING = '''from seqwarm.core.record import Run
from seqwarm.core.store import used
os.environ.pop("RANK", None)
run = Run("tiny", {}, name, runs)
entry = run.store/f"{steps:032x}"
used(entry, f"training {steps}")
entry.mkdir(parents=True, exist_ok=True); (entry/"numbers").write_text("1"); run.keep("best", entry)
(folder/"keep").write_text(os.environ.get("SEQWARM_KEEP", "-"))'''

def test_a_store_elsewhere_is_shared_and_cleared(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); nb = notebook(tmp_path/"10_tiny.ipynb", USING)
    (tmp_path/"far").mkdir(); (tmp_path/"mine").symlink_to("far")       # runs are often a link to another disk
    for runs, steps in (("mine", "1"), ("others", "2")):
        assert main(["run", str(nb), "--runs", runs, "--store", "big", "--keep", "2", "-p", "steps", steps]) == 0
    assert {p.name for p in Path("big").iterdir() if not p.name.startswith(".")} == {KEY(1), KEY(2)} and not Path("others/store").exists()
    assert Path("mine/tiny/checkpoints/best/numbers").read_text() == "1" and Path("others/tiny/keep").read_text() == "2"
    capsys.readouterr(); (tmp_path/"others"/"tiny"/"checkpoints"/"best").unlink()
    assert main(["clear", "--store", "big", "--runs", "mine", "--unnamed", "--dry-run"]) == 0       # the store knows the others
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["goes", "stays"] and "training 2" in lines[1] and "not named by tiny" in lines[1]
    assert lines[-1] == "would remove 1 of 2, 1 B; 1 stay, 1 B" and Path("big", KEY(2)).is_dir()
    Path("others").rename("moved")
    assert main(["clear", "--store", "big"]) == 2 and "use this store, and that folder is not there" in capsys.readouterr().err

@pytest.mark.parametrize("words, says", [(["--store", " "], "store is empty"), (["--store", "file"], "is no folder"), (["--keep", "0"], "keep cannot be 0")])
def test_wishes_that_cannot_be_are_refused_before_a_run_begins(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path); Path("file").touch(); nb = notebook(tmp_path/"10_tiny.ipynb")
    Path("g.toml").write_text(f'recipe = "{nb}"\nseeds = [0]')
    for command in (["run", str(nb)], ["sweep", "g.toml"]):
        assert main([*command, *words]) == 2 and says in capsys.readouterr().err and not Path("runs").exists()

# what goes

def test_what_runs_refer_to_stays_and_the_rest_goes(tmp_path, capsys):
    runs = tmp_path/"runs"; store = place(runs)
    things = [thing(store/name) for name in (KEY(1), f"start-{KEY(2)}", f"kept-{KEY(3)}", KEY(4), "probes", "notes", KEY(5)[:-1])]
    a, b, c, d, *not_ours = things
    (store/KEY(6)).symlink_to(tmp_path)                                  # not ours either
    run_of(runs/"open", store, a, b, finished=False); run_of(runs/"done", store, b, c)
    (runs/"done"/"checkpoints").mkdir(); (runs/"done"/"checkpoints"/"x").symlink_to(c)
    seen = {e.path: e for e in entries(store, runs)}
    assert {p: [r.name for r in e.runs] for p, e in seen.items()} == {a: ["open"], b: ["done", "open"], c: ["done"], d: []} and seen[c].named and not seen[b].finished
    assert main(["clear", "--runs", str(runs), "--dry-run"]) == 0 and d.is_dir()
    assert main(["clear", "--runs", str(runs), "--unnamed"]) == 0 and not d.exists() and all(p.is_dir() for p in (a, b, c, *not_ours))   # an unfinished run needs b
    shutil.rmtree(runs/"open")
    assert main(["clear", "--runs", str(runs), "--unnamed"]) == 0 and [p.is_dir() for p in (a, b, c)] == [False, False, True]
    old = time.time() - 40*86400
    for p in (c, c/"0.bin"): os.utime(p, (old, old))
    uses = runs/"done"/".uses.json"; uses.write_text(uses.read_text().replace(str(int(time.time()))[:5], str(int(old))[:5]))
    assert main(["clear", "--runs", str(runs), "--older", "60"]) == 0 and c.is_dir()
    assert main(["clear", "--runs", str(runs), "--older", "30"]) == 0 and not c.exists() and not os.path.lexists(runs/"done"/"checkpoints"/"x")
    assert all(p.is_dir() for p in not_ours) and (store/KEY(6)).is_symlink() and tmp_path.is_dir() and capsys.readouterr().err == ""

def test_a_live_process_keeps_what_it_holds(tmp_path):
    "A run at work, and a training without a run; killed outright, the run still refers to its thing, the training no more."
    runs = tmp_path/"runs"; store = place(runs); a, b = thing(store/KEY(1)), thing(store/KEY(2))
    code = f"""import time; from pathlib import Path; from seqwarm.core.files import Lock; from seqwarm.core.store import mine, used
run = Path({str(runs)!r}, "live"); held = Lock(run), Lock({str(b)!r}); mine(run, Path({str(store)!r})); used({str(a)!r}); print("there", flush=True); time.sleep(100)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        for words in ([], ["--older", "0"], ["--unnamed"]): assert main(["clear", "--runs", str(runs), *words]) == 0 and a.is_dir() and b.is_dir()
        stale = entries(store, runs)
        assert not any(take_away(e, runs) for e in stale)              # asked for all the same
    finally: process.kill(); process.wait(); process.stdout.close()
    assert main(["clear", "--runs", str(runs)]) == 0 and a.is_dir() and not b.exists()
    assert main(["clear", "--runs", str(runs), "--older", "0"]) == 0 and not a.exists()

def test_who_begins_to_use_a_thing_while_it_is_cleared_has_it_whole_or_makes_it_anew(tmp_path):
    runs = tmp_path/"runs"; store = place(runs); entry, over, gone = store/KEY(1), threading.Event(), []
    store.mkdir(parents=True)
    def clearing():
        while not over.is_set():
            for e in entries(store, runs): e.runs, e.live = [], ""; gone.append(take_away(e, runs))
    other = threading.Thread(target=clearing); other.start()
    try:
        for i in range(60):
            held = Lock(runs/f"run{i}"); mine(runs/f"run{i}", store); used(entry, "it")
            if not entry.is_dir(): thing(tmp_path/"new", 3).rename(entry)
            for _ in range(3): time.sleep(0.001); assert len(list(entry.glob("*.bin"))) == 3
            held.release(); shutil.rmtree(runs/f"run{i}")
            if i % 3: time.sleep(0.004)
    finally: over.set(); other.join()
    assert any(gone), "nothing was ever cleared: the test shows nothing"

def test_killed_anywhere_each_thing_is_whole_or_gone_and_the_next_clearing_ends_it(tmp_path):
    runs, rng, cut = tmp_path/"runs", random.Random(3), 0
    store = place(runs)
    code = f"from seqwarm.core import store; from pathlib import Path\nprint('go', flush=True)\nfor e in store.entries({str(store)!r}, {str(runs)!r}): store.take_away(e, {str(runs)!r})"
    for _ in range(5):
        for i in range(12): shutil.rmtree(store/KEY(i), ignore_errors=True); thing(store/KEY(i), 150)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE); process.stdout.readline()
        until = time.time() + 20
        while len([p for p in store.iterdir() if not p.name.startswith(".")]) > rng.randrange(2, 11) and time.time() < until: pass
        process.kill(); process.wait(); process.stdout.close()
        there = [p for p in store.iterdir() if not p.name.startswith(".")]
        cut += 0 < len(there) < 12
        assert all(len(list(p.glob("*.bin"))) == 150 for p in there)
    assert cut >= 3 and main(["clear", "--runs", str(runs)]) == 0 and [p.name for p in store.iterdir()] == [".lock"]

def test_a_writer_that_may_live_is_not_swept_away(tmp_path):
    store = tmp_path/"store"; fresh, old = thing(store/f".start-{KEY(1)}.x.part"), thing(store/f".start-{KEY(2)}.y.part")
    for p in (old, old/"0.bin"): os.utime(p, (0, 0))
    gone = _drop(thing(store/KEY(3)))
    assert gone.is_dir() and main(["clear", "--store", str(store), "--runs", str(tmp_path)]) == 0 and fresh.is_dir() and not old.exists() and not gone.exists()

def test_without_a_run_nothing_is_noted(folder):
    "A script's training leaves nothing but itself."
    usual = signal.getsignal(signal.SIGTERM)
    made = train_small.main(str(folder), str(folder/"bare"))
    assert [p.name for p in (folder/"bare").iterdir()] == [made.path.parent.name] and signal.getsignal(signal.SIGTERM) == usual

"""Sweeps: what a grid asks for and what it may not; runs as processes that fail, die, hang, meet at one training, or are killed with the sweep."""
import json, os, pty, re, signal, subprocess, sys, threading, time
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from seqwarm.batch import local
from seqwarm.batch.cli import main
from seqwarm.batch.local import Local, sweep
from seqwarm.batch.parameters import parameters
from seqwarm.batch.run import Failure, _folder
from seqwarm.batch.sweep import Book, _names, read_grid
from seqwarm.batch.watch import last_bar
from seqwarm.core.errors import Refusal
from seqwarm.core.files import Lock
sys.path.insert(0, str(Path(__file__).parent))
from tiny import notebook

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path/"10_tiny.ipynb")
    return tmp_path

def grid(text: str, name: str = "g.toml", recipe: str = "10_tiny.ipynb") -> Path:
    Path(name).write_text(f'recipe = "{recipe}"\n{text}')
    return Path(name)

def tree() -> dict[str, bytes]: return {str(p): p.read_bytes() if p.is_file() else b"" for p in Path(".").rglob("*")}

def usual() -> dict: return {k: p.default for k, p in parameters("10_tiny.ipynb").items()}

def book(name: str = "g") -> dict: return json.loads(Path(f"runs/.{name}.sweep/book.json").read_text())["runs"]

# ---- what a grid asks for

def test_lists_grid_and_seeds_multiply_and_the_names_tell_what_varies(here):
    plan = read_grid(grid('name = "x"\ntimeout = 60\nseeds = [0, 7]\n[parameters]\nscale = "demo"\n[grid]\nlr = [1, 2e-4]\narms = [["clp", "random"]]\n'
                          '[[list]]\nname = "short"\nsteps = 5\n[[list]]\nshuffle = false\n'))
    assert list(plan.given) == [f"x-{t}-lr={lr}-arms=clp+random-seed={s}" for t in ("short", "shuffle=False") for lr in ("1", "0.0002") for s in (0, 7)]
    assert plan.given["x-short-lr=0.0002-arms=clp+random-seed=7"] == {"scale": "demo", "steps": 5, "lr": 2e-4, "arms": ["clp", "random"], "seeds": [7]}
    assert plan.timeout == 60 and plan.runs == Path("runs") and not plan.finished and not Path("runs").exists()

def test_what_is_added_leaves_the_other_names(here):
    few = read_grid(grid("seeds = [0]\n[grid]\ncorpus = ['a/b']")).given
    assert few.items() < read_grid(grid("seeds = [0, 1]\n[grid]\ncorpus = ['a b', 'a/b', 'a_b']")).given.items()

@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=60), st.integers(), st.floats(allow_nan=False), st.booleans(), st.lists(st.text("a +/", max_size=3), max_size=2)), min_size=2, max_size=4, unique_by=repr))
def test_any_values_give_names_that_differ_and_can_be_folders(values):
    names = _names("g", [{"corpus": v, "seed": 0} for v in values])
    assert len({n.casefold() for n in names}) == len(values)
    for name in names: assert _folder("nowhere", name) and len(os.fsencode(name)) < 255

WRONG = {  # a grid -> what the line must say
    "seeds = [0": "is not TOML", "\0": "is not TOML", "a" * 2_000_000: "longer than 1 MB", "x = " + "[" * 100_000: "is not TOML", "": "nothing varies",
    "[parameters]\nsteps = 1": "nothing varies", "[gird]\nlr = [1]": "did you mean 'grid'?", "seed = [1]": "did you mean 'seeds'?",
    "steps = 5\nseeds = [0]": "steps stands above [parameters]; write it below", "[parameters]\ntimeout = 5\n[grid]\nlr = [1]": "timeout stands in [parameters]",
    "[grid]\nstepz = [1]": "did you mean 'steps'?", "[[list]]\nstepz = 1": "did you mean 'steps'?", "[parameters]\nstepz = 1\n[grid]\nlr = [1]": "did you mean 'steps'?",
    "[grid]\nsteps = [1, '2']": "parameter steps cannot be '2'; it is of type int", "[grid]\nlr = [nan]": "parameter lr cannot be nan", "[grid]\nscale = ['demo', 'huge']": "one of: smoke, demo, full",
    "[grid]\narms = ['clp']": "parameter arms cannot be 'clp'", "[grid]\nsteps = [1979-05-27]": "parameter steps cannot be", "[grid]\nextra = [{a = 1979-05-27}]": "a date",
    "[grid]\nextra = [{a = inf}]": "no finite number", "[grid]": "grid is empty", "list = []": "list is empty", "[grid]\nlr = []": "lr in [grid] is an empty list", "[grid]\nlr = 1": "lr in [grid] is no list",
    "grid = [1]": "grid cannot be [1]", "list = [1]": "no list of tables", "list = 3": "list cannot be 3", "seeds = []": "seeds is an empty list", "seeds = [1, 1]": "names something twice",
    "seeds = 3": "seeds cannot be 3", "seeds = ['a']": "a seed cannot be 'a'", "seeds = [[0]]": "a seed cannot be [0]", "seeds = [true]": "a seed cannot be True", "seeds = [-1]": "a seed cannot be -1",
    "seeds = [0]\n[parameters]\nseeds = [1]": "seeds is given twice, by [parameters] and by seeds", "[parameters]\nlr = 1\n[grid]\nlr = [1]": "lr is given twice",
    "[grid]\nlr = [1]\n[[list]]\nlr = 2": "lr is given twice", "[grid]\nlr = [1, 1.0]": "two runs are alike: g-lr=1 and g-lr=1.0", "[[list]]\n[[list]]": "two runs are alike",
    "[[list]]\nname = 'a'\nsteps = 1\n[[list]]\nname = 'b'\nsteps = 1": "two runs are alike: g-a and g-b", "[[list]]\nname = 3": "name in [[list]] cannot be 3", "[[list]]\nname = 'a/b'": "'g-a/b' cannot name a run",
    "[grid]\nname = ['a']": "name stands in [grid]; write it at the top", "[grid]\nruns = ['a']": "runs stands in [grid]", "name = 'a/b'\nseeds = [0]": "cannot name a run", "name = 3\nseeds = [0]": "name cannot be 3",
    "[parameters]\nruns = 'g.toml'\n[grid]\nlr = [1]": "exists and is no folder", "timeout = 0\nseeds = [0]": "timeout cannot be 0", "timeout = 'long'\nseeds = [0]": "timeout cannot be 'long'", "timeout = true\nseeds = [0]": "timeout cannot be True",
    "timeout = inf\nseeds = [0]": "timeout cannot be inf", f"seeds = {list(range(101))}\n[grid]\nlr = {list(range(10))}": "1,010 runs are asked for",
    f"[grid]\nsteps = {list(range(1000))}\nlr = {list(range(1000))}\nshare = {list(range(1000))}": "1,000,000,000 runs are asked for"}

@pytest.mark.parametrize("text", WRONG, ids=lambda t: re.sub(r"\W+", "_", t)[:40])
def test_a_bad_grid_is_one_line_and_nothing_is_written(here, capsys, text):
    grid(text); before = tree()
    assert main(["sweep", "g.toml"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("seqwarm: g.toml") and err.count("\n") == 1 and WRONG[text] in err and len(err) < 400 and not out, err
    assert tree() == before

def test_other_mistakes_are_one_line_too(here, capsys):
    Path("plain.ipynb").write_text(notebook(here/"x.ipynb", cell="steps: int = 1").read_text())
    Path("bytes.toml").write_bytes(b"\xff\xfe")
    Path("none.toml").write_text("seeds = [0]"); Path("number.toml").write_text("recipe = 3\nseeds = [0]")
    grid("seeds = [0]"); grid("seeds = [0]", "far.toml", "clpp"); grid("seeds = [0]", "plain.toml", "plain.ipynb"); grid("seeds = [0]", "gone.toml", "gone.ipynb")
    before = tree()
    for typed, said in [(["nowhere.toml"], "cannot be read"), (["."], "cannot be read"), (["bytes.toml"], "is not TOML"), (["none.toml"], "names no recipe"), (["number.toml"], "recipe cannot be 3"),
                        (["far.toml"], "there is no recipe 'clpp'"), (["plain.toml"], "has no parameter 'name'"), (["gone.toml"], "there is no notebook gone.ipynb"), (["g.toml", "--jobs", "0"], "jobs cannot be 0"),
                        (["g.toml", "--jobs", "-3"], "jobs cannot be -3"), (["g.toml", "--jobs", "x"], "Invalid value for '--jobs'"), ([], "GRID"), (["g.toml", "--resume"], "no sweep 'g' was begun in runs; leave out --resume")]:
        assert main(["sweep", *typed]) == 2, typed
        out, err = capsys.readouterr()
        assert err.startswith("seqwarm: ") and err.count("\n") == 1 and said in err and not out, (typed, err)
    assert main(["job", "g.toml", "x"]) == 2 and "knows no run 'x'" in capsys.readouterr().err
    assert tree() == before

# ---- the executor, on processes that are quick: what they do is told by a parameter

FAKE = '''ALL = {}
import json, os, pathlib, signal, subprocess, sys, time
book, name = sys.argv[-2:]
given = json.load(open(book))["runs"][name]["parameters"]
do, folder = given["corpus"], pathlib.Path("runs")/name
def mark(what): open("marks", "a").write(json.dumps([name, what, time.time()]) + "\\n")
mark("begin")
if do == "fail" and not pathlib.Path("mended").exists(): sys.exit("10%\\rseqwarm: it broke; see there")
if do == "raise": raise KeyError("no such key")
if do == "die": os.kill(os.getpid(), signal.SIGKILL)
if do == "empty": sys.exit()
if do == "bar": print(" train: 100%|##| 5/5 [00:01<00:00, 5step/s, loss 1.5, 99 tokens/s]", file=sys.stderr); time.sleep(1)
if do == "hang":
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", deaf], start_new_session=True, stdout=subprocess.PIPE); child.stdout.readline()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder/"pids").write_text(f"{os.getpid()} {child.pid}"); time.sleep(60)
if do == "share":
    from seqwarm.core.files import Lock
    if not pathlib.Path("runs/store/x/model").exists():
        try: held = Lock("runs/store/x")
        except ValueError as e: print("seqwarm:", e, file=sys.stderr); sys.exit(2)
        mark("train"); time.sleep(1); pathlib.Path("runs/store/x/model").touch()
time.sleep(0.3)
(folder/"record.json").write_text(json.dumps(dict(recipe="tiny", parameters={**ALL, **given, "name": name})))
mark("end")
'''

@pytest.fixture
def quick(here, monkeypatch):
    Path("fake.py").write_text(FAKE.replace("{}", repr(usual()), 1))
    monkeypatch.setattr(local, "_SELF", [sys.executable, "fake.py"])
    monkeypatch.setattr(Local.end, "__defaults__", (1.0,))
    return here

def until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)

def marks(what: str) -> list[str]: return sorted(m[0] for m in map(json.loads, Path("marks").read_text().splitlines()) if m[1] == what)

def alive(pid: int) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError: return False

def test_so_many_at_once_and_none_again(quick, capsys):
    g = grid("[grid]\ncorpus = ['ok']\nsteps = [1, 2, 3, 4, 5]")
    sweep(g, jobs=2)
    moments = sorted((t, 1 if what == "begin" else -1) for _, what, t in map(json.loads, Path("marks").read_text().splitlines()))
    level = [sum(step for _, step in moments[:i + 1]) for i in range(len(moments))]
    assert max(level) == 2 and marks("end") == sorted(book()) and len(book()) == 5
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 runs in runs, 0 of them finished before" and lines[-1] == "5 of 5 runs are finished"
    for name in book(): assert f"{name}: started" in lines and any(line.startswith(f"{name}: finished in ") for line in lines)
    sweep(g, jobs=2, resume=True)
    assert len(marks("begin")) == 5 and capsys.readouterr().out == "5 runs in runs, 5 of them finished before\n5 of 5 runs are finished\n"
    Path("runs/g-corpus=ok-steps=3/record.json").unlink()   # whoever removes a record wants the run again
    sweep(g); assert len(marks("begin")) == 6

def test_what_fails_is_noted_and_tried_once_more_by_the_next_start(quick, capsys):
    g = grid("[grid]\ncorpus = ['fail', 'raise', 'die', 'empty', 'ok']")
    assert main(["sweep", "g.toml", "--jobs", "3"]) == 1
    out, err = capsys.readouterr()
    why = {n.partition("=")[2]: r["note"] for n, r in book().items() if r["state"] == "failed"}
    assert why == {"fail": "it broke; see there", "raise": "KeyError: 'no such key'", "die": "was ended by SIGKILL, perhaps for want of memory",
                   "empty": "came to its end without a record.json; a recipe writes one last"}
    assert all(f"g-corpus={k}: failed: {v}" in out for k, v in why.items()) and err.count("\n") == 1 and err.startswith("seqwarm: 4 of 5 runs failed (g-corpus=fail, ")
    Path("mended").touch()
    with pytest.raises(Failure, match="3 of 5 runs failed"): sweep(g)
    assert {n.partition("=")[2]: r["tries"] for n, r in book().items()} == dict(fail=2, **{"raise": 2}, die=2, empty=2, ok=1) and book()["g-corpus=fail"]["state"] == "finished"

def test_a_run_that_takes_too_long_is_killed_with_all_that_it_started(quick):
    with pytest.raises(Failure, match="1 of 2 runs failed"): sweep(grid("timeout = 1\n[grid]\ncorpus = ['hang', 'ok']"))
    pids = [int(p) for p in Path("runs/g-corpus=hang/pids").read_text().split()]
    assert len(pids) == 2 and not any(map(alive, pids))   # both deaf to SIGTERM, one in a session of its own
    assert book()["g-corpus=hang"]["note"] == "took longer than 1 s and was ended" and book()["g-corpus=ok"]["state"] == "finished"

def test_what_cannot_be_started_is_a_failure_of_that_run(quick, monkeypatch):
    monkeypatch.setattr(local, "_SELF", ["/no/such/python"])
    with pytest.raises(Failure, match="2 of 2"): sweep(grid("seeds = [0, 1]"))
    assert "could not be started: No such file" in book()["g-seed=0"]["note"]

def test_two_that_need_one_training_train_it_once(quick, capsys):
    sweep(grid("[grid]\ncorpus = ['share']\nsteps = [1, 2, 3]"), jobs=3)
    assert len(marks("train")) == 1 and len(marks("end")) == 3 and max(r["tries"] for r in book().values()) > 1
    assert "waiting: runs/store/x is in use by another process" in capsys.readouterr().out

def test_one_that_is_a_moment_late_in_writing_is_tried_again():
    assert local.verdict(2, "seqwarm: runs/store/warm-12 exists; choose another place or remove it\n", False)[0] == "waiting"
    assert local.verdict(2, "seqwarm: there is no corpus x; name another\n", False) == ("failed", "there is no corpus x; name another")

def test_a_sweep_is_worked_off_by_one_process(quick):
    g = grid("seeds = [0]"); held = Book(read_grid(g)); was = held.file.read_bytes()
    with pytest.raises(Refusal, match="in use by another process"): sweep(g)
    assert held.file.read_bytes() == was and not Path("marks").exists()
    held.lock.release()

def test_a_run_held_by_somebody_else_is_waited_for(quick, monkeypatch):
    monkeypatch.setattr(local, "_SELF", [sys.executable, "-c", "from seqwarm.batch.cli import main; main()"])   # the real one, refused before a kernel
    hand = Lock("runs/g-seed=0"); log = Path("runs/g-seed=0/log.txt")
    def end_well():
        until(lambda: log.exists() and "in use" in log.read_text())
        (log.parent/"record.json").write_text(json.dumps(dict(recipe="tiny", parameters=usual() | {"name": "g-seed=0"}))); hand.release()
    helper = threading.Thread(target=end_well); helper.start()
    sweep(grid("seeds = [0]")); helper.join()
    assert book()["g-seed=0"]["state"] == "finished" and not Path("runs/g-seed=0/begun").exists() and "nothing was run" in log.read_text()

@pytest.mark.parametrize("torn", ["", "{", "[]", '{"runs": {}}'])
def test_a_torn_book_loses_nothing(quick, torn):
    sweep(g := grid("[grid]\ncorpus = ['ok']"))
    Path("runs/.g.sweep/book.json").write_text(torn)
    sweep(g)
    assert len(marks("begin")) == 1 and book()["g-corpus=ok"]["state"] == "finished"

def test_a_folder_with_something_else_is_refused_before_anything_starts(quick, capsys):
    sweep(grid("[grid]\ncorpus = ['ok']"))
    grid("[parameters]\nlr = 2\n[grid]\ncorpus = ['fail', 'ok']")
    assert main(["sweep", "g.toml"]) == 2 and len(marks("begin")) == 1
    assert capsys.readouterr().err == 'seqwarm: g.toml: runs/g-corpus=ok holds a run with other parameters (lr 0.001, not 2.0); give the sweep another name: name = "..." at the top\n'

def test_a_terminal_sees_a_table(quick, monkeypatch):
    own, other = pty.openpty(); seen = []
    def read():
        try:
            while piece := os.read(own, 1 << 16): seen.append(piece)
        except OSError: pass
    reader = threading.Thread(target=read, daemon=True); reader.start()
    monkeypatch.setenv("TERM", "xterm"); monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(other, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with pytest.raises(Failure): sweep(grid("[grid]\ncorpus = ['bar', 'fail']"), jobs=2)
        monkeypatch.undo()
    reader.join(5)
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", b"".join(seen).decode())
    assert re.search(r"g-corpus=bar\s+running\s+5/5\s+1\.5\s+99\s+00:00\s+train", text) and re.search(r"g-corpus=fail\s+failed\s+it broke", text)
    assert re.search(r"g-corpus=bar\s+finished\s+in \d+ s", text) and "1 finished, 1 failed" in text and "started" not in text
    assert text.endswith("\r\ng-corpus=fail: it broke; see there\r\n")

def test_a_bar_is_read_as_tqdm_draws_it_with_any_width(capfd):
    from tqdm import tqdm
    for title in ("clp 0", "scratch 3 (lr 0.001)", ""):
        for _ in tqdm(range(4), desc=title, unit="step", ncols=160, mininterval=0): pass
        with tqdm(total=2_000_000, desc=title, unit_scale=True, ncols=160) as bar: bar.set_postfix_str("loss nan, 1,234 tokens/s"); bar.update(1_000_000); bar.refresh()
        log = capfd.readouterr().err
        found = last_bar(log); assert (found.title, found.loss, found.speed) == (title, "nan", "1,234") and found.step == "1.00M/2.00M"
        assert last_bar(log[:log.index("4/4") + 30]).step == "4/4"

# ---- the real thing: kernels, signals, kills

SLOW = '''import time
with (folder/"pid").open("w") as f: f.write(str(os.getpid()))
if corpus == "die": os.kill(os.getpid(), 9)
while corpus.startswith("wait") and not pathlib.Path("go").exists(): time.sleep(0.1)
with open("ended", "a") as f: f.write(name + "\\n")'''

def start(*args: str) -> subprocess.Popen:
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)   # what runs in the background of a shell ignores Ctrl-C
    return subprocess.Popen([sys.executable, "-c", "from seqwarm.batch.cli import main; main()", "sweep", "g.toml", *args], preexec_fn=heed,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_a_sweep_that_is_stopped_and_then_killed_goes_on_and_each_run_ends_once(here):
    notebook(here/"10_tiny.ipynb", SLOW)
    strange = """__import__('os').abort() "\\"'\n{x}"""
    grid(f"[parameters]\nextra = {{said = {json.dumps(strange)}}}\n[grid]\ncorpus = ['ok', 'wait', 'die']")
    folder = {k: Path(f"runs/g-corpus={k}") for k in ("ok", "wait", "die")}
    for what in (signal.SIGINT, signal.SIGKILL):
        first = start("--jobs", "2")
        until(lambda: (folder["ok"]/"record.json").exists() and (folder["wait"]/"pid").exists() and (folder["wait"]/"pid").read_text())
        kernel = int((folder["wait"]/"pid").read_text())
        first.send_signal(what)
        out, err = first.communicate(timeout=60)
        if what == signal.SIGINT:
            assert first.returncode == 130 and err == "seqwarm: stopped; the same command goes on where it was\n" and not alive(kernel)
            assert book()["g-corpus=wait"]["state"] == "stopped" and book()["g-corpus=ok"]["state"] == "finished"
        until(lambda pid=kernel: not alive(pid))   # what was killed ended nothing itself: its runs felt it
        (folder["wait"]/"pid").unlink()
    Path("go").touch()
    last = start("--resume", "--jobs", "2")
    out, err = last.communicate(timeout=120)
    assert last.returncode == 1 and "g-corpus=die: failed: the kernel died, perhaps for want of memory" in out and out.startswith("3 runs in runs, 1 of them finished before\n")
    assert sorted(Path("ended").read_text().split()) == ["g-corpus=ok", "g-corpus=wait"]
    assert "Traceback" not in err and err.startswith("seqwarm: 1 of 3 runs failed (g-corpus=die)")
    for k in ("ok", "wait"): assert json.loads((folder[k]/"record.json").read_text())["parameters"]["extra"] == {"said": strange}

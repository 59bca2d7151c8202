"""Sweeps on a Slurm of one node: runs as jobs that fail, are killed, requeued, make room for others or end too late, and a sweep that finds them again."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd
import pytest
from seqwarm.batch.cli import main
from seqwarm.batch.slurm import options
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import slurm as cluster  # noqa: E402
from tiny import notebook  # noqa: E402

pytest.importorskip("submitit", reason="submitit is not installed: pip install submitit")

@pytest.fixture(scope="module")
def one_node(tmp_path_factory):
    if not cluster.ready(): pytest.skip(f"NO SLURM HERE ({', '.join(cluster.missing()) or 'not root'}): apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    try:
        try: env = cluster.up(folder)
        except (RuntimeError, subprocess.CalledProcessError) as e: pytest.skip(f"SLURM DOES NOT COME UP HERE: {e}")
        yield env
    finally:
        cluster.down(folder)
        left = subprocess.run(["pgrep", "-af", str(folder)], capture_output=True, text=True).stdout
        assert not [line for line in left.splitlines() if re.search("slurm(ctl)?d|munged", line)], left

FAKE = '''import json, os, pathlib, signal, sys, time
book, name = sys.argv[-2:]
given, folder = json.load(open(book))["runs"][name]["parameters"], pathlib.Path("runs")/name
do = given["corpus"]
def mark(what): open("marks", "a").write(json.dumps([name, what, os.environ["SLURM_JOB_ID"], os.environ.get("RANK"), os.environ.get("WORLD_SIZE")]) + "\\n")
mark("begin")
if do == "fail": sys.exit("10%\\rseqwarm: it broke; see there")
if do == "lame" and os.environ["RANK"] == "1": sys.exit("seqwarm: it broke at rank 1")
while do in ("wait", "lame") and not pathlib.Path("go").exists(): time.sleep(0.05)
if os.environ.get("RANK", "0") == "0": (folder/"record.json").write_text(json.dumps(dict(recipe="tiny", parameters={**ALL, **given, "name": name})))
mark("end")
'''

@pytest.fixture
def here(one_node, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for k in ("SLURM_CONF", "PATH"): monkeypatch.setenv(k, one_node[k])
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}{os.pathsep}{HERE}"); monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from seqwarm.batch.parameters import parameters
    usual = {k: p.default for k, p in parameters(notebook(tmp_path/"10_tiny.ipynb")).items()}
    Path("fake.py").write_text(FAKE.replace("ALL", repr(usual), 1))
    yield tmp_path
    subprocess.run(["scancel", "--signal=KILL", "-u", str(os.getuid())], capture_output=True); subprocess.run(["scancel", "-u", str(os.getuid())], capture_output=True)

def grid(text: str, slurm: str = "time = 5") -> None: Path("g.toml").write_text(f'recipe = "10_tiny.ipynb"\n{text}\n[slurm]\n{slurm}')

def start(*args: str, fake: bool = True) -> subprocess.Popen:
    code = "import sys; from seqwarm.batch import slurm; slurm._EVERY = 0.3; " + ("slurm._SELF = [sys.executable, 'fake.py']; " if fake else "") + "from seqwarm.batch.cli import main; main()"
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", code, "sweep", "g.toml", "--executor", "slurm", *args], preexec_fn=heed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def book() -> dict: return json.loads(Path("runs/.g.sweep/book.json").read_text())["runs"]

def marks(what: str, name: str = "") -> list: return [m for m in map(json.loads, Path("marks").read_text().splitlines() if Path("marks").exists() else []) if m[1] == what and name in m[0]]

def until(true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)

def tell(*command: str) -> None: subprocess.run(command, check=True, capture_output=True)

def test_what_is_asked_for_is_checked_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); notebook(tmp_path/"10_tiny.ipynb")
    for slurm, says in {"gpu = 1\ntime = 5": "did you mean 'gpus'?", "gpus = 1": "how long a job may work is not said", "time = 5\ncpus = 0": "cpus cannot be 0", "time = '1h'": "time cannot be '1h'",
                        "time = 5\nsetup = 'x'": "setup is no list", "time = 5\nextra = {'--x' = 1}": "no option of sbatch", "time = 5\npartition = ''": "partition cannot be ''", "time = 5\nrequeues = -1": "requeues cannot be -1"}.items():
        grid("seeds = [0]", slurm)
        assert main(["sweep", "g.toml", "--executor", "slurm"]) == 2 and says in (err := capsys.readouterr().err) and err.count("\n") == 1, err
    assert main(["sweep", "g.toml", "--executor", "slrum"]) == 2 and "did you mean 'slurm'?" in capsys.readouterr().err
    assert options(dict(time="1-0", tasks=2, extra=dict(reservation="may"))) == dict(time=1440, ntasks_per_node=2, signal_delay_s=120, additional_parameters=dict(requeue=True, reservation="may"))
    grid("seeds = [0]"); monkeypatch.setenv("PATH", "/nowhere")
    assert main(["sweep", "g.toml", "--executor", "slurm"]) == 2 and "sbatch is not found" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["sweep", "g.toml", "--executor", "slurm"]) == 2 and "submitit is not installed; pip install" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10_tiny.ipynb", "g.toml"]

LATE = """import os, signal, subprocess, sys, threading, time; from pathlib import Path; from seqwarm.batch import slurm
def begun():
    while not task.child: time.sleep(0.1)
end = lambda: (begun(), time.sleep(0.5), task.child.terminate(), time.sleep(1), os.kill(os.getpid(), signal.SIGTERM) if sys.argv[1:] else 0)
slurm._wanted, slurm._APART = lambda number: False, 3
task = slurm.Task([sys.executable, "-c", "import time; time.sleep(60)"], Path("log.txt"), 120)
threading.Thread(target=end).start(); task()"""

@pytest.mark.parametrize("told", [True, False])
def test_a_run_that_slurm_tells_to_end_before_its_job_has_not_failed(tmp_path, told):
    env = os.environ | dict(SUBMITIT_EXECUTOR="local", SUBMITIT_LOCAL_JOB_ID="1", PYTHONPATH=str(HERE.parent))
    got = subprocess.run([sys.executable, "-c", LATE, *["told"]*told], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (got.returncode, got.stderr) == (143, "") if told else got.returncode == 1 and "exit code -15" in got.stderr, got

def test_a_grid_of_notebooks(here):
    notebook(here/"10_tiny.ipynb", "assert corpus != 'b', 'b is broken'")
    grid("[grid]\ncorpus = ['a', 'b', 'c']")
    out, err = (sweep := start(fake=False)).communicate(timeout=300)
    assert sweep.returncode == 1 and err.startswith("seqwarm: 1 of 3 runs failed (g-corpus=b)"), (out, err)
    assert "g-corpus=b: failed: cell 4 failed: AssertionError: b is broken" in out and out.endswith("2 of 3 runs are finished\n")
    assert {n[-1]: r["state"] for n, r in book().items()} == dict(a="finished", b="failed", c="finished") and len({r["job"]["id"] for r in book().values()}) == 3
    for k in "ac":
        record = json.loads(Path(f"runs/g-corpus={k}/record.json").read_text())
        assert record["cwd"] == str(here) and record["lines"][0] in Path(f"runs/g-corpus={k}/log.txt").read_text()

def requeue(job: str) -> None: tell("scontrol", "requeue", job)
def warn(job: str) -> None: tell("scancel", "--signal=USR2", job)     # as Slurm does before the time is over
def hasten(job: str) -> None:
    "Slurm lets two minutes pass before a requeued job begins again; in the second in which it was ended its node takes it for the old one."
    time.sleep(0.3)
    if subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout.strip() != "PENDING": return
    time.sleep(3); subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], capture_output=True)

def displace(job: str) -> None: tell("sbatch", "-p", "high", "--exclusive", "--output=/dev/null", "--time=1", "--wrap", "sleep 1")

@pytest.mark.parametrize("how", [requeue, warn, displace])
def test_a_job_that_is_put_back_into_the_queue_finishes_once(here, how):
    grid("[grid]\ncorpus = ['wait']")
    sweep = start(); until(lambda: marks("begin"))
    time.sleep(0.5); how(marks("begin")[0][2])
    until(lambda: hasten(marks("begin")[0][2]) or len(marks("begin")) == 2)
    Path("go").touch(); out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0 and len(marks("end")) == 1 and len({m[2] for m in marks("begin")}) == 1, (out, err)
    assert book()["g-corpus=wait"]["state"] == "finished" and book()["g-corpus=wait"]["tries"] == 1

def test_what_fails_or_is_killed_is_noted_and_tried_again_by_the_next_start(here):
    grid("[grid]\ncorpus = ['wait', 'fail', 'ok']\n")
    sweep = start(); until(lambda: marks("begin", "wait") and len(marks("begin")) == 3)
    job = marks("begin", "wait")[0][2]; tell("scancel", "--signal=KILL", job)
    out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 1 and "g-corpus=fail: failed: it broke; see there" in out and re.search(rf"g-corpus=wait: failed: job {job} was (killed|cancelled)", out), out
    assert book()["g-corpus=ok"]["state"] == "finished"
    Path("go").touch(); out, err = (sweep := start()).communicate(timeout=120)
    assert book()["g-corpus=wait"]["state"] == "finished" and book()["g-corpus=fail"]["tries"] == 2 and len(marks("begin", "ok")) == 1

def test_a_sweep_that_is_left_or_killed_finds_its_jobs(here):
    grid("[grid]\ncorpus = ['wait']\nsteps = [1, 2, 3]")
    for what in (signal.SIGINT, signal.SIGKILL):
        sweep = start("--jobs", "2"); until(lambda: len(marks("begin")) == 2)
        until(lambda: all("job" in r and r["state"] == "running" for r in list(book().values())[:2])); time.sleep(0.5)
        sweep.send_signal(what)
        out, err = sweep.communicate(timeout=60)
        if what == signal.SIGINT:
            jobs = sorted(m[2] for m in marks("begin"))
            assert sweep.returncode == 130 and err == "seqwarm: stopped; the same command goes on where it was\n"
            assert re.fullmatch(r"2 runs go on as jobs; to end them: scancel (\d+) (\d+)", out.splitlines()[-1]) and sorted(out.split()[-2:]) == jobs, out
    Path("runs/.g.sweep/book.json").unlink()    # as if the kill had come between sbatch and the book
    sweep = start("--jobs", "2")
    until(lambda: Path("runs/.g.sweep/book.json").exists() and all("job" in r for r in list(book().values())[:2])); Path("go").touch()
    out, err = sweep.communicate(timeout=120)
    assert sweep.returncode == 0 and len(marks("begin")) == len(marks("end")) == 3, (out, err)
    assert sorted(re.findall(r": is job (\d+)", out)) == jobs and len(re.findall("handed over", out)) == 1, out

def test_a_job_that_takes_too_long_is_cancelled(here):
    grid("timeout = 2\n[grid]\ncorpus = ['wait']")
    out, err = (sweep := start()).communicate(timeout=120)
    assert sweep.returncode == 1 and "g-corpus=wait: failed: took longer than 2 s and was ended" in out, (out, err)
    until(lambda: "RUNNING" not in subprocess.run(["squeue", "-h", "-o", "%T"], capture_output=True, text=True).stdout)
    assert not marks("end", "wait")

def test_what_sbatch_refuses_is_said(here):
    grid("seeds = [0]", 'time = 5\npartition = "none"')
    out, err = start().communicate(timeout=60)
    assert re.search("g-seed=0: failed: could not be started: .*Invalid partition", out), (out, err)

def test_tasks_are_ranks_of_one_run(here):
    if os.cpu_count() < 2: pytest.skip("ONE CORE: no room for two tasks")
    grid("[grid]\ncorpus = ['ok', 'lame']", "time = 5\ntasks = 2")
    out, err = start("--jobs", "1").communicate(timeout=120)
    assert sorted(m[3:] for m in marks("begin", "ok")) == [["0", "2"], ["1", "2"]] and book()["g-corpus=ok"]["state"] == "finished", (out, err)
    assert "g-corpus=lame: failed: rank 1: it broke at rank 1" in out

TRAIN = f"import sys; sys.path.insert(0, {str(HERE)!r}); import train_small\ntrained = train_small.main(str(folder), str(folder/'store'), 0.1, 0.02)"

def test_a_training_that_is_told_to_end_loses_no_step(here):
    import train_small
    notebook(here/"10_tiny.ipynb", TRAIN); grid("seeds = [0]")
    sweep, log = start(fake=False), Path("runs/g-seed=0/log.txt")
    until(lambda: log.exists() and log.read_text().count("step\n") > 12, 300)
    warn(book()["g-seed=0"]["job"]["id"])
    while sweep.poll() is None: hasten(book()["g-seed=0"]["job"]["id"])
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0 and log.read_text().count("step\n") == 60, (out, err)    # over both pieces: none twice
    calm = train_small.main("runs/g-seed=0", "calm", 0.1); [path] = Path("runs/g-seed=0/store").glob("*/model")
    assert train_small.equal(train_small.weights(path), train_small.weights(calm.path))
    assert pd.DataFrame(json.loads((path.parent/"history.json").read_text())).drop(columns="seconds").equals(calm.history.drop(columns="seconds"))

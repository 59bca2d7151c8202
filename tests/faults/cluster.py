"""Jobs of a Slurm of one node that are requeued, cancelled, or whose processes are killed, with a sweep that watches and may be killed, too."""
import json, os, random, signal, subprocess, sys, time
from pathlib import Path
import slurm
from tiny import notebook
from faults import quick
from faults.common import TESTS, Row, Tally, litter, trained, until
from seqwarm.core.files import file_fingerprint

HOW = ["requeue", "submitit's process", "the run's process", "the batch script", "scancel --signal=KILL", "the sweep"]

class Jobs:
    "One sweep of two trainings as jobs."
    def __init__(self, folder: Path, env: dict[str, str], text: Path, work: str):
        self.folder = folder
        self.env = env | dict(PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}", OMP_NUM_THREADS="1", QUICK=work, QUICK_STEP="0.2", QUICK_TEXT=str(text))
        folder.mkdir(); notebook(folder/"10_tiny.ipynb")
        (folder/"g.toml").write_text('recipe = "10_tiny.ipynb"\nseeds = [0, 1]\n[slurm]\ntime = 20')
        self.names = ["g-seed=0", "g-seed=1"]

    def start(self) -> subprocess.Popen:
        with open(self.folder/"log", "ab") as out:
            return subprocess.Popen([sys.executable, str(TESTS/"faults"/"quick.py"), "sweep", "g.toml", "--executor", "slurm"], cwd=self.folder, env=self.env,
                                    stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    def tell(self, *words: str) -> str: return subprocess.run(words, env=self.env, capture_output=True, text=True).stdout.strip()
    def book(self) -> dict:
        try: return json.loads((self.folder/"runs"/".g.sweep"/"book.json").read_text())["runs"]
        except (OSError, ValueError): return {}
    def record(self, name: str) -> dict | None:
        try: return json.loads((self.folder/"runs"/name/"record.json").read_text())
        except (OSError, ValueError): return None
    def begun(self, name: str) -> int:
        try: return len((self.folder/"runs"/name/"begun").read_text())
        except OSError: return 0

    def kept(self, name: str) -> bool:
        "Whether something of a run is on disk."
        here = self.folder/"runs"/name
        return (here/"state.json").exists() or any(here.glob("store/*/state-*"))

    def processes(self, name: str) -> dict[str, int]:
        "The batch script, submitit's process, and the run's, of a job that works."
        found, want = {}, f"SLURM_JOB_ID={self.book()[name]['job']['id']}".encode()
        for p in Path("/proc").glob("[0-9]*"):
            try: words, env = (p/"cmdline").read_bytes().split(b"\0"), (p/"environ").read_bytes().split(b"\0")
            except OSError: continue
            if want not in env: continue
            if b"submitit.core._submit" in words: found["submitit's process"] = int(p.name)
            elif b"job" in words and b"--" in words: found["the run's process"] = int(p.name)
            elif any(w.endswith(b"slurm_script") for w in words): found["the batch script"] = int(p.name)
        return found

    def hasten(self) -> None:
        "Slurm lets two minutes pass before a requeued job begins again."
        for run in self.book().values():
            if "job" in run and self.tell("squeue", "-h", "-j", run["job"]["id"], "-o", "%T %r").startswith("PENDING BeginTime"):
                self.tell("scontrol", "update", f"jobid={run['job']['id']}", "starttime=now")

def kills(folder: Path, times: int, seed: int, work: str = "train") -> Row:
    "So many kills of jobs that train, or only make a chain of hashes; a new sweep of two runs after each three."
    begun, rng, tally = time.monotonic(), random.Random(seed), Tally()
    (folder/"calm").mkdir()
    calm = quick.chain(folder/"calm", 0) if work == "chain" else file_fingerprint(trained(folder, folder/"calm").path/"model.safetensors")
    env, n = slurm.up(folder/"slurm"), 0
    try:
        while tally.kills < times and not tally.lost and n < 2*times:
            how = [HOW[(tally.kills + i) % len(HOW)] for i in range(min(3, times - tally.kills))]; n += 1
            one(Jobs(folder/f"jobs-{n}", env, folder, work), how, rng, tally, calm)
    finally: slurm.down(folder/"slurm")
    row = tally.row("SIGKILL, requeue", "jobs of Slurm", times, seed); row.seconds = time.monotonic() - begun
    return row

class Struck:
    "A sweep of jobs under way, and how often each of its finished runs had been begun when it was first seen finished."
    def __init__(self, jobs: Jobs): self.jobs, self.sweep, self.done = jobs, jobs.start(), dict[str, int]()
    def look(self) -> None: self.done |= {n: self.jobs.begun(n) for n in self.jobs.names if n not in self.done and self.jobs.record(n)}
    def ended(self) -> bool: self.jobs.hasten(); return self.sweep.poll() is not None
    def again(self) -> None:
        if self.sweep.poll() is not None: self.sweep = self.jobs.start()

    def ready(self, name: str) -> bool:
        "Whether a run works and has something on disk, or no longer needs to."
        return self.ended() or self.jobs.record(name) is not None or self.jobs.kept(name) and "the run's process" in self.jobs.processes(name)

    def strike(self, what: str, rng: random.Random) -> bool:
        "At one of the runs that are not finished."
        jobs = self.jobs
        if not (names := [n for n in jobs.names if jobs.record(n) is None]): return False
        name = rng.choice(names)
        until(lambda: self.ready(name), 240, 0.3); time.sleep(rng.uniform(0, 1))
        pids = jobs.processes(name) if "job" in jobs.book().get(name, {}) else {}
        if jobs.record(name) is not None or "the run's process" not in pids: return False
        id, was = jobs.book()[name]["job"]["id"], jobs.begun(name)
        if what == "requeue": jobs.tell("scontrol", "requeue", id)
        elif what == "the sweep": self.sweep.kill(); self.sweep.wait()
        elif what == "scancel --signal=KILL": jobs.tell("scancel", "--signal=KILL", id)
        else: os.kill(pids.get(what, pids["the run's process"]), signal.SIGKILL)
        end = time.monotonic() + 60     # until the sweep has noted it, or the job has begun anew
        while what != "the sweep" and not self.ended() and time.monotonic() < end and jobs.book()[name]["state"] == "running" and jobs.begun(name) == was: time.sleep(0.3)
        self.again(); self.look()
        return True

def one(jobs: Jobs, how: list[str], rng: random.Random, tally: Tally, calm: str) -> None:
    "A sweep that is struck in these ways, one after another, and started again until nothing has failed."
    work, mine = Struck(jobs), 0
    for what in how:
        if work.strike(what, rng): mine += 1; tally.fell[what] += 1
    for _ in range(4):
        until(work.ended, 400, 0.5); work.look()
        if work.sweep.returncode == 0: break
        work.again()
    tally.kills += mine
    records = [jobs.record(n) for n in jobs.names]
    if work.sweep.poll() is None or any(r is None for r in records): tally.lost += sum(r is None for r in records) or 1; return
    tally.resumed += mine*(work.sweep.returncode == 0 and all(r["state"] == "finished" for r in jobs.book().values()))
    tally.equal += mine*all(r["result"] == calm for r in records if r)
    tally.twice += sum(jobs.begun(n) != k for n, k in work.done.items())
    tally.left += len(litter(jobs.folder))

"""Sweeps whose process, whose runs, or whose kernels are killed, and sweeps and runs that meet in one folder."""
import json, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path
from tiny import notebook
from faults import quick
from faults.common import TESTS, Forked, Row, Tally, alive, family, litter, strike

WORDS = ["sweep", "g.toml", "--jobs", "2"]
GRID = 'recipe = "10_tiny.ipynb"\nseeds = {seeds}\n'

class Kills:
    "Sweeps that are struck until each of their runs has ended; `kernels`: with real notebooks."
    def __init__(self, folder: Path, seed: int, kernels: bool = False, seeds: int = 3):
        self.folder, self.rng, self.kernels, self.n = folder, random.Random(seed), kernels, 0
        self.names = [f"g-seed={s}" for s in range(seeds)]
        self.env = os.environ | dict(PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}", OMP_NUM_THREADS="1", TMPDIR=str(folder/"tmp"))
        self.seeds, self.tally = seeds, Tally()
        (folder/"tmp").mkdir(); (folder/"calm").mkdir(); self.calm = quick.chain(folder/"calm", 0)

    def place(self) -> Path:
        self.n += 1
        here = self.folder/f"sweep-{self.n}"; here.mkdir()
        notebook(here/"10_tiny.ipynb", *["from faults import quick; quick.chain(folder)"][:self.kernels])
        (here/"g.toml").write_text(GRID.format(seeds=list(range(self.seeds))))
        return here

    def start(self, here: Path) -> subprocess.Popen | Forked:
        with open(here/"log", "ab") as out:
            if self.kernels: return subprocess.Popen([sys.executable, "-c", "from seqwarm.batch.cli import main; main()", *WORDS], cwd=here, env=self.env,
                                                     stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            def work() -> None:
                from seqwarm.batch.cli import main
                os.chdir(here); os.environ["TMPDIR"] = tempfile.tempdir = str(self.folder/"tmp"); quick.install(forked=True)
                sys.exit(main(WORDS))
            return Forked(work, out.fileno())

    def record(self, here: Path, name: str) -> dict | None:
        try: return json.loads((here/"runs"/name/"record.json").read_text())
        except (OSError, ValueError): return None

    def begun(self, here: Path) -> dict[str, int]:   # how often each run that is finished was begun
        return {n: len((here/"runs"/n/"begun").read_text()) for n in self.names if self.record(here, n)}

    def hit(self, here: Path, sweep: subprocess.Popen) -> str:   # where; empty if everything ended first
        "One SIGKILL, to the sweep, to one of its runs, or to a kernel."
        what, book = self.rng.choice(["sweep", "book", "run"]), here/"runs"/".g.sweep"
        if what == "book":
            skip, old = self.rng.randrange(6), set()
            def seen() -> bool: old.update(p.name for p in book.glob(".book.json.*") if p.name not in old); return len(old) > skip
            return "in writing the book" if strike(sweep.pid, self.rng, 0.002, seen) else ""
        children: list[int] = []
        def some() -> bool: children[:] = family(sweep.pid)[1:]; return bool(children)
        while not some():
            if not alive(sweep.pid): return ""
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0, 20 if self.kernels else 1.5))
        if what == "sweep": return "in the sweep" if strike(sweep.pid, self.rng, 0.001) else ""
        if not some(): return ""
        victim = self.rng.choice(children)
        try: kernel = b"ipykernel" in Path(f"/proc/{victim}/cmdline").read_bytes(); os.kill(victim, signal.SIGKILL)
        except OSError: return ""
        return "in a kernel" if kernel else "in a run"

    def one(self, kills: int) -> None:
        "A sweep, struck up to so often."
        here, mine, done, tally, again = self.place(), 0, {}, self.tally, 0
        while True:
            sweep, where = self.start(here), ""
            if mine < kills: where = self.hit(here, sweep)
            if where and where.startswith("in a"): sweep.wait(300)     # the sweep goes on after it
            code = sweep.wait(300)
            now = self.begun(here)
            tally.twice += sum(now[n] != k for n, k in done.items()); done = now
            if where: mine += 1; tally.fell[where] += 1
            elif code == 0: break
            elif (again := again + 1) > 3: break      # what failed is tried again, but not for ever
        self.judge(here, mine)

    def judge(self, here: Path, mine: int) -> None:
        tally, records = self.tally, [self.record(here, n) for n in self.names]
        tally.kills += mine; tally.lost += (lost := sum(r is None for r in records))
        if lost: return
        book = json.loads((here/"runs"/".g.sweep"/"book.json").read_text())["runs"]
        tally.resumed += mine*all(r["state"] == "finished" for r in book.values())
        tally.equal += mine*all(self.equal(here, n) for n in self.names)
        tally.left += len(litter(here, self.folder/"tmp"))

    def equal(self, here: Path, name: str) -> bool:
        "Whether what was computed in a run is what an undisturbed one computes."
        return json.loads((here/"runs"/name/"state.json").read_text()) == dict(step=quick.STEPS, sum=self.calm)

def kills(folder: Path, times: int, seed: int, kernels: bool = False) -> Row:
    "So many kills in sweeps."
    begun, sweeps = time.monotonic(), Kills(folder, seed, kernels, 2 if kernels else 3)
    while sweeps.tally.kills < times and not sweeps.tally.lost: sweeps.one(min(4, times - sweeps.tally.kills))
    row = sweeps.tally.row("SIGKILL", "a sweep of notebooks" if kernels else "a sweep's bookkeeping", times, seed)
    row.seconds = time.monotonic() - begun
    return row

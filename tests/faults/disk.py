"""A disk of some MB that is full when a state, a checkpoint, a plan's checkpoint, a record, a book or a notebook is to be written."""
import inspect, json, os, subprocess, sys, tempfile, time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
import train_small
from tiny import notebook
from faults import quick
from faults.common import TESTS, Row, litter, quietly, trained, until
from seqwarm.core import record, train as module, write as writing
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.plan import Plan, Row as PlanRow
from seqwarm.core.state import State

@contextmanager
def small(size: str = "2m") -> Iterator[Path]:
    "A small file system; OSError where it can't be mounted."
    folder = Path(tempfile.mkdtemp())
    try:
        if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "small", str(folder)], capture_output=True).returncode:
            raise OSError("NO SMALL DISK HERE: mount -t tmpfs needs root")
        try: yield folder
        finally: subprocess.run(["umount", "-l", str(folder)], check=True)
    finally: folder.rmdir()

def fill(folder: Path, left: int = 0) -> None:
    "Leave so many bytes."
    with open(folder/"ballast", "ab", buffering=0) as f:
        try:
            while True: f.write(bytes(4096))
        except OSError: pass
        f.truncate(f.tell() - left)

def forked(work, log: Path) -> str:
    "The last line that a forked process said, and nothing if it ended well."
    at = log.stat().st_size if log.exists() else 0
    if not os.waitpid(train_small.forked(quietly(work, log)), 0)[1]: return ""
    return [line for line in log.read_text()[at:].splitlines() if line.strip()][-1]

def clear(said: str) -> bool: return said.startswith("Refusal: ") and " is full; make room and start again; nothing was lost" in said

def training(folder: Path, what: str) -> dict[str, bool]:
    "The disk fills up just before a state, or the finished checkpoint, is written."
    with small() as disk:
        calm, log, store = trained(folder, folder/"calm"), folder/"log", disk/"store"
        def work() -> None:
            keep, save = State._write, module.save
            def state(self, tmp, book):
                if book["step"] == 10: fill(disk, 20_000)
                keep(self, tmp, book)
            def saved(*args): fill(disk, 20_000); return save(*args)
            if what == "state": State._write = state
            else: module.save = saved
            trained(folder, store)
        said = forked(work, log)
        [state] = store.glob("*/state-*")
        kept = state.name == ("state-000000008" if what == "state" else "state-000000020") and not litter(store) and not list(store.glob("*/model"))
        (disk/"ballast").unlink()
        again = not forked(lambda: trained(folder, store), log)
        return {"one line": clear(said), "the earlier whole": kept, "goes on": again and train_small.same(trained(folder, store), calm)}

def plan(folder: Path) -> dict[str, bool]:
    "A plan's new checkpoint, for which there was room when it began."
    calm = trained(folder, folder/"calm"); source = Checkpoint(calm.path)
    copy = Plan("copy", source.config, source.architecture, [PlanRow(n, "copy", f"s:{n}") for n in source.names], untied=source.untied)
    with small() as disk:
        def write(meanwhile: bool) -> None:
            room, weights = writing.room, writing._weights
            def late(*args): fill(disk, 4096); return weights(*args)
            writing.room = lambda *_: None
            if meanwhile: writing._weights = late
            try: writing.write(copy, {"s": source}, disk/"out")
            finally: writing.room, writing._weights = room, weights
        said = forked(lambda: write(True), folder/"log")
        left = [p.name for p in disk.iterdir()]; (disk/"ballast").unlink(); write(False)
        return {"one line": clear(said), "the earlier whole": left == ["ballast"],
                "goes on": train_small.equal(train_small.weights(disk/"out"), train_small.weights(calm.path))}

def on_record(folder: Path) -> dict[str, bool]:
    "The files that end a run, beside those of an earlier run in another folder."
    import pandas as pd
    with small("16m") as disk:    # a page is large
        def close(name: str, again: bool = False) -> None:
            run = record.Run("tiny", dict(name=name, runs=str(disk)), name, str(disk))
            if name == "late" and not again: fill(disk, 2000)
            record.close(run, ["a line"], pd.DataFrame(dict(step=range(500))), pd.DataFrame(dict(arm=["a"])), {})
        close("early"); early = (disk/"early"/"record.json").read_bytes()
        said = forked(lambda: close("late"), folder/"log")
        whole = (disk/"early"/"record.json").read_bytes() == early and not litter(disk) and not (disk/"late"/"record.json").exists()
        (disk/"ballast").unlink()
        return {"one line": clear(said), "the earlier whole": whole, "goes on": not forked(lambda: close("late", again=True), folder/"log")}

def seqwarm(here: Path, *words: str, kernel: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-c", "from seqwarm.batch.cli import main; main()"] if kernel else [sys.executable, str(TESTS/"faults"/"quick.py")]
    return subprocess.Popen([*command, *words], cwd=here, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | dict(PYTHONPATH=str(TESTS.parent), OMP_NUM_THREADS="1", QUICK_STEP="0.1"))

def one_line(err: str, place: Path) -> bool:
    lines = [x for x in err.splitlines() if x.strip()]
    return len(lines) == 1 and lines[0].startswith(f"seqwarm: the disk of {place}") and lines[0].endswith(" is full; make room and start again; nothing was lost")

def book(folder: Path) -> dict[str, bool]:
    "A sweep's book, while its runs write, too."
    with small() as disk:
        notebook(folder/"10_tiny.ipynb"); grid = folder/"full.toml"
        grid.write_text(f'recipe = "{folder}/10_tiny.ipynb"\nname = "g"\nseeds = [0, 1]\n[parameters]\nruns = "{disk}"')
        sweep = seqwarm(folder, "sweep", str(grid)); until(lambda: (disk/"g-seed=0"/"state.json").exists())
        fill(disk); out, err = sweep.communicate(timeout=300)
        kept = json.loads((disk/".g.sweep"/"book.json").read_text())["runs"]
        whole = list(kept) == ["g-seed=0", "g-seed=1"]
        (disk/"ballast").unlink()
        again = seqwarm(folder, "sweep", str(grid)); again.communicate(timeout=300)
        (folder/"calm-book").mkdir(); calm = quick.chain(folder/"calm-book", 0)
        equal = all(json.loads((disk/n/"record.json").read_text())["result"] == calm for n in kept) if not again.returncode else False
        return {"one line": sweep.returncode == 2 and one_line(err, disk), "the earlier whole": whole, "goes on": equal and not litter(disk)}

def a_notebook(folder: Path) -> dict[str, bool]:
    "The notebook of a run, which is kept after each cell."
    with small() as disk:
        cell = f"{inspect.getsource(fill).replace('Path', 'object')}\nif not (folder/'again').exists(): fill(pathlib.Path({str(disk)!r}))"
        recipe = notebook(folder/"20_full.ipynb", cell)
        run = seqwarm(folder, "run", str(recipe), "--runs", str(disk), "--name", "x", kernel=True); out, err = run.communicate(timeout=300)
        whole = any("begun" in "".join(c["source"]) for c in json.loads((disk/"x"/"notebook.ipynb").read_text())["cells"])
        (disk/"ballast").unlink(); (disk/"x"/"again").touch()
        again = seqwarm(folder, "run", str(recipe), "--runs", str(disk), "--name", "x", kernel=True); again.communicate(timeout=300)
        return {"one line": run.returncode == 2 and one_line(err, disk), "the earlier whole": whole,
                "goes on": again.returncode == 0 and (disk/"x"/"record.json").exists() and not litter(disk)}

PLACES = {"a state": lambda f: training(f, "state"), "a finished checkpoint": lambda f: training(f, "checkpoint"), "a plan's checkpoint": plan,
          "a record": on_record, "a sweep's book": book, "a notebook": a_notebook}

def full(folder: Path, where: str) -> Row:
    "The disk is full where this is to be written."
    begun, came = time.monotonic(), PLACES[where](folder)
    return Row("disk full", where, 1, ", ".join(came), ", ".join(k if good else f"not {k}" for k, good in came.items()), seconds=time.monotonic() - begun)

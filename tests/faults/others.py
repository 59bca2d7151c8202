"""Faults that are no kills: two at once, a kernel without its parent, a flipped bit, too little memory, a dead kernel, one that hangs."""
import json, os, random, re, shutil, signal, subprocess, sys, time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
import train_small
from tiny import notebook
from faults import quick
from faults.common import STEPS, TESTS, Row, alive, litter, quietly, trained, until
from faults.sweeps import Kills
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.plan import Plan, Row as PlanRow
from seqwarm.core.train import _Loop
from seqwarm.core.write import write

def _row(fault: str, where: str, times: int, asked: str, came: str, seed: int | None, begun: float) -> Row:
    return Row(fault, where, times, asked, came, seed=seed, seconds=time.monotonic() - begun)

# ---- two at once

def two_sweeps(folder: Path, times: int, seed: int) -> Row:
    "The same sweep, started twice within a second."
    begun, rng, sweeps, whole, twice, torn, words = time.monotonic(), random.Random(seed), Kills(folder, seed), 0, 0, 0, 0
    for _ in range(times):
        here = sweeps.place(); both = []
        for _ in range(2): both.append(sweeps.start(here)); time.sleep(rng.uniform(0, 1))
        codes = sorted(p.wait(300) for p in both)
        said = [x for x in (here/"log").read_text().splitlines() if x.startswith("seqwarm: ")]
        words += codes == [0, 0] and not said or codes == [0, 2] and len(said) == 1 and ".g.sweep is in use by another process" in said[0]
        now = sweeps.begun(here); whole += len(now) == len(sweeps.names); twice += sum(k > 1 for k in now.values())
        torn += sum((here/"runs"/n/"record.json").exists() and sweeps.record(here, n) is None for n in sweeps.names) + len(litter(here))
    told = "finished {}, told in one line or not needed {}, runs begun twice {}, torn {}"
    return _row("two at once", "a sweep", times, told.format(times, times, 0, 0), told.format(whole, words, twice, torn), seed, begun)

def many_runs(folder: Path, times: int, seed: int) -> Row:
    "Six processes ask for one run, again and again until it is finished."
    begun, rng, once, torn = time.monotonic(), random.Random(seed), 0, 0
    from seqwarm.batch.run import run
    recipe = notebook(folder/"10_tiny.ipynb")
    for i in range(times):
        waits = [rng.uniform(0, 0.15) for _ in range(6)]
        def ask(wait: float, i: int = i) -> None:
            quick.install(); os.environ["QUICK_STEP"] = "0.005"
            time.sleep(wait)
            while True:
                try: run(recipe, runs=str(folder/"runs"), name=f"r{i}", show=False); return
                except Refusal as e:
                    if "in use" not in str(e): raise
        pids = [train_small.forked(quietly(lambda w=w: ask(w), folder/"log")) for w in waits]
        good = not any([os.waitpid(p, 0)[1] for p in pids])
        here = folder/"runs"/f"r{i}"
        once += good and (here/"begun").read_text() == "x"
        torn += "result" not in json.loads((here/"record.json").read_text()) or bool(litter(here))
    return _row("two at once", "a run, by six processes", times, f"begun once {times}, torn 0", f"begun once {once}, torn {torn}", seed, begun)

def many_trainings(folder: Path, times: int, seed: int) -> Row:
    "Four processes ask for one training."
    begun, rng, once, equal = time.monotonic(), random.Random(seed), 0, 0
    calm, steps = trained(folder, folder/"calm"), folder/"steps"
    for i in range(times):
        waits = [rng.uniform(0, 0.5) for _ in range(4)]; steps.write_bytes(b"")
        def ask(wait: float, i: int = i) -> None:
            update, marks = _Loop.update, os.open(steps, os.O_WRONLY | os.O_APPEND)
            def marked(*args): os.write(marks, b"s"); return update(*args)
            _Loop.update = marked; time.sleep(wait)
            while True:
                try: trained(folder, folder/f"store{i}"); return
                except Refusal as e:
                    if "in use" not in str(e): raise
        pids = [train_small.forked(quietly(lambda w=w: ask(w), folder/"log")) for w in waits]
        good = not any([os.waitpid(p, 0)[1] for p in pids])
        once += good and steps.stat().st_size == STEPS
        equal += train_small.same(trained(folder, folder/f"store{i}"), calm)
    told = "each step once {}, bit-equal {}"
    return _row("two at once", "a training, by four processes", times, told.format(times, times), told.format(once, equal), seed, begun)

# ---- a kernel whose parent is gone

DEAF = """import time
parent = os.getppid(); os.getppid = lambda: parent      # a kernel that does not notice
(folder/"pid").write_text(str(os.getpid()))
while not (folder/"go").exists(): time.sleep(0.05)
(folder/"over").touch()"""

def orphan(folder: Path) -> Row:
    "A runner is killed, its kernel goes on with its cell; who comes meanwhile is refused, who comes when it is gone does the run."
    begun, recipe = time.monotonic(), notebook(folder/"10_tiny.ipynb", DEAF)
    command = [sys.executable, "-c", "from seqwarm.batch.cli import main; main()", "run", str(recipe)]
    env = os.environ | dict(PYTHONPATH=str(TESTS.parent), OMP_NUM_THREADS="1")
    first = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    here = folder/"runs"/"tiny"; until(lambda: (here/"pid").exists() and (here/"pid").read_text())
    first.kill(); first.wait()
    kernel = int((here/"pid").read_text())
    second = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    refused = second.returncode == 2 and second.stderr.count("\n") == 1 and "is in use by another process" in second.stderr and alive(kernel)
    (here/"go").touch()
    until(lambda: (here/"over").exists() or not alive(kernel))
    if alive(kernel): os.kill(kernel, signal.SIGKILL)     # it did not notice, and waits for cells that nobody sends
    until(lambda: not alive(kernel))
    third = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    ended = third.returncode == 0 and (here/"record.json").exists()
    came = f"refused while it lived {int(refused)}, finished afterwards {int(ended)}, leftovers {len(litter(here))}"
    return _row("an orphaned kernel", "seqwarm run", 1, "refused while it lived 1, finished afterwards 1, leftovers 0", came, None, begun)

# ---- one bit

def _flipped(file: Path, rng: random.Random, then) -> str:
    "What is said, in one line, of a file with a bit that is not as it was."
    whole = file.read_bytes(); at = rng.randrange(len(whole))
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:])
    try: then(); return ""
    except Refusal as e: return str(e)
    finally: file.write_bytes(whole)

def bits(folder: Path, times: int, seed: int, where: str) -> Row:
    "A bit in a file of a finished checkpoint that is found again, of one that a plan reads, or of a state that is gone on with."
    begun, rng, named, again = time.monotonic(), random.Random(seed), 0, 0
    calm = trained(folder, folder/"calm")
    if where == "a state":
        def stop(self, model, optimizer, feed, step, rates, update=_Loop.update): return update(self, model, optimizer, feed, step, rates) if step < 11 else os._exit(0)
        def work(): _Loop.update = stop; trained(folder, folder/"broken")
        os.waitpid(train_small.forked(quietly(work, folder/"log")), 0)
        [place] = (folder/"broken").glob("*/state-*"); then = lambda: trained(folder, folder/"broken")
    elif where == "a checkpoint that is found":
        place, then = calm.path, lambda: trained(folder, folder/"calm")
    else:
        place, source = calm.path, Checkpoint(calm.path)
        copy = Plan("copy", source.config, source.architecture, [PlanRow(n, "copy", f"s:{n}") for n in source.names], untied=source.untied)
        def then() -> None:      # a source may have been trained on: that is noted, and goes on
            with redirect_stderr(StringIO()) as said: write(copy, {"s": source}, folder/"out")
            shutil.rmtree(folder/"out")
            if said.getvalue(): raise Refusal(said.getvalue().strip(), "look at it")
    files = [f for f in sorted(place.iterdir()) if f.name != "README.md"]
    for _ in range(times):
        file = rng.choice(files); said = _flipped(file, rng, then)
        named += file.name in said and "\n" not in said
    try: then(); again = 1
    except Refusal as e: print(e)
    return _row("one bit flipped", where, times, f"noticed and named {times}, whole again 1", f"noticed and named {named}, whole again {again}", seed, begun)

# ---- runs that break, and a sweep that goes on

BREAK = """import resource, signal, time
if corpus == "memory":
    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32)); bytearray(1 << 33)
if corpus == "killed": os.kill(os.getpid(), signal.SIGKILL)
if corpus == "hangs": time.sleep(10**6)"""
TOLD = {"memory": r"failed: cell 4 failed: MemoryError: .*; see .*notebook\.ipynb; run again to resume", "killed": r"failed: the kernel died, perhaps for want of memory; see .*",
        "hangs": r"failed: took longer than \d+ s and was ended", "well": r"finished in .*"}

def broken(folder: Path, timeout: int = 120) -> Row:
    "A sweep of notebooks: one asks for more memory than it may have, one is killed as for want of memory, one hangs, one is well."
    begun = time.monotonic()
    notebook(folder/"10_tiny.ipynb", BREAK)
    (folder/"g.toml").write_text(f'recipe = "10_tiny.ipynb"\ntimeout = {timeout}\n[grid]\ncorpus = {list(TOLD)}')
    got = subprocess.run([sys.executable, "-c", "from seqwarm.batch.cli import main; main()", "sweep", "g.toml", "--jobs", "2"], cwd=folder, capture_output=True, text=True,
                         env=os.environ | dict(PYTHONPATH=str(TESTS.parent), OMP_NUM_THREADS="1"), timeout=600)
    lines = dict(re.findall(r"^g-corpus=(\w+): ((?:failed|finished).*)$", got.stdout, re.M))
    right = [k for k, says in TOLD.items() if re.fullmatch(says, lines.get(k, ""))]
    ended = got.returncode == 1 and got.stderr.count("\n") == 1 and got.stderr.startswith("seqwarm: 3 of 4 runs failed")
    gone = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True).stdout.split()
    told = "told rightly: {}; the sweep went on {}, processes left {}"
    return _row("runs that break", "a sweep of notebooks", 4, told.format(", ".join(TOLD), 1, 0), told.format(", ".join(right), int(ended), len(gone)), None, begun)

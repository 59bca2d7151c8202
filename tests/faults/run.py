"""Puts faults in, on purpose, and writes down what came of each: python tests/faults/run.py [--kills N] [--only WORD,WORD] [--seed S] [--out results/faults.csv]

A row: what was done and where, how often, what was asked of it, what came out, where the kills fell. The exit code is 1 if anything else came out than was asked.
It needs Linux; where it is not root there is no small disk, and without slurm-wlm and munge there are no jobs: their rows then say so, and count as failures.
"""
import argparse, csv, os, sys, tempfile, time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
os.environ |= dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}")

MEMORY = "/dev/shm"   # a kill is not a power cut: nothing here has to reach a disk, and waiting for one takes most of the time
SHARES = {"training": 0.46, "state": 0.16, "checkpoint": 0.13, "bookkeeping": 0.20, "notebooks": 0.02, "slurm": 0.03}   # of the kills

def rows(kills: int, seed: int) -> dict[str, Callable]:
    "By a word: what gives a row, in an empty folder."
    from faults import cluster, disk, others, sweeps, training
    n = {k: max(1, round(share*kills)) for k, share in SHARES.items()}
    n["training"] += kills - sum(n.values())
    few = max(1, kills//20)
    return {
        "kill training": lambda d: training.kills(d, n["training"], seed, "steps"),
        "kill state": lambda d: training.kills(d, n["state"], seed + 1, "state"),
        "kill checkpoint": lambda d: training.kills(d, n["checkpoint"], seed + 2, "checkpoint"),
        "kill bookkeeping": lambda d: sweeps.kills(d, n["bookkeeping"], seed + 3),
        "kill notebooks": lambda d: sweeps.kills(d, n["notebooks"], seed + 4, kernels=True),
        "kill slurm": lambda d: cluster.kills(d, n["slurm"], seed + 5),
        **{f"disk {where}": lambda d, where=where: disk.full(d, where) for where in disk.PLACES},
        "meet sweeps": lambda d: others.two_sweeps(d, few, seed + 6),
        "meet runs": lambda d: others.many_runs(d, 2*few, seed + 7),
        "meet trainings": lambda d: others.many_trainings(d, few, seed + 8),
        "orphan": others.orphan,
        **{f"bit {where}": lambda d, where=where: others.bits(d, 5*few, seed + 9, where) for where in ("a checkpoint that is found", "a checkpoint that a plan reads", "a state")},
        "broken": others.broken}

COLUMNS = "fault where times asked came as_asked fell seed seconds".split()

def write(table: list, out: Path) -> None:
    "Put rows into a table; with `--only`, the others stay as they were."
    known = {}
    if out.exists():
        with open(out, newline="") as f: known = {(r["fault"], r["where"]): r for r in csv.DictReader(f)}
    for r in table:
        values = [r.fault, r.where, r.times, r.asked, r.came, "yes" if r.good else "no", r.fell, "" if r.seed is None else r.seed, round(r.seconds, 1)]
        known[r.fault, r.where] = dict(zip(COLUMNS, values))
    with open(out, "w", newline="") as f:
        rows = csv.DictWriter(f, COLUMNS, lineterminator="\n"); rows.writeheader(); rows.writerows(known.values())

def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200); parser.add_argument("--only", default=""); parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    from faults.common import Row
    table, begun = [], time.monotonic()
    for word, make in rows(asked.kills, asked.seed).items():
        if not any(w in word for w in asked.only.split(",")): continue
        with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None, ignore_cleanup_errors=True) as d:
            try: row = make(Path(d).resolve())
            except Exception as e: row = Row(word, "", 1, "a result", f"{type(e).__name__}: {e}")
        table.append(row)
        print(f"{'as asked' if row.good else 'NOT AS ASKED'}  {row.fault}, {row.where}: {row.came}{f' ({row.fell})' if row.fell else ''}; {row.seconds:.0f} s", flush=True)
    print(f"{sum(r.good for r in table)} of {len(table)} as asked, {time.monotonic() - begun:.0f} s")
    if asked.out: write(table, asked.out)
    return int(not all(r.good for r in table))

if __name__ == "__main__": sys.exit(main())

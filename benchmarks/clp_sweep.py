"""The CLP recipe over methods and seeds on a Slurm of one node that is brought up for it, with kills in between.

While `seqwarm sweep --executor slurm` works, kernels, jobs and the sweep itself are killed, requeued and warned at random moments; the
same command is given again until all runs are finished. Then one run that asks for all methods and seeds finds every training in the
store, one method and seed is trained once more where nothing is killed, and both must say what the killed runs said, to the last bit.

    python benchmarks/clp_sweep.py FOLDER [--kills 20] [--scale demo]     # about half an hour on two cores; needs root, slurm-wlm, munge

In FOLDER lie the runs and report.html; the table of the report and the list of kills go to results/.
"""
import argparse, csv, json, os, random, shutil, subprocess, sys, time
from pathlib import Path
import pandas as pd
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tests"))
import slurm as cluster  # noqa: E402

METHODS, SEEDS = ["random", "overlap", "guarded", "clp+", "procrustes"], [0, 1, 2]
GRID = """recipe = "clp"
name = "sweep"
seeds = {seeds}

[parameters]
scale = "{scale}"
rates = [0.002]      # the best of the demo's three
threads = 1

[grid]
arms = {arms}

[slurm]
time = "2:00:00"
cpus = 1
"""

def jobs(book: Path) -> dict[str, str]:
    "Run -> job, of those that work."
    out = subprocess.run(["squeue", "-h", "-t", "RUNNING", "-o", "%i"], capture_output=True, text=True).stdout.split()
    runs = json.loads(book.read_text())["runs"] if book.exists() else {}
    return {name: r["job"]["id"] for name, r in runs.items() if r["state"] == "running" and r.get("job", {}).get("id") in out}

def kernel(name: str) -> psutil.Process | None:
    "The kernel of a run, below its job's process."
    for p in psutil.process_iter(["cmdline"]):
        words = p.info["cmdline"] or []
        if words[-1:] == [name] and "job" in words:
            return next((c for c in p.children(recursive=True) if "ipykernel_launcher" in " ".join(c.cmdline())), None)

def strike(draw: random.Random, sweep: subprocess.Popen, book: Path) -> tuple[str, str] | None:
    "One disturbance; what was done to whom."
    working = jobs(book)
    if not working: return None
    name, job = draw.choice(sorted(working.items()))
    how = draw.choice(["SIGKILL to the kernel", "SIGKILL to the job", "requeue", "warning (SIGUSR2)", "SIGKILL to the sweep"])
    if how == "SIGKILL to the kernel":
        if (k := kernel(name)) is None: return None
        k.kill()
    elif how == "SIGKILL to the sweep": sweep.kill(); name = ""
    else: subprocess.run({"SIGKILL to the job": ["scancel", "--signal=KILL", job], "requeue": ["scontrol", "requeue", job],
                          "warning (SIGUSR2)": ["scancel", "--signal=USR2", job]}[how], capture_output=True)
    return how, name

def hasten() -> None:
    "Slurm lets two minutes pass before a requeued job begins again: not here."
    for job in subprocess.run(["squeue", "-h", "-t", "PENDING", "-o", "%i"], capture_output=True, text=True).stdout.split():
        subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], capture_output=True)

def disturbed(folder: Path, command: list[str], kills: int, every: tuple[float, float]) -> list[dict]:
    "Give the command until it succeeds; strike in between."
    draw, done, book, begun = random.Random(0), [], folder/"runs"/".sweep.sweep"/"book.json", time.monotonic()
    for start in range(200):
        with open(folder/"sweep.log", "ab") as log: sweep = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        due = time.monotonic() + draw.uniform(*every)
        while sweep.poll() is None:
            time.sleep(1); hasten()
            if len(done) < kills and time.monotonic() > due:
                due = time.monotonic() + draw.uniform(*every)
                if did := strike(draw, sweep, book):
                    done.append(dict(second=round(time.monotonic() - begun), how=did[0], run=did[1]))
                    print(*done[-1].values(), flush=True)
        if sweep.returncode == 0: return done
        print(f"start {start + 1} ended with {sweep.returncode}", flush=True)
    raise SystemExit("the sweep did not come to its end")

def numbers(folder: Path, name: str) -> pd.DataFrame:
    return pd.DataFrame(json.loads((folder/"runs"/name/"record.json").read_text())["table"]).set_index(["arm", "seed"]).sort_index()

def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", type=Path); ask.add_argument("--kills", type=int, default=20); ask.add_argument("--scale", default="demo")
    ask.add_argument("--every", type=float, nargs=2, default=(20, 60), help="seconds between kills")
    p = ask.parse_args()
    folder = p.folder.resolve(); folder.mkdir(parents=True, exist_ok=True)
    if not cluster.ready(): raise SystemExit(f"no Slurm here: {', '.join(cluster.missing()) or 'not root'}")
    (folder/"sweep.toml").write_text(GRID.format(seeds=SEEDS, scale=p.scale, arms=[[m] for m in METHODS]))
    seqwarm = [sys.executable, "-c", "from seqwarm.batch.cli import main; import sys; sys.exit(main())"]
    home = folder/"slurm"; os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    try:
        os.environ.update(cluster.up(home))
        kills = disturbed(folder, [*seqwarm, "sweep", "sweep.toml", "--executor", "slurm", "--jobs", "2"], p.kills, p.every)
    finally: cluster.down(home)
    given = ["--scale", p.scale, "-p", "rates", "[0.002]", "-p", "threads", "1"]
    ask_for = lambda arms, seeds: ["-p", "arms", json.dumps(arms), "-p", "seeds", json.dumps(seeds)]
    run = lambda *more: subprocess.run([*seqwarm, "run", "clp", *given, *more], cwd=folder, check=True)
    begun = time.monotonic()
    run("--name", "slurm", *ask_for(METHODS, SEEDS))
    print(f"all of it, found in the store: {time.monotonic() - begun:.0f} s", flush=True)
    run("--name", "calm", "-p", "runs", "calm", *ask_for(METHODS[-1:], SEEDS[-1:]))
    shutil.copytree(folder/"calm"/"calm", folder/"runs"/"calm", dirs_exist_ok=True, symlinks=True)
    whole, book = numbers(folder, "slurm"), json.loads((folder/"runs"/".sweep.sweep"/"book.json").read_text())["runs"]
    parts = pd.concat([numbers(folder, name) for name in book]); parts = parts[~parts.index.duplicated()].sort_index()
    pd.testing.assert_frame_equal(whole, parts, check_exact=True)
    calm = numbers(folder, "calm"); pd.testing.assert_frame_equal(calm, whole.loc[calm.index], check_exact=True)
    left = [str(f) for f in (folder/"runs").rglob(".*") if f.suffix in (".part", ".gone")]
    assert not left, left
    print(f"{len(book)} runs, {len(kills)} kills, {sum(r['tries'] for r in book.values())} starts; the same numbers, to the last bit")
    subprocess.run([*seqwarm, "report", *book, "slurm", "-o", "report.html", "--table", "report.csv"], cwd=folder, check=True)
    shutil.copy(folder/"report.csv", ROOT/"results"/"clp_sweep.csv")
    with open(ROOT/"results"/"clp_sweep_kills.csv", "w", newline="") as f:
        table = csv.DictWriter(f, ["second", "how", "run"], lineterminator="\n"); table.writeheader(); table.writerows(kills)

if __name__ == "__main__": main()

"""What each recipe needs at demo size: python benchmarks/memory.py [RECIPE ...] writes results/memory.csv.

Sizes are those of demo, but for the numbers of steps, which take time and no memory, and for a shorter text, of which a GPU holds a batch.
MB of the state are 16 bytes a parameter of the largest model: weights, gradients and Adam's two moments. MB of the process are the peak of
all that it holds, Python and the libraries included.
"""
import json, os, subprocess, sys, tempfile
from pathlib import Path
import pandas as pd
from seqwarm.core.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tests"))
from checks import FEW    # noqa: E402

def measured(recipe: str, folder: Path) -> dict:
    words = [x for k, v in (FEW[recipe] | dict(words=100_000)).items() for x in ("-p", k, json.dumps(v))]
    start = [sys.executable, "-c", "from seqwarm.batch.cli import main; main()", "run", recipe, "--scale", "demo", *words]
    run = subprocess.Popen(start, cwd=folder, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(run.pid, 0)          # of the command and of the kernel that it waited for, the larger
    if status: raise SystemExit(f"{recipe} failed")
    made = [Checkpoint(c).layout for c in (folder/"runs"/recipe/"checkpoints").iterdir()]
    largest = max(sum(t.size for t in lay.stored().values()) for lay in made)
    return dict(recipe=recipe, parameters=largest, state_mb=round(16*largest/1e6, 1), process_mb=round(used.ru_maxrss*1024/1e6))

if __name__ == "__main__":
    out = ROOT/"results"/"memory.csv"
    rows = {r["recipe"]: r for r in pd.read_csv(out).to_dict("records")} if out.exists() else {}
    for recipe in sys.argv[1:] or FEW:
        with tempfile.TemporaryDirectory() as d: rows[recipe] = measured(recipe, Path(d))
        print(rows[recipe], flush=True)
        pd.DataFrame([rows[r] for r in FEW if r in rows]).to_csv(out, index=False)

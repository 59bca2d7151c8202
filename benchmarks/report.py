"""How long `seqwarm report` takes over runs that are made up: 4 arms x 3 seeds, 51 measurements, 12 checkpoints each.

    python benchmarks/report.py [RUNS]
"""
import json, os, resource, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import seqwarm
from seqwarm.core.card import Card

OUT = Path(__file__).resolve().parents[1]/"results"/"report.csv"
ARMS, SEEDS, ROWS = ["scratch", "overlap", "clp", "procrustes"], [0, 1, 2], 51

def make(folder: Path, i: int) -> None:
    "One run, as a recipe leaves it; every tenth has failed instead."
    rng, texts = np.random.default_rng(i), dict(source_text="world:a", target_text=f"world:{'bc'[i % 2]}")
    folder.mkdir(parents=True)
    if i % 10 == 9:
        error = dict(output_type="error", ename="Refusal", evalue="the loss became nan in step 7; lower the learning rate", traceback=[])
        (folder/"notebook.ipynb").write_text(json.dumps(dict(cells=[dict(cell_type="code", execution_count=1, outputs=[error])])))
        return
    s = np.arange(ROWS)
    clock, noise = lambda: rng.uniform(0.9, 1.1, ROWS).cumsum(), lambda: rng.normal(size=ROWS)/100
    metrics = [pd.DataFrame(dict(arm=arm, seed=seed, step=10*s, tokens=1280.*s, flops=1e9*s, seconds=clock(), lr=1e-3,
                                 loss=2 + 4*np.exp(-(1 + a)*s/20) + noise())) for a, arm in enumerate(ARMS) for seed in SEEDS]
    pd.concat(metrics).to_parquet(folder/"metrics.parquet", index=False)
    source, helper = (Card(n, "clp", cost=dict(tokens=1e6, flops=1e12, seconds=60)).sealed(f"{n}{i}") for n in ("source", "helper"))
    for arm in ARMS:
        for seed in SEEDS:
            start = Card.child(f"start {arm} {seed}", "clp", [source, helper]).sealed(f"{arm}{seed}{i}")
            trained = Card.child(f"{arm} {seed}", "clp", [start], dict(tokens=6e4, flops=5e10, seconds=9)).sealed(f"t{arm}{seed}{i}")
            (place := folder/"checkpoints"/f"{arm}-{seed}").mkdir(parents=True)
            trained.write(place)
    table = [dict(arm=a, seed=s, saved=rng.uniform(), last_loss=rng.uniform()) for a in ARMS for s in SEEDS]
    claims = {"clp-steps": rng.uniform(), "clp-embeddings": rng.uniform()/2}
    record = dict(recipe="clp", name=folder.name, parameters=texts | dict(seeds=SEEDS, arms=ARMS, width=32 << i % 3), seconds=60.,
                  environment=dict(seqwarm=seqwarm.__version__, torch="2.13", device="CPU"), lines=["a line"]*10, claims=claims,
                  by_seed={s: claims for s in SEEDS}, table=table)
    (folder/"record.json").write_text(json.dumps(record, indent=1))

def main(n: int) -> None:
    with tempfile.TemporaryDirectory() as d:
        for i in range(n): make(Path(d)/"runs"/f"run-{i:03}", i)
        code, times = "from seqwarm.batch.cli import main; main()", []
        for _ in range(3):
            begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code, "report"], cwd=d, check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append((time.perf_counter() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
        seconds, cpu = min(times)   # by the clock, which says little on a machine that others use, and of one core
        size = (Path(d)/"report.html").stat().st_size/1e6
        row = dict(runs=n, cpu_seconds=round(cpu, 2), page_MB=round(size, 1), cores=os.cpu_count())
    pd.DataFrame([row]).to_csv(OUT, index=False)
    print(row, f"by the clock {seconds:.1f} s")

if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)

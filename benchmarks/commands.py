"""How long the two commands take and how much memory they need, each in a fresh clone, with nothing from pip's cache.

    python benchmarks/commands.py [demo] [test]

Memory is the peak, over samples four a second, of the proportional set size summed over all processes of the command (shared pages
counted once).
"""
import os, subprocess, sys, tempfile, time
from pathlib import Path
import pandas as pd
import psutil
import collect

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"demo": ["setup-run", "demo"], "test": ["setup-dev", "test"]}   # a command sets up by itself; apart, each can be timed
PROMISED = {"demo": 8 * 60, "test": 15 * 60}

def watched(command: list[str], folder: Path) -> tuple[float, float]:
    "Seconds, and peak memory in GB, of a command and its children."
    begun, peak = time.perf_counter(), 0
    process = psutil.Popen(command, cwd=folder, env=os.environ | {"PIP_NO_CACHE_DIR": "1", "SEQWARM_CACHE": str(folder/"cache")})
    while process.poll() is None:
        total = 0
        for p in [process, *process.children(recursive=True)]:
            try: total += p.memory_full_info().pss
            except psutil.Error: pass
        peak = max(peak, total); time.sleep(0.25)
    if process.returncode: raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - begun, peak / 1e9

def main(asked: list[str]) -> None:
    out = ROOT/"results"/"commands.csv"
    rows = pd.read_csv(out).to_dict("records") if out.exists() else []
    for name in asked or list(STEPS):
        with tempfile.TemporaryDirectory() as d:
            subprocess.run(["git", "clone", "-q", ROOT, f"{d}/clone"], check=True)
            (install, _), (run, memory) = (watched(["make", target], Path(d)/"clone") for target in STEPS[name])
            if name == "demo": collect.main([f"{d}/clone/runs/demo"])   # the record that the README shows is that of this run
        rows = [r for r in rows if r["command"] != f"make {name}"]
        rows.append({"command": f"make {name}", "installing_s": round(install), "running_s": round(run), "peak_GB": round(memory, 2),
                     "promised_s": PROMISED[name], "cores": os.cpu_count()})
        pd.DataFrame(rows).to_csv(out, index=False)
    print(pd.DataFrame(rows).to_string(index=False))

if __name__ == "__main__": main(sys.argv[1:])

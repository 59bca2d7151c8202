"""Take the record and a figure of finished runs into `results/`, and make the table of all of them anew.

    python benchmarks/collect.py RUNS/NAME [RUNS/NAME ...]
"""
import json, shutil, sys
from pathlib import Path
import pandas as pd

RESULTS = Path(__file__).resolve().parents[1]/"results"

def main(folders: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for folder in map(Path, folders):
        record = json.loads((folder/"record.json").read_text())
        name = f"{record['recipe']}-{record['name'].removeprefix(record['recipe'] + '-')}"
        kept = {k: v for k, v in record.items() if k not in ("page", "name")}
        (RESULTS/f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        for figure in (folder/"figures"/f"{by}.svg" for by in ("tokens", "flops", "detection")):   # by what the recipe draws
            if figure.exists(): shutil.copy(figure, RESULTS/f"{name}.svg")
    for recipe in {p.stem.split("-")[0] for p in RESULTS.glob("*-*.json")}:
        tables = {p.stem.removeprefix(f"{recipe}-"): json.loads(p.read_text())["table"] for p in sorted(RESULTS.glob(f"{recipe}-*.json"))}
        table = pd.concat([pd.DataFrame(t).assign(run=name) for name, t in tables.items()])
        table.set_index("run").round(5).to_csv(RESULTS/f"{recipe}.csv")

if __name__ == "__main__": main(sys.argv[1:])

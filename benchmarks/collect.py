"""Take the record and a figure of finished runs into `results/`, and make the table of all of them anew.

What a record says of the claims is made anew as well, from its own table by the recipe as it is today, for all seeds and for each
alone: what is kept is judged by one measure.

    python benchmarks/collect.py RUNS/NAME [RUNS/NAME ...]
"""
import json, shutil, sys
from pathlib import Path
import pandas as pd
from seqwarm.recipes import clp, growth, metro, sequential, together

RESULTS = Path(__file__).resolve().parents[1]/"results"

JUDGES = {   # claims of a record, from its rows
    "clp": lambda r, rows: clp.claims_of(rows(r["table"])),
    "growth": lambda r, rows: growth.claims_of(rows(r["table"]), r["parameters"]["kind"]),
    "metro": lambda r, rows: metro.claims_of(rows(r["table"])),
    "sequential": lambda r, rows: sequential.claims_of(rows(r["table"]), rows(r["pairs"]), r["labelling"]),
    "together": lambda r, rows: together.claims_of(rows(r["table"]))}

def judged(record: dict) -> dict:
    "What a record says of its claims: all seeds together, and each alone."
    whole, of = pd.DataFrame, JUDGES[record["recipe"]]
    seeds = record["parameters"]["seeds"]
    if not record["claims"]: return {"claims": {}, "by_seed": {}}       # the arms that they speak of were not run
    alone = {str(s): of(record, lambda rows, s=s: whole(rows).query("seed == @s")) for s in seeds}
    return {"claims": of(record, whole), "by_seed": {s: c for s, c in alone.items() if any(x is not None for x in c.values())}}

def plain(x): return {k: plain(v) for k, v in x.items()} if isinstance(x, dict) else x.item() if hasattr(x, "item") else x

def main(folders: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for folder in map(Path, folders):
        record = json.loads((folder/"record.json").read_text())
        name = f"{record['recipe']}-{record['name'].removeprefix(record['recipe'] + '-')}"
        kept = {k: v for k, v in record.items() if k not in ("page", "name")}
        (RESULTS/f"{name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        for figure in (folder/"figures"/f"{by}.svg" for by in ("tokens", "flops", "detection")):   # by what the recipe draws
            if figure.exists(): shutil.copy(figure, RESULTS/f"{name}.svg")
    for path in RESULTS.glob("*-*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | plain(judged(record)), indent=1, ensure_ascii=False) + "\n")
    for recipe in {p.stem.split("-")[0] for p in RESULTS.glob("*-*.json")}:
        tables = {p.stem.removeprefix(f"{recipe}-"): json.loads(p.read_text())["table"] for p in sorted(RESULTS.glob(f"{recipe}-*.json"))}
        table = pd.concat([pd.DataFrame(t).assign(run=name) for name, t in tables.items()])
        table.set_index("run").round(5).to_csv(RESULTS/f"{recipe}.csv")

if __name__ == "__main__": main(sys.argv[1:])

"""Which family keeps which promise at which growth: what the tests of width, depth and experts hold every model to, as a table.

    python tests/test_promises.py     writes results/promises.csv anew"""
import csv, sys
from pathlib import Path
from test_depth import POST, PRE
from test_experts import WAYS
from test_width import CASES, CHANGED, EXACT, REFUSED, promises

TABLE = Path(__file__).parents[1]/"results"/"promises.csv"

def lines() -> list[dict[str, str]]:
    "A row a model type, a column a growth."
    found, upcycled = [], {kind: EXACT for kind, _ in WAYS} | {"t5": CHANGED}
    for case in (c for c in CASES if c.tied and not c.more and not c.architecture):
        deep = EXACT if case.kind in PRE else REFUSED if case.kind in POST or case.kind.startswith("deberta") else ""
        found.append({"model_type": case.kind} | {name: what for name, (_, what) in promises(case).items()}
                     | {"new layers, identity": deep, "experts": upcycled.get(case.kind, "")})
    return found

def test_the_table_is_what_the_tests_hold_models_to():
    with open(TABLE, newline="") as f: assert list(csv.DictReader(f)) == lines(), "python tests/test_promises.py writes it anew"

if __name__ == "__main__":
    rows = lines()
    with open(TABLE, "w", newline="") as f:
        out = csv.DictWriter(f, rows[0], lineterminator="\n"); out.writeheader(); out.writerows(rows)
    sys.exit(print(TABLE))

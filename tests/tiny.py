"""A recipe of two cells, for the tests of what runs recipes."""
import json
from pathlib import Path

CELL = '''scale: str = "smoke"            # smoke | demo | full: sets every size
steps: int = None               # set by scale
lr: float = 1e-3                # learning rate, peak
arms: list[str] = ["clp"]       # clp | random | overlap
seeds: list[int] = [0]          # one run each
share: float | None = 0.5       # of the tokens
corpus: str = "world:a"         # what is read
shuffle: bool = True            # or in order
extra: dict = {}                # passed on
name: str = "tiny"              # the folder of this run
runs: str = "runs"              # where runs are kept
'''
BEGIN = '''import json, os, pathlib, sys
folder = pathlib.Path(runs)/name
folder.mkdir(parents=True, exist_ok=True)
given = {k: globals()[k] for k in "scale steps lr arms seeds share corpus shuffle extra".split()}
(folder/"begun").open("a").write("x")'''
END = '''record = dict(recipe="tiny", parameters=dict(given, name=name, runs=runs), lines=[f"{scale}, {steps} steps"], page=str(folder/"page.html"),
              python=sys.executable, cwd=os.getcwd())
(folder/"record.json").write_text(json.dumps(record))'''

def notebook(path: Path, *middle: str, cell: str = CELL) -> Path:
    "Write a recipe whose cells are the parameters, a beginning, those in the middle, and a record."
    sources = [("code", cell), ("markdown", "## What is done\n\n> two cells"), *(("code", s) for s in (BEGIN, *middle, END))]
    cells = [{"cell_type": kind, "id": f"c{i}", "metadata": {"tags": ["parameters"]} if i == 0 else {}, "source": s.splitlines(keepends=True),
              **({"execution_count": None, "outputs": []} if kind == "code" else {})} for i, (kind, s) in enumerate(sources)]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path

"""The page about many runs: what it says, that nothing broken keeps it from being made, and that it is light."""
import json, os, subprocess, sys, time
from pathlib import Path
import pandas as pd
import pytest
import seqwarm
from seqwarm.batch.cli import main
from seqwarm.batch.report import gather, look, report, table
from seqwarm.core.card import Card
from seqwarm.core.claims import promised, verdict

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"benchmarks"))
from report import make as make_up   # noqa: E402
GOOD = dict(recipe="clp", parameters=dict(source_text="world:a", target_text="world:b", seeds=[0, 1], width=32), environment={"seqwarm": seqwarm.__version__},
            seconds=60, lines=["said"], claims={"clp-steps": 0.84, "clp-embeddings": None, "arm": "clp"}, by_seed={"0": {"clp-steps": 0.9}, "1": {"clp-steps": 0.78}})

def run(folder: Path, record: dict | None = GOOD) -> Path:
    "A finished run of two arms and two seeds, whose checkpoints share an ancestor."
    folder.mkdir(parents=True)
    if record is not None: (folder/"record.json").write_text(json.dumps(record))
    pd.DataFrame([dict(arm=a, seed=s, step=i, tokens=8*i, flops=64*i, seconds=i/9, loss=3 - r*i + s/50) for a, r in (("scratch", .1), ("clp", .2)) for s in (0, 1) for i in range(9)]
                 ).to_parquet(folder/"metrics.parquet")
    helper = Card("helper", "clp", cost=dict(tokens=10, flops=100)).sealed("h")
    for arm in ("clp", "overlap"):
        (folder/"checkpoints"/arm).mkdir(parents=True)
        Card.child(arm, "clp", [helper], dict(tokens=5, flops=50)).sealed(arm).write(folder/"checkpoints"/arm)
    return folder

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(tmp_path/"runs"/"good")
    return tmp_path

def body(page: str) -> str: return page.split("<h1>", 1)[1]   # after the scripts of the head

# ---- what it says ------------------------------------------------------------------------------------------------------------

def test_the_verdicts_of_the_kept_records():
    names = sorted(map(str, (ROOT/"results").glob("*-*.json")))
    rows, claims = table(gather(names)), promised()
    assert set(rows.run) == {Path(n).stem for n in names} and set(rows.state) == {"finished"} and rows.claim.notna().sum() > 100
    for r in rows.dropna(subset="claim").itertuples():
        x = json.loads(Path(r.path).read_text())["claims"][r.claim]
        assert r.verdict == verdict(claims[r.claim], x) and (x is None) == pd.isna(r.measured)
    assert len(set(rows.verdict.dropna())) == 4
    text = body(report(gather(names)))
    assert all(f"<td>{k}</td>" in text and c["says"].split(".")[0][:40] in text.replace("&#x27;", "'") for k, c in claims.items() if k in set(rows.claim))

def test_a_run_is_told_with_its_seeds_and_what_it_cost_in_all(here):
    [row, other] = table(gather()).to_dict("records")
    assert (row["claim"], row["measured"], row["low"], row["high"], row["verdict"], row["seeds"]) == ("clp-steps", 0.84, 0.78, 0.9, "reproduced", 2)
    assert other["claim"] == "clp-embeddings" and other["verdict"] == "no verdict" and pd.isna(other["measured"])
    assert row["flops"] == 200 and row["tokens"] == 20 and row["text"] == "world a → b"       # the helper once
    text = body(report(gather()))
    assert "78 % to 90 %" in text and text.count("<figure>") == 2 and "60 s" in text and "helper" in text

def test_a_run_at_smoke_has_no_verdict(here):
    run(here/"runs"/"tried", GOOD | dict(parameters=GOOD["parameters"] | dict(scale="smoke")))
    row = table(gather(["tried"])).iloc[0]
    assert (row["claim"], row["measured"], row["verdict"]) == ("clp-steps", 0.84, "no verdict") and "reproduced</td>" not in body(report(gather(["tried"])))

def test_what_differs_and_what_is_the_same(here):
    run(here/"runs"/"wide", GOOD | {"parameters": GOOD["parameters"] | {"width": 64}, "environment": GOOD["environment"] | {"device": "GPU"}})
    text = body(report(gather()))
    assert "clp: 2 runs, 1 parameters differ" in text and "<td>64</td>" in text and "The same in all: source_text world:a" in text and "<td>GPU</td>" in text

def test_the_page_needs_no_network_and_trusts_no_name(here):
    hostile = "</script><script>alert(1)</script>"
    run(here/"runs"/"x<b>", GOOD | {"lines": [hostile], "parameters": GOOD["parameters"] | {"note": hostile}, "recipe": hostile})
    Card(hostile, hostile).sealed("x").write(here/"runs"/"x<b>"/"checkpoints"/"clp")
    page = report(gather())
    assert hostile not in page and "<b>" not in body(page) and " src=" not in body(page) and " href=" not in body(page)
    assert page.count("plotly.js v") == 1

# ---- what is broken ----------------------------------------------------------------------------------------------------------

def cut(p): p.write_bytes(p.read_bytes()[:-40])
def card(**more): return lambda r: (r/"checkpoints/clp/seqwarm.json").write_text(json.dumps(json.loads((r/"checkpoints/clp/seqwarm.json").read_text()) | more))
def metrics(change): return lambda r: change(pd.read_parquet(r/"metrics.parquet")).to_parquet(r/"metrics.parquet")
def record(**more): return lambda r: (r/"record.json").write_text(json.dumps(GOOD | more))
def book(text): return lambda r: ((r/"record.json").unlink(), (r/"notebook.ipynb").write_text(text))
cell = lambda **out: json.dumps(dict(cells=[dict(cell_type="code", execution_count=1, outputs=[dict(output_type="error", **out)]), dict(cell_type="code", execution_count=None, outputs=[])]))

BROKEN = {   # what befell a run -> its state, and what the page says
    "torn record": (lambda r: cut(r/"record.json"), "unreadable", "record.json is torn"),
    "record of bytes": (lambda r: (r/"record.json").write_bytes(b"\xff\xfe\x00"), "unreadable", "record.json is torn"),
    "record is a list": (lambda r: (r/"record.json").write_text("[]"), "unreadable", "holds a list"),
    "deep record": (lambda r: (r/"record.json").write_text("[" * 100_000), "unreadable", "record.json is torn"),
    "foreign record": (lambda r: (r/"record.json").write_text('{"claims": 3}'), "unreadable", "no recipe, no parameters, no claims, no environment"),
    "another version": (record(environment={"seqwarm": "0.0.9"}), "finished", "written by seqwarm 0.0.9"),
    "odd values": (record(claims={"clp-steps": "much"}, by_seed=[1], lines="x", seconds="long", floor={}, parameters={"text": " + "}), "finished", ""),
    "odd source": (record(parameters={"source": 3}), "unreadable", "its parameter source is no str"),
    "odd parameters": (record(parameters={"seeds": 3}), "unreadable", "its parameter seeds is no list"),
    "failed": (book(cell(ename="MemoryError", evalue="8 GB\nwanted", traceback=[])), "failed", "MemoryError: 8 GB wanted"),
    "failed at length": (book(cell(ename="ValueError", evalue="x" * 9999, traceback=[])), "failed", "ValueError: xxx"),
    "stopped": (book('{"cells": [{"cell_type": "code", "execution_count": 1}, {"cell_type": "code"}]}'), "unfinished", "1 of 2 cells have run"),
    "torn notebook": (book('{"cells": [{'), "unreadable", "notebook.ipynb is torn"),
    "no notebook": (book('{"cells": 3}'), "unreadable", "notebook.ipynb is no notebook"),
    "empty": (lambda r: (r/"record.json").unlink(), "no run", "neither record.json nor notebook.ipynb"),
    "torn metrics": (lambda r: cut(r/"metrics.parquet"), "finished", "metrics.parquet cannot be read"),
    "no metrics": (lambda r: (r/"metrics.parquet").unlink(), "finished", "metrics.parquet cannot be read"),
    "foreign metrics": (metrics(lambda m: m[["arm", "loss"]]), "finished", "has no column seed, tokens, flops, seconds"),
    "metrics of words": (metrics(lambda m: m.assign(loss="low")), "finished", "its curves cannot be drawn"),
    "metrics go back": (metrics(lambda m: m.assign(seconds=-m.seconds)), "finished", "goes back"),
    "empty metrics": (metrics(lambda m: m[:0]), "finished", ""),
    "torn card": (lambda r: cut(r/"checkpoints/clp/seqwarm.json"), "finished", "checkpoint clp has no card"),
    "card of another version": (card(colour="red"), "finished", "checkpoint clp has no card"),
    "card with a cost of words": (card(cost={"flops": "many"}), "finished", "checkpoint clp has no card"),
    "card with foreign ancestors": (card(ancestors={"a": 3}), "finished", "checkpoint clp has no card"),
    "cards that contradict": (lambda r: Card("helper", "clp", cost={"flops": 7}, id=Card("helper", "clp").sealed("h").id).write(r/"checkpoints/clp"), "finished", ""),
    "checkpoint gone": (lambda r: (r/"checkpoints/away").symlink_to("nowhere"), "finished", "away is gone"),
}

@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_a_line_and_the_page_is_made(here, what):
    befall, state, said = BROKEN[what]
    befall(run(here/"runs"/"bad"))
    bad, good = gather()
    assert (bad.name, bad.state, good.state) == ("bad", state, "finished") and all("\n" not in n and len(n) < 400 for n in bad.notes)
    text = body(report([bad, good]))
    assert said in text and "Traceback" not in text and "78 % to 90 %" in text
    assert {"bad", "good"} == set(table([bad, good]).run)

def test_runs_named_alike_are_told_apart(here):
    run(here/"more"/"good", GOOD | {"claims": {"clp-steps": 0.5}})
    seen = gather(["good", "more/good"])
    assert [s.name for s in seen] == ["runs/good", "more/good"] and look("more/good").record["claims"] == {"clp-steps": 0.5}
    assert len(gather(["good", "good"])) == 1
    assert body(report(seen)).count("<summary>runs/good") == body(report(seen)).count("<summary>more/good") == 1

# ---- the command -------------------------------------------------------------------------------------------------------------

def test_the_command_writes_page_and_table(here, capsys):
    (here/"runs"/"store").mkdir(); (here/"runs"/".hidden").mkdir()
    assert main(["report", "--table", "r.csv"]) == 0 and capsys.readouterr().out == "1 finished run, 0 others; open report.html\n"
    before = Path("report.html").read_text()
    assert main(["report", "good", "runs/good/record.json", "-o", "new/page.html", "--table", "new/r.parquet"]) == 0
    rows = pd.read_parquet("new/r.parquet")
    assert len(rows) == 4 and pd.read_csv("r.csv").measured[0] == rows.measured[0] == 0.84 and Path("report.html").read_text() == before
    (here/"runs"/"good"/"record.json").unlink()
    assert main(["report"]) == 0 and "no run" in Path("report.html").read_text()     # made anew, in one step
    assert sorted(p.name for p in here.iterdir()) == ["new", "r.csv", "report.html", "runs"]

WRONG = {("report", "goood"): "did you mean 'good'?", ("report", "good", "--runs", "away"): "no folder away with runs", ("report", "--runs", "runs/good/checkpoints/clp"): "there are no runs",
         ("report", "-o", "runs"): "runs is a folder", ("report", "--table", "r.txt"): "no .csv or .parquet", ("report", "-o", "/proc/x/r.html"): "cannot be written",
         ("report", "-o", "runs/good/record.json/r.html"): "cannot be written"}

@pytest.mark.parametrize("typed", WRONG, ids=" ".join)
def test_a_mistake_is_one_line_and_nothing_is_written(here, capsys, typed):
    before = sorted(here.rglob("*"))
    assert main(list(typed)) == 2 and sorted(here.rglob("*")) == before
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("seqwarm: ") and WRONG[typed] in err

def test_it_is_light(here):
    code = "import sys\nfrom seqwarm.batch.cli import main\nprint(main(TYPED), sorted({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    last = lambda *args: subprocess.run([sys.executable, "-c", code.replace("TYPED", repr(list(args)))], capture_output=True, text=True, env=os.environ).stdout.splitlines()[-1]
    assert last("report") == "0 ['pandas']" and last("report", "--help") == "0 []"
    assert last("lineage", "runs/good/checkpoints/clp") == "0 []" and last("verify", "--help") == "0 []"

def test_many_runs_take_milliseconds_each(tmp_path):
    for i in range(20): make_up(tmp_path/f"run-{i:02}", i)
    report(gather(runs=tmp_path)[:2])
    begun = time.process_time(); page = report(seen := gather(runs=tmp_path)); spent = time.process_time() - begun
    assert len(seen) == 20 and page.count("<figure>") == 36 and "became nan in step 7" in page
    assert spent < 20*0.025 + 0.5, f"{spent:.2f} s of one core"       # five seconds for 200 runs

"""Some of the malformed inputs of tests/faults/inputs.py: one line and exit code 2, at once, no file left, no code run; and the judge sees what would be wrong."""
import sys
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).parent/"faults"))
import inputs   # noqa: E402
from inputs import Case, GOOD, judged, drawn, shared, shown, started   # noqa: E402

def test_each_kind_of_malformed_input_is_refused_in_one_line():
    wrong, seen = [], []
    def act(case: Case) -> None:
        v = judged(case)
        seen.append(v.outcome)
        if v.outcome not in GOOD: wrong.append(f"{v.outcome}: {shown(case)}\n{v.said[-1500:]}")
    drawn(shared(40), None, act)
    assert not wrong, "\n".join(wrong)
    assert len(seen) >= 30 and seen.count("refused") > len(seen)//2

def test_the_independent_judges_take_what_is_valid(monkeypatch):
    monkeypatch.chdir(inputs.valid_files())
    assert all(map(inputs.opens, ["gpt2", "helper", "bert", "llama", "graft", "sharded", "grown"])) and all(inputs.speaks(m, 290) for m in ("gpt2", "helper", "bert", "llama", "graft"))
    assert inputs.is_card("grown") and inputs.is_grid("grid.toml") and inputs.is_recipe("10_tiny.ipynb") and all(map(inputs.is_text, inputs.CORPORA))

def test_the_shell_sees_the_same():
    header = b"\xff"*8 + inputs.there("gpt2/model.safetensors")[8:]
    for case in (Case("header", ["grow", "gpt2", "out", "--num-layers", "2"], {"gpt2/model.safetensors": header}), Case("corpus", ["clp", "gpt2", "helper", "out", "--corpus", "text:t.jsonl"], {"t.jsonl": b"null\n"})):
        here, there = judged(case), judged(case, started)
        assert (here.outcome, here.said) == (there.outcome, there.said) and here.outcome == "refused" and next(iter(case.files)) in here.said

@pytest.mark.parametrize("does, outcome", [
    (lambda: 1/0, "traceback"), (lambda: Path("left").touch() or 2, "files left"), (lambda: inputs.canary().touch() or 2, "code run"), (lambda: 0, "accepted wrongly"), (lambda: 3, "exit code 3"),
    (lambda: print("seqwarm: a\nb", file=sys.stderr) or 2, "not one line"), (lambda: print("a warning\nseqwarm: b", file=sys.stderr) or 2, "not one line"), (lambda: 2, "not one line"),
    (lambda: print("seqwarm: a; b", file=sys.stderr) or 2, "refused"), (lambda: [None for _ in iter(int, 1)], "hang")])
def test_the_judge_sees_it(monkeypatch, does, outcome):
    "What each defect of the command would be called."
    monkeypatch.setattr(inputs, "SECONDS", 0.3)
    monkeypatch.setattr("seqwarm.batch.cli.main", lambda args: does())
    assert judged(Case("none", [])).outcome == outcome

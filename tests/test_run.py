"""Recipes as batch jobs, on a recipe of a few cells: what is checked, what is executed, what is left behind, what is run again."""
import fcntl, json, math, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest
from hypothesis import given, settings, strategies as st
from seqwarm.batch import run as runner
from seqwarm.batch.parameters import Parameter, describe_parameters, find_recipe, parameters, recipes
from seqwarm.batch.run import Failure, run
from seqwarm.core.errors import Refusal
from seqwarm.core.files import Lock
sys.path.insert(0, str(Path(__file__).parent))
from tiny import notebook

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return notebook(tmp_path/"10_tiny.ipynb")

def tree(folder: Path) -> set[str]: return {str(p.relative_to(folder)) for p in folder.rglob("*")}

# ---- what may be varied

def test_the_cell_is_read_as_written(tiny):
    found = parameters(tiny)
    assert list(found) == "scale steps lr arms seeds share corpus shuffle extra name runs".split()
    assert found["scale"] == Parameter("scale", "str", "smoke", "smoke | demo | full: sets every size", ("smoke", "demo", "full"))
    assert found["steps"] == Parameter("steps", "int", None, "set by scale") and found["arms"].allowed == ("clp", "random", "overlap")
    assert not found["lr"].allowed and found["share"].type == "float | None"
    table = describe_parameters(tiny).splitlines()
    assert len(table) == 11 and table[1].split() == ["steps", "int", "None", "set", "by", "scale"]

@pytest.mark.parametrize("name, text, value", [
    ("steps", "500", 500), ("steps", "-3", -3), ("steps", "None", None), ("lr", "3e-4", 3e-4), ("lr", "1", 1.0), ("share", "none", None),
    ("arms", "clp,random", ["clp", "random"]), ("arms", '["overlap"]', ["overlap"]), ("arms", "clp", ["clp"]), ("seeds", "0, 1,2", [0, 1, 2]),
    ("seeds", "[3]", [3]), ("shuffle", "no", False), ("shuffle", "True", True), ("extra", '{"a": [1]}', {"a": [1]}),
    ("corpus", "text:a b.txt?x=1 + world:b", "text:a b.txt?x=1 + world:b"), ("corpus", "'quoted'", "'quoted'")])
def test_text_is_read_by_the_declared_type(tiny, name, text, value):
    got = parameters(tiny)[name].parse(text)
    assert got == value and type(got) is type(value)

@pytest.mark.parametrize("name, text", [("steps", "1.5"), ("steps", "many"), ("steps", ""), ("steps", "True"), ("lr", "nan"), ("lr", "inf"), ("lr", "fast"),
    ("arms", "clp,fvt"), ("seeds", "0,x"), ("seeds", "[0"), ("seeds", '["0"]'), ("seeds", "[" * 100_000), ("shuffle", "maybe"), ("extra", "[1]"), ("extra", "{a: 1}"), ("scale", "huge"), ("scale", "")])
def test_text_of_the_wrong_type_is_refused_by_name(tiny, name, text):
    with pytest.raises(Refusal, match=f"parameter {name} cannot be") as e: parameters(tiny)[name].parse(text)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300

@pytest.mark.parametrize("name, value", [("steps", 1.5), ("steps", True), ("steps", "5"), ("lr", "1"), ("lr", math.nan), ("lr", True), ("arms", "clp"), ("arms", [1]),
    ("seeds", [0, 0.5]), ("shuffle", 1), ("corpus", None), ("corpus", 3), ("scale", "Demo"), ("extra", [])])
def test_values_of_the_wrong_type_are_refused(tiny, name, value):
    with pytest.raises(Refusal, match=f"parameter {name} cannot be"): parameters(tiny)[name].check(value)

@settings(max_examples=200, deadline=None)
@given(st.text(), st.sampled_from(["int", "float", "bool", "list[int]", "list[str]", "dict", "int | None", "float | list[int]", "str"]))
def test_any_text_gives_a_value_of_the_type_or_a_refusal(text, kind):
    p = Parameter("p", kind, None)
    try: value = p.parse(text)
    except Refusal: return
    assert p.check(value) == value

@pytest.mark.parametrize("cell", ["steps: int = 2 * 3", "import os", "steps: int", "a, b = 1, 2", "x: set = None", "steps: int = 'a'", "print(1)", "steps: int = ("])
def test_a_cell_that_must_be_run_to_be_read_is_refused(tmp_path, cell):
    with pytest.raises(Refusal): parameters(notebook(tmp_path/"1_x.ipynb", cell=cell))

@pytest.mark.parametrize("content", ["", "not json", "[]", "{}", '{"cells": 3}', '{"cells": []}', '{"cells": [3]}', "[" * 100_000, "\0"])
def test_what_is_no_notebook_is_refused(tmp_path, content):
    (tmp_path/"1_x.ipynb").write_text(content)
    with pytest.raises(Refusal, match="1_x.ipynb"): parameters(tmp_path/"1_x.ipynb")

def test_recipes_come_from_the_checkout_and_are_found_by_name():
    assert set(recipes().values()) == set((ROOT/"nbs"/"recipes").glob("*.ipynb"))
    for name, path in recipes().items():
        assert find_recipe(name) == path and {"scale", "name", "runs"} <= set(parameters(path))
        assert parameters(path)["scale"].allowed == ("smoke", "demo", "full") and parameters(path)["scale"].default == "smoke"
    with pytest.raises(Refusal, match="there is no recipe 'clpp'"): find_recipe("clpp")

# ---- executing

def test_a_run_gets_its_values_this_python_and_this_folder(tiny, capsys):
    wish = {"steps": 7, "lr": 1, "arms": ["random"], "corpus": 'a "quoted"\nline, __import__("os") and \\n {x}', "extra": {"k": [1, None]}}
    record = run(tiny, wish, scale="demo", name="one")
    assert {k: record["parameters"][k] for k in wish} == {**wish, "lr": 1.0} and record["parameters"]["scale"] == "demo"
    assert record["parameters"]["share"] == 0.5 and record["parameters"]["seeds"] == [0]   # what was not wished is the notebook's
    assert Path(record["python"]) == Path(sys.executable) and Path(record["cwd"]) == Path.cwd()
    assert tree(Path("runs")) == {"one", "one/begun", "one/.lock", "one/record.json", "one/notebook.ipynb"}
    assert capsys.readouterr().out.splitlines()[-2:] == ["demo, 7 steps", "open runs/one/page.html"]
    cells = json.loads(Path("runs/one/notebook.ipynb").read_text())["cells"]
    assert [c["execution_count"] for c in cells if c["cell_type"] == "code"] == [1, 2, 3, 4]

def test_a_registered_kernel_of_another_python_is_not_used(tiny, tmp_path, monkeypatch):
    spec = tmp_path/"jupyter"/"kernels"/"python3"
    spec.mkdir(parents=True)
    (spec/"kernel.json").write_text(json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "trap", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter")); monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    assert Path(run(tiny, show=False)["python"]) == Path(sys.executable)

def test_bars_move_on_the_terminal_and_leave_one_line_in_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(notebook(tmp_path/"1_bar.ipynb", "import time\nfrom tqdm import tqdm\nfor i in tqdm(range(20), desc='train', mininterval=0): time.sleep(0.1)\nprint('after')"))
    shown = capsys.readouterr()
    assert shown.err.count("\r") >= 5 and "100%" in shown.err and "after" in shown.out
    [cell] = [c for c in json.loads(Path("runs/tiny/notebook.ipynb").read_text())["cells"] if "tqdm" in "".join(c["source"])]
    err = "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream" and o["name"] == "stderr")
    assert err.count("train:") == 1 and "100%" in err

def test_the_notebook_can_be_opened_while_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peek = "shown = json.loads((folder/'notebook.ipynb').read_text()); (folder/'peek').write_text(str([c.get('execution_count') for c in shown['cells']]))"
    run(notebook(tmp_path/"1_peek.ipynb", peek), show=False)
    assert Path("runs/tiny/peek").read_text() == "[1, 2, None, 3, None, None]"

def test_a_failing_cell_leaves_its_traceback_and_a_run_that_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nb = notebook(tmp_path/"1_x.ipynb", "if not (folder/'mended').exists(): raise RuntimeError('it broke\\nbadly')")
    with pytest.raises(Failure) as e: run(nb, show=False)
    assert str(e.value) == "cell 4 failed: RuntimeError: it broke badly; see runs/tiny/notebook.ipynb; run again to resume"
    text = Path("runs/tiny/notebook.ipynb").read_text()
    assert "Traceback" in text and "it broke" in text and not Path("runs/tiny/record.json").exists()
    Path("runs/tiny/mended").touch()
    assert run(nb, show=False)["recipe"] == "tiny" and Path("runs/tiny/begun").read_text() == "xx"

def test_a_refusal_in_a_cell_is_a_refusal_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse = "from seqwarm.core.errors import Refusal\n(folder/'begun').unlink(missing_ok=True)\nraise Refusal('there is no corpus x', 'name another')"
    with pytest.raises(Refusal, match="^there is no corpus x; name another$"): run(notebook(tmp_path/"1_x.ipynb", refuse), show=False)
    assert tree(Path(".")) == {"1_x.ipynb"}
    with pytest.raises(Refusal): run(notebook(tmp_path/"1_x.ipynb", refuse.replace("unlink(missing_ok=True)", "touch()")), show=False)
    assert "tiny/begun" in tree(Path("runs"))   # work that was done is not thrown away

def test_a_dead_kernel_is_a_failure_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Failure, match="the kernel died"): run(notebook(tmp_path/"1_x.ipynb", "import signal; os.kill(os.getpid(), signal.SIGKILL)"), show=False)
    assert "Traceback" not in capfd.readouterr().err and json.loads(Path("runs/tiny/notebook.ipynb").read_text())["cells"]

# ---- running again

def test_a_finished_run_is_found_and_another_one_refused(tiny, capsys):
    first = run(tiny, {"steps": 3}, show=False)
    assert run(tiny, {"steps": 3}) == first and Path("runs/tiny/begun").read_text() == "x"
    assert "runs/tiny is finished; nothing was run" in capsys.readouterr().out
    with pytest.raises(Refusal, match=r"other parameters \(steps 3, not 4\).*--name tiny-2"): run(tiny, {"steps": 4})
    with pytest.raises(Refusal, match="steps 3, not None"): run(tiny)
    assert run(tiny, {"steps": 4}, name="tiny-2", show=False)["parameters"]["steps"] == 4
    other = notebook(tiny.parent/"20_other.ipynb")
    with pytest.raises(Refusal, match="holds a run of recipe tiny"): run(other, {"steps": 3})
    assert Path("runs/tiny/begun").read_text() == "x"

def test_a_run_made_by_hand_is_known_by_its_record(tiny):
    run(tiny, {"steps": 3}, show=False)
    Path("runs/tiny/notebook.ipynb").unlink()
    assert run(tiny, {"steps": 3}, show=False)["parameters"]["steps"] == 3 and Path("runs/tiny/begun").read_text() == "x"
    with pytest.raises(Refusal, match="steps 3, not 4"): run(tiny, {"steps": 4}, show=False)

@pytest.mark.parametrize("torn", ["", "{", "[1]", "null", "\0\0"])
def test_a_torn_record_means_not_finished(tiny, torn):
    run(tiny, show=False)
    Path("runs/tiny/record.json").write_text(torn)
    assert run(tiny, show=False)["recipe"] == "tiny" and Path("runs/tiny/begun").read_text() == "xx"

def test_a_folder_in_use_is_refused(tiny):
    held = Lock("runs/tiny")
    with pytest.raises(Refusal, match="in use"): run(tiny, show=False)
    held.release()
    with runner._hold(Path("runs/tiny")), pytest.raises(Refusal, match="in use"): run(tiny, show=False)
    assert not Path("runs/tiny/notebook.ipynb").exists() and run(tiny, show=False)["recipe"] == "tiny"

def test_who_waited_for_the_hold_finds_what_was_done_meanwhile(tiny, monkeypatch):
    hold = runner._hold
    def late(folder):
        monkeypatch.setattr(runner, "_hold", hold); run(tiny, show=False)     # another comes first
        return hold(folder)
    monkeypatch.setattr(runner, "_hold", late)
    assert run(tiny, show=False)["recipe"] == "tiny" and Path("runs/tiny/begun").read_text() == "x"

def test_a_lock_on_a_folder_that_went_away_is_one_on_the_next(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []
    def late(file, how):
        if not calls: shutil.rmtree(tmp_path/"x")     # its holder took it away, between our opening and locking it
        calls.append(how); return flock(file, how)
    monkeypatch.setattr(fcntl, "flock", late)
    held = Lock(tmp_path/"x")
    with pytest.raises(Refusal, match="in use"): Lock(tmp_path/"x")
    held.release(); assert len(calls) == 3

@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", ".hidden", "store", "a\nb", "-x", "x" * 300])
def test_names_that_cannot_be_folders_are_refused(tiny, name):
    with pytest.raises(Refusal, match="cannot name a run"): run(tiny, name=name)
    assert not Path("runs").exists()

def test_nothing_starts_on_bad_wishes(tiny):
    Path("file").write_text("x")
    for wish, more, said in [({"stepz": 1}, {}, "did you mean 'steps'"), ({"steps": "1"}, {}, "of type int"), ({}, {"scale": "huge"}, "one of: smoke, demo, full"),
                             ({"scale": "demo"}, {"scale": "full"}, "given twice"), ({}, {"runs": "file"}, "file exists and is no folder")]:
        with pytest.raises(Refusal, match=said): run(tiny, wish, **more)
    assert tree(Path(".")) == {"file", "10_tiny.ipynb"}
    plain = notebook(tiny.parent/"20_plain.ipynb", cell="steps: int = 1  # that is all")
    with pytest.raises(Refusal, match="has no parameter 'scale'"): run(plain, scale="demo")

def test_ctrl_c_ends_runner_and_kernel_and_the_run_resumes(tmp_path):
    notebook(tmp_path/"1_long.ipynb", "(folder/'pid').write_text(str(os.getpid()))\nimport time\nif (folder/'pid2').exists(): pass\nelse: time.sleep(60)")
    command = [sys.executable, "-c", "from seqwarm.batch.cli import main; main()", "run", "1_long.ipynb"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)   # what runs in the background of a shell ignores Ctrl-C, and so do its children
    p = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heed)
    mark = tmp_path/"runs"/"tiny"/"pid"
    for _ in range(600):
        if mark.exists() and mark.read_text(): break
        time.sleep(0.05)
    time.sleep(0.2)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=20)
    assert p.returncode == 130 and err.strip().endswith("seqwarm: stopped; the same command goes on where it was") and "Traceback" not in err
    assert not _alive(int(mark.read_text()))
    (tmp_path/"runs"/"tiny"/"pid2").touch()
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0

def _alive(pid: int) -> bool:
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return "ipykernel" in Path(f"/proc/{pid}/cmdline").read_text() if Path(f"/proc/{pid}/cmdline").exists() else False

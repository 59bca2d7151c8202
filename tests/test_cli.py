"""The seqwarm command: what it prints, and that every mistake is one line, exit code 2, no traceback, nothing written."""
import json, os, subprocess, sys
from pathlib import Path
import pytest
from seqwarm import __version__
from seqwarm.batch.cli import main
from seqwarm.batch.parameters import recipes
sys.path.insert(0, str(Path(__file__).parent))
from tiny import notebook

ROOT = Path(__file__).resolve().parents[1]

@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a tiny recipe, a file, an unreadable model and nothing else."
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path/"10_tiny.ipynb")
    (tmp_path/"file").write_text("x")
    (tmp_path/"broken.ipynb").write_text("{")
    for name, text in {"torn": "{", "list": "[]", "nameless": "{}", "deep": "[" * 100_000, "martian": '{"model_type": "martian", "architectures": ["MartianModel"]}'}.items():
        (tmp_path/name).mkdir(); (tmp_path/name/"config.json").write_text(text)
    (tmp_path/"empty").mkdir()
    return tmp_path

def command(*args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    "The command as a shell starts it."
    return subprocess.run([sys.executable, "-c", "from seqwarm.batch.cli import main; main()", *args], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})

def snapshot(folder: Path) -> dict[str, bytes]: return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()} | {str(p): b"" for p in folder.rglob("*") if p.is_dir()}

WRONG = {  # what is typed -> what the line must say
    ("run", "clpp"): "there is no recipe 'clpp'",
    ("run", "nowhere/10_x.ipynb"): "there is no notebook nowhere/10_x.ipynb",
    ("run", "broken.ipynb"): "broken.ipynb is not a notebook",
    ("run",): "Missing argument",
    ("run", "10_tiny.ipynb", "-p", "stepz", "5"): "there is no parameter 'stepz'; did you mean 'steps'?",
    ("run", "10_tiny.ipynb", "-p", "steps", "many"): "parameter steps cannot be 'many'; it is of type int (set by scale)",
    ("run", "10_tiny.ipynb", "-p", "steps", "__import__('os').mkdir('owned')"): "parameter steps cannot be",
    ("run", "10_tiny.ipynb", "-p", "lr", "-inf"): "parameter lr cannot be '-inf'",
    ("run", "10_tiny.ipynb", "-p", "arms", "clp,randon"): "did you mean 'random'?",
    ("run", "10_tiny.ipynb", "--scale", "smokey"): "did you mean 'smoke'?",
    ("run", "10_tiny.ipynb", "-p", "steps"): "-p needs a name and a value",
    ("run", "10_tiny.ipynb", "-p"): "-p needs a name and a value",
    ("run", "10_tiny.ipynb", "-p", "steps", "1", "-p", "steps", "2"): "steps is given twice",
    ("run", "10_tiny.ipynb", "--name", "../x"): "'../x' cannot name a run",
    ("run", "10_tiny.ipynb", "--runs", "file"): "file exists and is no folder",
    ("run", "10_tiny.ipynb", "--steps", "3"): "(seqwarm run --help says more)",
    ("rum", "10_tiny.ipynb"): "No such command 'rum'",
    ("--verson",): "No such option",
    ("recipes", "clpp"): "there is no recipe 'clpp'",
    ("notebooks",): "Missing argument",
    ("notebooks", "file"): "file exists",
    ("notebooks", "empty"): "empty exists",
    ("notebooks", "file/new"): "file",
    ("describe",): "Missing argument",
    ("describe", "./nowhere"): "there is no model at ./nowhere",
    ("describe", "empty"): "there is no model at empty",
    ("describe", "torn"): "torn/config.json is no model's config",
    ("describe", "list"): "list/config.json is no model's config",
    ("describe", "nameless"): "nameless/config.json is no model's config",
    ("describe", "deep"): "deep/config.json is no model's config",
    ("describe", "file"): "file is no model's config",
    ("describe", "10_tiny.ipynb", "--length", "0"): "Invalid value for '--length'",
}

@pytest.mark.parametrize("typed", WRONG, ids=" ".join)
def test_a_mistake_is_one_line_and_exit_code_2(here, capsys, typed):
    before = snapshot(here)
    assert main(list(typed)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("seqwarm: ") and err.count("\n") == 1 and WRONG[typed] in err and not out, (out, err)
    assert snapshot(here) == before

@pytest.mark.parametrize("typed", [("run", "10_tiny.ipynb", "-p", "steps", "x"), ("rum",), ("describe", "torn")], ids=" ".join)
def test_the_shell_sees_the_same(here, typed):
    done = command(*typed, cwd=here)
    assert done.returncode == 2 and done.stderr.startswith("seqwarm: ") and done.stderr.count("\n") == 1 and not done.stdout

def test_a_model_that_cannot_be_fetched_is_one_line(here):
    done = command("describe", "nobody/nothing", cwd=here, HF_HUB_OFFLINE="1", HF_HOME=str(here/"empty"))
    assert done.returncode == 2 and "nobody/nothing is no folder here, and was not found on the hub" in done.stderr and done.stderr.count("\n") == 1

def test_an_unreadable_file_is_one_line(here, capsys):
    if os.geteuid() == 0: Path("locked.ipynb").symlink_to("locked.ipynb")  # root reads everything, but not a loop
    else: notebook(here/"locked.ipynb").chmod(0)
    assert main(["run", "locked.ipynb"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not Path("runs").exists()

def test_a_refusal_in_the_notebook_is_exit_code_2_and_a_failure_1(here, capsys):
    notebook(here/"20_refuse.ipynb", "(folder/'begun').unlink()\nfrom seqwarm.core.errors import Refusal\nraise Refusal('corpus x is empty', 'name another')")
    assert main(["run", "20_refuse.ipynb"]) == 2 and capsys.readouterr().err == "seqwarm: corpus x is empty; name another\n"
    assert not Path("runs").exists()
    notebook(here/"30_fail.ipynb", "1/0")
    assert main(["run", "30_fail.ipynb"]) == 1
    assert capsys.readouterr().err == "seqwarm: cell 4 failed: ZeroDivisionError: division by zero; see runs/tiny/notebook.ipynb; run again to resume\n"

def test_run_passes_what_was_typed(here, capsys):
    typed = ["run", "10_tiny.ipynb", "-p", "lr", "2e-4", "-p", "corpus", "-p", "-p", "seeds", "1,2", "--scale", "demo", "--name", "typed", "--runs", "out/runs"]
    assert main(typed) == 0
    assert capsys.readouterr().out.splitlines() == ["demo, None steps", "open out/runs/typed/page.html"]
    wished = json.loads(Path("out/runs/typed/record.json").read_text())["parameters"]
    assert wished["lr"] == 2e-4 and wished["corpus"] == "-p" and wished["seeds"] == [1, 2] and wished["scale"] == "demo"
    assert main(typed) == 0 and "is finished; nothing was run" in capsys.readouterr().out

def test_recipes_and_notebooks(here, capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes()) if recipes() else lines == ["there are no recipes in this installation"]
    assert main(["recipes", "10_tiny.ipynb"]) == 0 and "set by scale" in capsys.readouterr().out
    assert main(["notebooks", "out"]) == 0
    assert {p.name: p.read_bytes() for p in Path("out").iterdir()} == {p.name: p.read_bytes() for p in recipes().values()}

def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"seqwarm {__version__}\n"

def test_help_is_light():
    code = "import sys\nfrom seqwarm.batch.cli import main\ncode = main(['--help'])\nprint(code, sorted({'torch', 'transformers', 'papermill', 'pandas', 'numpy', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 []" and "Usage: seqwarm" in done.stdout and not done.stderr

def test_describe_prints_the_table_by_role(here, capsys):
    import transformers
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20, architectures=["GPT2LMHeadModel"])
    model = transformers.GPT2LMHeadModel(config)
    total = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    config.save_pretrained("config-only")
    assert main(["describe", "config-only", "--length", "16"]) == 0
    out = capsys.readouterr().out
    assert total in out and "attn.qkv" in out and "embed.token" in out and f"{50 * 16:,}" in out
    assert main(["describe", "config-only/config.json", "--length", "16"]) == 0 and capsys.readouterr().out == out
    assert main(["describe", "martian"]) == 2 and "martian" in capsys.readouterr().err
    model.save_pretrained("whole")
    assert main(["describe", "whole", "--length", "16"]) == 0 and capsys.readouterr().out == out

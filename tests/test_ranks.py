"One run by two ranks: the same losses as by one in every recipe, one folder that the first writes, and one line where something is wrong."
import json, signal, subprocess, sys, time
from pathlib import Path
import pandas as pd
import pytest
from seqwarm.batch.parameters import recipes
from seqwarm.batch.ranks import launch
from seqwarm.batch.run import Failure, run
from seqwarm.core.errors import Refusal
sys.path.insert(0, str(Path(__file__).parent))
from tiny import notebook

SEQWARM = [sys.executable, "-c", "from seqwarm.batch.cli import main; main()"]
FEW = dict(clp=dict(arms=["clp"]), growth=dict(arms=["fpi+interpolate"]), metro=dict(arms=["mlm", "metro"]))

@pytest.fixture
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path); monkeypatch.setenv("OMP_NUM_THREADS", "1"); return tmp_path

@pytest.mark.parametrize("recipe", recipes())
def test_two_ranks_give_the_losses_of_one(here, recipe):
    wish = dict(threads=1) | FEW.get(recipe, {})
    run(recipe, wish, name="one", show=False)
    assert launch(recipe, wish, 2, name="two") == 0
    one, two = (pd.read_parquet(f"runs/{name}/metrics.parquet").drop(columns="seconds") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, check_exact=False, atol=1e-5, rtol=1e-5)
    assert len(one) > 5 and not list(Path("runs/two").glob("notebook-*")) and Path("runs/two/page.html").exists()

def test_a_finished_run_is_found(here, capfd):
    nb = notebook(here/"10_tiny.ipynb", "assert os.environ['WORLD_SIZE'] == '2'")
    assert launch(nb, dict(steps=3), 2) == 0 and launch(nb, dict(steps=3), 2) == 0
    assert "runs/tiny is finished" in capfd.readouterr().out and Path("runs/tiny/begun").read_text().count("x") == 2      # each rank once
    with pytest.raises(Refusal, match="steps 3, not 4"): launch(nb, dict(steps=4), 2)

def test_what_is_wrong_is_said_once_and_before_a_rank_starts(here):
    nb = notebook(here/"10_tiny.ipynb")
    for wish, says in ((dict(stepz=1), "there is no parameter"), (dict(steps="x"), "parameter steps cannot be")):
        with pytest.raises(Refusal, match=says): launch(nb, wish, 2)
    got = subprocess.run([*SEQWARM, "run", str(nb), "--procs", "0"], capture_output=True, text=True)
    assert got.returncode == 2 and got.stderr.splitlines() == ["seqwarm: procs cannot be 0; give a whole number of at least 1"] and not Path("runs").exists()

def test_a_refusal_in_a_cell_is_one_line(here):
    refuse = "from seqwarm.core.errors import Refusal\nraise Refusal('there is no corpus x', 'name another')"
    got = subprocess.run([*SEQWARM, "run", str(notebook(here/"10_tiny.ipynb", refuse)), "--procs", "2"], capture_output=True, text=True)
    assert got.returncode == 2 and [x for x in got.stderr.splitlines() if x] == ["seqwarm: there is no corpus x; name another"], got.stderr

@pytest.mark.parametrize("cell, says", [("raise RuntimeError('it broke')", "rank 1: cell 4 failed: RuntimeError: it broke; see runs/tiny/notebook-1.ipynb; run again to resume"),
                                        ("import signal; os.kill(os.getpid(), signal.SIGKILL)", "rank 1: the kernel died, perhaps for want of memory; see runs/tiny/notebook-1.ipynb; run again to resume")])
def test_a_rank_that_fails_ends_the_run_and_says_why(here, cell, says):
    wait = "import time\nif os.environ['RANK'] == '0': time.sleep(100)\n"
    with pytest.raises(Failure) as e: launch(notebook(here/"10_tiny.ipynb", wait + cell), {}, 2)
    assert str(e.value) == says and json.loads(Path("runs/tiny/notebook-1.ipynb").read_text())["cells"] and not Path("runs/tiny/record.json").exists()

def test_a_signal_ends_all_ranks_and_the_same_command_goes_on(here):
    nb = notebook(here/"10_tiny.ipynb", "import time\n(folder/f\"at-{os.environ['RANK']}\").write_text(str(os.getpid()))\nif not (folder/'go').exists(): time.sleep(100)")
    work = subprocess.Popen([*SEQWARM, "run", str(nb), "--procs", "2"], stderr=subprocess.PIPE, text=True)
    kernels = [Path(f"runs/tiny/at-{r}") for r in (0, 1)]
    while not all(k.exists() and k.read_text() for k in kernels): assert work.poll() is None; time.sleep(0.1)
    pids = [int(k.read_text()) for k in kernels]
    work.send_signal(signal.SIGTERM)
    assert work.wait(60) == 143 and [x for x in work.stderr.read().splitlines() if x] == ["seqwarm: stopped; the same command goes on where it was"]
    begun = time.time()
    while any(Path(f"/proc/{p}").exists() for p in pids): assert time.time() < begun + 30, "a kernel outlived its run"; time.sleep(0.2)
    Path("runs/tiny/go").touch()
    assert launch(nb, {}, 2) == 0 and Path("runs/tiny/record.json").exists()

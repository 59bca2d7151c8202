"""Each fault once, in small; `python tests/faults/run.py` is the whole, and `results/faults.csv` what came of it."""
import csv, os, subprocess, sys
from pathlib import Path
import pytest
import torch
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import slurm  # noqa: E402
from faults import cluster, disk, others, sweeps, training  # noqa: E402

@pytest.fixture
def folder(tmp_path, monkeypatch):
    threads, cache = torch.get_num_threads(), os.environ.get("SEQWARM_CACHE")
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}{os.pathsep}{HERE}"); monkeypatch.setenv("OMP_NUM_THREADS", "1"); monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    yield tmp_path
    torch.set_num_threads(threads)
    os.environ.pop("SEQWARM_CACHE", None) if cache is None else os.environ.__setitem__("SEQWARM_CACHE", cache)

def hold(row): assert row.good, f"{row.came}, and not {row.asked} ({row.fell})"

@pytest.mark.parametrize("where, times", [("steps", 3), ("state", 2), ("checkpoint", 2)])
def test_a_killed_training_is_resumed_to_the_last_bit(folder, where, times): hold(training.kills(folder, times, 0, where))

def test_a_killed_sweep_loses_nothing_and_runs_nothing_twice(folder): hold(sweeps.kills(folder, 3, 0))

def test_a_killed_job_goes_on(folder):
    if not slurm.ready(): pytest.skip(f"NO SLURM HERE ({', '.join(slurm.missing()) or 'not root'}): apt-get install slurm-wlm munge")
    try: hold(cluster.kills(folder, 1, 0, "chain"))
    except (RuntimeError, subprocess.CalledProcessError) as e: pytest.skip(f"SLURM DOES NOT COME UP HERE: {e}")

@pytest.mark.parametrize("where", [w for w in disk.PLACES if w != "a notebook"])
def test_a_full_disk_is_said_and_costs_nothing(folder, where):
    try: hold(disk.full(folder, where))
    except OSError as e:
        if "NO SMALL DISK" in str(e): pytest.skip(str(e))
        raise

@pytest.mark.parametrize("meet", [others.two_sweeps, others.many_runs, others.many_trainings])
def test_two_at_once_do_nothing_twice(folder, meet): hold(meet(folder, 1, 0))

def test_a_kernel_without_its_parent_keeps_others_out(folder): hold(others.orphan(folder))

@pytest.mark.parametrize("where", ["a checkpoint that is found", "a checkpoint that a plan reads", "a state"])
def test_a_flipped_bit_is_named(folder, where): hold(others.bits(folder, 12, 0, where))

def test_the_table_is_of_200_kills_and_all_came_out_as_asked():
    with open(HERE.parent/"results"/"faults.csv", newline="") as f: rows = list(csv.DictReader(f))
    assert sum(int(r["times"]) for r in rows if r["fault"].startswith("SIGKILL")) == 200 and all(r["as_asked"] == "yes" and r["asked"] == r["came"] for r in rows)
    assert {r["fault"] for r in rows} == {"SIGKILL", "SIGKILL, requeue", "disk full", "two at once", "an orphaned kernel", "one bit flipped", "runs that break"}

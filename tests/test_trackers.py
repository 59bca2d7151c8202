"""Who watches a training sees every loss of its history: TensorBoard, trackio and Weights & Biases, for real and offline; nobody where none is asked for."""
import importlib.util, json, os, subprocess, sys
from pathlib import Path
import pytest
from seqwarm.batch.cli import main
from seqwarm.core.errors import Refusal
from seqwarm.core.trackers import begin
from tiny import notebook

HERE = Path(__file__).parent
TRAIN = f'''import os, sys; sys.path.insert(0, {str(HERE)!r})
import train_small
from seqwarm.core.record import Run
run = Run("tiny", {{}}, "watched", "runs")
made = train_small.main(".", str(run.store))
made.history.to_json("history.json")
'''

def trained(where: Path, **env: str) -> tuple[list[tuple[int, float]], str]:
    "Steps and validation losses of a run's training, and its address."
    (where/"work.py").write_text(TRAIN)
    got = subprocess.run([sys.executable, "work.py"], cwd=where, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-2000:]
    history = json.loads((where/"history.json").read_text())
    [made] = (where/"runs"/"store").glob("*/model")
    return [(history["step"][i], history["loss"][i]) for i in history["step"]], made.parent.name

def agree(seen: list[tuple[int, float]], told: list[tuple[int, float]]) -> None:
    assert [s for s, _ in seen] == [s for s, _ in told] and all(abs(a - b) < 1e-5 for (_, a), (_, b) in zip(seen, told)) and len(told) > 8

needs = lambda name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed: pip install {name} to try it")

@needs("tensorboard")
def test_tensorboard_has_its_place_in_the_run(tmp_path):
    told, _ = trained(tmp_path, SEQWARM_TRACK="tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [events] = [e for e in (tmp_path/"runs"/"watched"/"log"/"model").glob("events*") if "valid" in EventAccumulator(str(e)).Reload().Tags()["scalars"]]
    agree([(x.step, x.value) for x in EventAccumulator(str(events)).Reload().Scalars("valid")], told)

def wandb_seen(file: Path) -> tuple[list[tuple[int, float]], tuple[str, str]]:
    "Steps and validation losses in wandb's own file (blocks of 32 KiB, as LevelDB's log has them), and the names of project and run."
    from wandb.proto import wandb_internal_pb2 as pb
    data, at, whole, seen, name = file.read_bytes(), 7, b"", [], None
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7: at += left; continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        whole, at = whole + data[at + 7:at + 7 + size], at + 7 + size
        if kind not in (1, 4): continue          # first or middle part of a record
        record, whole = pb.Record.FromString(whole), b""
        if record.HasField("run"): name = (record.run.project, record.run.display_name)
        row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        if "valid" in row: seen.append((record.history.step.num or row.get("_step", 0), row["valid"]))
    return seen, name

@needs("wandb")
def test_wandb_offline_has_every_loss(tmp_path):
    told, address = trained(tmp_path, SEQWARM_TRACK="wandb", WANDB_MODE="offline", WANDB_SILENT="true")
    [file] = (tmp_path/"runs"/"watched"/"log").glob(f"wandb/offline-run-*/run-{address}.wandb")
    seen, name = wandb_seen(file)
    agree(seen, told); assert name == ("train", f"model {address[:6]}")

@needs("trackio")
def test_trackio_has_every_loss(tmp_path):
    told, address = trained(tmp_path, SEQWARM_TRACK="trackio", TRACKIO_DIR=str(tmp_path/"trackio"), HF_HUB_OFFLINE="1")
    got = subprocess.run([sys.executable, "-c", "import json, trackio; r = trackio.Api().runs('train'); print(json.dumps([[x.name] for x in r])); "
                          "from trackio.sqlite_storage import SQLiteStorage as S; print(json.dumps(S.get_logs('train', r[0].name), default=str))"],
                         env={**os.environ, "TRACKIO_DIR": str(tmp_path/"trackio"), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-2000:]
    names, logs = map(json.loads, got.stdout.splitlines()[-2:])
    agree([(x["step"], x["valid"]) for x in logs if "valid" in x], told); assert [n for [n] in names] == [f"model {address[:6]}"]

def test_what_is_not_there_is_refused_before_a_run_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("SEQWARM_TRACK", ""); nb = notebook(tmp_path/"10_tiny.ipynb")
    missing = next(n for n in ("clearml", "swanlab", "dvclive", "aim") if importlib.util.find_spec(n) is None)
    for name, says in ((missing, f"seqwarm: {missing} is not installed; pip install {missing}, or leave --track out"), ("tensorbord", "seqwarm: there is no tracker 'tensorbord'; did you mean 'tensorboard'?")):
        assert main(["run", str(nb), "--track", name]) == 2 and capsys.readouterr().err.strip() == says and not Path("runs").exists()

def test_a_tracker_that_cannot_start_is_one_line(tmp_path):
    class Acc:
        log_with, is_main_process = ["wandb"], True
        class project_configuration: pass
        def init_trackers(self, *_, **__): raise RuntimeError("api_key not configured (no-tty)\nmore")
    with pytest.raises(Refusal, match=r"wandb cannot be started \(api_key not configured \(no-tty\)\); log in \(wandb login\), or set WANDB_MODE=offline"):
        begin(Acc(), "a", "clp", "00ff00", tmp_path)

def test_without_one_nothing_is_imported(tmp_path):
    code = "import sys, seqwarm.core.train; print([m for m in ('wandb', 'trackio', 'tensorboard', 'torch.utils.tensorboard') if m in sys.modules])"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "SEQWARM_TRACK": ""})
    assert got.stdout.splitlines()[-1] == "[]", got.stdout + got.stderr

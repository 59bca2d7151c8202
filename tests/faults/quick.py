"""The command `seqwarm`, whose runs need no kernel: a chain of hashes, or with QUICK=train a training, is kept, resumed, and put on record.

What stands around a run (checks, holds, records, sweeps, jobs) is the real thing; only the execution of a notebook is replaced.
"""
import hashlib, json, os, sys, time
from pathlib import Path

STEPS = 20

def chain(folder: Path, wait: float = 0.02) -> str:
    "Twenty hashes, each kept before the next; the last one tells whether none was left out or done twice."
    from seqwarm.core.files import write_whole
    state = folder/"state.json"
    now = json.loads(state.read_text()) if state.exists() else dict(step=0, sum="")
    while now["step"] < STEPS:
        time.sleep(float(os.environ.get("QUICK_STEP", wait)))
        now = dict(step=now["step"] + 1, sum=hashlib.sha256(f"{now['sum']}{now['step']}".encode()).hexdigest())
        write_whole(state, now)
    return now["sum"]

def training(folder: Path) -> str:
    "A small training, which waits a moment at every step; the fingerprint of its weights."
    from faults.common import trained
    from seqwarm.core.files import file_fingerprint
    from seqwarm.core.train import _Loop
    update = _Loop.update
    def slow(*args): time.sleep(float(os.environ.get("QUICK_STEP", 0.02))); return update(*args)
    _Loop.update = slow
    return file_fingerprint(trained(Path(os.environ["QUICK_TEXT"]), folder/"store").path/"model.safetensors")

def execute(notebook: Path, folder: Path, wishes: dict, show: bool, held: tuple = ()) -> None:
    from seqwarm.core.files import Lock, write_whole
    write_whole(folder/"notebook.ipynb", dict(cells=[], metadata=dict(seqwarm=dict(recipe="tiny", parameters=wishes))))
    lock = Lock(folder)    # as the kernel of a recipe does
    with open(folder/"begun", "a") as f: f.write("x")
    result = (training if os.environ.get("QUICK") == "train" else chain)(folder)
    write_whole(folder/"record.json", dict(recipe="tiny", parameters=wishes, result=result, lines=[result]))
    write_whole(folder/"notebook.ipynb", dict(cells=[], metadata=dict(seqwarm=dict(recipe="tiny", parameters=wishes))))
    lock.release()

def install(forked: bool = False) -> None:
    "Put it in the place of the kernel, and this file in that of the command; `forked`: jobs of a sweep are forked."
    from seqwarm.batch import local, run, slurm
    run._execute = execute
    local._SELF = slurm._SELF = [sys.executable, str(Path(__file__).resolve())]
    slurm._EVERY = 0.5
    if forked: local.subprocess = Popens

class Popens:
    "In the place of the module `subprocess`, for `seqwarm.batch.local`."
    from subprocess import PIPE, STDOUT, TimeoutExpired
    @staticmethod
    def Popen(command: list[str], stdout, env: dict[str, str], **_):
        from faults.common import Forked
        from seqwarm.batch.cli import main
        return Forked(lambda: sys.exit(main(command[2:])), stdout.fileno(), leash=True)

if __name__ == "__main__":
    install()
    from seqwarm.batch.cli import main
    main()

"""What all faults share: a row of the table, a strike at a random moment, and a run of a sweep that needs no kernel."""
import os, random, signal, subprocess, sys, time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

GIVEN: dict[str, dict] = {}

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent

@dataclass
class Row:
    "What was done, what was asked of it, and what came out."
    fault: str
    where: str
    times: int
    asked: str
    came: str
    fell: str = ""         # where the kills fell, as the folder showed afterwards
    seed: int | None = None
    seconds: float = 0.0
    @property
    def good(self) -> bool: return self.asked == self.came

@dataclass
class Tally:
    "Kills and what became of them."
    kills: int = 0
    resumed: int = 0
    equal: int = 0
    lost: int = 0
    twice: int = 0
    left: int = 0
    fell: Counter = field(default_factory=Counter)
    def row(self, fault: str, where: str, times: int, seed: int) -> Row:
        said = lambda *n: "kills {}, resumed {}, bit-equal {}, lost {}, twice {}, leftovers {}".format(*n)
        fell = ", ".join(f"{k} {n}" for k, n in sorted(self.fell.items()))
        return Row(fault, where, times, said(times, times, times, 0, 0, 0), said(self.kills, self.resumed, self.equal, self.lost, self.twice, self.left), fell, seed)

STEPS = 20

def trained(folder: Path, store: Path):   # -> Trained
    "A training of 20 steps in two stages, with a state after every second one; `folder` holds its text."
    import torch, train_small
    from transformers import GPT2Config, GPT2LMHeadModel
    from seqwarm.core.train import Stage, train
    data = GIVEN.get(str(folder)) or GIVEN.setdefault(str(folder), train_small.given(str(folder)))     # forked processes find it
    tokenizer = data["tokenizer"]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2,
                                       bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))     # with dropout
    return train(model, *data.values(), [Stage(steps=6, frozen=("ffn",)), Stage(steps=STEPS - 6, lr=2e-3)], store, batch=2, every=5, save_every=2, sequences=2)

def litter(*places: Path) -> list[str]:
    "Passing files and folders."
    return [str(p) for place in places for p in place.rglob("*") if p.name.endswith((".part", ".tmp", "_tmp"))]

def until(true: Callable[[], bool], seconds: float = 180, every: float = 0.05) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end: raise TimeoutError("it took too long")
        time.sleep(every)

def alive(pid: int) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError: return False

def family(pid: int) -> list[int]:
    "A process and all that it started."
    import psutil
    try: first = psutil.Process(pid); return [pid, *(p.pid for p in first.children(recursive=True))]
    except psutil.NoSuchProcess: return []

def strike(pid: int, rng: random.Random, wait: float, seen: Callable[[], bool] | None = None, every: float = 0.0005) -> bool:   # whether it hit a living process
    "SIGKILL to a child after a random time of at most `wait` seconds; with `seen`, counted from when that became true."
    if seen:
        while not seen():
            if not alive(pid): return False
            time.sleep(every)
    end = time.monotonic() + rng.uniform(0, wait)
    while time.monotonic() < end:
        if not alive(pid): return False
        time.sleep(min(0.002, max(0.0, end - time.monotonic())))
    os.kill(pid, signal.SIGKILL)
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT).si_code == os.CLD_KILLED

class Forked:
    "What `subprocess.Popen` gives, of a forked process: nothing has to be imported anew, and nothing but standard files stays open, as after an exec."
    def __init__(self, work: Callable[[], None], log: int, leash: bool = False):
        end, self.held = os.pipe() if leash else (os.open(os.devnull, os.O_RDONLY), -1)
        self.returncode: int | None = None
        sys.stdout.flush(); sys.stderr.flush()
        if not (pid := os.fork()): self._do(work, end, log)
        self.pid = pid; os.close(end)
    def _do(self, work: Callable[[], None], end: int, log: int) -> None:
        code = 1
        try:
            os.setsid(); os.dup2(end, 0); os.dup2(log, 1); os.dup2(log, 2); os.closerange(3, 4096)
            for s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, signal.SIG_DFL)
            sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, closefd=False) for fd, mode in ((0, "r"), (1, "w"), (2, "w")))
            work(); code = 0
        except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException as e: print(f"{type(e).__name__}: {e}", flush=True)
        finally:
            try: sys.stdout.flush(); sys.stderr.flush()
            finally: os._exit(code)
    @property
    def stdin(self) -> "Forked": return self     # of which only close() is asked
    def close(self) -> None:
        if self.held >= 0: os.close(self.held); self.held = -1
    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode
    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout if timeout is not None else 1e9)
        while self.poll() is None:
            if time.monotonic() > end: raise subprocess.TimeoutExpired("a forked process", timeout or 0)
            time.sleep(0.005)
        return self.returncode or 0
    def kill(self) -> None:
        if self.poll() is None: os.kill(self.pid, signal.SIGKILL)
    def terminate(self) -> None:
        if self.poll() is None: os.kill(self.pid, signal.SIGTERM)

def quietly(work: Callable[[], None], log: Path) -> Callable[[], None]:
    "The same, for a forked process: what it says goes to a file."
    def do() -> None:
        with open(log, "ab") as out:
            for fd in (1, 2): os.dup2(out.fileno(), fd)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        try: work()
        except BaseException as e: print(f"\n{type(e).__name__}: {e}", flush=True); raise
        finally: sys.stdout.flush(); sys.stderr.flush()
    return do

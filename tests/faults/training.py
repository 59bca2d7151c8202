"""A training that is killed again and again: in its steps, while it writes a state, while it writes the finished checkpoint."""
import os, random, signal, sys, time
from collections.abc import Callable
from pathlib import Path
import train_small
from faults.common import GIVEN, Row, Tally, litter, quietly, strike, trained
from seqwarm.core import train as module
from seqwarm.core.state import State
from seqwarm.core.train import _Loop

def ambush(what: str, at: int) -> Callable[[], int]:   # how many calls there were
    "SIGKILL to this process itself at the call number `at` (of Python's or C's functions) that writing states, or the checkpoint, makes."
    owner, name = (State, "keep") if what == "state" else (module, "save")
    real, calls = getattr(owner, name), 0
    def tick(frame: object, event: str, arg: object) -> None:
        nonlocal calls; calls += 1
        if calls == at: os.kill(os.getpid(), signal.SIGKILL)
    def watched(*args):
        sys.setprofile(tick)
        try: return real(*args)
        finally:
            if what == "state": sys.setprofile(None)    # after the checkpoint comes the clearing up
    setattr(owner, name, watched)
    return lambda: calls

class Killed:
    "Trainings in forked processes, which need not import torch anew, and what their stores show."
    def __init__(self, folder: Path, seed: int, where: str):
        self.folder, self.rng, self.log, self.stores, self.where = folder, random.Random(seed), folder/"log", 0, where
        self.steps, self.told = folder/"steps", folder/"calls"   # a byte a step, over all processes; how many calls a writing makes
        GIVEN[str(folder)] = train_small.given(str(folder)); begun = time.monotonic()
        pid = self.start(folder/"calm", -1)
        while not self.count(): time.sleep(0.001)
        self.early = time.monotonic() - begun    # until the first step
        os.waitpid(pid, 0); self.calm, self.calls = trained(folder, folder/"calm"), int(self.told.read_text())

    def start(self, store: Path, struck: int = 0) -> int:
        def work() -> None:
            update, marks = _Loop.update, os.open(self.steps, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            def marked(*args): os.write(marks, b"s"); return update(*args)
            _Loop.update = marked
            calls = ambush(self.where, struck) if struck and self.where != "steps" else lambda: 0
            trained(self.folder, store); sys.setprofile(None)
            if struck < 0: self.told.write_text(str(calls()))
        return train_small.forked(quietly(work, self.log))

    def count(self) -> int: return self.steps.stat().st_size if self.steps.exists() else 0

    def fell(self, store: Path) -> str:
        "Where a kill fell, by what it left."
        found = lambda pattern: any(store.glob(pattern))
        if found("*/.model.*.part"): return "in writing the checkpoint"
        if found("*/.state-*.part"): return "in writing a state"
        if found("*/model"): return "in clearing up" if found("*/state-*") else "at the end"
        return "between" if found("*/state-*") else "before the first state"

    def chain(self, tally: Tally, kills: int) -> None:
        "Strike one training up to `kills` times, let it end, and look at what it became."
        self.stores += 1
        store, mine, done, status = self.folder/f"store-{self.stores}", 0, None, -1
        while True:
            pid, hit = self.strike(store, mine < kills)
            status = os.waitpid(pid, 0)[1]; hit = hit and os.WIFSIGNALED(status)
            if done is not None and self.count() > done: tally.twice += 1   # it was finished, and trained again
            if next(store.glob("*/model"), None): done = self.count()
            if not hit: break
            mine += 1; tally.fell[self.fell(store)] += 1
        tally.kills += mine
        if status or not done: tally.lost += 1; return
        tally.resumed += mine
        again = trained(self.folder, store)    # found
        tally.equal += mine*train_small.same(again, self.calm)
        tally.left += len(litter(store)) + len(list(store.glob("*/state-*")))

    def strike(self, store: Path, now: bool) -> tuple[int, bool]:   # the process, and whether it was struck
        "A strike at a random moment; counted in steps or calls where that can be, for a loaded machine has no seconds."
        rng = self.rng
        if not now: return self.start(store), False
        if self.where == "steps":
            pid, at = self.start(store), self.count() + rng.randrange(1, 9)
            return pid, strike(pid, rng, 0.02, lambda: self.count() >= at, 0.004) if rng.random() < 0.85 else strike(pid, rng, self.early)
        skip = rng.randrange(4) if self.where == "state" else 0
        if rng.random() < 0.75: return self.start(store, rng.randrange(1, self.calls//3 if self.where == "state" else self.calls)), True
        pattern, old, seen = {"state": "*/.state-*.part", "checkpoint": "*/.model.*.part"}[self.where], set(store.glob("*/.*.part")), 0
        def now_seen() -> bool:
            nonlocal seen
            found = set(store.glob(pattern)) - old; old.update(found); seen += len(found)
            return seen > skip
        pid = self.start(store)
        return pid, strike(pid, rng, 0.03, now_seen)

def kills(folder: Path, times: int, seed: int, where: str) -> Row:
    "So many kills of trainings at one place."
    killed, tally, begun = Killed(folder, seed, where), Tally(), time.monotonic()
    while tally.kills < times and not tally.lost: killed.chain(tally, min(6, times - tally.kills))
    row = tally.row("SIGKILL", {"steps": "training, at any moment", "state": "training, in writing a state", "checkpoint": "training, in writing the checkpoint"}[where], times, seed)
    row.seconds = time.monotonic() - begun
    return row

"""Seconds and memory of a step of MLM and of METRO with its auxiliary joint, frozen and offline, beside what the ledger's FLOPs say.

    python benchmarks/metro.py [--rounds 15] [--sizes 4x128x4000x12x64 ...] [--kind bert] [--out results/metro_step.csv]

A size is layers x width x vocabulary x sequences x tokens of one; the auxiliary has a third of the layers. The arms:

    whole    MLM as transformers has it: the head works at every position
    mlm      MLM with the head at the masked positions alone, as METRO has it: what METRO's machinery is compared with
    joint    METRO: the auxiliary is trained along
    frozen   an auxiliary that exists, asleep (Fast-ELECTRA)
    offline  its proposals on disk

They take turns, step by step, in one process, so that a noisy machine disturbs all alike; the table holds medians of the seconds and of the
ratios within a round. A step is the training loop's own: making the batch, forward, backward, clipping, AdamW. No dropout, which no FLOPs
are counted for. Filling the table of proposals is done beforehand and is not in a step; what it took for a step's batch stands in `once`.
Peak memory is of a process of its own for each arm, above what it had when everything was imported and read but no model was made; on a
GPU, what torch has allocated there. With --cpu-time it is the process's own time that is told, not the clock's: for a busy machine.
"""
import argparse, subprocess, sys, tempfile, time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
import pandas as pd
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForMaskedLM, MPNetConfig, MPNetForMaskedLM
from transformers.utils import logging as hf_logging
from seqwarm.core.corpus import Corpus, documents, parse
from seqwarm.core.feed import Feed
from seqwarm.core.layout import layout
from seqwarm.core.masked import Masked
from seqwarm.core.record import environment
from seqwarm.core.stages import Stage, asleep, chains, optimizer
from seqwarm.core.train import _Loop, costs
from seqwarm.core.vocab import train_tokenizer
from seqwarm.methods.metro import pair
from seqwarm.methods.offline import Kept, Offline, propose

SIZES = ["4x128x4000x12x64", "12x256x8000x8x128"]
KINDS = {"bert": (BertForMaskedLM, BertConfig), "mpnet": (MPNetForMaskedLM, MPNetConfig)}
ARMS = ("whole", "mlm", "joint", "frozen", "offline")
ROUND = 4   # steps after which the same samples come round
WORLD = "world:a?words=200000"

def mlm(kind: str, sizes: tuple[int, ...], tokenizer, layers: int | None = None, seed: int = 0):
    "A masked LM, fresh."
    depth, width, vocab, _, length = sizes
    Model, Config = KINDS[kind]
    torch.manual_seed(seed)
    return Model(Config(vocab_size=vocab, hidden_size=width, num_hidden_layers=depth if layers is None else layers,
                        num_attention_heads=max(width // 64, 2), intermediate_size=4*width, max_position_embeddings=length + 8,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=tokenizer.pad_token_id))

def stage(arm: str, frozen: tuple[str, ...] = ()) -> Stage:
    return Stage(10_000, objective="mlm" if arm in ("whole", "mlm") else "metro", frozen=frozen, repeat=ROUND)

def made(name: str, kind: str, sizes: tuple[int, ...], tokenizer, table: str):
    "The module of an arm, its layout, and what sleeps."
    main = mlm(kind, sizes, tokenizer)
    if name == "whole": return main, layout(main.config, type(main).__name__), ()
    if name == "mlm": module = Masked(main)
    elif name == "offline": module = Offline(main, Kept(table))
    else: module = pair(main, auxiliary=None if name == "joint" else mlm(kind, sizes, tokenizer, max(1, round(sizes[0] / 3)), 1))
    return module, module.layout, getattr(module, "idle", ())

def arm(name: str, kind: str, sizes: tuple[int, ...], given: tuple, acc: Accelerator, table: str, stack: ExitStack, clock):
    "A function of the step that trains for one and returns its seconds; and the FLOPs of a sequence."
    tokenizer, corpus = given
    model, lay, idle = made(name, kind, sizes, tokenizer, table)
    model.to(acc.device)
    [chain] = chains([stage(name, idle)])
    adamw = optimizer(model, lay, chain)
    stack.enter_context(asleep(model))
    feed = Feed(chain.stages[0], 0, corpus, tokenizer, model.config, acc, sizes[3], 1, 0)
    loop = SimpleNamespace(acc=acc, seed=0, model=model, guard=None)
    model, adamw = acc.prepare(model, adamw)
    model.train()
    def step(i: int) -> float:
        begun = clock()
        loss, _ = _Loop.update(loop, model, adamw, feed, i, [chain.lr_at(i)])
        loss.item()
        return clock() - begun
    return step, costs(lay, chain.stages[0], sizes[-1], 1)[0].flops

def fill(kind: str, sizes: tuple[int, ...], given: tuple, folder: str) -> Kept:
    "A round's proposals."
    tokenizer, corpus = given
    auxiliary = mlm(kind, sizes, tokenizer, max(1, round(sizes[0] / 3)), 1)
    return propose(auxiliary, tokenizer, corpus, corpus, [stage("offline")], folder, k=min(32, sizes[2]), batch=sizes[3], sequences=1)

def resident() -> tuple[int, int]:
    "Bytes of memory that this process has, and the most that it had since this was last asked (Linux)."
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Vm"))
    found = tuple(1024 * int(told[k].split()[0]) for k in ("VmRSS", "VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return found

def peak(name: str, kind: str, sizes: tuple[int, ...], table: str) -> int:
    "Bytes that an arm's model and three of its steps take at most; to be called in a process of its own."
    acc, given = begin(sizes)
    before, _ = resident()
    with ExitStack() as stack:
        step, _ = arm(name, kind, sizes, given, acc, table, stack, time.perf_counter)
        for i in range(3): step(i)
    return torch.cuda.max_memory_allocated() if acc.device.type == "cuda" else resident()[1] - before

def begin(sizes: tuple[int, ...]) -> tuple[Accelerator, tuple]:
    "The device; tokenizer and corpus."
    hf_logging.set_verbosity_error(); torch.set_num_threads(min(2, torch.get_num_threads()))
    tokenizer = train_tokenizer(documents(parse(WORLD)[0]), min(4000, sizes[2]))
    return Accelerator(cpu=not torch.accelerator.is_available()), (tokenizer, Corpus(WORLD, tokenizer, sizes[-1]))

def measure(size: str, kind: str, rounds: int, clock) -> pd.DataFrame:
    "A row for each arm."
    sizes = tuple(map(int, size.split("x"))); acc, given = begin(sizes)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        kept = fill(kind, sizes, given, folder)
        table, once = str(kept.folder), kept.card.cost["seconds"] / kept.told["batches"]
        alone = lambda name: subprocess.run([sys.executable, __file__, "--peak", name, size, kind, table], check=True,
                                            stdout=subprocess.PIPE, text=True).stdout
        peaks = {name: int(alone(name).split()[-1]) for name in ARMS}
        arms = {name: arm(name, kind, sizes, given, acc, table, stack, clock) for name in ARMS}
        for step, _ in arms.values(): step(0); step(1)      # to warm up
        seconds = []
        for i in range(rounds):
            turn = i % len(ARMS)
            seconds.append({name: arms[name][0](i + 2) for name in ARMS[turn:] + ARMS[:turn]})
    seconds = pd.DataFrame(seconds)[list(ARMS)]
    rows = pd.DataFrame(dict(seconds=seconds.median()))
    for base in ("mlm", "joint"):
        over = seconds.div(seconds[base], axis=0)
        rows[f"over_{base}"], rows[f"flops_{base}"] = over.median(), pd.Series({n: f / arms[base][1] for n, (_, f) in arms.items()})
        rows[f"off_{base}"] = rows[f"over_{base}"] / rows[f"flops_{base}"] - 1
        rows[f"low_{base}"], rows[f"high_{base}"] = over.min(), over.max()
    rows["peak_mb"] = pd.Series(peaks) / 1e6
    rows["once"] = pd.Series(dict(offline=once))
    rows = rows.round(4).rename_axis("arm").reset_index()
    rows.insert(0, "size", size); rows.insert(1, "kind", kind)
    return rows

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--rounds", type=int, default=15); a.add_argument("--sizes", nargs="*", default=SIZES)
    a.add_argument("--kind", choices=KINDS, default="bert"); a.add_argument("--cpu-time", action="store_true")
    a.add_argument("--peak", nargs=4, help=argparse.SUPPRESS); a.add_argument("--out", default="results/metro_step.csv"); o = a.parse_args()
    if o.peak: print(peak(o.peak[0], o.peak[2], tuple(map(int, o.peak[1].split("x"))), o.peak[3])); return
    made = environment()
    clock = time.process_time if o.cpu_time else time.perf_counter
    table = pd.concat([measure(size, o.kind, o.rounds, clock) for size in o.sizes])
    table = table.assign(rounds=o.rounds, threads=torch.get_num_threads(), torch=made["torch"], transformers=made["transformers"],
                         device=made["device"])
    Path(o.out).parent.mkdir(exist_ok=True); table.to_csv(o.out, index=False)
    print(table.to_string(index=False))

if __name__ == "__main__": main()

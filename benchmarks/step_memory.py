"""What spares memory, on one CPU core: peak bytes and time of a forward and backward pass, beside what was predicted beforehand.

    python benchmarks/step_memory.py [--rounds 5] [--out results/step_memory.csv]

    cached      as transformers has it: a cache of keys and values that nobody reads
    plain       without it
    chunked     the loss in parts
    twice       layers computed twice
    both        both

A GPT-2, float32, no dropout. Peaks are counted by torch's tracker of storages, which sees every allocation of a tensor; weights and their
gradients are in it, optimizer's moments are not. The sides take turns; `over_plain` is the median of the ratios of process time within a
round. Parts are made small here (2**20 logits), so that a small case has many of them.

What is predicted, with N tokens, D width, V words, L layers, 4 bytes a number, P parameters:
    plain       8P + 12NV (logits, log-softmax, gradient) + 68NDL (Korthikanti et al., 2022, arXiv:2205.05198, in float32)
    chunked     8P + 3 parts of 4 * 2**20 + 4DV (the head's gradient, before it is the table's) + 68NDL
    twice       8P + 12NV + 4NDL + 68ND          both: with both
and for the time 1, 1, 1 + the body's share of the FLOPs that is its forward pass, by the ledger.
"""
import argparse, time
from pathlib import Path
import pandas as pd
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import GPT2Config, GPT2LMHeadModel
from seqwarm.core import memory
from seqwarm.core.layout import layout
from seqwarm.core.ledger import flops
from seqwarm.core.losses import sums
from seqwarm.core.record import environment

L, D, V, S, B = 6, 128, 8000, 128, 16
ARMS = {"cached": None, "plain": dict(), "chunked": dict(chunked=True), "twice": dict(checkpointing=True),
        "both": dict(chunked=True, checkpointing=True)}

def step(model, batch, options) -> float:
    "A forward and a backward pass; its process seconds."
    begun = time.process_time()
    if options is None: sums(model, model, batch).sum().backward()
    else:
        with memory.thrifty(model, **options): sums(model, model, batch).sum().backward()
    spent = time.process_time() - begun
    model.zero_grad(set_to_none=True)
    return spent

def peak(model, batch, options) -> float:
    tracker = MemTracker(); tracker.track_external(model)
    with tracker: step(model, batch, options)
    return max(found["Total"] for found in tracker.get_tracker_snapshot("peak").values())

def predicted(parameters: int, lay) -> dict[str, tuple[float, float]]:
    "Arm -> MB and times the plain step."
    N, head, part = B * S, 2 * S * D * V, 3 * 4 * memory._PART
    again = (flops(lay, S, train=False) - head) / flops(lay, S)
    logits, kept, inputs = 12 * N * V, 68 * N * D * L, 4 * N * D * L + 68 * N * D
    table = {"cached": (logits + kept, 1.0), "plain": (logits + kept, 1.0), "chunked": (part + 4 * D * V + kept, 1.0),
             "twice": (logits + inputs, 1 + again), "both": (part + 4 * D * V + inputs, 1 + again)}
    return {k: ((8 * parameters + x) / 1e6, t) for k, (x, t) in table.items()}

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--rounds", type=int, default=5); a.add_argument("--out", default="results/step_memory.csv"); o = a.parse_args()
    torch.set_num_threads(1); torch.manual_seed(0); memory._PART = 1 << 20
    model = GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=S, n_embd=D, n_layer=L, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
                                       attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))
    ids = torch.randint(V, (B, S)); batch = dict(input_ids=ids, labels=ids.roll(-1, 1))
    said = predicted(sum(p.numel() for p in model.parameters()), layout(model.config, "GPT2LMHeadModel"))
    for options in ARMS.values(): step(model, batch, options)     # to warm up
    names = list(ARMS)
    seconds = pd.DataFrame([{k: step(model, batch, ARMS[k]) for k in names[i % 5:] + names[:i % 5]} for i in range(o.rounds)])[names]
    over, made = seconds.div(seconds["plain"], axis=0), environment()
    rows = pd.DataFrame([dict(arm=k, predicted_MB=said[k][0], peak_MB=peak(model, batch, ARMS[k]) / 1e6, predicted_time=said[k][1],
                              over_plain=over[k].median(), lowest=over[k].min(), highest=over[k].max()) for k in ARMS]).round(3)
    rows = rows.assign(model=f"{L}x{D}x{V}, {B} rows of {S}", rounds=o.rounds, **{k: made[k] for k in ("torch", "transformers", "device")})
    Path(o.out).parent.mkdir(exist_ok=True); rows.to_csv(o.out, index=False)
    print(rows.to_string(index=False))

if __name__ == "__main__": main()

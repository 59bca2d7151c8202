"""Seconds of a training step of an encoder whose tokens or sequences leave early in given shares, beside the plain step's and the FLOPs'.

    python benchmarks/exit.py [--rounds 7] [--only 12x256 ...] [--out results/exit.csv]

All take turns, step by step, in one process, so that a noisy machine disturbs all alike; the table holds medians of the seconds and of the
ratios within a round. Who leaves is drawn, not learned: at each exit, after every second layer, a share of those who are still there.
`plain` is the encoder with one detection head at its top; `share` 0 has all the heads, and nobody leaves. A step is forward, the heads'
losses, backward, AdamW. No dropout, no padding, no head over the vocabulary: what is measured is the encoder.
"""
import argparse, time
from pathlib import Path
import pandas as pd
import torch
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel
from transformers.utils import logging as hf_logging
from seqwarm.core.record import environment
from seqwarm.methods import exit as method
from seqwarm.methods.exit import exit_losses, exiting, spent

#           layers, width, sequences, tokens of one
MODELS = {"12x256": (12, 256, 8, 128), "6x512": (6, 512, 8, 128), "4x128": (4, 128, 16, 128), "4x32": (4, 32, 2, 16)}
KINDS = {"mpnet": (MPNetModel, MPNetConfig), "bert": (BertModel, BertConfig)}
ARMS = [("plain", 0.0), *(("token", s) for s in (0.0, 0.25, 0.5, 0.75)), *(("sequence", s) for s in (0.25, 0.5, 0.75))]

def drawn(share: float, seed: int):
    "Who leaves an exit, drawn; in place of the rule."
    g = torch.Generator().manual_seed(seed)
    def gone(z, at, kept, threshold, by):
        if by == "token": return (torch.rand(len(z), generator=g) < share).to(z.device)
        return (torch.rand(len(kept), generator=g) < share).to(z.device)[at // kept.shape[1]]
    return gone

def arm(kind: str, sizes: tuple[int, ...], by: str, share: float, device: torch.device):
    "A function of the step that trains for one and returns its seconds, what was kept, and its FLOPs."
    layers, width, B, S = sizes
    Model, Config = KINDS[kind]
    torch.manual_seed(0)
    config = Config(vocab_size=4000, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(width // 64, 1),
                    intermediate_size=4*width, max_position_embeddings=S + 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = Model(config, add_pooling_layer=False).to(device).train()
    model = exiting(encoder, layers if by == "plain" else 2, 1.0, "sequence" if by == "sequence" else "token")
    adam = torch.optim.AdamW(model.parameters(), 1e-4)
    def step(i: int) -> tuple[float, float, int]:
        g = torch.Generator().manual_seed(i)
        ids, replaced = torch.randint(5, 4000, (B, S), generator=g).to(device), (torch.rand(B, S, generator=g) < 0.15).to(device)
        rule, method._gone = method._gone, drawn(share, i)
        begun = time.perf_counter()
        try:
            out = model(input_ids=ids)
            sums, counts = exit_losses(out, replaced)
            adam.zero_grad(); (sums / counts.clamp(min=1)).sum().backward(); adam.step()
            if device.type == "cuda": torch.cuda.synchronize()
        finally: method._gone = rule
        return time.perf_counter() - begun, out.kept, spent(model, out)
    return step

def measure(name: str, kind: str, rounds: int, device: torch.device) -> pd.DataFrame:
    "A row for each way to take a step."
    steps = {a: arm(kind, MODELS[name], *a, device) for a in ARMS}
    for step in steps.values(): step(0); step(1)      # to warm up
    rows = []
    for i in range(rounds):
        for by, share in ARMS[i % len(ARMS):] + ARMS[:i % len(ARMS)]:
            seconds, kept, flops = steps[by, share](i + 2)
            rows.append(dict(round=i, by=by, share=share, seconds=seconds, kept=kept, flops=flops))
    rows = pd.DataFrame(rows)
    plain = rows[rows.by == "plain"].set_index("round")
    rows["over_plain"], rows["by_flops"] = rows.seconds / rows["round"].map(plain.seconds), rows.flops / rows["round"].map(plain.flops)
    groups = rows.groupby(["by", "share"], sort=False)
    table = groups[["kept", "seconds", "over_plain", "by_flops"]].median()
    table["off"] = table.over_plain / table.by_flops - 1
    table["lowest"], table["highest"] = groups.over_plain.min(), groups.over_plain.max()
    table = table.loc[ARMS].round(4).reset_index()
    table.insert(0, "model", name); table.insert(1, "kind", kind)
    return table

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--rounds", type=int, default=7); a.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    a.add_argument("--only", nargs="*", choices=MODELS, default=[n for n in MODELS if n != "4x32"])
    a.add_argument("--out", default="results/exit.csv"); o = a.parse_args()
    hf_logging.set_verbosity_error(); torch.set_num_threads(min(2, torch.get_num_threads()))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    made = environment()
    table = pd.concat([measure(name, kind, o.rounds, device) for name in o.only for kind in o.kinds])
    table = table.assign(rounds=o.rounds, torch=made["torch"], transformers=made["transformers"], device=made["device"])
    Path(o.out).parent.mkdir(exist_ok=True); table.to_csv(o.out, index=False)
    print(table.to_string(index=False))

if __name__ == "__main__": main()

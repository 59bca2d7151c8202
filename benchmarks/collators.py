"""Tokens a second of the denoising objectives on one core, beside plain collators that work row by row.

    python benchmarks/collators.py [--rounds 15] [--rows 100] [--length 512]

Both sides take turns in one process on the same packed rows; the table holds the median of each and of the ratios within a round. The
plain ones do what collators usually do: draw spans for one row after the other, join its pieces, pad, stack and shift. Tokens are
those of the rows.
"""
import argparse, time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from seqwarm.core.corpus import Packed
from seqwarm.core.objectives import Draws, objective
from seqwarm.core.record import environment

MASK, PAD, START, FIRST = 4, 2, 1, 110   # ids below 110 are special, 10 to 109 are sentinels

class Tokenizer:
    bos_token_id, eos_token_id, pad_token_id, unk_token_id, mask_token_id, unk_token = 0, 1, PAD, 3, MASK, "<unk>"
    cls_token_id, sep_token_id, all_special_ids = 0, 1, [*range(FIRST)]
    def __len__(self): return 32_000
    def convert_tokens_to_ids(self, token): return 10 + int(token[10:-1])

class Config: model_type, is_encoder_decoder, pad_token_id, decoder_start_token_id = "bart", True, PAD, START

def corpus(rows: int, length: int) -> Packed:
    "Documents of 10 to 200 words, bos ... eos, packed."
    rng, flat = np.random.default_rng(0), []
    while len(flat) < rows * length: flat += [0, *rng.integers(FIRST, len(Tokenizer()), rng.integers(10, 200)), 1]
    ids = np.array(flat[:rows * length]).reshape(rows, length)
    return Packed(ids, np.zeros_like(ids), np.zeros_like(ids), np.arange(rows))

def plain(name: str, ids: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    "A collator of the usual kind."
    sources, targets = [], []
    for row in ids:
        words = np.flatnonzero(row >= FIRST)
        left, lengths = max(1, round((0.15 if name == "spans" else 0.3) * len(words))), []
        while left > 0:
            lengths.append(min(left, max(1, rng.poisson(3)) if name == "spans" else rng.poisson(3)))
            left -= lengths[-1]
        source, target, at = [], [], 0
        for i, (start, size) in enumerate(zip(np.sort(rng.choice(words, len(lengths), replace=False)), lengths)):
            start = max(start, at)
            source.append(row[at:start]); at = start + size
            if name != "omit": source.append([MASK if name == "denoise" else 10 + i])
            if name == "spans": target += [[10 + i], row[start:at]]
        sources.append(np.concatenate([*source, row[at:]]))
        targets.append(np.concatenate([*target, [1]]) if name == "spans" else row)
    stack = lambda rows, fill: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(r) for r in rows], True, fill)
    source, labels = stack(sources, PAD), stack(targets, -100)
    shown = torch.cat([torch.full((len(ids), 1), START), labels[:, :-1]], 1).masked_fill_(labels == -100, PAD)
    return dict(input_ids=source, attention_mask=source != PAD, decoder_input_ids=shown, labels=labels)

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--rounds", type=int, default=15); a.add_argument("--rows", type=int, default=100)
    a.add_argument("--length", type=int, default=512); a.add_argument("--out", default="results/collators.csv"); o = a.parse_args()
    torch.set_num_threads(1)
    packed, tokenizer, rng, lines = corpus(o.rows, o.length), Tokenizer(), np.random.default_rng(1), []
    for name in ("denoise", "omit", "spans"):
        ask = objective(name)
        sides = {"ours": lambda i, ask=ask: ask(packed, Draws(0, i, packed.samples), Config, tokenizer),
                 "plain": lambda i, name=name: plain(name, packed.ids, rng)}
        seconds = []
        for i in range(o.rounds + 1):
            seconds.append({})
            for side in (sides if i % 2 else reversed(sides)):
                begun = time.perf_counter(); sides[side](i); seconds[-1][side] = time.perf_counter() - begun
        speed = o.rows * o.length / pd.DataFrame(seconds[1:])   # the first round warms up
        over = speed.ours / speed.plain
        lines.append(dict(objective=name, tokens_per_second=round(speed.ours.median()), plain=round(speed.plain.median()),
                          over_plain=round(over.median(), 2), lowest=round(over.min(), 2), highest=round(over.max(), 2)))
    made = environment()
    table = pd.DataFrame(lines).assign(rounds=o.rounds, rows=o.rows, length=o.length, torch=made["torch"], numpy=made["numpy"],
                                       device=made["device"])
    Path(o.out).parent.mkdir(exist_ok=True); table.to_csv(o.out, index=False)
    print(table.to_string(index=False))

if __name__ == "__main__": main()

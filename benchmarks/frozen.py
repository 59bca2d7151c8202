"""Seconds of a step with everything awake, with the encoder asleep, and with its outputs kept, beside what the ledger's FLOPs say.

    python benchmarks/frozen.py [--rounds 7] [--only 12+12x256 ...]

The three take turns, step by step, in one process, so that a noisy machine disturbs all alike; the table holds medians of the seconds and
of the ratios within a round. A step is the training loop's own: making the batch, forward, backward, clipping, AdamW. No dropout, which no
FLOPs are counted for. The shared embedding sleeps with the encoder. Filling the kept outputs is done beforehand and is not in a step.
"""
import argparse, tempfile, time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
import pandas as pd
import torch
from accelerate import Accelerator
from transformers import BartConfig, BartForConditionalGeneration
from transformers.utils import logging as hf_logging
from seqwarm.core.corpus import Corpus, documents, parse
from seqwarm.core.feed import Feed, keep
from seqwarm.core.layout import layout
from seqwarm.core.ledger import flops
from seqwarm.core.objectives import shape
from seqwarm.core.record import environment
from seqwarm.core.stages import Stage, asleep, chains, optimizer
from seqwarm.core.train import _Loop
from seqwarm.core.vocab import train_tokenizer

#           layers (each stack), width, rows of the embedding, sequences, tokens of a text
MODELS = {"12+12x256": (12, 256, 8000, 4, 128), "6+6x256": (6, 256, 8000, 4, 128), "4+4x128": (4, 128, 4000, 8, 128)}
ROUND = 4   # steps after which the kept outputs come round

def arm(kind: str, sizes: tuple[int, ...], tokenizer, corpus, acc: Accelerator, folder: str, stack: ExitStack):
    "A function of the step that trains for one step and returns its seconds; and the FLOPs of a sequence."
    layers, width, vocab, batch, length = sizes
    torch.manual_seed(0)
    ids = {f"{r}_token_id": getattr(tokenizer, f"{r}_token_id") for r in ("bos", "eos", "pad")}
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=vocab, d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=4*width, decoder_ffn_dim=4*width,
        encoder_attention_heads=width // 64, decoder_attention_heads=width // 64, max_position_embeddings=2*length, dropout=0.0,
        decoder_start_token_id=ids["eos_token_id"], forced_eos_token_id=None, **ids)).to(acc.device)
    lay = layout(model.config, "BartForConditionalGeneration")
    stage = Stage(10_000, objective="denoise", frozen=() if kind == "full" else ("encoder/", "embed.token"),
                  **dict(repeat=ROUND, keep="float32") if kind == "kept" else {})
    [chain] = chains([stage])
    adamw = optimizer(model, lay, chain)
    stack.enter_context(asleep(model))
    feed = Feed(stage, 0, corpus, tokenizer, model.config, acc, batch, 1, 0)
    loop = SimpleNamespace(acc=acc, seed=0, model=model, guard=None)
    if kind == "kept": keep(feed, model, lay, folder, 4e9)
    model, adamw = acc.prepare(model, adamw)
    model.train()
    def step(i: int) -> float:
        begun = time.perf_counter()
        loss, _ = _Loop.update(loop, model, adamw, feed, i, [chain.lr_at(i)])
        loss.item()
        return time.perf_counter() - begun
    return step, flops(lay, *shape("denoise", length), frozen=stage.frozen, encoder=kind != "kept")

def measure(name: str, sizes: tuple[int, ...], tokenizer, acc: Accelerator, rounds: int) -> pd.DataFrame:
    "A row for each way to take a step."
    corpus = Corpus("world:a?words=200000", tokenizer, sizes[-1])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arms = {kind: arm(kind, sizes, tokenizer, corpus, acc, folder, stack) for kind in ("full", "frozen", "kept")}
        for step, _ in arms.values(): step(0); step(1)   # to warm up
        kinds, seconds = list(arms), []
        for i in range(rounds):
            order = kinds[i % 3:] + kinds[:i % 3]
            seconds.append({kind: arms[kind][0](i + 2) for kind in order})
    seconds = pd.DataFrame(seconds)[kinds]
    over, by_flops = seconds.div(seconds["full"], axis=0), pd.Series({k: n / arms["full"][1] for k, (_, n) in arms.items()})
    table = pd.DataFrame(dict(seconds=seconds.median(), over_full=over.median(), by_flops=by_flops, off=over.median() / by_flops - 1,
                              lowest=over.min(), highest=over.max())).round(4).rename_axis("step").reset_index()
    table.insert(0, "model", name)
    return table

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--rounds", type=int, default=7); a.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    a.add_argument("--out", default="results/frozen.csv"); o = a.parse_args()
    hf_logging.set_verbosity_error(); torch.set_num_threads(min(2, torch.get_num_threads()))
    acc = Accelerator(cpu=not torch.accelerator.is_available())
    tokenizer = train_tokenizer(documents(parse("world:a?words=200000")[0]), 4000)
    made = environment()
    table = pd.concat([measure(name, MODELS[name], tokenizer, acc, o.rounds) for name in o.only])
    table = table.assign(rounds=o.rounds, torch=made["torch"], transformers=made["transformers"], device=made["device"])
    Path(o.out).parent.mkdir(exist_ok=True); table.to_csv(o.out, index=False)
    print(table.to_string(index=False))

if __name__ == "__main__": main()

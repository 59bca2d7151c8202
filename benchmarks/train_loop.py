"""Tokens a second of `seqwarm.core.train` beside a bare PyTorch loop and Hugging Face's Trainer, on one model and the same batches.

    python benchmarks/train_loop.py [--steps 40] [--rounds 7]

The three sides take turns in one process, so that a noisy machine disturbs all alike; the table holds the median of each and of the
ratios within a round. Ours makes its batches as it goes; the bare loop and Trainer are given theirs ready-made, which favours them.
"""
import argparse, logging, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.utils import logging as hf_logging
from seqwarm.core.corpus import Corpus, documents, parse
from seqwarm.core.objectives import Draws, causal
from seqwarm.core.record import environment
from seqwarm.core.train import Stage, train
from seqwarm.core.vocab import train_tokenizer

B, S, SEED, LR = 16, 128, 0, 1e-3

def fresh(tokenizer) -> GPT2LMHeadModel:
    torch.manual_seed(SEED)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=S, n_embd=128, n_layer=4, n_head=4,
                                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                      bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))

def nll(model, batch) -> torch.Tensor:
    "A function of its own, so that the logits go with the graph: a loop that holds them until the next step is a tenth slower."
    return F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits.flatten(0, 1), batch["labels"].flatten())

def bare(model, batches) -> float:
    "The shortest loop that does the same: forward, loss, backward, clip, fused AdamW."
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), fused=True)
    model.train(); begun = time.perf_counter()
    for batch in batches:
        nll(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(); optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begun

def trainer(model, batches) -> float:
    "Hugging Face's Trainer on the same samples, with nothing logged, saved or evaluated."
    rows = [{k: v[i] for k, v in b.items()} | {"labels": b["input_ids"][i]} for b in batches for i in range(B)]
    with tempfile.TemporaryDirectory() as d:
        args = TrainingArguments(d, per_device_train_batch_size=B, max_steps=len(batches), learning_rate=LR, optim="adamw_torch_fused",
                                 max_grad_norm=1.0, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
                                 dataloader_num_workers=0, remove_unused_columns=False,
                                 use_cpu=not torch.cuda.is_available())
        t = Trainer(model, args, train_dataset=rows, data_collator=lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]})
        begun = time.perf_counter(); t.train()
        return time.perf_counter() - begun

def ours(model, tokenizer, corpus, steps: int) -> float:
    "Our loop; its own measure of training seconds, which leaves out evaluation and saving as the other two do."
    with tempfile.TemporaryDirectory() as d:
        trained = train(model, tokenizer, corpus, corpus, [Stage(steps=steps, lr=LR)], d, batch=B, seed=SEED, every=steps, sequences=1)
        return trained.card.cost["seconds"]

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--steps", type=int, default=40); a.add_argument("--rounds", type=int, default=7)
    a.add_argument("--out", default="results/train_loop.csv"); o = a.parse_args()
    hf_logging.set_verbosity_error(); hf_logging.disable_progress_bar(); logging.disable(logging.WARNING)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    text = "world:a?words=300000"
    tokenizer = train_tokenizer(documents(parse(text)[0]), 4000)
    corpus, model = Corpus(text, tokenizer, S), fresh(tokenizer)
    batches = [causal(p := corpus.sample(np.arange(i * B, i * B + B)), Draws(SEED, i, p.samples), model.config, tokenizer)
               for i in range(o.steps)]
    sides = {"bare loop": lambda: bare(fresh(tokenizer), batches), "seqwarm": lambda: ours(fresh(tokenizer), tokenizer, corpus, o.steps),
             "HF Trainer": lambda: trainer(fresh(tokenizer), batches)}
    for run in sides.values(): run()   # a round to warm up
    seconds = pd.DataFrame([{name: sides[name]() for name in (sides if i % 2 else reversed(sides))} for i in range(o.rounds)])
    speed = o.steps * B * S / seconds
    over = speed.div(speed["bare loop"], axis=0)
    table = pd.DataFrame(dict(tokens_per_second=speed.median(), over_bare=over.median(), lowest=over.min(), highest=over.max()))
    table = table.loc[list(sides)].round(3).rename_axis("side").reset_index()
    made = environment()
    table = table.assign(rounds=o.rounds, steps=o.steps, torch=made["torch"], transformers=made["transformers"], device=made["device"])
    Path(o.out).parent.mkdir(exist_ok=True); table.to_csv(o.out, index=False)
    print(table.to_string(index=False))

if __name__ == "__main__": main()

"""Is the toy world fast to write and fit for toy models? Words a second, and how near small models come to the floor.

    python benchmarks/world.py [--seeds 1] [--steps 2000]

A causal model of 4 layers x 128 is trained for 2,000 steps of 2,000 tokens and its loss set beside the exact floor; a masked model of that
size is trained for 200 steps and its loss set beside the unigram entropy, which is what it knows before it has learned to look around.
"""
import argparse, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from seqwarm.core.corpus import Corpus, documents, parse
from seqwarm.core.record import environment
from seqwarm.core.train import Stage, train
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.world import World

S, B = 125, 16

def causal(tokenizer) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=S, n_embd=128, n_layer=4, n_head=4,
                                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                                      bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))

def masked(tokenizer) -> BertForMaskedLM:
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
                                      intermediate_size=512, max_position_embeddings=S, pad_token_id=tokenizer.pad_token_id,
                                      hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in [("--seeds", 1), ("--steps", 2000), ("--vocab", 1500), ("--masked-vocab", 500)]:
        a.add_argument(name, type=int, default=value)
    a.add_argument("--language", default="a"); a.add_argument("--out", default="results/world.csv"); o = a.parse_args()
    world, made, rows = World(), environment(), []
    for language in world.languages:
        begun = time.process_time()
        n = sum(len(d.split()) for d in world.documents(language, words=1_000_000))
        seconds = (time.process_time() - begun) / n * 1e6
        rows.append(dict(what="seconds of one core for a million words", language=language, value=seconds, promised=15))
    text = f"world:{o.language}?words=4000000"
    with tempfile.TemporaryDirectory() as store:
        for kind, vocab, stage in [(causal, o.vocab, Stage(o.steps, 4e-3)), (masked, o.masked_vocab, Stage(200, 1e-3, "mlm"))]:
            tokenizer = train_tokenizer(documents(parse(f"{text}&documents=10000")[0]), vocab)
            corpus, valid = Corpus(text, tokenizer, S), Corpus(text, tokenizer, S, "valid")
            for seed in range(o.seeds):
                torch.manual_seed(seed)
                loss = train(kind(tokenizer), tokenizer, corpus, valid, [stage], store, f"{kind.__name__} {seed}", batch=B, seed=seed,
                             sequences=min(200, len(valid))).history.loss.iloc[-1]
                if kind is causal:
                    floor = world.floor(o.language)
                    rows.append(dict(what=f"causal model, {o.steps} steps: bits a word over the floor", language=o.language, seed=seed,
                                     value=loss / np.log(2) * valid.tokens_per_word / floor, promised=1.15))
                else:
                    share = np.bincount(corpus.parts[0].ids)[len(tokenizer.all_special_ids):]; share = share[share > 0] / share.sum()
                    rows.append(dict(what="masked model, 200 steps: nats below the unigram entropy", language=o.language, seed=seed,
                                     value=-(share * np.log(share)).sum() - loss, promised=0))
    table = pd.DataFrame(rows).round(4).assign(torch=made["torch"], device=made["device"])
    Path(o.out).parent.mkdir(exist_ok=True); table.to_csv(o.out, index=False)
    print(table.to_string(index=False))

if __name__ == "__main__": main()

"""A small training of a pair, and two ranks of it, forked from one process: python train_metro.py FOLDER STORE PORT [offline | early]."""
import gc, sys
import torch
from transformers import BertConfig, BertForMaskedLM
from seqwarm.core.train import Stage, train
from seqwarm.methods.exit import Early
from seqwarm.methods.metro import pair
from seqwarm.methods.offline import Offline, propose
from train_small import given, ranks

def mlm(tokenizer, layers: int = 2, dropout: float = 0.0) -> BertForMaskedLM:
    "16 wide."
    torch.manual_seed(layers)
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
                                      max_position_embeddings=20, pad_token_id=tokenizer.pad_token_id, hidden_dropout_prob=dropout,
                                      attention_probs_dropout_prob=dropout))

def main(folder: str, store: str, dropout: float = 0.0, auxiliary: str | None = None, **changed):
    data = given(folder)
    made = pair(mlm(data["tokenizer"], dropout=dropout), auxiliary=auxiliary, tokenizer=data["tokenizer"])
    stages = [Stage(6, 5e-3, "metro?rate=0.3&heat=2&tau=0.5", frozen=made.idle)]
    return train(made, stages=stages, store=store, **data, **dict(batch=4, every=3, save_every=2, sequences=8) | changed)

def offline(folder: str, store: str):
    "The same with an auxiliary that is run beforehand."
    data, stages, sizes = given(folder), [Stage(6, 5e-3, "metro?rate=0.3&heat=2&tau=0.5")], dict(batch=4, sequences=8)
    kept = propose(mlm(data["tokenizer"], 1), stages=stages, store=store, **data, **sizes, k=9)
    return train(Offline(mlm(data["tokenizer"]), kept), stages=stages, store=store, **data, **sizes, every=3, parents=(kept.card,))

def early(folder: str, store: str, threshold: float = 0.5, accumulate: int = 1):
    "Where tokens leave the main model."
    data = given(folder)
    made = pair(mlm(data["tokenizer"], 3), signals=[Early(every=1, threshold=threshold)], prior=0.15)
    return train(made, stages=[Stage(6, 5e-3, "metro?rate=0.3")], store=store, **data, batch=4, accumulate=accumulate, every=3, save_every=2, sequences=8)

if __name__ == "__main__":
    gc.collect(); gc.freeze()   # accelerate collects after every stage
    ranks(dict(offline=offline, early=early)[sys.argv[4]] if sys.argv[4:] else main, *sys.argv[1:4])

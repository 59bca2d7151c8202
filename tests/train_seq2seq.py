"""A small seq2seq training, and processes of their own that run it: killed one after the other, or as two ranks.

    python train_seq2seq.py killed FOLDER STORE STEPS...     each somewhere in the step that is its so-manieth
    python train_seq2seq.py ranks FOLDER STORE PORT

The processes are forked from one that has imported everything and computed nothing.
"""
import gc, os, random, signal, sys, time
from functools import partial
import torch
from transformers import BartConfig, BartForConditionalGeneration
from seqwarm.core.layout import layout
from seqwarm.core.train import _Loop, train
from seqwarm.methods.unfreeze import frozen_then
from train_small import forked, given, ranks

def model(tokenizer, dropout: float = 0.0) -> BartForConditionalGeneration:
    "Two and two layers, 16 wide."
    torch.manual_seed(0)
    ids = {f"{r}_token_id": getattr(tokenizer, f"{r}_token_id", 0) for r in ("bos", "eos", "pad")}
    return BartForConditionalGeneration(BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_attention_heads=2, max_position_embeddings=32, dropout=dropout, attention_dropout=dropout, activation_dropout=dropout,
        decoder_start_token_id=ids["eos_token_id"], forced_eos_token_id=None, **ids))

def main(folder: str, store: str, dropout: float = 0.0):
    "Ten steps with the encoder asleep, its outputs kept in rounds of four; then ten awake."
    data = given(folder); start = model(data["tokenizer"], dropout)
    stages = frozen_then(20, 10, layout(start.config, type(start).__name__), objective="denoise", lr=2e-3, repeat=4, keep="float32")
    return train(start, stages=stages, store=store, **data, batch=4, every=5, save_every=3, sequences=4)

def killed(folder: str, store: str, *steps: str) -> None:
    "Kill process after process, at step 0 before it takes one; prints the signal that each died of (0: it was through)."
    update, rng = _Loop.update, random.Random(1)
    for n in map(int, steps):
        out, into = os.pipe()
        def slow(self, *args, into=into): time.sleep(0.08); os.write(into, b"."); return update(self, *args)
        _Loop.update = slow
        pid = forked(lambda: main(folder, store, 0.1))
        os.close(into)
        for _ in range(n): os.read(out, 1)
        time.sleep(rng.uniform(0, 0.1)); os.kill(pid, signal.SIGKILL); os.close(out)
        print(os.waitpid(pid, 0)[1] & 127)

if __name__ == "__main__":
    gc.collect(); gc.freeze()   # accelerate collects after every stage
    {"killed": killed, "ranks": partial(ranks, main)}[sys.argv[1]](*sys.argv[2:])

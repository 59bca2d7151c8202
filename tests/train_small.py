"""A small training for tests that need a process of their own: python train_small.py FOLDER STORE [dropout] [stall].

With `stall` it waits a moment at every step, so that a signal can strike anywhere. Beside it, what tests of other small trainings share.
"""
import os, sys, threading, time
from pathlib import Path
import torch
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.corpus import Corpus
from seqwarm.core.train import Stage, _Loop, train
from seqwarm.core.vocab import train_tokenizer

def given(folder: str) -> dict:
    "Tokenizer and texts."
    os.environ["SEQWARM_CACHE"] = f"{folder}/cache"
    torch.set_num_threads(1)
    text = Path(folder)/"text.txt"
    if not text.exists(): text.write_text("\n".join(f"{a} and {b} are {a + b} , not {a * b}" for a in range(30) for b in range(30)))
    tokenizer = train_tokenizer(text.read_text().splitlines(), 300)
    corpus, valid = (Corpus(f"text:{text}", tokenizer, 16, split) for split in ("train", "valid"))
    return dict(tokenizer=tokenizer, corpus=corpus, valid=valid)

def weights(path) -> dict: c = Checkpoint(path); return {n: c.read(n) for n in c.names}
def equal(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
def same(a, b) -> bool:
    "Whether two trainings ended, and went, alike."
    return equal(weights(a.path), weights(b.path)) and a.history.drop(columns="seconds").equals(b.history.drop(columns="seconds"))

# a bar's lock is shared by all children of a process, and one that was killed may hold it for ever
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))

def forked(work) -> int:
    "The id of a process that does `work`."
    if pid := os.fork(): return pid
    code = 1
    try: work(); code = 0
    finally: os._exit(code)

def ranks(work, folder: str, store: str, port: str) -> None:
    "Two ranks of `work(folder, store)`, forked; fails if one of them does."
    given(folder)
    def rank(i: int) -> None:
        os.environ |= dict(RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        work(folder, store)
    pids = [forked(lambda i=i: rank(i)) for i in range(2)]
    sys.exit(any([os.waitpid(pid, 0)[1] for pid in pids]))

def main(folder: str, store: str, dropout: float = 0.0, stall: float = 0.0):
    data = given(folder); tokenizer = data["tokenizer"]
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout,
                                       attn_pdrop=dropout, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    if stall:
        update = _Loop.update
        def slow(self, *args): time.sleep(stall); print("step", flush=True); return update(self, *args)
        _Loop.update = slow
    return train(model, *data.values(), [Stage(steps=20, frozen=("ffn",)), Stage(steps=40, lr=2e-3)], store, batch=4, every=7, save_every=5, sequences=4)

if __name__ == "__main__": main(*sys.argv[1:3], *map(float, sys.argv[3:]))

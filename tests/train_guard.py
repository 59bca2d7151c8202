"""A small training whose gradients spike, and two ranks of it, forked from one process: python train_guard.py FOLDER STORE PORT."""
import gc, os, sys
from contextlib import contextmanager
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from seqwarm.core.feed import Feed
from seqwarm.core.train import Accelerator, Stage, train
from train_small import given, ranks

SPIKES = {13: 1e4, 14: float("inf"), 18: 30.0, 23: 1e3}    # step -> factor on the gradient; the last comes early in the second stage, and passes
SKIPPED = {step: x for step, x in SPIKES.items() if step < 20}
STAGES = [Stage(20, 3e-3), Stage(14, 3e-3)]

def model(tokenizer) -> GPT2LMHeadModel:
    "16 wide, without dropout."
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
                                      attn_pdrop=0.0, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))

@contextmanager
def spiking(spikes: dict[int, float]):
    "Gradients of some steps are spoilt; of two ranks' only the last one's."
    parts, backward, at = Feed.parts, Accelerator.backward, {}
    mine = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
    def seen(self, step): at["step"] = step; return parts(self, step)
    def spoilt(self, loss): backward(self, loss * (spikes.get(at["step"], 1.0) if mine else 1.0))
    Feed.parts, Accelerator.backward = seen, spoilt
    try: yield
    finally: Feed.parts, Accelerator.backward = parts, backward

def main(folder: str, store: str, spikes: dict[int, float] = SPIKES, stages: list[Stage] = STAGES, guard: float | None = 5, **changed):
    data = given(folder)
    with spiking(spikes):
        return train(model(data["tokenizer"]), stages=stages, store=store, guard=guard, **data, **dict(batch=4, every=5, save_every=3, sequences=4) | changed)

if __name__ == "__main__":
    gc.collect(); gc.freeze()   # accelerate collects after every stage
    ranks(lambda folder, store: main(folder, store, SKIPPED), *sys.argv[1:])

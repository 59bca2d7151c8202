"""Two ranks that hold a model in parts, on one CPU: python train_sharded.py FOLDER STORE PORT

accelerate cuts models on accelerators only; so it is told that the training's kind is FSDP, and the rest is its own doing. The ranks are asked to
end in a later stage, and go on.
"""
import os, sys, traceback
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
import torch
from torch.distributed.tensor import DTensor
from seqwarm.core import train as module
from seqwarm.core.train import Stage
import train_small
from train_small import ranks

PLAN = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
            FSDP_RESHARD_AFTER_FORWARD="true", FSDP_CPU_RAM_EFFICIENT_LOADING="false")

STOP, STAGES = 8, [Stage(steps=5, frozen=("ffn",)), Stage(steps=7, lr=2e-3)]
HOW = dict(batch=4, every=3, save_every=4, sequences=4, guard=1e6, accumulate=2)

def small(folder: str, store: str, plain=train_small.train):
    "The small training in these stages."
    train_small.train = lambda model, tokenizer, corpus, valid, *_, **__: plain(model, tokenizer, corpus, valid, STAGES, store, **HOW)
    try: return train_small.main(folder, store)
    finally: train_small.train = plain

def cut(plain=module._accelerator):
    "Our accelerator, told that it shards."
    def made(*args):
        acc = plain(*args)
        told = dict(distributed_type=DistributedType.FSDP, fsdp_plugin=FullyShardedDataParallelPlugin())
        for state in (AcceleratorState, PartialState): state._shared_state.update(told)
        return acc
    module._accelerator = made

def looked(self, model, optimizer, feed, step, rates, update=module._Loop.update):
    if step == STOP and self.halt.heard == 0 and not looked.stopped: self.halt.heard = 15
    got = update(self, model, optimizer, feed, step, rates)
    mine = [p for g in optimizer.param_groups for p in g["params"]]
    assert all(isinstance(p, DTensor) for p in mine) and sum(p.to_local().numel() for p in mine) < 0.6*sum(p.numel() for p in mine)
    return got

def main(folder: str, store: str) -> None:
    os.environ |= PLAN
    cut(); module._Loop.update, looked.stopped = looked, False
    try:
        try: small(folder, store)
        except module.Stopped as e: print(e, flush=True); looked.stopped = True
        small(folder, store)
    except BaseException: traceback.print_exc(); raise     # a forked process ends without a word
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks(main, *sys.argv[1:4])

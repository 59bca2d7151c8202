"""A model doubled in width, from disk to disk, beside a copy of what comes out.

    python benchmarks/growth.py [--rounds 3] [--hidden 1024] [--layers 20] [--method fpi] [--folder /tmp] [--out results/growth_write.csv]

A Llama in bfloat16 is made on the spot and doubled in hidden size, heads and feed-forward size. The writing process is watched from
outside, twenty times a second, for its anonymous memory. It takes turns with `cp --reflink=never` of the files that it wrote before; both
are timed until everything is on disk. Nothing is dropped from the cache of the file system, so what is read lies in memory for both.
"""
import argparse, json, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import pandas as pd
import torch
from transformers import LlamaConfig
from clp import copied, watched
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.layout import layout
from seqwarm.core.write import write
from seqwarm.methods.width import width

def make_source(folder: Path, D: int, layers: int) -> None:
    "One file of finite bfloat16 numbers, one block of 64 MiB over and over."
    config = LlamaConfig(vocab_size=32_000, hidden_size=D, intermediate_size=D*11//4, num_hidden_layers=layers, num_attention_heads=D//64,
                         num_key_value_heads=D//64, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    head, at = {"__metadata__": {"format": "pt"}}, 0
    for n, t in layout(config.to_dict(), "LlamaForCausalLM").stored().items():
        head[n] = dict(dtype="BF16", shape=list(t.shape), data_offsets=[at, at + 2*t.size]); at += 2*t.size
    text = json.dumps(head).encode(); text += b" "*(-len(text) % 8)
    block = memoryview((torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))*0.02).bfloat16().view(torch.uint8).numpy())
    with open(folder/"model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for left in range(at, 0, -len(block)): f.write(block[:left])

def child(source: str, method: str, out: str) -> None:
    "What is watched: plan and write, timed apart."
    begun = time.perf_counter()
    small = Checkpoint(source)
    plan = width(small, method, hidden=2*small.layout.size("hidden"))
    planned = time.perf_counter()
    write(plan, {"source": small}, out)
    print(json.dumps({"plan_s": planned - begun, "write_s": time.perf_counter() - planned}))

def main() -> None:
    if sys.argv[1:2] == ["child"]: return child(*sys.argv[2:])
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, n in dict(rounds=3, hidden=1024, layers=20).items(): a.add_argument(f"--{name}", type=int, default=n)
    a.add_argument("--method", default="fpi"); a.add_argument("--folder", help="on the disk that is measured")
    a.add_argument("--out", help="a table to which the rounds are added")
    o, rows = a.parse_args(), []
    with tempfile.TemporaryDirectory(dir=o.folder) as d:
        source, out, kept = Path(d)/"source", Path(d)/"out", Path(d)/"kept"
        source.mkdir(); make_source(source, o.hidden, o.layers)
        watched(__file__, "child", source, o.method, kept)
        files = sorted(kept.glob("*.safetensors"))
        for i in range(o.rounds):
            row = dict(round=i, method=o.method, hidden=o.hidden, layers=o.layers, GB=sum(f.stat().st_size for f in files)/1e9)
            for side in ("cp", "seqwarm") if i % 2 else ("seqwarm", "cp"):
                subprocess.run(["sync"], check=True)
                row |= copied(files, out) if side == "cp" else watched(__file__, "child", source, o.method, out)
                shutil.rmtree(out)
            row |= dict(ratio=row["cp_s"]/row["write_s"], load=os.getloadavg()[0], cores=os.cpu_count(), threads=torch.get_num_threads())
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}); print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(f"{table.ratio.median():.2f} of cp's bytes a second, at least {table.ratio.min():.2f}; up to {table.peak_anon_GB.max():.2f} GB")
    if o.out: table.to_csv(o.out, mode="a", header=not Path(o.out).exists(), index=False)

if __name__ == "__main__": main()

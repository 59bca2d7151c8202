"""CLP-Transfer at real sizes: the rules beside plainer ways to the same rows, and whole checkpoints beside a copy.

    python benchmarks/clp.py rows [--rounds 3] [--out results/clp_rows.csv]
    python benchmarks/clp.py write [--rounds 3] [--layers 30] [--untied] [--folder /tmp] [--out results/clp_write.csv]

`rows`: new rows for a vocabulary of 50,000 tokens of which 12,000 are shared, by our operations, by two loops over the tokens (timed on
500 of them and scaled; one in the manner of the paper's script, one faster) and by dense products in batches, in turns. The largest
relative error of a row is told against float64.

`write`: a Llama of about three thousand million parameters in bfloat16 gets the vocabulary of a small helper. The writing process is
watched from outside, twenty times a second, for its anonymous memory (pages of mapped files are not in it). It takes turns with
`cp --reflink=never` of the same number of bytes; both are timed until everything is on disk. Nothing is dropped from the cache of the
file system; the share of the source that lies in it before each side begins is in the table.
"""
import argparse, ctypes, json, mmap, os, shutil, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedTokenizerFast
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.layout import layout
from seqwarm.core.plan import OPS
from seqwarm.core.vocab import load_tokenizer
from seqwarm.core.write import write
from seqwarm.methods.clp import clp

VOCABULARY, SHARED = 65_536, 24_000

def tokenizer(language: str) -> PreTrainedTokenizerFast:
    "Byte-level BPE whose vocabulary is a list: bytes, words that all languages share, and words of its own."
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *letters, *(f"shared{i}" for i in range(SHARED))]
    words += [f"{language}{i}" for i in range(VOCABULARY - len(words))]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")

def make_source(folder: Path, layers: int, tied: bool) -> None:
    "Two files of finite bfloat16 numbers, one block of 64 MiB over and over, and an index; nothing is held but the block."
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=2560, intermediate_size=8960, num_hidden_layers=layers, num_attention_heads=20,
                         num_key_value_heads=20, max_position_embeddings=4096, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
                         dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder); tokenizer("source").save_pretrained(folder)
    stored = [(n, t.shape, 2*t.size) for n, t in layout(config.to_dict(), "LlamaForCausalLM").stored().items()]
    block = memoryview((torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))*0.02).bfloat16().view(torch.uint8).numpy())
    half, where = len(stored)//2, {}
    for i, part in enumerate((stored[:half], stored[half:])):
        name, head, at = f"model-{i+1:05}-of-00002.safetensors", {"__metadata__": {"format": "pt"}}, 0
        for n, shape, size in part:
            head[n] = dict(dtype="BF16", shape=list(shape), data_offsets=[at, at + size])
            where[n] = name; at += size
        text = json.dumps(head).encode(); text += b" "*(-len(text) % 8)
        with open(folder/name, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for left in range(at, 0, -len(block)): f.write(block[:left])
            os.fsync(f.fileno())
    index = {"metadata": {"total_size": sum(s for *_, s in stored)}, "weight_map": where}
    (folder/"model.safetensors.index.json").write_text(json.dumps(index))

def make_helper(folder: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer("helper").save_pretrained(folder)

def cached(files: list[Path]) -> float:
    "Share of the files' pages that lie in memory, by mincore(2)."
    libc, here, there = ctypes.CDLL(None, use_errno=True), 0, 0
    for path in files:
        size = path.stat().st_size; pages = -(-size//mmap.PAGESIZE); found = (ctypes.c_ubyte*pages)()
        with open(path, "r+b") as f, mmap.mmap(f.fileno(), size, access=mmap.ACCESS_COPY) as m:
            place = (ctypes.c_char*size).from_buffer(m)
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(size), found)
            if failed: raise OSError(ctypes.get_errno(), "mincore")
            del place
        here += sum(b & 1 for b in bytes(found)); there += pages
    return here/there

def child(source: str, helper: str, out: str) -> None:
    "What is watched: plan and write, timed apart."
    begun = time.perf_counter()
    sources = {"source": Checkpoint(source), "helper": Checkpoint(helper)}
    plan = clp(**sources)
    planned = time.perf_counter()
    write(plan, sources, out, load_tokenizer(helper))
    print(json.dumps({"plan_s": planned - begun, "write_s": time.perf_counter() - planned}))

def watched(*command: str | Path) -> dict[str, float]:
    "Seconds, and the peak of anonymous memory in GB, of a process that writes."
    process, peak = psutil.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True), 0
    while process.poll() is None:
        try: status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError: break
        peak = max(peak, *(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")), 0)
        time.sleep(0.05)
    text = process.communicate()[0]
    if process.returncode: raise SystemExit("the writing process failed")
    return json.loads(text.splitlines()[-1]) | {"peak_anon_GB": peak/1e9}

def copied(files: list[Path], out: Path) -> dict[str, float]:
    "Seconds that cp takes, until all is on disk."
    out.mkdir(); begun = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *files, out], check=True)
    subprocess.run(["sync", *sorted(out.iterdir()), out], check=True)
    return {"cp_s": time.perf_counter() - begun}

def writing(o: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory(dir=o.folder) as d:
        source, helper, out = Path(d)/"source", Path(d)/"helper", Path(d)/"out"
        source.mkdir(); make_source(source, o.layers, not o.untied); make_helper(helper)
        files = sorted(source.glob("*.safetensors")); size = sum(f.stat().st_size for f in files)
        for i in range(o.rounds):
            row = dict(round=i, GB=round(size/1e9, 3))
            for side in ("cp", "seqwarm") if i % 2 else ("seqwarm", "cp"):
                subprocess.run(["sync"], check=True)
                row[f"cached_{side}"] = cached(files)
                row |= copied(files, out) if side == "cp" else watched(__file__, "child", source, helper, out)
                if side == "seqwarm": row["GB_written"] = sum(f.stat().st_size for f in out.glob("*.safetensors"))/1e9
                shutil.rmtree(out)
            row |= dict(ratio=row["write_s"]/row["cp_s"], ratio_with_plan=(row["plan_s"] + row["write_s"])/row["cp_s"],
                        load=os.getloadavg()[0], cores=os.cpu_count(), tied=not o.untied)
            rows.append({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}); print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    print(f"ratio {table.ratio.median():.2f} (at most {table.ratio.max():.2f}), anonymous memory up to {table.peak_anon_GB.max():.2f} GB")
    if o.out: table.to_csv(o.out, mode="a", header=not Path(o.out).exists(), index=False)

def spaces(target: int, source: int, shared: int, d: int, D: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    "Tables of source and helper, float32, related by a noisy linear map; origin and anchors. Helper rows lean one way, as trained ones do."
    g = torch.Generator().manual_seed(0)
    H = torch.randn(target, d, generator=g) + 0.5*torch.randn(d, generator=g)
    S = torch.randn(source, D, generator=g)
    origin = torch.full((target,), -1); anchors = torch.randperm(target, generator=g)[:shared].sort().values
    origin[anchors] = torch.randperm(source, generator=g)[:shared]
    S[origin[anchors]] = H[anchors] @ torch.randn(d, D, generator=g)/d**0.5 + 0.3*S[origin[anchors]]
    return S, H, origin, anchors

def published(S: torch.Tensor, H: torch.Tensor, origin: torch.Tensor, anchors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    "In the manner of the paper's script: cosines of all tokens at once, then numpy's weighted average of the shared rows, token by token."
    A, unit = S[origin[anchors]].numpy(), torch.nn.functional.normalize(H[anchors], dim=1)
    rows = []
    for c in (torch.nn.functional.normalize(H[ids], dim=1) @ unit.T).numpy(): rows.append(np.average(A, axis=0, weights=c/c.sum()))
    return torch.tensor(np.stack(rows))

def products(S: torch.Tensor, H: torch.Tensor, origin: torch.Tensor, anchors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    "Token by token too, but by two products of a matrix and a vector, which is the fastest loop that we could think of."
    A, C = S[origin[anchors]].numpy(), H[anchors].numpy()
    length, rows = np.linalg.norm(C, axis=1), []
    for i in ids.tolist():
        h = H[i].numpy()
        c = C @ h/(length*np.linalg.norm(h))
        rows.append((c/c.sum()) @ A)
    return torch.tensor(np.stack(rows))

def dense(S: torch.Tensor, H: torch.Tensor, origin: torch.Tensor, anchors: torch.Tensor, ids: torch.Tensor,
          batch: int = 2048) -> torch.Tensor:
    "The same by matrix products of missing x shared, in batches."
    A, unit = S[origin[anchors]], torch.nn.functional.normalize(H[anchors], dim=1)
    rows = []
    for part in ids.split(batch):
        c = torch.nn.functional.normalize(H[part], dim=1) @ unit.T
        rows.append(c/c.sum(1, keepdim=True) @ A)
    return torch.cat(rows)

def rules(o: argparse.Namespace) -> None:
    S, H, origin, anchors = spaces(o.target, o.source, o.shared, o.helper_width, o.width)
    ids, some = torch.nonzero(origin == -1)[:, 0], torch.nonzero(origin == -1)[:, 0][:500]
    make = lambda op: OPS[op](*((S, H)), shape=(len(origin), S.shape[1]), origin=origin, anchors=anchors)
    exact = dense(S.double(), H.double(), origin, anchors, some)
    error = lambda x: float(((x.double() - exact).norm(dim=1)/exact.norm(dim=1)).max())
    sides = {"script": lambda: published(S, H, origin, anchors, some), "loop": lambda: products(S, H, origin, anchors, some),
             "dense": lambda: dense(S, H, origin, anchors, ids),
             **{op: (lambda op=op: make(op)) for op in ("embed.clp", "embed.guarded", "embed.lstsq", "embed.procrustes")}}
    rows = []
    for i in range(o.rounds):
        for name, f in list(sides.items())[::1 if i % 2 else -1]:
            begun = time.perf_counter(); x = f(); seconds = time.perf_counter() - begun
            new = x if name in ("script", "loop") else x[:500] if name == "dense" else x[some]
            same = name in ("script", "loop", "dense", "embed.clp")
            if name in ("script", "loop"): seconds *= len(ids)/len(some)
            rows.append(dict(round=i, side=name, seconds=seconds, error=error(new) if same else None))
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table = table.assign(**{f"{other}/this": table.merge(table[table.side == other], on="round", suffixes=("", "_other")).pipe(
        lambda t: t.seconds_other/t.seconds).to_numpy() for other in ("script", "loop", "dense")})
    table = table.groupby("side", sort=False).median(numeric_only=True).drop(columns="round").reset_index()
    table = table.assign(target=o.target, source=o.source, shared=o.shared, helper_width=o.helper_width, width=o.width, rounds=o.rounds,
                         threads=torch.get_num_threads(), torch=torch.__version__)
    print(table.to_string(index=False))
    if o.out: table.to_csv(o.out, index=False)

def main() -> None:
    if sys.argv[1:2] == ["child"]: return child(*sys.argv[2:])
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = a.add_subparsers(dest="part", required=True)
    r = parts.add_parser("rows"); r.set_defaults(run=rules)
    for name, n in dict(rounds=3, target=50_000, source=50_000, shared=12_000, helper_width=768, width=1600).items():
        r.add_argument("--" + name.replace("_", "-"), type=int, default=n)
    r.add_argument("--out", help="the table's file")
    w = parts.add_parser("write"); w.set_defaults(run=writing)
    w.add_argument("--rounds", type=int, default=3); w.add_argument("--layers", type=int, default=30)
    w.add_argument("--untied", action="store_true")
    w.add_argument("--folder", help="on the disk that is measured"); w.add_argument("--out", help="a table to which the rounds are added")
    o = a.parse_args(); o.run(o)

if __name__ == "__main__": main()

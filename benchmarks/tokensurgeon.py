"""Our warm starts beside those of mergekit-tokensurgeon on the same two models: time, peak memory, and loss after equal training.

    python -m venv MK && MK/bin/pip install mergekit          # in an environment of its own
    python benchmarks/tokensurgeon.py MK [--source S --helper H --text TEXT --valid TEXT --name NAME]
    python benchmarks/tokensurgeon.py MK --wide               # two wide models with random weights: time and memory only

S and H are folders of causal models; without them two small ones of the toy world are trained first. Each way of writing the new model
runs in a process of its own, the ways taking turns; memory is sampled a hundred times a second. Then every model is loaded by
transformers, looked over, and trained for the same steps on the same batches. The table keeps its lines of other models.
"""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging
from seqwarm.core.corpus import Corpus
from seqwarm.core.errors import Refusal
from seqwarm.core.record import environment
from seqwarm.core.overlap import overlap
from seqwarm.core.text import Text
from seqwarm.core.train import Stage, train
from seqwarm.core.vocab import load_tokenizer
from seqwarm.recipes.clp import existing, sized

THEIRS = ["omp", "omp -k 8", "omp -k 2", "common_interpolation -c -k 8", "landmark_pca", "subword"]   # omp is their default, at k=64
OURS = ["lstsq", "softmax", "guarded"]
WRITE = """
import sys
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.vocab import load_tokenizer
from seqwarm.core.write import write
from seqwarm.methods.clp import clp
source, helper, out, method, *options = sys.argv[1:]
sources = dict(source=Checkpoint(source), helper=Checkpoint(helper))
write(clp(**sources, method=method, **{k: float(v) if "." in v else int(v) for k, v in (o.split("=") for o in options)}),
      sources, out, load_tokenizer(sources["helper"].path))
"""

def command(side: str, method: str, mergekit: Path, source: Path, helper: Path, out: Path, threads: int) -> list[str]:
    name, *options = method.split()
    if side == "seqwarm": return [sys.executable, "-c", WRITE, *map(str, (source, helper, out)), name, *options]
    return [str(mergekit/"bin"/"mergekit-tokensurgeon"), *map(str, (source, helper, out)), "-a", name, *options,
            "--quiet", "-j", str(threads)]

def watched(words: list[str], threads: int) -> dict[str, float | str]:
    "Seconds of a command, and its peak of resident and of anonymous memory in GB; or the last line of what it said when it failed."
    peak = {"VmHWM": 0, "RssAnon": 0}
    with tempfile.TemporaryFile("w+") as said:
        begun = time.perf_counter()
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or words[0] == sys.executable}   # the other side's is its own
        env |= {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        child = subprocess.Popen(words, stdout=said, stderr=said, env=env)
        while child.poll() is None:
            try: lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            except OSError: lines = []
            for key, _, value in (line.partition(":") for line in lines):
                if key in peak: peak[key] = max(peak[key], int(value.split()[0]))
            time.sleep(0.01)
        seconds = time.perf_counter() - begun
        if child.returncode: said.seek(0); return {"failed": (said.read().strip().splitlines() or ["no word"])[-1][:100]}
    return {"seconds": seconds, "peak_GB": peak["VmHWM"] * 1024 / 1e9, "peak_anonymous_GB": peak["RssAnon"] * 1024 / 1e9}

def raced(ways: list[tuple[str, str]], folder: Path, rounds: int, threads: int, *where: Path) -> pd.DataFrame:
    "Every way of writing the model, in turns, there and back; medians of time, maxima of memory. The models of the first round stay."
    rows = []
    for i in range(rounds):
        for side, method in ways if i % 2 == 0 else ways[::-1]:
            with tempfile.TemporaryDirectory(dir=folder) as d:
                out = Path(d)/"out"
                rows.append(dict(side=side, method=method) | watched(command(side, method, *where, out, threads), threads))
                if i == 0 and out.exists(): out.rename(place(folder, side, method))
            print(*rows[-1].values(), flush=True)
    by = pd.DataFrame(rows).reindex(columns=["side", "method", "seconds", "peak_GB", "peak_anonymous_GB", "failed"])
    how = {"seconds": "median", "peak_GB": "max", "peak_anonymous_GB": "max", "failed": "first"}
    return by.groupby(["side", "method"], sort=False).agg(how)

def place(folder: Path, side: str, method: str) -> Path: return folder/f"{side} {method}".replace(" ", "_").replace("/", "_")

def startup(mergekit: Path, threads: int) -> dict[str, float]:
    "Seconds that each side needs before it does anything: the interpreter and its imports."
    ours = WRITE.split("source, helper")[0]
    sides = {"mergekit": [str(mergekit/"bin"/"mergekit-tokensurgeon"), "--help"], "seqwarm": [sys.executable, "-c", ours]}
    return {side: float(np.median([watched(words, threads)["seconds"] for _ in range(3)])) for side, words in sides.items()}

def faults(path: Path, source: Path, tokenizer) -> str:
    "What is wrong with a written model, in a few words; empty if nothing is."
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    old, both, found = AutoModelForCausalLM.from_pretrained(source), overlap(load_tokenizer(source), tokenizer), []
    E, S = (m.get_input_embeddings().weight for m in (model, old))
    if info["missing_keys"] or info["unexpected_keys"]: found.append("keys")
    if len(E) < len(tokenizer) or model.config.vocab_size != len(E): found.append("rows")
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab(): found.append("tokenizer")
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()): found.append("not finite")
    if not torch.equal(E[both.shared_target], S[both.shared_source]): found.append("shared rows")
    heads = {id(m.get_output_embeddings().weight) for m in (model, old)} | {id(E)}
    if not all(torch.equal(p, old.get_parameter(n)) for n, p in model.named_parameters() if id(p) not in heads): found.append("body")
    if (model.get_output_embeddings().weight is E) != (old.get_output_embeddings().weight is S): found.append("tying")
    ids = [f"{role}_token_id" for role in ("bos", "eos", "pad")]
    if any(getattr(model.config, i) != getattr(tokenizer, i) for i in ids): found.append("ids")
    if not (path/"generation_config.json").exists() and (source/"generation_config.json").exists(): found.append("no generation_config")
    return ", ".join(found)

def trained(path: Path, tokenizer, text: str, valid: str | None, o: argparse.Namespace) -> dict[str, float]:
    "First and last validation loss of a model in nats a token."
    model = AutoModelForCausalLM.from_pretrained(path)
    length = min(o.length, getattr(model.config, "max_position_embeddings", o.length))
    train_on, valid_on = Corpus(text, tokenizer, length), Corpus(valid or text, tokenizer, length, "all" if valid else "valid")
    loss = train(model, tokenizer, train_on, valid_on, [Stage(o.steps, o.lr)], o.store, path.name, "tokensurgeon",
                 batch=o.batch, seed=o.seed, every=o.steps, sequences=min(48, len(valid_on))).history.loss
    return {"first_loss": loss.iloc[0], "last_loss": loss.iloc[-1]}

def toys(store: Path, seed: int) -> tuple[Path, Path, str]:
    "Two small trained models of the toy world, and the corpus of the second one's language."
    texts = dict(source_text="world:a", target_text="world:b", source_valid=None, target_valid=None, match="exact", wake=0)
    p = sized("demo", seeds=[seed], heads=4, **texts)
    both = existing(p, store, *(Text(spec, None, p.length, p.vocab) for spec in (p.source_text, p.target_text)), seed, {})
    return both["source"].path, both["helper"].path, p.target_text

def wide(folder: Path, rows: int, shared: int, source: int, helper: int, layers: int) -> tuple[Path, Path]:
    "Two models with random weights and vocabularies of `rows` words, of which some are shared."
    specials = {f"{r}_token": f"<{r}>" for r in ("bos", "eos", "pad", "unk")}
    for name, first, width, n in (("source", 0, source, layers), ("helper", rows - shared, helper, 2)):
        words = [*specials.values(), *(f"w{first + i}" for i in range(rows - len(specials)))]
        core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **specials)
        ids = {f"{r}_token_id": getattr(tokenizer, f"{r}_token_id") for r in ("bos", "eos", "pad")}
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=rows, n_positions=128, n_embd=width, n_layer=n, n_head=width//64, **ids)
        GPT2LMHeadModel(config).save_pretrained(folder/name)
        tokenizer.save_pretrained(folder/name)
    return folder/"source", folder/"helper"

def measured(folder: Path, source: Path, helper: Path, text: str | None, o: argparse.Namespace) -> pd.DataFrame:
    "Race all ways on one pair of models and look what they wrote over; train it, if there is a text."
    ways = [("mergekit", m) for m in o.theirs] + [("seqwarm", m) for m in o.ours]
    table, tokenizer = raced(ways, folder, o.rounds, o.threads, o.mergekit, source, helper), load_tokenizer(helper)
    for way in ways:
        if not (path := place(folder, *way)).exists(): continue
        table.loc[way, "faults"] = faults(path, source, tokenizer)
        if not (text and o.steps): continue
        try: found = trained(path, tokenizer, text, o.valid, o)
        except Refusal as e: table.loc[way, "failed"] = str(e)[:100]; continue
        for key, value in found.items(): table.loc[way, key] = value
    return table.reset_index()

def options() -> argparse.Namespace:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("mergekit", type=Path, help="environment in which mergekit is installed")
    a.add_argument("--source", type=Path); a.add_argument("--helper", type=Path); a.add_argument("--text"); a.add_argument("--valid")
    a.add_argument("--name", help="of the pair of models, in the table"); a.add_argument("--wide", action="store_true")
    a.add_argument("--theirs", nargs="*", default=THEIRS); a.add_argument("--ours", nargs="*", default=OURS)
    for name, value in [("rounds", 3), ("steps", 250), ("batch", 16), ("length", 128), ("seed", 0), ("threads", 1)]:
        a.add_argument(f"--{name}", type=int, default=value)
    a.add_argument("--lr", type=float, default=4e-3); a.add_argument("--store", type=Path, help="folder of trainings, kept")
    a.add_argument("--out", type=Path, default=Path("results/tokensurgeon.csv")); o = a.parse_args()
    if not o.wide and len({x is None for x in (o.source, o.helper, o.text)}) > 1: a.error("--source, --helper and --text belong together")
    o.name = o.name or ("wide, random weights" if o.wide else "given" if o.source else "toy world")
    return o

def main() -> None:
    o = options()
    torch.set_num_threads(o.threads); hf_logging.set_verbosity_error(); hf_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as d:
        folder, o.store = Path(d), o.store or Path(d)/"store"
        if o.wide: models = *wide(folder, 16_000, 6_000, 768, 256, 12), None
        else: models = (o.source, o.helper, o.text) if o.source else toys(o.store, o.seed)
        table, begins = measured(folder, *models, o), startup(o.mergekit, o.threads)
    made, code = environment(), "from importlib.metadata import version; print(version('mergekit'))"
    version = subprocess.run([o.mergekit/"bin"/"python", "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    table = table.assign(models=o.name, startup_s=table.side.map(begins), rounds=o.rounds, steps=None if o.wide else o.steps,
                         threads=o.threads, mergekit=version, torch=made["torch"], device=made["device"])
    shown = ["models", "side", "method", "seconds", "startup_s", "peak_GB", "peak_anonymous_GB", "first_loss", "last_loss"]
    shown += ["faults", "failed"]
    table = table.reindex(columns=[*shown, "rounds", "steps", "threads", "mergekit", "torch", "device"]).round(4)
    if o.out.exists() and len(old := (old := pd.read_csv(o.out))[old.models != o.name]): table = pd.concat([old, table])
    o.out.parent.mkdir(parents=True, exist_ok=True); table.to_csv(o.out, index=False)
    print(table[shown].to_string(index=False))

if __name__ == "__main__": main()

"""One GPU in one command: its own ceilings, then tokens a second, memory and share of the ceiling, of every kind of training that there is.

    python benchmarks/gpu.py [--budget 480] [--only PART ...] [--sizes base large] [--out results/gpu.csv]

Parts stand in the order of their importance; each begins only while the seconds of the budget last, and says so where they do not. Every
row is written as soon as it is measured. Nothing is assumed but torch, transformers, accelerate and what this package needs. Without a GPU
it runs on a CPU at tiny sizes, to try itself, and writes gpu-cpu.csv.

    ceilings     the best product of two square bfloat16 matrices, a copy on the device, copies to it: what the rest is a share of
    race         a causal language model: the bare loop, `train`, Trainer, `train` with the loss in parts, and with layers twice
    kinds        masked LM (head at the masked places), seq2seq in full, with a frozen encoder, with its kept outputs, METRO joint and
                 with a frozen auxiliary
    large        the race at about a billion parameters
    loss         the loss of a large vocabulary alone: plain, in parts, torch's own in parts
    attention    packed documents kept apart by a mask, beside attention that keeps nothing apart, beside torch's varlen kernel
    clp          250,000 x 4,096 rows by CLP on the card, its products in TF32
    growth       a Llama of 7 billion parameters out of one of half the width, row by row on the card
    compiled     the race, compiled
    large kinds  the same kinds at about a billion parameters

Sides of a race hold a model each and take turns in blocks of steps in one process, each in a thread of its own: a side's loop is the real
one, stopped between two steps. A step's FLOPs are the ledger's; a layer that is computed twice counts once. Bare loop and Trainer are
given ready-made batches, which favours them. Peak memory is what torch has allocated at most while a side had its turn, less what the
others hold; what a side holds between its turns is its weights and moments. The first turn holds warm-up and compiling (`first_s`). On a
CPU there is no measure of memory: see benchmarks/step_memory.py.
"""
import argparse, gc, importlib.metadata, importlib.util, os, shutil, subprocess, tempfile, threading, time, traceback
from collections.abc import Callable
from pathlib import Path
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models
from transformers import (BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments)
from transformers.utils import logging as hf_logging
from seqwarm.core.corpus import Corpus, Tokens
from seqwarm.core.feed import Feed
from seqwarm.core.layout import layout
from seqwarm.core.losses import _accelerator, several
from seqwarm.core.masked import Masked
from seqwarm.core.memory import linear_nll
from seqwarm.core.objectives import Draws, causal
from seqwarm.core.stages import Stage
from seqwarm.core.train import _Loop, costs, train
from seqwarm.methods.metro import pair

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
#        layers, width, vocabulary, tokens of a row, rows a step
SIZES = {"tiny": (2, 64, 1000, 32, 4), "small": (2, 128, 1000, 64, 4),                     # for a CPU
         "base": (12, 768, 32_000, 512, 64), "large": (18, 2048, 32_000, 512, 32)}
WARM, BLOCK, ROUNDS = (12, 10, 3) if GPU else (12, 3, 2)    # train looks at its losses every ten steps, as often as a block ends
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]

# ---- what is trained, and on what

def words(vocab: int) -> PreTrainedTokenizerFast:
    "A tokenizer of so many words."
    known = {t: i for i, t in enumerate([*SPECIAL, *(f"w{i}" for i in range(vocab - len(SPECIAL)))])}
    roles = dict(zip(("pad", "bos", "eos", "unk", "mask"), SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(known, "<unk>")),
                                   **{f"{r}_token": t for r, t in roles.items()})

def noise(vocab: int, length: int, rows: int = 4096) -> Corpus:
    "Documents of 32 to 700 random words, packed: for speed their meaning is all one."
    rng, lengths = np.random.default_rng(0), []
    while sum(lengths) < rows * length: lengths.append(int(rng.integers(32, 700)))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    ids = rng.integers(len(SPECIAL), vocab, sum(lengths), dtype=np.uint16)
    ids[starts] = 1; ids[starts[1:] - 1] = 2
    made = object.__new__(Corpus)
    made.spec, made.length, made.seed, made.parts = "noise", length, 0, [Tokens(ids, starts, len(ids), "0" * 32)]
    made.sizes = made.counts = np.array([rows]); made._epochs = {}
    return made

def decoder(size: tuple[int, ...]) -> LlamaForCausalLM:
    L, D, V, S, _ = size
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=-(-D * 8 // 3 // 128) * 128, num_hidden_layers=L, max_position_embeddings=S,
        num_attention_heads=max(1, D // (128 if D > 1024 else 64)), tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0))

def encoder(size: tuple[int, ...], layers: int | None = None) -> BertForMaskedLM:
    L, D, V, S, _ = size
    return BertForMaskedLM(BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=layers or L, num_attention_heads=max(1, D // 64), intermediate_size=4*D,
        max_position_embeddings=S + 8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0))

def both(size: tuple[int, ...]) -> BartForConditionalGeneration:
    "As many layers in each stack as the base model has; eight at a billion."
    L, D, V, S, _ = size
    L = L if D < 1024 else 8
    return BartForConditionalGeneration(BartConfig(
        vocab_size=V, d_model=D, encoder_layers=L, decoder_layers=L, encoder_ffn_dim=4*D, decoder_ffn_dim=4*D, max_position_embeddings=2*S,
        encoder_attention_heads=max(1, D // 64), decoder_attention_heads=max(1, D // 64), dropout=0.0, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None))

def kinds(size: tuple[int, ...]) -> dict[str, Callable]:
    "Kind -> what makes the module and its stage."
    many, sleeping = dict(steps=1_000_000, lr=1e-4), ("encoder/", "embed.token")
    def metro(frozen: bool):
        made = pair(encoder(size), auxiliary=encoder(size, max(1, size[0] // 3)) if frozen else None)
        return made, Stage(objective="metro", frozen=made.idle, **many)
    rewrite = lambda **how: lambda: (both(size), Stage(objective="denoise", **many, **how))
    return {"causal": lambda: (decoder(size), Stage(**many)), "mlm": lambda: (Masked(encoder(size)), Stage(objective="mlm", **many)),
            "seq2seq": rewrite(), "seq2seq frozen": rewrite(frozen=sleeping),
            "seq2seq kept": rewrite(frozen=sleeping, repeat=4, keep="float16"),
            "metro joint": lambda: metro(False), "metro frozen": lambda: metro(True)}

# ---- turns

HERE = threading.local()

class Ended(BaseException): pass

def sync() -> None: GPU and torch.cuda.synchronize()
def held() -> int: return torch.cuda.memory_allocated() if GPU else 0
def tidy() -> None: gc.collect(); GPU and torch.cuda.empty_cache()

class Side(threading.Thread):
    "A loop that is let go for a block of steps at a time."
    def __init__(self, name: str, work: Callable[[], None]):
        super().__init__(daemon=True)
        self.title, self.work, self.n, self.quit, self.error, self.own = name, work, 0, False, None, 0
        self.go, self.there, self.turns, self.peaks, self.first = threading.Event(), threading.Event(), [], [], 0.0
    def run(self) -> None:
        HERE.side = self
        try: self.work()
        except Ended: pass
        except BaseException as e: self.error = e; traceback.clear_frames(e.__traceback__)
        self.work = None; self.there.set()
    def stepped(self) -> None:
        self.n += 1
        if self.n < WARM or (self.n - WARM) % BLOCK: return
        sync(); self.there.set(); self.go.wait(); self.go.clear()
        if self.quit: raise Ended
    def turn(self, limit: float) -> None:
        "A block of steps, timed; the first is the warm-up."
        first, before = not self.is_alive(), held()
        if GPU: torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        self.start() if first else self.go.set()
        if not self.there.wait(limit): raise TimeoutError(f"{self.title} took more than {limit:.0f} s")
        self.there.clear(); spent = time.perf_counter() - begun
        if self.error: raise self.error
        if first: self.first, self.own = spent, held() - before; return
        self.turns.append(spent / BLOCK)
        if GPU: self.peaks.append(torch.cuda.max_memory_allocated() - (before - self.own))
    def end(self) -> None:
        if self.is_alive(): self.quit = True; self.go.set(); self.join(60)

def stepped() -> None:
    if side := getattr(HERE, "side", None): side.stepped()

usual = _Loop.update
def _update(self, *args):
    out = usual(self, *args); stepped(); return out

class Pause(TrainerCallback):
    def on_step_end(self, *_, **__): stepped()

# ---- the sides

def ours(make: Callable, size: tuple[int, ...], data: tuple, **options) -> None:
    torch.manual_seed(0); model, stage = make()
    with tempfile.TemporaryDirectory() as d:
        train(model, *data, data[1], [stage], d, batch=size[4], every=1_000_000, save_every=1_000_000, sequences=1, **options)

def ready(size: tuple[int, ...], data: tuple, config, n: int = 8) -> list[dict[str, torch.Tensor]]:
    "Batches of the causal objective, made beforehand."
    tokenizer, corpus = data
    packed = [corpus.sample(np.arange(i * size[4], (i + 1) * size[4])) for i in range(n)]
    return [causal(p, Draws(0, i, p.samples), config, tokenizer) for i, p in enumerate(packed)]

def bare(make: Callable, size: tuple[int, ...], data: tuple, compile: bool = False) -> None:
    "The shortest loop that does the same."
    torch.manual_seed(0); model, _ = make(); model.to(DEVICE).train()
    batches = [{k: v.to(DEVICE) for k, v in b.items()} for b in ready(size, data, model.config)]
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=True)
    call = torch.compile(model) if compile else model
    def nll(batch):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            found = call(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
            return F.cross_entropy(found.flatten(0, 1), batch["labels"].flatten())
    i = 0
    while True:
        nll(batches[i := (i + 1) % len(batches)]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step(); adamw.zero_grad(set_to_none=True); stepped()

def trainer(make: Callable, size: tuple[int, ...], data: tuple, compile: bool = False) -> None:
    "Hugging Face's, on the same batches, each a sample of its data set."
    torch.manual_seed(0); model, _ = make(); model.config.use_cache = False
    batches = ready(size, data, model.config)
    for b in batches: b["labels"] = torch.cat([torch.full_like(b["labels"][:, :1], -100), b["labels"][:, :-1]], 1)    # it shifts by itself
    class Again(torch.utils.data.Dataset):
        def __len__(self): return 1_000_000
        def __getitem__(self, i): return batches[i % len(batches)]
    with tempfile.TemporaryDirectory() as d:
        args = TrainingArguments(d, per_device_train_batch_size=1, max_steps=1_000_000, learning_rate=1e-4, optim="adamw_torch_fused",
                                 max_grad_norm=1.0, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
                                 remove_unused_columns=False, bf16=GPU, torch_compile=compile, use_cpu=not GPU)
        Trainer(model, args, train_dataset=Again(), data_collator=lambda rows: rows[0], callbacks=[Pause()]).train()

# ---- the table

def about() -> dict:
    "The device, and the versions of all that matters to its speed."
    told = lambda p: importlib.metadata.version(p) if importlib.util.find_spec(p) else None
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return dict(device=torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads", cuda=torch.version.cuda,
                driver=subprocess.run(ask, capture_output=True, text=True).stdout.strip() if GPU and shutil.which(ask[0]) else None,
                **{p: told(p) for p in ("torch", "transformers", "accelerate", "triton")})

class Table:
    "Rows that are on disk as soon as they are known."
    def __init__(self, out: str, budget: float):
        self.out, self.rows, self.end, self.ceiling, self.about = Path(out), [], time.perf_counter() + budget, None, about()
        self.out.parent.mkdir(exist_ok=True)
    def left(self) -> float: return self.end - time.perf_counter()
    def add(self, part: str, what: str, **row) -> None:
        row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
        self.rows.append(dict(part=part, what=what, **row, **self.about))
        columns = list(dict.fromkeys(k for r in self.rows for k in r if k not in self.about)) + list(self.about)
        pd.DataFrame(self.rows, columns=columns).to_csv(self.out, index=False)
        print(f"[{self.left():.0f} s left] {part}: {what}", {k: v for k, v in row.items() if v is not None}, flush=True)
    def measure(self, part: str, what: str, f: Callable, n: int = 5, **rates: float) -> float:
        "A row with the median of seconds, the bytes at most above what there was, and rates: so much in that time. Errors are told."
        try: t, peak = timed(f, n)
        except Exception as e: self.add(part, what, note=f"{type(e).__name__}: {str(e)[:200]}"); return float("nan")
        self.add(part, what, step_s=t, **{k: v / t for k, v in rates.items()}, peak_GB=peak)
        return t

def timed(f: Callable, n: int = 5) -> tuple[float, float | None]:
    "Median of seconds, and the GB at most above what there was."
    f(); sync(); seconds, before = [], held()
    if GPU: torch.cuda.reset_peak_memory_stats()
    for _ in range(n): begun = time.perf_counter(); f(); sync(); seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds)), (torch.cuda.max_memory_allocated() - before) / 1e9 if GPU else None

def race(table: Table, part: str, name: str, makes: dict[str, Callable], size: str, make: Callable, base: str | None = None) -> None:
    "Sides in turn; a row each."
    *_, S, B = SIZES[size]
    with torch.device("meta"): model, stage = make()
    lay = model.layout if several(model) else layout(model.config, type(model).__name__)
    flops, parameters = costs(lay, stage, S, B)[0].flops, sum(t.size for t in lay.stored().values())
    del model; sides = []
    def fail(side: Side, e: Exception) -> None:
        side.end(); table.add(part, f"{name}: {side.title}", size=size, note=f"{type(e).__name__}: {str(e)[:200]}"); tidy()
    AcceleratorState._reset_state(reset_partial_state=True)     # the last race's Trainer leaves its precision there, and that it compiles
    try:
        for title, work in makes.items():
            side = Side(title, work)
            try: side.turn(max(60.0, table.left()))
            except Exception as e: fail(side, e)
            else: sides.append(side)
        for i in range(ROUNDS):
            for side in [*sides] if i % 2 else sides[::-1]:
                try: side.turn(max(60.0, table.left()))
                except Exception as e: sides.remove(side); fail(side, e)
        speed = {s.title: np.array([B * S / t for t in s.turns]) for s in sides}
        for s in sides:
            t, over = float(np.median(s.turns)), float(np.median(speed[s.title] / speed[base])) if base in speed else None
            peak, own = (max(s.peaks) / 1e9, s.own / 1e9) if GPU else (None, None)
            table.add(part, f"{name}: {s.title}", size=size, parameters=parameters, rows=B, tokens=S, step_s=t, tokens_per_second=B * S / t,
                      step_flops=float(flops), tflops=flops / t / 1e12, over_bare=over,
                      share_of_ceiling=flops / t / table.ceiling if table.ceiling else None, peak_GB=peak, held_GB=own, first_s=s.first)
    finally:
        for s in sides: s.end()
        sides.clear(); tidy(); torch._dynamo.reset()

# ---- the parts

def matrices(table: Table, n: int) -> float:
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in "ab")
    return 2 * n**3 / table.measure("ceilings", f"bfloat16 matrices of {n}", lambda: a @ b, 20 if GPU else 3, tflops=2 * n**3 / 1e12)

def fetch(table: Table, x: torch.Tensor, kind: str) -> None:
    z = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=kind == "pinned")
    table.measure("ceilings", f"copy to the device, {kind}", lambda: x[:len(z)].copy_(z, non_blocking=True), GB_per_second=len(z) / 1e9)

def ceilings(table: Table, sizes: list[str]) -> None:
    table.ceiling = max(matrices(table, n) for n in ((4096, 8192, 16384) if GPU else (512,)))
    x = torch.empty(1 << (32 if GPU else 24), dtype=torch.uint8, device=DEVICE); y = torch.empty_like(x)
    table.measure("ceilings", "copy on the device", lambda: y.copy_(x), GB_per_second=2 * len(x) / 1e9)
    for kind in ("pinned", "pageable") if GPU else (): fetch(table, x, kind)

def data_of(size: str) -> tuple: return words(SIZES[size][2]), noise(*SIZES[size][2:4])

LOOPS = {"bare": bare, "train": ours, "Trainer": trainer}
EAGER = {"bare": {}, "train": {}, "Trainer": {}, "train, loss in parts": dict(chunked=True),
         "train, loss in parts, layers twice": dict(chunked=True, checkpointing=True)}
COMPILED = {f"{k}, compiled": EAGER[k] | dict(compile=True) for k in ("bare", "train", "train, loss in parts", "Trainer")}
LARGE = {k: EAGER[k] for k in ("bare", "train", "Trainer", "train, loss in parts")} | {
    k: COMPILED[k] for k in ("train, loss in parts, compiled",)}

def causal_race(table: Table, size: str, part: str, which: dict[str, dict]) -> None:
    data, make = data_of(size), kinds(SIZES[size])["causal"]
    side = lambda name, how: lambda: LOOPS[name.split(",")[0]](make, SIZES[size], data, **how)
    race(table, part, "causal", {name: side(name, how) for name, how in which.items()}, size, make, next(iter(which)))

def first_race(table: Table, sizes: list[str]) -> None: causal_race(table, sizes[0], "race", EAGER)
def compiled_race(table: Table, sizes: list[str]) -> None: causal_race(table, sizes[0], "compiled", COMPILED)
def large_race(table: Table, sizes: list[str]) -> None: causal_race(table, sizes[1], "large", LARGE)

def kind_of(table: Table, part: str, name: str, size: str, make: Callable, data: tuple) -> None:
    "A kind of training alone, and what the host takes to make its batch, which is to be less."
    with torch.device("meta"): model, stage = make()
    feed = Feed(stage, 0, data[1], data[0], model.config, _accelerator(), SIZES[size][4], 1, 0)
    table.measure(part, f"{name}: making a batch, on the host", lambda: feed._made(0), 3)
    race(table, part, name, {"train": lambda: ours(make, SIZES[size], data)}, size, make)

def all_kinds(table: Table, size: str, part: str, need: float) -> None:
    data = data_of(size)
    for name, make in kinds(SIZES[size]).items():
        if name == "causal": continue
        if table.left() < need: table.add(part, name, size=size, note="skipped: the budget is spent")
        else: kind_of(table, part, name, size, make, data)

def base_kinds(table: Table, sizes: list[str]) -> None: all_kinds(table, sizes[0], "kinds", 20 * GPU)
def large_kinds(table: Table, sizes: list[str]) -> None: all_kinds(table, sizes[1], "large kinds", 30 * GPU)

def one_loss(table: Table, N: int, D: int, V: int) -> None:
    x, w = torch.randn(N, D, device=DEVICE, requires_grad=True), (torch.randn(V, D, device=DEVICE) * 0.02).requires_grad_()
    y = torch.randint(V, (N,), device=DEVICE)
    sides = {"plain": lambda: F.cross_entropy((x @ w.T).float(), y, reduction="sum"), "in parts": lambda: linear_nll(x, w, y)}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        sides["torch's in parts"] = lambda: F.linear_cross_entropy(x, w, y, reduction="sum", options=options)
    def step(f: Callable) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU): out = f()
        out.backward(); x.grad = w.grad = None
    for name, f in sides.items():
        table.measure("loss", f"{name}, {N} x {D}, {V} words", lambda f=f: step(f), tflops=6 * N * D * V / 1e12)

def loss(table: Table, sizes: list[str]) -> None:
    for shape in ((32_768, 768, 32_000), (16_384, 2048, 128_000)) if GPU else ((2048, 64, 4000),): one_loss(table, *shape)

def one_attention(table: Table, B: int, H: int, S: int, d: int) -> None:
    q, k, v = (torch.randn(B, H, S, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv")
    at = (torch.arange(S, device=DEVICE) // max(1, S // 4)).expand(B, S)                  # four documents a row
    mask = (at[:, None, :, None] == at[:, None, None, :]).tril()
    sides = {"mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
             "causal, nothing apart": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
    if GPU:
        from torch.nn.attention.varlen import varlen_attn
        flat = lambda t: t.transpose(1, 2).reshape(B * S, H, d)
        ends = torch.arange(0, B * S + 1, S // 4, device=DEVICE, dtype=torch.int32)
        sides["varlen"] = lambda: varlen_attn(flat(q), flat(k), flat(v), ends, ends, S // 4, S // 4, window_size=(-1, 0))
    for name, f in sides.items(): table.measure("attention", f"{name}, {B} x {H} x {S} x {d}", lambda f=f: f().sum().backward())

def attention(table: Table, sizes: list[str]) -> None:
    for shape in ((64, 12, 512, 64), (16, 16, 2048, 128)) if GPU else ((2, 2, 64, 16),): one_attention(table, *shape)

def clp(table: Table, sizes: list[str]) -> None:
    from seqwarm.core.plan import OPS
    from seqwarm.methods import embed
    embed.finite = lambda x: bool(torch.isfinite(x).all())         # theirs reads the CPU's memory
    V, D, d, shared = (250_000, 4096, 1024, 60_000) if GPU else (2000, 64, 16, 500)
    with torch.device(DEVICE):
        S, H = torch.randn(V, D), torch.randn(V, d) + 0.5
        origin = torch.full((V,), -1); anchors = torch.arange(0, V, V // shared)[:shared]; origin[anchors] = anchors
        for op in ("embed.clp", "embed.guarded"):
            table.measure("clp", f"{op}, {V} x {D} rows from {len(anchors)} shared",
                          lambda op=op: OPS[op](S, H, shape=(V, D), origin=origin, anchors=anchors), 3, GB_per_second=4 * V * D / 1e9)

class OnCard:
    "A checkpoint whose tensors come from memory to the card."
    def __init__(self, source): self.tensors = {n: source.read(n) for n in source.names}
    def read(self, name: str) -> torch.Tensor: return self.tensors[name].to(DEVICE, non_blocking=True)

def growth(table: Table, sizes: list[str]) -> None:
    from growth import make_source
    from seqwarm.core.checkpoint import Checkpoint
    from seqwarm.methods.width import width
    D, L = (2048, 32) if GPU else (64, 2)
    with tempfile.TemporaryDirectory() as d:
        make_source(Path(d), D, L)
        small = Checkpoint(d); plan = width(small, "fpi", hidden=2 * D); source = {"source": OnCard(small)}
    factors = {key for r in plan.rows for option, key in r.arrays.items() if option.startswith("by")}     # maps stay where numpy reads them
    plan.arrays.update({key: plan.arrays[key].to(DEVICE) for key in factors})
    def run() -> list[torch.Tensor]:
        with torch.device(DEVICE): return [x for _, x in plan.apply(source)]
    numbers = sum(plan.layout.tensors[r.target].size for r in plan.rows)
    table.measure("growth", f"Llama, {L} layers, width {D} to {2 * D}: {numbers:,} parameters", run, 2, GB_per_second=2 * numbers / 1e9)

#        part: what does it, seconds that it wants at least on an H200 (a guess, not a measurement)
PARTS = {"ceilings": (ceilings, 5), "race": (first_race, 40), "kinds": (base_kinds, 20), "large": (large_race, 90), "loss": (loss, 5),
         "attention": (attention, 5), "clp": (clp, 15), "growth": (growth, 30), "compiled": (compiled_race, 120),
         "large kinds": (large_kinds, 30)}

def main() -> None:
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--budget", type=float, default=480, help="seconds")
    a.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    a.add_argument("--sizes", nargs=2, choices=SIZES, default=["base", "large"] if GPU else ["tiny", "small"])
    a.add_argument("--out", default="results/gpu.csv" if GPU else "gpu-cpu.csv"); o = a.parse_args()
    hf_logging.set_verbosity_error(); hf_logging.disable_progress_bar(); torch.set_float32_matmul_precision("high")
    _Loop.update = _update
    table = Table(o.out, o.budget)
    for part in o.only:
        do, need = PARTS[part]
        if table.left() < need * GPU:
            table.add(part, part, note=f"skipped: {max(0, table.left()):.0f} s of the budget left, {need} wanted"); continue
        try: do(table, o.sizes)
        except Exception as e: traceback.print_exc(); table.add(part, part, note=f"{type(e).__name__}: {str(e)[:200]}")
        tidy()
    os._exit(0)     # a side that hangs shall not keep the others' rows

if __name__ == "__main__": main()

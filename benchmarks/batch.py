"""What the machinery costs: `seqwarm run` beside the same cells in a plain process, states beside steps, resuming at step 100,000.

    python benchmarks/batch.py [--rounds 5] [--only run states resume] [--out results/batch.csv]

The sides of a comparison take turns, so that a noisy machine disturbs all alike. Beside the seconds on the wall stand those of the
processors (of a process and all that it started), which a loaded machine stretches less; `load` is how many processes wanted a core
meanwhile, `disk` what a plain write and fsync of 64 MB took in the same minute.

run      a recipe that imports what recipes import, keeps a record and computes nothing, by `seqwarm run`; and its cells one after
         another in a plain Python.
states   trainings with a state every few steps; what a state took, and a step, so what a state in 500 steps adds.
resume   a process that opens a corpus and calls `train` on a training that stands at step 100,000. That state is written by `train`
         itself at step 3, and then its number and book are changed; the tensors in it are those of step 3, of the size that they
         would have at step 100,000.
"""
import argparse, json, os, resource, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import nbformat
import pandas as pd

ROUNDS = 5

def disk(folder: str) -> float:
    "Seconds that 64 MB take to the disk of a folder."
    begun = time.perf_counter()
    with open(Path(folder)/"probe", "wb") as f: f.write(os.urandom(1 << 26)); f.flush(); os.fsync(f.fileno())
    return time.perf_counter() - begun

def timed(command: list, cwd: str, **env: str) -> tuple[float, float]:
    "Seconds on the wall and of the processors that a command took, with all that it started."
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    got = subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    if got.returncode: sys.exit(got.stdout + got.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

def row(what: str, wall: list[float], cpu: list[float], **more) -> dict:
    median = statistics.median
    return dict(what=what, wall=round(median(wall), 3), lowest=round(min(wall), 3), highest=round(max(wall), 3),
                cpu=round(median(cpu), 3), rounds=len(wall), load=round(os.getloadavg()[0], 1), **more)

# a run

PARAMETERS = 'scale: str = "smoke"   # smoke | demo | full\nname: str = "bare"   # folder\nruns: str = "runs"   # where'
CELLS = ["import json\nfrom pathlib import Path\nimport pandas as pd, plotly.graph_objects as go, torch, transformers",
         "from seqwarm.core.record import Run, close\nfrom seqwarm.core.train import Stage, train\nfrom seqwarm.methods.grow import grow",
         "run = Run('bare', dict(scale=scale, name=name, runs=runs), name, runs)", *(f"print('cell {i}')" for i in range(20)),
         "close(run, ['done'], pd.DataFrame(dict(step=[1])), pd.DataFrame(dict(arm=['a'])), {})"]

def notebook(path: Path) -> None:
    "A recipe that imports what recipes import, keeps a record, and computes nothing."
    cells = [nbformat.v4.new_code_cell(c) for c in (PARAMETERS, *CELLS)]; cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)

def runs(rounds: int) -> list[dict]:
    self, out = [sys.executable, "-c", "from seqwarm.batch.cli import main; main()"], {"seqwarm run": [], "plain": []}
    for i in range(rounds + 1):    # the first round warms up the disk's cache, and is not counted
        for side in list(out)[::1 if i % 2 else -1]:
            with tempfile.TemporaryDirectory() as d:
                Path(d, "plain.py").write_text("\n\n".join((PARAMETERS, *CELLS))); notebook(Path(d, "10_bare.ipynb"))
                took = timed([sys.executable, "plain.py"] if side == "plain" else [*self, "run", "10_bare.ipynb"], d)
                assert Path(d, "runs/bare/record.json").exists()
            if i: out[side].append(took)
    both = list(zip(out["seqwarm run"], out["plain"]))
    found = [row(f"{len(CELLS)} cells without work, {side}", *zip(*took)) for side, took in out.items()]
    return found + [row("overhead of a run, s", [a[0] - b[0] for a, b in both], [a[1] - b[1] for a, b in both], asked="at most 5")]

# states

def data(folder: str, length: int, lines: int = 4000):
    from seqwarm.core.corpus import Corpus
    from seqwarm.core.vocab import train_tokenizer
    text = Path(folder, "text.txt")
    if not text.exists(): text.write_text("\n".join(f"{a} and {b} are {a + b} , not {a*b}" for a in range(lines // 40) for b in range(40)))
    tokenizer = train_tokenizer(text.read_text().splitlines()[:4000], 400)
    return tokenizer, *(Corpus(f"text:{text}", tokenizer, length, split) for split in ("train", "valid"))

def gpt2(tokenizer, length: int, width: int, layers: int, vocab: int):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_positions=length, n_embd=width, n_layer=layers, n_head=4,
                                      bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))

def states(rounds: int) -> list[dict]:
    import torch
    from seqwarm.core import train as module
    from seqwarm.core.state import State
    from seqwarm.core.train import Stage, train
    torch.set_num_threads(1)
    found, keep, update = [], State.keep, module._Loop.update
    for width, layers, vocab, length, every in ((32, 2, 400, 32, 20), (128, 4, 8000, 128, 4), (512, 6, 16000, 128, 2)):
        steps = every*rounds
        saved, stepped = [], []
        def clocked(function, into):
            def call(*args):
                begun = time.perf_counter(), time.process_time()
                got = function(*args)
                into.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
                return got
            return call
        State.keep, module._Loop.update = clocked(keep, saved), clocked(update, stepped)
        try:
            with tempfile.TemporaryDirectory() as d:
                os.environ["SEQWARM_CACHE"] = f"{d}/cache"
                tokenizer, corpus, valid = data(d, length)
                model = gpt2(tokenizer, length, width, layers, vocab); n = sum(p.numel() for p in model.parameters())
                train(model, tokenizer, corpus, valid, [Stage(steps)], d, batch=16, every=steps, save_every=every, sequences=1)
                probe = disk(d)
        finally: State.keep, module._Loop.update = keep, update
        title = f"{n/1e6:.2g} M parameters, batch 16 x {length}"
        step = [statistics.median(x) for x in zip(*stepped)]
        share = [[100*s[i]/(500*step[i]) for s in saved] for i in (0, 1)]
        found += [row(f"a step, {title}", *zip(*stepped), disk=round(probe, 2)),
                  row(f"a state, {title}", *zip(*saved), disk=round(probe, 2)),
                  row(f"a state in 500 steps, % of training, {title}", *share, disk=round(probe, 2), asked="at most 5")]
    return found

# resuming

AT, HOW = 100_000, dict(batch=16, every=1000, save_every=3, sequences=8)

def resume(folder: str) -> None:
    "In a process of its own: what a user's script does, with the clock started before the corpus is opened."
    import torch, transformers.models.gpt2.modeling_gpt2, seqwarm.core.train as module   # noqa: F401 (what is imported is not in the clock)
    from seqwarm.core.vocab import load_tokenizer
    from seqwarm.core.corpus import Corpus
    torch.set_num_threads(1)
    class There(BaseException): pass
    update, seen = module._Loop.update, {}
    def first(self, model, optimizer, feed, step, rates):
        update(self, model, optimizer, feed, step, rates)
        seen.update(step=step, wall=time.perf_counter() - begun[0], cpu=time.process_time() - begun[1]); raise There
    module._Loop.update = first
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    model = gpt2(tokenizer, 128, 128, 4, 8000)
    begun = time.perf_counter(), time.process_time()
    corpus, valid = (Corpus(f"text:{folder}/text.txt", tokenizer, 128, split) for split in ("train", "valid"))
    seen.update(corpus=time.perf_counter() - begun[0], corpus_cpu=time.process_time() - begun[1])
    try: module.train(model, tokenizer, corpus, valid, [module.Stage(AT + 20)], f"{folder}/store", **HOW)
    except There: print(json.dumps(seen))

def resumes(rounds: int) -> list[dict]:
    out = []
    with tempfile.TemporaryDirectory() as d:
        env = dict(SEQWARM_CACHE=f"{d}/cache", TQDM_DISABLE="1")
        self = [sys.executable, __file__]
        timed([*self, "--prepare", d], ".", **env)
        for _ in range(rounds):
            got = subprocess.run([*self, "--resume", d], env={**os.environ, **env}, capture_output=True, text=True)
            if got.returncode: sys.exit(got.stderr)
            out.append(json.loads(got.stdout.splitlines()[-1])); assert out[-1]["step"] == AT, out
        size, probe = Path(d, "text.txt").stat().st_size, disk(d)
    title = f"{size/1e6:.0f} MB of text"
    what = f"from the corpus's opening to the end of the first step, at step {AT:,}, {title}"
    return [row(what, [o["wall"] for o in out], [o["cpu"] for o in out], disk=round(probe, 2), asked="under 2"),
            row("of it opening the corpus", [o["corpus"] for o in out], [o["corpus_cpu"] for o in out], disk=round(probe, 2))]

def prepare(folder: str) -> None:
    "Corpus, cache and a state at step 3, renamed."
    import torch, seqwarm.core.train as module
    from seqwarm.core.files import fingerprint
    torch.set_num_threads(1)
    tokenizer, corpus, valid = data(folder, 128, 100_000)
    tokenizer.save_pretrained(f"{folder}/tokenizer")
    from seqwarm.core.vocab import load_tokenizer
    tokenizer = load_tokenizer(f"{folder}/tokenizer")
    update = module._Loop.update
    def three(self, model, optimizer, feed, step, rates):
        if step == 3: raise KeyboardInterrupt
        return update(self, model, optimizer, feed, step, rates)
    module._Loop.update = three
    try: module.train(gpt2(tokenizer, 128, 128, 4, 8000), tokenizer, corpus, valid, [module.Stage(AT + 20)], f"{folder}/store", **HOW)
    except KeyboardInterrupt: pass
    [state] = Path(folder).glob("store/*/state-*")
    book = json.loads((state/"book.json").read_text()) | {"step": AT}
    del book["seal"]; files = book.pop("files")
    (state/"book.json").write_text(json.dumps(book | dict(files=files, seal=fingerprint([book, files]))))
    state.rename(state.with_name(f"state-{AT:09d}"))

if __name__ == "__main__":
    a = argparse.ArgumentParser(); a.add_argument("--rounds", type=int, default=ROUNDS)
    a.add_argument("--only", nargs="*", default=["run", "states", "resume"], choices=["run", "states", "resume"])
    a.add_argument("--prepare"); a.add_argument("--resume"); a.add_argument("--out", default="results/batch.csv"); o = a.parse_args()
    if o.prepare: prepare(o.prepare)
    elif o.resume: resume(o.resume)
    else:
        from seqwarm.core.record import environment
        sides = dict(run=runs, states=states, resume=resumes)
        table = pd.DataFrame([r for side in o.only for r in sides[side](o.rounds)])
        versions = {k: v for k, v in environment().items() if k in ("torch", "device")}
        table.assign(**versions).to_csv(o.out, index=False)
        print(table.to_string())

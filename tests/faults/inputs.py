"""Malformed inputs, drawn by hypothesis: each must end in one line and exit code 2, at once, with no file left and no code run. `python tests/faults/inputs.py --out FILE.csv` writes the table."""
import argparse, ast, csv, gzip, io, json, math, os, pickle, re, resource, shutil, signal, subprocess, sys, tempfile, time, tomllib, traceback, warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
from tiny import notebook   # noqa: E402

SECONDS, BYTES = 10, 4 << 30     # a case that takes longer hangs (what it waits for a core is not its fault); the memory that it may ask for
GONE, FOLDER, LOOP, PIPE = "gone", "a folder", "a link to itself", "a pipe"    # what may lie where a file should

@dataclass
class Case:
    "A command, and what it is given instead of the valid files."
    kind: str
    args: list[str]
    files: dict[str, bytes | str] = field(default_factory=dict)   # path -> content, or GONE, FOLDER, LOOP, PIPE
    valid: Callable[[], bool] = lambda: False                     # an independent judgement, asked where the command took the input
    told: Callable[[str], bool] | None = None                     # of what a command prints that has to report damage, and not to refuse it
    kernel: bool = False                                          # whether a recipe that is reached is run

@dataclass
class Verdict:
    "What became of a case."
    outcome: str          # refused, valid, told; or else what is wrong
    said: str             # by the command
    seconds: float
    code: int | None = None

# ---- the valid files --------------------------------------------------------------------------------------------------------

CODE = "__import__('pathlib').Path({!r}).touch()"     # what must never be evaluated

def _models(home: Path) -> None:
    import torch, transformers as t
    from seqwarm.batch.cli import main
    from seqwarm.core.card import Card
    from seqwarm.core.vocab import train_tokenizer
    from seqwarm.core.write import save
    words = {"a": "and are not", "b": "und sind nicht"}
    texts = {n: [f"{i} {x} {j} {y} {i + j} , {z} {i*j}" for i in range(9) for j in range(9)] for n, s in words.items() for x, y, z in [s.split()]}
    a, b = (train_tokenizer(texts[n], 290) for n in "ab")
    torch.manual_seed(0)
    ids = dict(bos_token_id=a.bos_token_id, eos_token_id=a.eos_token_id, pad_token_id=a.pad_token_id)
    size = dict(vocab_size=len(a), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20, **ids)
    gpt = lambda tok, width: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=len(tok), n_positions=16, n_embd=width, n_layer=1, n_head=2, **ids))
    made = {"gpt2": (gpt(a, 16), a), "helper": (gpt(b, 8), b), "bert": (t.BertForMaskedLM(t.BertConfig(**size)), a),
            "llama": (t.LlamaForCausalLM(t.LlamaConfig(**size, num_key_value_heads=1)), a)}
    for name, (model, tok) in made.items(): save(model, tok, home/name, Card.child(name, "found", cost={"tokens": 7.0, "flops": 9.0}))
    for args in (["grow", "gpt2", "grown", "--num-layers", "2"], ["graft", "bert", "graft"]):
        if main(args): raise RuntimeError(f"{args} is refused")
    (home/"t.txt").write_text("\n".join(texts["b"]) + "\n")

def _sharded(home: Path) -> None:
    from safetensors.torch import load_file, save_file
    shutil.copytree(home/"gpt2", home/"sharded")
    tensors, folder = load_file(home/"gpt2"/"model.safetensors"), home/"sharded"
    (folder/"model.safetensors").unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves): save_file(half, folder/f"model-0000{i + 1}-of-00002.safetensors", {"format": "pt"})
    where = {n: f"model-0000{i + 1}-of-00002.safetensors" for i, half in enumerate(halves) for n in half}
    (folder/"model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))

def _texts(home: Path) -> None:
    import pandas as pd
    lines = (home/"t.txt").read_text().splitlines()
    (home/"t.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    (home/"t.txt.gz").write_bytes(gzip.compress((home/"t.txt").read_bytes()))
    pd.DataFrame({"text": lines}).to_parquet(home/"t.parquet")
    (home/"words.vec").write_text("3 2\nand 1 2\nare 2 1\nund 1 1\n"); (home/"pairs.txt").write_text("and und\nare sind\n")

GRID = 'recipe = "10_tiny.ipynb"\nname = "rates"\nseeds = [0, 1]\n\n[parameters]\nsteps = 5\ncorpus = "world:a"\n\n[grid]\nlr = [1e-3, 3e-3]\narms = [["clp"], ["random"]]\n'

def _runs(home: Path) -> None:
    import pandas as pd, seqwarm
    notebook(home/"10_tiny.ipynb"); (home/"grid.toml").write_text(GRID)
    (home/"book.json").write_text(json.dumps(dict(sweep="s", recipe="10_tiny.ipynb", runs={"one": dict(state="to come", parameters={"steps": 5})})))
    run = home/"runs"/"good"
    (run/"checkpoints").mkdir(parents=True); shutil.copytree(home/"grown", run/"checkpoints"/"clp")
    (run/"record.json").write_text(json.dumps(dict(recipe="clp", parameters=dict(source_text="world:a", target_text="world:b", seeds=[0], width=32),
        environment={"seqwarm": seqwarm.__version__}, seconds=60, lines=["said"], claims={"clp-steps": 0.84}, by_seed={"0": {"clp-steps": 0.9}})))
    shutil.copy(home/"10_tiny.ipynb", run/"notebook.ipynb")
    pd.DataFrame([dict(arm=a, seed=0, step=i, tokens=8*i, flops=64*i, seconds=i/9, loss=3 - i/9) for a in ("scratch", "clp") for i in range(5)]).to_parquet(run/"metrics.parquet")

@cache
def valid_files() -> Path:
    "A folder with all that the cases begin from; made once a process."
    home, before = Path(tempfile.mkdtemp(prefix="inputs-")), os.getcwd()
    (home/"valid").mkdir(); os.chdir(home/"valid")
    with _quiet():
        try:
            for make in (_models, _sharded, _texts, _runs): make(Path.cwd())
        finally: os.chdir(before)
    import atexit
    atexit.register(shutil.rmtree, home, True)
    return home/"valid"

@contextmanager
def _quiet() -> Iterator[None]:
    before = sys.stdout
    with open(os.devnull, "w") as sys.stdout:
        try: yield
        finally: sys.stdout = before

def canary() -> Path: return valid_files().parent/"canary"
def there(name: str) -> bytes: return (valid_files()/name).read_bytes()

# ---- what is wrong with a file ----------------------------------------------------------------------------------------------

def strings() -> st.SearchStrategy[str]:
    "Texts that somebody might take for code, for markup, or for more than one line."
    code = CODE.format(str(canary()))
    return st.one_of(st.sampled_from([code, f"'); {code} #", f'""" + {code} + """', f"{{{{ {code} }}}}", f"{{% set x = {code} %}}", f"\n{code}\n", f"!!python/object/apply:os.system ['touch {canary()}']",
                                      f"$(touch {canary()})", f"`touch {canary()}`", "<script>boom()</script>", "\ud800", "\x1b[31mred\x1b[0m", "a\nb\r\nc", "\0", "../../..", "x"*5000]), st.text(max_size=20))

def values() -> st.SearchStrategy[Any]:
    "What JSON can hold, and what stands nowhere as a valid value."
    deep: Any = 1
    for _ in range(300): deep = [deep]
    return st.one_of(st.sampled_from([None, True, -1, 0, 10**9, 10**30, -10**30, 1e308, 0.5, math.nan, math.inf, "", "5", [], {}, [None], {"a": {}}, deep, [[1, 2]]]), strings(), st.integers(), st.floats())

def _paths(doc: Any, at: tuple = ()) -> Iterator[tuple]:
    if isinstance(doc, dict | list):
        for k, x in doc.items() if isinstance(doc, dict) else enumerate(doc[:3]): yield (*at, k); yield from _paths(x, (*at, k))

@st.composite
def changed(draw, doc: Any, also: tuple[tuple, ...] = ()) -> str:     # `also`: places that are drawn as often as all others together
    "A JSON text in which something is replaced, gone, or there twice."
    every = sorted(_paths(doc), key=len)[:200]
    at = draw(st.sampled_from([*also]) if also and draw(st.booleans()) else st.sampled_from(every))
    new = json.loads(json.dumps(doc))
    inside = new
    for k in at[:-1]: inside = inside[k]
    how = draw(st.sampled_from(["replace"]*6 + ["strike", "twice", "more"]))
    if how == "strike" and at[-1] in (inside if isinstance(inside, dict) else range(len(inside))): del inside[at[-1]]
    elif how == "more" and isinstance(inside, dict): inside[draw(strings())] = draw(values())
    elif how == "twice" and len(at) == 1: return json.dumps(new)[:-1] + f", {json.dumps(at[0])}: {json.dumps(draw(values()))}}}"
    else: inside[at[-1]] = draw(values())
    return json.dumps(new)

def _cut(draw, x: bytes) -> bytes: return x[:draw(st.integers(0, max(0, len(x) - 1)))]
def _flipped(draw, x: bytes) -> bytes:
    x = bytearray(x or b"x")
    for _ in range(draw(st.integers(1, 8))): x[draw(st.integers(0, len(x) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(x)

_BYTES = dict(cut=_cut, flipped=_flipped, empty=lambda draw, x: b"", wide=lambda draw, x: x.decode("latin1").encode("utf-16"), binary=lambda draw, x: b"\xff\xfe\xad" + x,
              zeros=lambda draw, x: bytes(len(x)), noise=lambda draw, x: draw(st.binary(max_size=40)), deep=lambda draw, x: b"["*100_000, brackets=lambda draw, x: b'{"a":'*100_000)

@st.composite
def damaged(draw, name: str, places: bool = True) -> bytes | str:
    "The bytes of a valid file, torn, turned or replaced; or what is no file at all."
    if places and draw(st.integers(0, 5)) == 0: return draw(st.sampled_from([GONE, FOLDER, LOOP, *([PIPE] if "/" in name else [])]))   # a pipe that was named is waited for
    return _BYTES[draw(st.sampled_from([*_BYTES]))](draw, there(name))

def json_file(name: str, also: tuple[tuple, ...] = (), **kw) -> st.SearchStrategy[bytes | str]:
    "A JSON file with a wrong entry, or one that is no JSON."
    doc = json.loads(there(name))
    wrong = changed(doc, also).map(str.encode)
    return st.one_of(wrong, wrong, wrong, damaged(name, **kw))

# ---- independent judgements: what others than the package say of a file -----------------------------------------------------

def _json(path: str) -> Any: return json.loads(Path(path).read_text(encoding="utf-8"))

def opens(folder: str) -> bool:
    "Whether transformers makes a model of this config, and safetensors has all its numbers, in the right shapes."
    import torch, transformers
    from safetensors.torch import load_file
    config = transformers.AutoConfig.from_pretrained(folder)
    named = (config.architectures or ["GPT2LMHeadModel"])[0] if not isinstance(config.architectures, str) else config.architectures
    with torch.device("meta"): model = getattr(transformers, named)(config)
    wanted = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    files = list(Path(folder).glob("model*.safetensors"))
    held = {n: tuple(x.shape) for f in files for n, x in load_file(f).items()}
    tied = {n for n in wanted if n not in held and ("lm_head" in n or "cls.predictions" in n)}
    return not files or all(held.get(n) == s for n, s in wanted.items() if n not in tied) and not set(held) - set(wanted)

def speaks(folder: str, rows: int) -> bool:
    "Whether transformers loads the tokenizer of a folder, and it stays within the rows of its model."
    import transformers
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    return max(tok("1 and 2 are").input_ids) < rows and max(tok.get_vocab().values()) < 10*rows

def is_card(folder: str) -> bool:
    "Whether a card has its fields, each of its kind."
    c, num = _json(f"{folder}/seqwarm.json"), lambda d: all(isinstance(x, int | float) for x in d.values())
    return (isinstance(c["name"], str) and isinstance(c["recipe"], str) and isinstance(c.get("id", ""), str) and all(isinstance(p, str) for p in c.get("parents", [])) and num(c.get("cost", {}))
            and all(num(a.get("cost") or {}) and all(isinstance(p, str) for p in a.get("parents") or []) for a in c.get("ancestors", {}).values()))

_TYPES = dict(scale=str, steps=int, lr=(int, float), arms=list, seeds=list, share=(int, float), corpus=str, shuffle=bool, extra=dict, runs=str)

def is_grid(path: str) -> bool:
    "Whether a grid is TOML whose every value has the type that the recipe's cell says."
    g = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    fits = lambda k, x: isinstance(x, _TYPES[k]) and (k == "shuffle" or not isinstance(x, bool)) and (not isinstance(x, float) or math.isfinite(x))
    varied = [(k, x) for k, xs in g.get("grid", {}).items() for x in xs] + [(k, x) for t in g.get("list", []) for k, x in t.items() if k != "name"]
    return (not set(g) - {"recipe", "name", "timeout", "seeds", "parameters", "slurm", "grid", "list"} and isinstance(g["recipe"], str) and bool({"seeds", "grid", "list"} & set(g))
            and all(type(s) is int and s >= 0 for s in g.get("seeds", [])) and all(fits(k, x) for k, x in [*g.get("parameters", {}).items(), *varied]))

def is_recipe(path: str) -> bool:
    "Whether nbformat reads a notebook, and its one tagged cell is assignments of literals."
    import nbformat
    book = _json(path)
    nbformat.read(path, 4)
    [cell] = [c for c in book["cells"] if "parameters" in c["metadata"].get("tags", [])]
    return all(ast.literal_eval(node.value) is not Ellipsis for node in ast.parse("".join(cell["source"])).body)

def is_text(path: str) -> bool:
    "Whether a file is text in UTF-8, rows of JSON with one, or a table with one."
    import pandas as pd
    if path.endswith(".parquet"): return all(isinstance(x, str) for x in pd.read_parquet(path).text)
    raw = Path(path).read_bytes()
    text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode()
    if path.endswith(".jsonl"): return any(text.split()) and all(isinstance(json.loads(line)["text"], str) for line in text.splitlines() if line.strip())
    return bool(text.strip())

# ---- the kinds of cases: each a strategy ------------------------------------------------------------------------------------

def uses(model: str) -> list[list[str]]:
    "Commands that read a checkpoint."
    own = dict(gpt2=[["clp", "gpt2", "helper", "out"], ["clp", "gpt2", "helper", "--dry-run"], ["grow", "gpt2", "out", "--num-layers", "2"]], helper=[["clp", "gpt2", "helper", "out"]],
               bert=[["graft", "bert", "out"], ["graft", "bert", "--dry-run"], ["grow", "bert", "out", "--hidden-size", "32", "--num-heads", "4"]], graft=[["extract", "graft", "out"]],
               llama=[["upcycle", "llama", "out", "--experts", "2"], ["grow", "llama", "out", "--num-layers", "4"]], sharded=[["clp", "sharded", "helper", "out"]], grown=[["grow", "grown", "out", "--num-layers", "3"]])
    return [["describe", model], *own[model]]

_SIZES = {"gpt2": "n_embd n_layer n_head n_positions vocab_size n_inner", "helper": "n_embd vocab_size", "bert": "hidden_size num_hidden_layers num_attention_heads intermediate_size type_vocab_size",
          "llama": "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim", "graft": "d_model encoder_layers decoder_layers decoder_attention_heads", "sharded": "n_embd"}

@st.composite
def configs(draw) -> Case:
    model = draw(st.sampled_from([*_SIZES]))
    also = tuple((k,) for k in ["model_type", "architectures", *_SIZES[model].split()])
    return Case("config", draw(st.sampled_from(uses(model))), {f"{model}/config.json": draw(json_file(f"{model}/config.json", also))}, lambda: opens(model))

def _weights(head: dict, body: bytes, length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body

@st.composite
def headers(draw) -> Case:
    model = draw(st.sampled_from(["gpt2", "helper", "bert", "llama", "graft"]))
    name = draw(st.sampled_from([f"{model}/model.safetensors"] + [f"{model}/origin.safetensors"]*3*(model == "graft")))
    n = int.from_bytes((raw := there(name))[:8], "little")
    head, body = json.loads(raw[8:8 + n]), raw[8 + n:]
    names = [k for k in head if k != "__metadata__"]
    one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    how = draw(st.sampled_from(["length", "json", "json", "json", "entry", "entry", "overlap", "alias", "short", "long", "damaged", "damaged"]))
    if how == "length": new = _weights(head, body, draw(st.sampled_from([0, 1, n - 1, n + 1, len(raw), 10**8, 2**63, 2**64 - 1])))
    elif how == "json": new = _weights(draw(changed(head)).encode(), body)
    elif how == "overlap": new = _weights(head | {one: head[one] | {"data_offsets": head[other]["data_offsets"]}}, body + b"x"*(one == other))
    elif how == "alias": new = _weights(head | {draw(strings()): head[one]}, body)
    elif how == "short": new = _weights(head, body[:draw(st.integers(0, len(body) - 1))])
    elif how == "long": new = _weights(head, body + draw(st.binary(min_size=1, max_size=64)))
    elif how == "entry":
        key, x = draw(st.sampled_from([("dtype", "F31"), ("dtype", "I64"), ("dtype", ""), ("dtype", None), ("shape", [-1]), ("shape", [2**62, 2**62]), ("shape", []), ("shape", [0]), ("shape", [1.0]), ("shape", [True]),
                                       ("shape", "4"), ("data_offsets", [-4, 0]), ("data_offsets", [0, 2**70]), ("data_offsets", [4]), ("data_offsets", None)]))
        new = _weights(head | {one: head[one] | {key: x}}, body)
    else: new = draw(damaged(name))
    commands = [c for c in uses(model) if "origin" not in name or c[0] == "extract"]
    return Case("origin of a graft" if "origin" in name else "safetensors header", draw(st.sampled_from(commands)), {name: new}, lambda: opens(model))

@st.composite
def indexes(draw) -> Case:
    at = "sharded/model.safetensors.index.json"
    places = json.loads(there(at))["weight_map"]
    also = ("weight_map",), *(("weight_map", n) for n in list(places)[:2])
    shard = "sharded/model-00002-of-00002.safetensors"
    wrong = draw(st.one_of(json_file(at, also).map(lambda x: {at: x}), damaged(shard).map(lambda x: {shard: x}), st.just({shard: there("gpt2/model.safetensors")})))
    return Case("shards", draw(st.sampled_from(uses("sharded"))), wrong, lambda: opens("sharded"))

@st.composite
def tokenizers(draw) -> Case:
    model = draw(st.sampled_from(["gpt2", "helper", "bert", "llama", "graft"]))
    name = f"{model}/{draw(st.sampled_from(['tokenizer.json']*3 + ['tokenizer_config.json']))}"
    also = (("model",), ("model", "type"), ("model", "vocab"), ("model", "merges"), ("added_tokens",), ("added_tokens", 0, "id"), ("pre_tokenizer",), ("model", "vocab", "and")) if name.endswith("r.json") else (
        ("tokenizer_class",), ("model_max_length",), ("eos_token",), ("pad_token",))
    commands = [c for c in uses(model) if c[0] != "describe" and "--dry-run" not in c]
    return Case("tokenizer", draw(st.sampled_from(commands)), {name: draw(json_file(name, also, places=False))}, lambda: speaks(model, 290))

@st.composite
def cards(draw) -> Case:
    name = "grown/seqwarm.json"
    old = json.loads(there(name))
    [ancestor] = old["ancestors"]
    wrong = draw(json_file(name, (("cost",), ("parents",), ("ancestors",), ("ancestors", ancestor), ("ancestors", ancestor, "parents"), ("ancestors", ancestor, "cost"), ("files",), ("name",), ("id",))))
    said = lambda c: {k: x for k, x in c.items() if k != "seal"}
    command = draw(st.sampled_from([["lineage", "grown"], ["verify", "grown"], ["grow", "grown", "out", "--num-layers", "3"]]))
    same = lambda: said(_json(name)) == said(old)
    return Case("card", command, {name: wrong}, same if command[0] == "verify" else lambda: is_card("grown"), (lambda out: "is not whole" in out) if command[0] == "verify" else None)

@st.composite
def changed_files(draw) -> Case:
    name = draw(st.sampled_from(["grown/model.safetensors", "grown/config.json", "grown/tokenizer.json", "grown/plan.json", "grown/generation_config.json"]))
    return Case("file of a card", ["verify", "grown"], {name: draw(damaged(name))}, lambda: Path(name).read_bytes() == there(name), lambda out: "is not whole" in out and Path(name).name in out)

@st.composite
def grids(draw) -> Case:
    lines = GRID.splitlines()
    wrong = ["stepz = 1", "steps = 'many'", "seeds = 'x'", "seeds = [-1]", "seeds = [0.5]", "seeds = [true]", "seeds = []", "lr = [nan]", "lr = []", "lr = 'fast'", "arms = [['clpp']]", "steps = 1979-05-27", "recipe = 5",
             "recipe = []", "recipe = 'nowhere'", "name = '../x'", "name = ['x']", "timeout = -1", "timeout = nan", "timeout = 'x'", "[[list]]\nname = 5", "list = [1]", "grid = 5", "parameters = []", "[slurm]\nx = 1",
             f"seeds = {list(range(2000))}", "a = " + "["*5000, "x.y.z = 1", "seeds = [0, 0]", "steps = 1e400", "corpus = 5", "runs = 'grid.toml'", "[grid.lr]", "lr = [[1]]", "extra = [1]", "steps = [5]", "scale = 'huge'"]
    how = draw(st.sampled_from(["line", "line", "line", "swap", "string", "string", "damaged", "file"]))
    at = draw(st.integers(0, len(lines)))
    if how == "line": lines.insert(at, draw(st.sampled_from(wrong)))
    elif how == "swap": lines[min(at, len(lines) - 1)] = draw(st.sampled_from(wrong))
    elif how == "string":
        key, text = draw(st.sampled_from(["steps", "lr", "recipe", "name", "corpus", "seeds", "arms"])), json.dumps(draw(strings()))
        lines = [re.sub(rf"^{key} = .*", lambda m: f"{key} = {text}", line) for line in lines]
    files = {"grid.toml": draw(damaged("grid.toml")) if how == "damaged" else "\n".join(lines).encode("utf-8", "surrogatepass")}
    if how == "file": files = {"10_tiny.ipynb": draw(damaged("10_tiny.ipynb"))}
    return Case("grid", ["sweep", "grid.toml"], files, lambda: is_grid("grid.toml") and is_recipe("10_tiny.ipynb"))

@st.composite
def notebooks(draw) -> Case:
    name = "10_tiny.ipynb"
    wrong = draw(json_file(name, (("cells",), ("cells", 0), ("cells", 0, "source"), ("cells", 0, "metadata"), ("cells", 0, "metadata", "tags"), ("cells", 1, "cell_type"), ("metadata",), ("nbformat",), ("nbformat_minor",))))
    return Case("recipe", draw(st.sampled_from([["recipes", name], ["run", name], ["sweep", "grid.toml"]])), {name: wrong}, lambda: is_recipe(name) and is_grid("grid.toml"))

_PARAMETERS = {"steps": ["many", "1.5", "1e9", "", "0x10", "True", "9"*5000], "lr": ["nan", "-inf", "1e999", "fast", ""], "arms": ["clpp", "clp,,x", '["clp"', "[[]]", "[1]"], "seeds": ["x", "0.5", "[", "[true]", "["*9999, "1e3"],
               "share": ["half", "nan"], "shuffle": ["maybe", "2"], "extra": ["{", "[]", "{'a': 1}", "5", '{"a": 1}x'], "scale": ["huge", ""], "name": ["../x", "", "a/b", "store", "x"*300, "\0", ".x"], "stepz": ["5"], "": ["5"],
               "runs": ["10_tiny.ipynb", "t.txt/x", "/proc/nowhere"]}

@st.composite
def parameter_values(draw) -> Case:
    key = draw(st.sampled_from([*_PARAMETERS]))
    text = draw(st.one_of(st.sampled_from(_PARAMETERS[key]), strings() if key not in ("runs", "arms", "name") else st.nothing()))
    return Case("parameter", ["run", "10_tiny.ipynb", "-p", key, text.encode("utf-8", "replace").decode()], {}, lambda: key in ("steps", "lr", "share", "shuffle", "seeds") and bool(re.fullmatch(r"\s*(none|null|yes|no|true|false|[\d.,\s+-]*)\s*", text, re.I)))

@st.composite
def strings_as_values(draw) -> Case:
    text = draw(strings()).replace("\0", "").encode("utf-8", "replace").decode()
    return Case("parameter that is a text", ["run", "10_tiny.ipynb", "-p", "corpus", text], {}, lambda: _json("runs/tiny/record.json")["parameters"]["corpus"] == text, kernel=True)

@st.composite
def options(draw) -> Case:
    whole, real = ["-1", "0", "x", "", "1.5", "nan", str(10**12), str(10**30)], ["nan", "inf", "-1", "x", "", "-inf"]
    known = {("clp", "gpt2", "helper", "out"): {"--top-k": ("softmax", whole), "--temperature": ("softmax", real), "--ridge": ("lstsq", [*real, "-0.5"]), "--pad-to": ("overlap", whole), "--seed": ("random", ["-1", "x", str(10**30)]),
                                                "--method": (None, ["", "clpp", "Overlap"]), "--match": (None, ["", "exactly"]), "--architecture": (None, ["GPT2", "os.system", ""])},
             ("graft", "bert", "out"): {"--decoder-layers": ("copy", whole), "--decoder": (None, ["", "x"]), "--family": (None, ["", "gpt2", "x"]), "--seed": (None, ["-1", "x"]), "--cross": (None, ["", "x"])},
             ("grow", "gpt2", "out"): {"--hidden-size": (None, whole), "--num-heads": (None, whole), "--intermediate-size": (None, whole), "--num-layers": (None, whole), "--num-kv-heads": (None, whole),
                                       "--order": (None, ["", "0-", "9-1", "0-9999", "0-99999", "x", "0," * 3000, "-1", "0,5"]), "--width": (None, ["", "x"]), "--depth": (None, ["", "x"])},
             ("upcycle", "llama", "out"): {"--experts": (None, whole), "--top-k": (None, whole), "--every": (None, whole), "--fine": (None, whole), "--noise": (None, real), "--family": (None, ["", "gpt2"])},
             ("describe", "gpt2"): {"--length": (None, ["-1", "0", "x", "nan", "1.5"])}, ("sweep", "grid.toml"): {"--jobs": (None, ["-1", "0", "x"]), "--executor": (None, ["", "x"])}}
    command = draw(st.sampled_from([*known]))
    option = draw(st.sampled_from([*known[command]]))
    method, wrong = known[command][option]
    more = [] if method is None else ["--method" if command[0] == "clp" else "--decoder", method]
    return Case("option", [*command, *more, option, draw(st.sampled_from(wrong))])

CORPORA = ["t.txt", "t.jsonl", "t.parquet", "t.txt.gz"]

@st.composite
def corpora(draw) -> Case:
    name = draw(st.sampled_from(CORPORA))
    rows = [json.dumps(x) for x in ({"txt": "a"}, {"text": 5}, {"text": None}, {"text": ["a"]}, 5, None, [1], {}, {"text": {"a": 1}}, {"text": "\ud800"})]
    how = draw(st.sampled_from(["damaged", "damaged", "rows", "spec", "spec", "vectors"]))
    if how == "spec":
        spec = draw(st.sampled_from(["text:nowhere*.txt", "text:", "txt:t.txt", "t.txt", "text:t.txt?column", "text:t.txt?weight=nan", "text:t.txt?documents=-1", "text:t.txt?documents=1e999", "text:t.jsonl?column=x", "text:10_tiny.ipynb",
                                     "text:gpt2", "text:[", "text:**/x", "text:t.txt + ", "world:q", "world:a?words=x", "world:a?seed=-1", "world:a?size=x", "hub:gpt2", "hub:nobody/nothing", "hub:../..", "text:t.txt\0", "text:" + "x"*5000,
                                     "text:t.txt?lang=a&lang=b", f"hub:evil?config={CODE.format(str(canary()))}", "hub:evil", "text:/proc/self/mem", "text:loop.txt"]))
        evil = {"evil/evil.py": CODE.format(str(canary())).encode(), "evil/dataset_infos.json": b"{", "loop.txt": LOOP}
        return Case("corpus", draw(st.sampled_from([["clp", "gpt2", "helper", "out", "--corpus", spec], ["grow", "gpt2", "out", "--num-layers", "2", "--check", "--text", spec]])), evil)
    if how == "vectors":
        name = draw(st.sampled_from(["words.vec", "pairs.txt"]))
        args = ["clp", "gpt2", "helper", "out", "--method", "wechsel", "--source-vectors", "words.vec", "--helper-vectors", "words.vec", "--dictionary", "pairs.txt"]
        return Case("word vectors", args, {name: draw(st.one_of(damaged(name), st.sampled_from([b"2 2\nand nan 1\nare 1 2\n", b"and\n", b"3 2\nand 1\n", b"9 9\n", b"-1 2\nand 1 2\n", b"10000000000 2\nand 1 2\n", b"1 1000000000000\nand 1 2\n", b"\n\n"])))})
    if how == "rows": name, new = "t.jsonl", "\n".join([*draw(st.lists(st.just('{"text": "a"}'), max_size=1)), draw(st.sampled_from(rows))]).encode()
    else: new = draw(damaged(name))
    command = draw(st.sampled_from([["clp", "gpt2", "helper", "out", "--corpus", f"text:{name}"], ["grow", "gpt2", "out", "--num-layers", "2", "--check", "--text", f"text:{name}"]]))
    return Case("corpus", command, {name: new}, lambda: is_text(name))

class _Boom:
    def __reduce__(self): return eval, (CODE.format(str(canary())),)

@st.composite
def codes(draw) -> Case:
    "Checkpoints that bring code: pickles, classes of their own, templates, YAML with tags."
    code, files, model = CODE.format(str(canary())), {}, draw(st.sampled_from(["gpt2", "bert", "llama"]))
    how = draw(st.sampled_from(["pickle only", "pickle beside", "pickle as safetensors", "auto_map", "auto_map of a known type", "tokenizer", "template", "yaml", "adapter", "quantised", "pickled shards"]))
    boom, config = pickle.dumps(_Boom()), json.loads(there(f"{model}/config.json"))
    if how == "pickle only": files = {"model.safetensors": GONE, draw(st.sampled_from(["pytorch_model.bin", "model.pt", "weights.ckpt", "tf_model.h5", "training_args.bin"])): boom}
    elif how == "pickle beside": files = {"pytorch_model.bin": boom, "optimizer.pt": boom, "training_args.bin": boom, "scheduler.pkl": boom}
    elif how == "pickle as safetensors": files = {"model.safetensors": boom}
    elif how == "pickled shards": files = {"model.safetensors": GONE, "a.bin": boom, "model.safetensors.index.json": json.dumps({"weight_map": {"a": "a.bin"}}).encode()}
    elif how.startswith("auto_map"):
        kind = config["model_type"] if "known" in how else draw(st.sampled_from(["own", "gpt3", ["gpt2"], None, 5]))
        files = {"config.json": json.dumps(config | {"model_type": kind, "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}, "trust_remote_code": True}).encode()}
    elif how == "tokenizer": files = {"tokenizer_config.json": json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}, "trust_remote_code": True}).encode(), "tokenizer.json": draw(st.sampled_from([GONE, there(f"{model}/tokenizer.json")]))}
    elif how == "template": files = {"chat_template.jinja": b"{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**9) %}{% endfor %}"}
    elif how == "yaml": files = {"README.md": f"---\nlicense: !!python/object/apply:eval [\"{code}\"]\n---\n".encode()}
    elif how == "adapter": files = {"adapter_config.json": b'{"base_model_name_or_path": "x"}', "config.json": GONE}
    else: files = {"config.json": json.dumps(config | {"quantization_config": {"quant_method": draw(st.sampled_from(["gptq", "x", code]))}}).encode()}
    files |= {f"{n}.py": f"{code}\nclass OwnConfig: pass\nOwn = OwnModel = OwnConfig\n".encode() for n in ("own", "modeling_own", "configuration_own", "tokenization_own")}
    harmless = how in ("pickle beside", "template", "yaml", "auto_map of a known type")   # there is a valid model beside what is not read
    command = draw(st.sampled_from(uses(model)))
    return Case("code in a checkpoint", command, {f"{model}/{n}": x for n, x in files.items()}, lambda: harmless or (command[0] == "describe" and how in ("pickle only", "pickled shards")) or (how == "tokenizer" and files["tokenizer.json"] != GONE))

@st.composite
def reports(draw) -> Case:
    name = draw(st.sampled_from(["record.json", "record.json", "notebook.ipynb", "metrics.parquet", "checkpoints/clp/seqwarm.json"]))
    also = (("parameters",), ("claims",), ("claims", "clp-steps"), ("environment",), ("by_seed",), ("seconds",), ("lines",), ("recipe",), ("parameters", "seeds"), ("by_seed", "0")) if name == "record.json" else ()
    at = f"runs/good/{name}"
    files = {at: draw(damaged(at) if name.endswith("parquet") else json_file(at, also))} | ({"runs/good/record.json": GONE} if name == "notebook.ipynb" else {})
    return Case("run in a report", ["report", "-o", "page.html", "--table", "table.csv"], files, told=lambda out: "open page.html" in out and "<script>boom" not in Path("page.html").read_text())

@st.composite
def books(draw) -> Case:
    wrong = draw(json_file("book.json", (("recipe",), ("runs",), ("runs", "one"), ("runs", "one", "parameters"))))
    return Case("book of a sweep", ["job", "book.json", "one"], {"book.json": wrong}, lambda: isinstance(_json("book.json")["runs"]["one"]["parameters"], dict))

@st.composite
def places(draw) -> Case:
    "Commands that are told to read or write where nothing can be."
    where = draw(st.sampled_from(["t.txt", "gpt2", "t.txt/x", "/proc/nowhere", "", " ", "x"*300, "\0", "loop.txt", "loop.txt/x", "/dev/null", "pipe", "/dev/full/x", ".", "..", "new/../gpt2"]))
    model = draw(st.sampled_from(["nowhere/x/y", "./nowhere", "t.txt", "", " ", "loop.txt", "pipe", "/dev/null", "x"*5000, "a/b", "nobody--/x", "\0", "runs", "~nobody/x", "gpt2/config.json/x", "..", "https://example.org/x"]))
    outs = [["clp", "gpt2", "helper", where], ["graft", "bert", where], ["grow", "gpt2", where, "--num-layers", "2"], ["notebooks", where], ["report", "-o", where], ["report", "--table", where + ".csv"], ["run", "10_tiny.ipynb", "--runs", where]]
    ins = [["clp", model, "helper", "out"], ["clp", "gpt2", model, "out"], ["graft", model, "out"], ["extract", model, "out"], ["extract", "graft", "out", "--origin", model], ["grow", model, "out", "--num-layers", "2"],
           ["upcycle", model, "out"], ["describe", model], ["lineage", model], ["verify", model], ["sweep", model], ["run", model], ["run", model + ".ipynb"], ["recipes", model], ["report", model], ["job", model, "one"]]
    args = draw(st.sampled_from([*outs, *ins]))
    fine = args[0] == "report" and (model in args and model in ("..", "gpt2", "t.txt", "runs", "pipe", "/dev/null") or "\0" not in where and len(where) < 200) or "--runs" in args and where in ("gpt2", ".", "..", "", " ", "new/../gpt2")
    return Case("place", args, {"loop.txt": LOOP, "pipe": PIPE}, lambda: fine)

KINDS = {"config": configs, "header": headers, "shards": indexes, "tokenizer": tokenizers, "card": cards, "file": changed_files, "grid": grids, "recipe": notebooks, "parameter": parameter_values, "text": strings_as_values,
         "option": options, "corpus": corpora, "code": codes, "report": reports, "book": books, "place": places}
SHARES = {"config": 3, "header": 3, "tokenizer": 2, "corpus": 2, "option": 2, "grid": 2, "code": 1.5, "place": 1.5, "recipe": 1.5, "text": 0.3, "file": 0.7}   # of the examples; others 1

# ---- carrying out and judging -----------------------------------------------------------------------------------------------

class Hang(BaseException): "It took longer than it may."

def taken() -> float:
    "Seconds on the clock, without those in which this process could have worked and had no core."
    return time.monotonic() - int(Path("/proc/self/schedstat").read_text().split()[1])/1e9

class Reached(BaseException): "A sweep was about to start."

def lay_out(case: Case, folder: Path) -> None:
    "The valid files, those of the case in their place, and a folder for what passes."
    shutil.copytree(valid_files(), folder, symlinks=True)
    (folder/"tmp").mkdir()
    for name, content in case.files.items():
        path = folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists(): path.unlink()
        if isinstance(content, bytes): path.write_bytes(content)
        elif content == FOLDER: path.mkdir()
        elif content == LOOP: path.symlink_to(path.name)
        elif content == PIPE: os.mkfifo(path)

def listing(folder: Path) -> dict[str, int]: return {str(p.relative_to(folder)): p.lstat().st_size if p.is_file() else -1 for p in folder.rglob("*")}

@contextmanager
def _inside(folder: Path, kernel: bool = False) -> Iterator[None]:
    "Work in a folder, with little memory and time, and with nothing but what lies there; power cuts are not waited for."
    import datasets.config as data, huggingface_hub.constants as hub, transformers.utils.logging as talk
    import seqwarm.batch.local as local, seqwarm.batch.run as run
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent/"hub"), "SEQWARM_CACHE": str(folder.parent/"cache"), "TMPDIR": str(folder/"tmp")}
    old, here, size = dict(os.environ), os.getcwd(), resource.getrlimit(resource.RLIMIT_AS)
    begun, limit = taken(), [SECONDS]
    def alarm(*_):
        if (left := limit[0] - taken() + begun) <= 0: raise Hang
        signal.setitimer(signal.ITIMER_REAL, left + 0.1)
    def reached(*_, **__): raise Reached
    def begin(*a, **kw): limit[0] *= 30; return client(*a, **kw)   # from here on the recipe takes its time
    used = int(Path("/proc/self/statm").read_text().split()[0])*resource.getpagesize()
    once = (talk.warning_once, talk.info_once) if hasattr(talk, "info_once") else (talk.warning_once,)
    for f in once: f.cache_clear()
    before, kept, passing, client = signal.signal(signal.SIGALRM, alarm), local.EXECUTORS["local"], tempfile.tempdir, run._client
    sync, offline = (os.fsync, os.fdatasync), (hub.HF_HUB_OFFLINE, data.HF_HUB_OFFLINE)
    try:
        os.chdir(folder); os.environ.update(env); tempfile.tempdir = None
        local.EXECUTORS["local"], run._client = reached, begin if kernel else reached
        os.fsync = os.fdatasync = lambda fd: None
        hub.HF_HUB_OFFLINE = data.HF_HUB_OFFLINE = True
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, size[1])); signal.setitimer(signal.ITIMER_REAL, SECONDS)
        with warnings.catch_warnings(): yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, size); os.chdir(here); os.environ.clear(); os.environ.update(old)
        local.EXECUTORS["local"], tempfile.tempdir, run._client = kept, passing, client
        (os.fsync, os.fdatasync), (hub.HF_HUB_OFFLINE, data.HF_HUB_OFFLINE) = sync, offline

@contextmanager
def _heard() -> Iterator[dict[str, str]]:
    "What Python and the libraries below it write to the two streams."
    said, kept = {}, {1: os.dup(1), 2: os.dup(2)}
    olds = sys.stdout, sys.stderr
    for s in olds: s.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        for fd, f in ((1, out), (2, err)): os.dup2(f.fileno(), fd)
        sys.stdout, sys.stderr = (io.TextIOWrapper(open(os.dup(fd), "wb"), "utf-8", errors, write_through=True) for fd, errors in ((1, "strict"), (2, "backslashreplace")))
        try: yield said
        finally:
            for s in (sys.stdout, sys.stderr): s.close()
            sys.stdout, sys.stderr = olds
            for fd, old in kept.items(): os.dup2(old, fd); os.close(old)
            for name, f in (("out", out), ("err", err)): f.seek(0); said[name] = f.read().decode("utf-8", "replace")

def called(case: Case, folder: Path) -> tuple[Any, str, str]:
    "Exit code (or what went wrong), stdout and stderr of the command, in this process."
    from seqwarm.batch.cli import main
    with _inside(folder, case.kernel), _heard() as said:
        try: code = main(case.args)
        except Hang: code = "hang"
        except Reached: code = 0
        except BaseException: code = "traceback"; traceback.print_exc()
    return code, said["out"], said["err"]

def started(case: Case, folder: Path) -> tuple[Any, str, str]:
    "The same, as a shell has it."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder.parent/"hub"), "SEQWARM_CACHE": str(folder.parent/"cache"), "TMPDIR": str(folder/"tmp")}
    try: done = subprocess.run([sys.executable, "-c", "from seqwarm.batch.cli import main; main()", *case.args], cwd=folder, env=env, capture_output=True, timeout=60*SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired: return "hang", "", ""
    out, err = (x.decode("utf-8", "replace") for x in (done.stdout, done.stderr))
    return "traceback" if "Traceback" in err else done.returncode, out, err

def _agreed(case: Case, folder: Path) -> bool:
    "Whether others take the input for valid."
    try:
        with _inside(folder), _heard(): return case.valid()
    except (Exception, Hang): WHY.append(traceback.format_exc()); return False

def judged(case: Case, run: Callable = called) -> Verdict:
    "Carry out a case and say what is wrong with what happened, if anything."
    canary().unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="case-", dir=valid_files().parent) as home:
        lay_out(case, folder := Path(home)/"here")
        before, begun = listing(folder), taken()
        code, out, err = run(case, folder)
        seconds, more = taken() - begun, {k for k, n in listing(folder).items() if before.get(k) != n} | (set(before) - set(listing(folder)))
        say = lambda outcome, said=err or out: Verdict(outcome, said, seconds, code if isinstance(code, int) else None)
        one = err.startswith("seqwarm: ") and err.count("\n") == 1 and len(err) < 1500 and err[:-1].isprintable()
        if canary().exists(): return say("code run")
        if code == "hang" or seconds > SECONDS and run is called and not case.kernel: return say("hang")
        if code == "traceback": return say("traceback")
        if code == 2: return say("files left", f"{sorted(more)[:5]} {err}") if more else say("refused") if one else say("not one line", f"{err!r}")
        if case.told is not None and code in (0, 1):
            here = os.getcwd(); os.chdir(folder)
            try: told = case.told(out)
            finally: os.chdir(here)
            if told: return say("told")
        if code == 0 and _agreed(case, folder): return say("valid")
        return say("accepted wrongly" if code == 0 else f"exit code {code}")

WHY: list[str] = []      # what others said of an input
GOOD = ("refused", "valid", "told")

def drawn(kinds: dict[str, int], start: int | None, act: Callable[[Case], None]) -> None:
    "Hand so many cases of each kind to a function; the same seed draws the same ones."
    for kind, n in kinds.items():
        def one(case): act(case)
        test = settings(max_examples=n, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=start is None)(given(KINDS[kind]())(one))
        (test if start is None else seed(start)(test))()

def shared(examples: int, kinds: list[str] | None = None) -> dict[str, int]:
    "How many examples each kind gets."
    weights = {k: SHARES.get(k, 1) for k in kinds or KINDS}
    return {k: max(1, round(examples*w/sum(weights.values()))) for k, w in weights.items()}

COLUMNS = {"examples": None, "one_line_and_code_2": "refused", "told_in_the_result": "told", "valid_after_all": "valid", "accepted_wrongly": "accepted wrongly", "not_one_line": "not one line",
           "traceback": "traceback", "hang": "hang", "files_left": "files left", "code_run": "code run", "other": None}

def table(seen: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    "A row a kind and command."
    rows = []
    for kind, command in sorted({s[:2] for s in seen}):
        n = Counter(outcome for k, c, outcome in seen if (k, c) == (kind, command))
        known = {name: n[outcome] for name, outcome in COLUMNS.items() if outcome}
        rows.append(dict(kind=kind, command=command) | {name: known.get(name, 0) for name in COLUMNS} | {"examples": n.total(), "other": n.total() - sum(known.values())})
    return rows

def save(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as f: w = csv.DictWriter(f, list(rows[0]), lineterminator="\n"); w.writeheader(); w.writerows(rows)

def shown(case: Case) -> str:
    return f"{case.kind}: {[a[:80] for a in case.args]} " + ", ".join(f"{n}: {x[:80]!r}... ({len(x)})" if isinstance(x, bytes) and len(x) > 80 else f"{n}: {x!r}" for n, x in case.files.items())[:600]

def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--examples", type=int, default=300); p.add_argument("--seed", type=int, default=0); p.add_argument("--out", type=Path)
    p.add_argument("--kinds", nargs="+", choices=list(KINDS)); p.add_argument("--processes", type=int, default=12, help="so many cases are carried out by a shell as well")
    p.add_argument("--show", action="store_true", help="print every case with what was said")
    a = p.parse_args()
    valid_files()
    seen, slowest, again = [], (0.0, ""), []
    def act(case: Case) -> None:
        nonlocal slowest
        v = judged(case)
        seen.append((case.kind, case.args[0], v.outcome)); slowest = max(slowest, (v.seconds, shown(case)))
        if v.outcome == "refused": again.append((case, v))
        if a.show or v.outcome not in GOOD: print(f"{v.outcome} ({v.seconds:.1f} s): {shown(case)}\n    {v.said[-1500:].strip()}", flush=True)
        if v.outcome == "accepted wrongly": print("   ", *WHY[-1:])
    drawn(shared(a.examples, a.kinds), a.seed, act)
    if a.out: save(a.out, table(seen))
    some = again[::max(1, len(again)//max(1, a.processes))][:a.processes]
    for case, v in some:
        w = judged(case, started)
        if (w.outcome, w.said) != (v.outcome, v.said): print(f"the shell sees another thing: {shown(case)}\n    {w.outcome}: {w.said}\n    {v.outcome}: {v.said}")
        seen.append((case.kind, f"{case.args[0]} (a process)", w.outcome))
    rows, bad = table(seen), [s for s in seen if s[2] not in GOOD]
    print(f"{len(seen)} cases, {len(bad)} wrong; slowest {slowest[0]:.1f} s: {slowest[1]}")
    if a.out: save(a.out, rows)
    raise SystemExit(bool(bad))

if __name__ == "__main__": main()

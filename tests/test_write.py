"Writing: bytes that other readers take, memory that a large tensor does not move, refusals that leave nothing."
import json, os, threading, time
from pathlib import Path
import pytest, torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.files import file_fingerprint, fingerprint, whole_folder
from seqwarm.core.plan import Plan, Row, operation
from seqwarm.core.write import build, save, write

WTE, FFN = "transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"

def gpt2(**kw): return GPT2LMHeadModel(GPT2Config(**dict(vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=1) | kw))
def plan_of(c, made=(), **kw):
    "Copies, but for the rows in `made`."
    own = {r.target: r for r in made}
    return Plan("copy", c.config, c.architecture, [own.get(n) or Row(n, "copy", f"s:{n}") for n in c.names], untied=c.untied, **kw)
def header(path):
    raw = path.read_bytes(); n = int.from_bytes(raw[:8], "little")
    return n, json.loads(raw[8:8+n])

@pytest.fixture
def c(tmp_path): torch.manual_seed(0); return save(gpt2(), None, tmp_path/"a", Card("a", "scratch"))

@pytest.fixture
def mixed(tmp_path):
    "A checkpoint with tensors of 8, 4, 2 and 2 bytes a number, and of odd lengths."
    torch.manual_seed(0); save(gpt2(vocab_size=19, n_embd=6, n_positions=7), None, tmp_path/"m", Card("m", "scratch"))
    f = tmp_path/"m"/"model.safetensors"; kinds = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    save_file({n: x.to(kinds[i % 4]) for i, (n, x) in enumerate(load_file(f).items())}, f, metadata={"format": "pt"})
    return Checkpoint(tmp_path/"m")

@pytest.mark.parametrize("shard", [1 << 30, 700, 1])
def test_the_library_reads_what_was_written(mixed, tmp_path, shard):
    out = write(plan_of(mixed), {"s": mixed}, tmp_path/"out", shard=shard)
    files, held = sorted((tmp_path/"out").glob("*.safetensors")), {}
    for f in files:
        with safe_open(f, "pt") as g: assert g.metadata() == {"format": "pt"} and set(g.keys()) == set(load_file(f))
        held |= load_file(f)
        n, head = header(f); assert n % 8 == 0
        for name, t in head.items():   # every number lies at a multiple of its width
            if name != "__metadata__": assert t["data_offsets"][0] % {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[t["dtype"]] == 0
    want = load_file(tmp_path/"m"/"model.safetensors")
    assert set(held) == set(want) == set(out.names) and len(files) == {1 << 30: 1, 700: len(files), 1: len(want)}[shard]
    for n, x in want.items(): assert held[n].dtype == x.dtype and torch.equal(held[n], x) and torch.equal(out.read(n), x)
    assert not (tmp_path/"out"/"model.safetensors.index.json").exists() if shard == 1 << 30 else len(files) > 1

def test_index_is_that_of_transformers(c, tmp_path):
    gpt2().save_pretrained(tmp_path/"theirs", max_shard_size=2000)
    write(plan_of(c), {"s": c}, tmp_path/"ours", shard=2000)
    theirs, ours = ((tmp_path/n/"model.safetensors.index.json").read_text() for n in ("theirs", "ours"))
    a, b = json.loads(theirs), json.loads(ours)
    assert a["metadata"] == b["metadata"] and set(a["weight_map"]) == set(b["weight_map"]) and list(b) == list(a)
    assert ours == json.dumps(b, indent=2, sort_keys=True) + "\n" and theirs == json.dumps(a, indent=2, sort_keys=True) + "\n"
    assert list(b["weight_map"]) == sorted(b["weight_map"])

def test_hash_of_writing_is_hash_of_files(c, tmp_path):
    for shard in 1500, 1 << 30:
        out = write(plan_of(c), {"s": c}, tmp_path/str(shard), shard=shard)
        files = sorted((tmp_path/str(shard)).glob("*.safetensors"))
        assert out.card.id == fingerprint(["copy", [c.card.id], fingerprint([file_fingerprint(f) for f in files])])
        assert out.card.id == fingerprint(["copy", [c.card.id], Checkpoint(out.path).fingerprint])

def test_the_same_bytes_again(c, tmp_path):
    made = [Row(FFN, "normal", (), {"std": 0.5}), Row("transformer.wpe.weight", "zeros")]
    for d in "xy":
        (tmp_path/d).mkdir(); write(plan_of(c, made, seed=3, dropped={f"s:{r.target}": "made anew" for r in made}), {"s": c}, tmp_path/d/"out", shard=900, extra={"a.json": {"b": [1]}})
    x, y = ({p.name: p.read_bytes() for p in (tmp_path/d/"out").iterdir()} for d in "xy")
    assert x == y and len(x) > 5

def test_made_rows_are_those_of_the_plan(c, tmp_path):
    made = [Row(FFN, "normal", (), {"std": 0.5}), Row("transformer.wpe.weight", "zeros"), Row("transformer.ln_f.bias", "ones")]
    plan = plan_of(c, made, seed=5, dtype="bfloat16", dropped={f"s:{r.target}": "made anew" for r in made})
    out = write(plan, {"s": c}, tmp_path/"out", shard=1200)
    built = build(plan, {"s": c}).state_dict()
    for n, x in plan.apply({"s": c}):
        assert torch.equal(out.read(n), x) and out.dtype(n) == x.dtype, n
        assert torch.equal(built[n], x.to(built[n].dtype))
    assert out.dtype(FFN) == torch.bfloat16 and out.dtype(WTE) == torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path/"out").state_dict()
    assert torch.equal(loaded[FFN].float(), out.read(FFN).float())

def anon() -> int: return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def test_a_copy_is_never_held(tmp_path):
    "134 MB of one tensor, stored in a file with holes, pass through a few MB."
    c = save(gpt2(vocab_size=64, n_embd=64), None, tmp_path/"a", Card("a", "scratch"))
    f = tmp_path/"a"/"model.safetensors"; held = load_file(f); total, head, at = 128 << 20, {}, 0
    long = total//(4*64)
    for n, x in held.items():
        shape = [long, 64] if n == WTE else list(x.shape); size = 4*shape[0]*(shape[1] if len(shape) > 1 else 1)
        head[n] = dict(dtype="F32", shape=shape, data_offsets=[at, at + size]); at += size
    text = json.dumps(head).encode()
    with open(f, "wb") as g: g.write(len(text).to_bytes(8, "little") + text); g.truncate(8 + len(text) + at)
    config = json.loads((tmp_path/"a"/"config.json").read_text()); (tmp_path/"a"/"config.json").write_text(json.dumps(config | {"vocab_size": long}))
    c = Checkpoint(tmp_path/"a"); plan = plan_of(c)
    write(plan, {"s": c}, tmp_path/"warm"); before, peak, stop = anon(), [0], threading.Event()
    def watch():
        while not stop.is_set(): peak[0] = max(peak[0], anon()); time.sleep(0.002)
    t = threading.Thread(target=watch); t.start()
    try: out = write(plan, {"s": c}, tmp_path/"out")
    finally: stop.set(); t.join()
    assert out.shape(WTE) == (long, 64) and peak[0] - before < 32 << 20, f"{(peak[0] - before) >> 20} MiB"

@operation("test.broken")
def _broken(x: torch.Tensor, *, at: int) -> torch.Tensor:
    x = x.clone(); x.view(-1)[at] = float("inf")
    return x

@operation("test.refuses")
def _refuses(x: torch.Tensor) -> torch.Tensor: raise Refusal("the helper has no such token")

def left(folder: Path) -> set: return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}

def spoilt(c, name, value):
    f = c.path/"model.safetensors"; held = load_file(f); held[name].view(-1)[5] = value; save_file(held, f, metadata={"format": "pt"})
    return Checkpoint(c.path)

@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(c, tmp_path, value):
    c = spoilt(c, FFN, value); before = left(tmp_path)
    where = f"{FFN} in {c.path}/model.safetensors holds NaN or infinity"
    for made in [], [Row(FFN, "test.broken", f"s:{FFN}", {"at": 0})]:   # copied, or read by an operation
        for go in lambda p: write(p, {"s": c}, tmp_path/"new"/"out"), lambda p: build(p, {"s": c}):
            with pytest.raises(Refusal, match=where): go(plan_of(c, made))
    assert left(tmp_path) == before
    write(plan_of(c, [Row(FFN, "zeros")], dropped={f"s:{FFN}": "broken"}), {"s": c}, tmp_path/"out")   # what is not read does no harm

def test_what_an_operation_breaks_or_refuses(c, tmp_path):
    before = left(tmp_path)
    for row, words in [(Row(FFN, "test.broken", f"s:{FFN}", {"at": 9}), f"test.broken makes NaN or infinity in {FFN}, from s:{FFN}"),
                       (Row(WTE, "test.refuses", f"s:{WTE}"), "no such token")]:
        with pytest.raises(Refusal, match=words) as e: write(plan_of(c, [row]), {"s": c}, tmp_path/"out", shard=800)
        assert "\n" not in str(e.value) and left(tmp_path) == before

class Silent:
    "A source that tells what it holds, and may not be read."
    def __init__(self, c): self.c, self.names, self.shape, self.dtype = c, c.names, c.shape, c.dtype
    def read(self, *_, **__): raise AssertionError("read")
    card = property(lambda self: self.read())

def test_refused_before_anything_is_read(c, tmp_path, monkeypatch):
    (tmp_path/"there").mkdir(); (tmp_path/"file").write_text(""); os.symlink("nowhere", tmp_path/"link"); before = left(tmp_path)
    plan = plan_of(c)
    for place, words in {"there": "exists", "file": "exists", "link": "exists", "file/out": "cannot be written"}.items():
        with pytest.raises(Refusal, match=words): write(plan, {"s": Silent(c)}, tmp_path/place)
    with pytest.raises(Refusal, match="cannot be written"): write(plan, {"s": Silent(c)}, "/proc/out")
    usage = __import__("shutil").disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=10**7))
    with pytest.raises(Refusal, match=r"needs 0\.02 GB and its disk has 0\.01 GB free; make room"): write(plan, {"s": Silent(c)}, tmp_path/"x"/"y"/"out")
    assert left(tmp_path) == before

@pytest.mark.parametrize("error", [28, 122])
def test_a_disk_that_fills_up(c, tmp_path, monkeypatch, error):
    def full(_): raise OSError(error, os.strerror(error))
    monkeypatch.setattr(os, "fdatasync", full); before = left(tmp_path)
    with pytest.raises(Refusal, match="disk of .* is full"): write(plan_of(c), {"s": c}, tmp_path/"new"/"out", shard=900)
    assert left(tmp_path) == before

@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_stopped_midway(c, tmp_path, monkeypatch, error):
    before, real, seen = left(tmp_path), Checkpoint.pieces, []
    def pieces(self, name, **kw):
        if len(seen) == 9: assert len(left(tmp_path)) > len(before) + 5; raise error
        seen.append(name); yield from real(self, name, **kw)
    monkeypatch.setattr(Checkpoint, "pieces", pieces)
    with pytest.raises(error): write(plan_of(c), {"s": c}, tmp_path/"new"/"out", shard=900)
    assert left(tmp_path) == before and len(seen) == 9

def test_a_source_that_is_cut_while_it_is_read(c, tmp_path):
    f = c.path/"model.safetensors"; f.write_bytes(f.read_bytes()[:-900]); before = left(tmp_path)
    with pytest.raises(Refusal, match="is damaged: it ends at byte"): write(plan_of(c), {"s": c}, tmp_path/"out")
    assert left(tmp_path) == before

def test_further_files(c, tmp_path, capsys):
    write(plan_of(c), {"s": c}, tmp_path/"out", extra={"report.html": "<p>ü</p>", "report.json": {"ü": 1}, "raw.bin": b"\x00\xff"})
    assert (tmp_path/"out"/"report.html").read_text(encoding="utf-8") == "<p>ü</p>" and (tmp_path/"out"/"raw.bin").read_bytes() == b"\x00\xff"
    assert json.loads((tmp_path/"out"/"report.json").read_text(encoding="utf-8")) == {"ü": 1}
    assert "writing" not in capsys.readouterr().err   # no bar where nobody looks
    before = left(tmp_path)
    for name in "../x", "/tmp/x", "a/b", "..", ".", "", "config.json", "plan.json", "seqwarm.json", "model.safetensors", "model.safetensors.index.json":
        with pytest.raises(Refusal, match="cannot be the name|of the checkpoint itself"): write(plan_of(c), {"s": c}, tmp_path/"x", extra={name: "y"})
    assert left(tmp_path) == before

def test_who_may_read_a_folder_may_read_its_weights(tmp_path):
    "safetensors writes for its writer alone; in a team's folder that is no model."
    (tmp_path/"plain").write_text("")
    with whole_folder(tmp_path/"new") as tmp: save_file({"x": torch.ones(2)}, tmp/"x.safetensors"); (tmp/"to").symlink_to(tmp_path/"plain")
    assert (tmp_path/"new"/"x.safetensors").stat().st_mode == (tmp_path/"plain").stat().st_mode and (tmp_path/"new"/"to").is_symlink()

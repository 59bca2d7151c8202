"""METRO's auxiliary, run once: what it proposes is kept, found again, drawn from at any temperature, and paid once."""
import json, math, os, random, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel
from seqwarm.core.checkpoint import Card
from seqwarm.core.errors import Refusal
from seqwarm.core.ledger import Cost, flops, lineage, units
from seqwarm.core.stages import Chain, Stage, optimizer
from seqwarm.core.train import _Loop, train
from seqwarm.core.vocab import train_tokenizer
from seqwarm.methods import offline as module
from seqwarm.methods.metro import _text, pair
from seqwarm.methods.offline import Kept, Offline, propose, taken
import train_metro
from train_small import equal, forked, given, weights

NAME = "metro?rate=0.3&heat=2&tau=0.5"
SIZES = dict(batch=4, sequences=8)
pytestmark = pytest.mark.usefixtures("quick")

def stages(repeat=None, name=NAME, frozen=()): return [Stage(6, 5e-3, name, frozen=frozen, repeat=repeat)]

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("offline")
    torch.set_num_threads(threads)

@pytest.fixture(scope="module")
def data(folder): return given(str(folder))

@pytest.fixture(scope="module")
def auxiliary(data):
    "One whose guesses differ from place to place."
    model = train_metro.mlm(data["tokenizer"], 1, dropout=0.1)
    for p in model.parameters(): p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model

@pytest.fixture(scope="module")
def kept(folder, data, auxiliary):
    "All tokens, and five of them."
    return [propose(auxiliary, stages=stages(), store=folder/"kept", **data, **SIZES, **o) for o in (dict(k=len(data["tokenizer"]), keep="float32"), dict(k=5))]

def run(made, data, store, repeat=None, **more):
    options = dict(every=3, save_every=2) | SIZES | more
    return train(made, stages=stages(repeat, frozen=made.idle), store=store, **data, **options)

def batches(data, auxiliary, name=NAME, repeat=None):
    return [x for _, x in module._batches(stages(repeat, name), data["corpus"], data["valid"], data["tokenizer"], auxiliary.config, 4, 0, 8, "cpu")]

def offline(data, kept, dropout=0.0, **options): return Offline(train_metro.mlm(data["tokenizer"], dropout=dropout), kept, **options)

@pytest.fixture(scope="module")
def calm(folder, data, kept): return run(offline(data, kept[1], 0.1), data, folder/"calm", parents=(kept[1].card,))


# ---------------------------------------------------------------- what is drawn

def test_all_tokens_kept_are_the_frozen_auxiliary_itself(data, auxiliary, kept, folder):
    "Draw by draw, at temperatures that were not known when the table was filled; and loss by loss, through a training."
    assert len(kept[0].mass) == 2 and all(m == pytest.approx(1, abs=1e-5) for m in kept[0].mass.values())
    for name in (NAME, "metro?rate=0.3", "metro?rate=0.3&heat=0.5&tau=1"):
        frozen, other = pair(train_metro.mlm(data["tokenizer"]), auxiliary=auxiliary).eval(), offline(data, kept[0]).eval()
        for x in batches(data, auxiliary, name):
            (one, _, filled, *_), (two, _, again, *_) = frozen.seen(x), other.seen(x)
            assert torch.equal(filled, again) and torch.allclose(one, two, rtol=1e-5) and (filled != _text(0, **x).ids).any()
    other, frozen = run(other, data, folder/"equal"), run(frozen, data, folder/"equal")
    for column in ("train", "loss", "aux", "rtd", "clm", "auc", "recall", "precision", "replaced", "over_base", "spread", "lr", "tokens"):
        assert np.allclose(other.history[column].astype(float), frozen.history[column].astype(float), rtol=1e-5, equal_nan=True), column
    after = [AutoModelForMaskedLM.from_pretrained(t.path).state_dict() for t in (other, frozen)]
    assert all(torch.allclose(x, after[1][n], atol=1e-5) for n, x in after[0].items())

def slow(auxiliary, x, k, keep=np.float16):
    "What is drawn of the k likeliest, in plain steps; and the mass that they have, summed at temperature 1 and 2."
    logits = auxiliary.eval()(input_ids=x["input_ids"], attention_mask=x["attention_mask"], position_ids=x["position_ids"]).logits.double()
    filled, mass, n = x["input_ids"].clone(), np.zeros(2), 0
    for b, s in (x["labels"] != -100).nonzero().tolist():
        z = logits[b, s].tolist(); best = sorted(sorted(range(len(z)), key=lambda v: -z[v])[:k])
        for i, T in enumerate((1, 2)): mass[i] += sum(math.exp(z[v] / T) for v in best) / sum(math.exp(y / T) for y in z)
        near = [float(keep(z[v] - max(z))) / x["temperature"][b].item() for v in best]
        u = x["chance"][b, s].item() * sum(map(math.exp, near))
        filled[b, s] = best[next(i for i in range(k) if sum(map(math.exp, near[:i + 1])) >= u * (1 - 1e-15) or i == k - 1)]; n += 1
    return filled, mass, n

@torch.no_grad()
def test_a_few_kept_are_renormalised(data, auxiliary, kept):
    made, whole, places, same = offline(data, kept[1]).eval(), np.zeros(2), 0, 0
    for x in batches(data, auxiliary):
        filled, mass, n = slow(auxiliary, x, 5); whole += mass; places += n
        mine = made.fill(_text(0, **x))[1]; at = x["labels"] != -100
        same += (mine == filled)[at].sum().item()
        assert torch.equal(mine[~at], filled[~at])
    assert places == kept[1].told["places"] and same >= places - 1            # a float16 may be rounded from either side
    assert [kept[1].mass["1"], kept[1].mass["2"]] == pytest.approx(whole / places, rel=1e-4) and kept[1].mass["2"] < kept[1].mass["1"] < 0.99

def test_temperature_one_is_none(data, auxiliary, kept):
    made = offline(data, kept[1]).eval()
    for x in batches(data, auxiliary, "metro?rate=0.3"):
        bare = {k: v for k, v in x.items() if k != "temperature"}
        assert (x["temperature"] == 1).all() and torch.equal(made.fill(_text(0, **x))[1], made.fill(_text(0, **bare))[1])

def test_a_lucky_sample_is_original(data, auxiliary, kept):
    made = offline(data, kept[1]).eval(); x = batches(data, auxiliary)[0]; t = _text(0, **x)
    sure = t.ids.flatten()[t.at][:, None]      # a table that is sure of what stood there
    made.kept = SimpleNamespace(read=lambda _: (sure, torch.zeros(sure.shape), torch.zeros(len(sure))))
    assert torch.equal(made.seen(x)[2], t.ids) and made.read(made.tally(**x))["replaced"] == 0


# ---------------------------------------------------------------- the table

def test_bytes_are_as_promised(data, kept):
    V = len(data["tokenizer"]); assert 256 < V < 65_536
    for table, k, logit in zip(kept, (V, 5), (4, 2)):
        n = table.told["places"]
        assert table.told["bytes"] == taken(32, n, k, V, table.told["keep"]) == n * (k * (2 + logit) + 4) + 24 * 32
        files = [table.folder/f"{f}.npy" for f in module._FILES]
        assert sum(np.load(f, mmap_mode="r").nbytes for f in files) == table.told["bytes"] == sum(f.stat().st_size for f in files) - 5 * 128
        assert table.ids.dtype == np.uint16 and (np.diff(table.ids.astype(int)) > 0).all() and (table.logits.max(1) == 0).all()
        assert table.told["rows"] == 32 and int(table.first[:, 1].sum()) == n

def test_what_takes_too_much_is_refused_before_anything_is_written(data, auxiliary, kept, folder):
    ask = lambda most: propose(auxiliary, stages=stages(), store=folder/"bound", **data, **SIZES, k=5, most=most)
    for most in (100, kept[1].told["bytes"] - 1):
        with pytest.raises(Refusal, match=f"may take {most:,}; repeat a shorter round"): ask(most)
        assert not (folder/"bound").exists()
    assert ask(kept[1].told["bytes"]).told["address"] == kept[1].told["address"]

def test_rounds_take_a_round(data, auxiliary, folder):
    "A third of the steps; and a row that does not come round is told."
    short = propose(auxiliary, stages=stages(2), store=folder/"rounds", **data, **SIZES, k=5)
    assert short.told["rows"] == 2 * 4 + 8
    trained = run(offline(data, short), data, folder/"rounds", repeat=2)
    assert trained.history.train.notna().sum() == 2
    with pytest.raises(Refusal, match="of 4 of 4 rows nothing was foreseen"): run(offline(data, short), data, folder/"all")
    with pytest.raises(Refusal, match="nothing was foreseen"): run(offline(data, short), data, folder/"more", repeat=2, sequences=9)
    with pytest.raises(Refusal, match="nothing was foreseen"): run(offline(data, short), data, folder/"seed", repeat=2, seed=1)

def test_stages_one_after_the_other(data, auxiliary, folder):
    two = [Stage(2, objective="metro?rate=0.3"), Stage(3, objective="metro?rate=0.15", repeat=2)]
    table = propose(auxiliary, stages=two, store=folder/"two", **data, **SIZES, k=5)
    assert table.told["rows"] == (2 + 2) * 4 + 2 * 8
    made = offline(data, table)
    done = train(made, stages=two, store=folder/"two", **data, **SIZES, every=1, save_every=9)
    assert len(done.history) == 6 and done.history.loss.notna().all()

def test_an_address_is_all_that_the_table_depends_on(data, auxiliary, kept, folder, calm):
    ask = lambda model=auxiliary, name=NAME, **o: propose(model, stages=stages(name=name), store=folder/"kept", **data, **SIZES | dict(k=5) | o)
    filled = (kept[1].folder/"ids.npy").stat().st_mtime_ns
    for same in (ask(), ask(name="metro?rate=0.3"), ask(name="metro?rate=0.3&heat=9")):
        assert same.folder == kept[1].folder and (same.folder/"ids.npy").stat().st_mtime_ns == filled
    moved = train_metro.mlm(data["tokenizer"], 1); card = Card("other", "found", id="x" * 32)
    others = [ask(k=6), ask(keep="float32"), ask(moved), ask(seed=1), ask(sequences=9), ask(name="metro?rate=0.2"), ask(parents=(card,))]
    assert len({t.folder for t in [*others, kept[1]]}) == 8
    again, six = run(offline(data, kept[1], 0.1), data, folder/"calm", parents=(kept[1].card,)), run(offline(data, others[0], 0.1), data, folder/"calm", parents=(kept[1].card,))
    assert again.path == calm.path != six.path

@pytest.mark.parametrize("hard", [False, True], ids=["interrupted", "killed"])
def test_a_filling_that_is_stopped_goes_on(data, auxiliary, kept, folder, monkeypatch, hard):
    "To the same bytes, and asks nothing twice: interrupted anywhere, or killed, which costs what is not yet in the book."
    ask, calls, store = module._ask, [], folder/f"stopped-{hard}"
    def struck(*args):
        calls.append(1)
        if len(calls) == 4: os._exit(9) if hard else exec("raise KeyboardInterrupt")
        return ask(*args)
    call = lambda: propose(auxiliary, stages=stages(), store=store, **data, **SIZES, k=5)
    monkeypatch.setattr(module, "_ask", struck)
    if hard:
        monkeypatch.setattr(module, "_OFTEN", -1)      # a note after each batch
        os.waitpid(forked(call), 0)
    else:
        with pytest.raises(KeyboardInterrupt): call()
    [at] = store.glob("proposals-*"); assert json.loads((at/"book.json").read_text())["batches"] == 3 and not (at/"table").exists()
    calls[:] = [1]*9; table = call()
    assert len(calls) == 9 + kept[1].told["batches"] - 3 and sorted(f.name for f in at.iterdir()) == [".lock", "table"]
    for f in [f"{n}.npy" for n in module._FILES] + ["told.json"]: assert (table.folder/f).read_bytes() == (kept[1].folder/f).read_bytes(), f
    assert {f.name for f in table.folder.iterdir()} == {f.name for f in kept[1].folder.iterdir()} and table.card.cost["flops"] == kept[1].card.cost["flops"]

def test_two_ranks_have_the_table_and_the_training_of_one(folder):
    one = train_metro.offline(str(folder), str(folder/"lone"))
    subprocess.run([sys.executable, Path(train_metro.__file__), folder, folder/"ranks", str(random.randint(20000, 60000)), "offline"],
                   check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, capture_output=True)
    [mine], [theirs] = ((folder/w).glob("proposals-*/table") for w in ("lone", "ranks"))
    assert mine.parent.name == theirs.parent.name and not list((folder/"ranks").rglob("*.part")) and not list((folder/"ranks").rglob("book.json"))
    for f in [f"{n}.npy" for n in module._FILES] + ["told.json"]: assert (mine/f).read_bytes() == (theirs/f).read_bytes(), f
    [history] = (folder/"ranks").glob("*/history.json"); rows = json.loads(history.read_text())
    for k in ("loss", "aux", "rtd", "clm", "spread"): assert np.allclose([r[k] for r in rows], one.history[k], rtol=1e-5), k


# ---------------------------------------------------------------- training

def test_resumed_is_bit_equal(data, kept, folder, calm, monkeypatch):
    update = _Loop.update
    def struck(self, model, opt, feed, step, rates):
        if step == 5: raise KeyboardInterrupt
        return update(self, model, opt, feed, step, rates)
    start = lambda: run(offline(data, Kept(kept[1].folder), 0.1), data, folder/"struck", parents=(kept[1].card,))    # opened without an auxiliary
    monkeypatch.setattr(_Loop, "update", struck)
    with pytest.raises(KeyboardInterrupt): start()
    assert list((folder/"struck").glob("*/state-000000004"))
    monkeypatch.setattr(_Loop, "update", update)
    trained = start()
    assert equal(weights(trained.path), weights(calm.path)) and (trained.path/"detect.safetensors").read_bytes() == (calm.path/"detect.safetensors").read_bytes()
    assert trained.history.drop(columns="seconds").equals(calm.history.drop(columns="seconds"))

def test_any_cut_of_the_batch_finds_its_rows(data, kept, folder):
    one, parts = (run(offline(data, kept[1]), data, folder/"parts", accumulate=n) for n in (1, 4))
    assert one.path != parts.path
    for k in ("train", "loss", "rtd", "clm"): assert np.allclose(one.history[k].dropna(), parts.history[k].dropna(), rtol=1e-4), k

def test_no_auxiliary_anywhere(data, kept, calm):
    made = offline(data, kept[1])
    assert not [n for n, _ in made.named_parameters() if "auxiliary" in n] and set(dict(made.named_parameters(remove_duplicate=False))) <= set(made.layout.tensors)
    assert not (calm.path/"auxiliary").exists() and (calm.path/"detect.safetensors").exists()
    assert AutoModelForMaskedLM.from_pretrained(calm.path).config.num_hidden_layers == 2
    assert {"aux", "rtd", "clm", "auc", "recall", "precision", "replaced", "over_base", "spread"} <= set(calm.history) and calm.history.aux.nunique() == 1
    assert calm.history.loss.iloc[-1] < calm.history.loss.iloc[0]


# ---------------------------------------------------------------- cost

@pytest.mark.parametrize("options", [dict(), dict(weights=dict(clm=0))], ids=["all", "detection alone"])
def test_flops_as_torch_counts(data, auxiliary, kept, options):
    main = train_metro.mlm(data["tokenizer"]); main.set_attn_implementation("eager")
    made = Offline(main, kept[1], **options).train(); lay = made.layout
    optimizer(made, lay, Chain((Stage(1, objective="metro", frozen=made.idle),)))
    x = batches(data, auxiliary)[0]; n, S = int((x["labels"] != -100).sum()), 16
    x["attention_mask"] = torch.zeros(x["attention_mask"].shape).masked_fill_(~x["attention_mask"], torch.finfo(torch.float32).min)
    told = lambda train, at: flops(lay, S, train=train, frozen=made.idle, asked=at)
    for back in (False, True):
        with FlopCounterMode(display=False) as counter:
            loss = made(**x).sum()
            if back: loss.backward()
        assert 4 * told(back, 0) + n * (told(back, 1) - told(back, 0)) == pytest.approx(counter.get_total_flops(), rel=1e-6), back

def test_filling_is_one_forward_pass(data, auxiliary, kept):
    auxiliary.set_attn_implementation("eager"); counted = 0
    try:
        for x in batches(data, auxiliary)[:6]:      # those that are trained on
            with FlopCounterMode(display=False) as counter, torch.no_grad(): module._ask(auxiliary, 0, x, 5, "float16")
            counted += counter.get_total_flops()
    finally: auxiliary.set_attn_implementation("sdpa")
    cost = kept[1].card.cost
    assert cost["flops"] == pytest.approx(counted, rel=1e-6) and cost["units"] == pytest.approx(6 / 1e5 / 12 / 2) and cost["tokens"] == 0 and cost["seconds"] > 0

def test_what_the_auxiliary_cost_is_paid_once(data, folder):
    first = train_metro.main(str(folder), str(folder/"first"))
    table = propose(first.path/"auxiliary", stages=stages(), store=folder/"line", **data, **SIZES, k=5)
    assert table.card.parents == [Card.load(first.path/"auxiliary").id]
    one, two = (run(offline(data, table, weights=dict(rtd=w)), data, folder/"line", parents=(table.card,)) for w in (50.0, 10.0))
    own, made = Cost.of(one.card.cost), offline(data, table)
    assert own.flops == 6 * 4 * flops(made.layout, 16, asked=5) and own.tokens == 6 * 4 * 16 and own.units == pytest.approx(units(made.layout, 6))
    add = lambda *costs: sum((Cost.of(c).flops for c in costs), 0.0)
    assert lineage(one.card).flops == add(first.card.cost, table.card.cost, own)
    assert lineage([one.card, two.card]).flops == add(first.card.cost, table.card.cost, own, two.card.cost)


# ---------------------------------------------------------------- bad input

def test_refusals(data, auxiliary, kept, folder):
    tokenizer, main = data["tokenizer"], train_metro.mlm(data["tokenizer"])
    other = train_tokenizer(["quite another text"] * 9, 300); other.save_pretrained(folder/"other")
    ask = lambda model=auxiliary, **o: propose(model, **dict(stages=stages(), store=folder/"no", k=5) | data | SIZES | o)
    wide, narrow = main.config.__class__(**main.config.to_dict() | dict(vocab_size=400)), auxiliary.config.__class__(**auxiliary.config.to_dict() | dict(vocab_size=100))
    for says, call in {
        "tokenizer of the auxiliary .* differs": lambda: ask(folder/"other"), "tokenizer has .* and the auxiliary 100": lambda: ask(type(auxiliary)(narrow)),
        "tokenizer of the proposals differs": lambda: Offline(main, kept[1], tokenizer=other),
        f"of {len(tokenizer)} tokens and the main model has 400": lambda: Offline(type(main)(wide), kept[1]),
        "no auxiliary here that could be trained": lambda: Offline(main, kept[1], weights=dict(aux=1.0)), "no loss of METRO 'rdt'": lambda: Offline(main, kept[1], weights=dict(rdt=1)),
        "k cannot be 0": lambda: ask(k=0), "1000 tokens of .* can't be kept": lambda: ask(k=1000), "no way to keep logits 'int8'": lambda: ask(keep="int8"),
        "nothing is proposed for mlm": lambda: ask(stages=[Stage(2, objective="mlm")]), "no head over the vocabulary": lambda: ask(BertModel(main.config)),
        "no encoder for METRO 'gpt2'": lambda: ask(GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=8, n_head=1, n_layer=1))),
        "holds no proposals": lambda: Kept(folder), "nothing trains main/head": lambda: offline(data, kept[1], weights=dict(clm=0)).train()(**batches(data, auxiliary)[0]),
        "Offline can't do mlm": lambda: train(offline(data, kept[1]), stages=[Stage(1, objective="mlm")], store=folder/"no", **data)}.items():
        with pytest.raises(Refusal, match=says): call()
    broken = train_metro.mlm(tokenizer, 1); broken.get_input_embeddings().weight.data[:] = math.nan
    with pytest.raises(Refusal, match="logits are no numbers"): ask(broken)
    assert not list((folder/"no").rglob("*.npy")) and json.loads((kept[1].folder/"told.json").read_text())["k"] == 5

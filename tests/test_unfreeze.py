"""Staged unfreezing: what sleeps does not move, drop, keep or weigh anything; a run is the same whenever it is killed; kept outputs are the encoder's."""
import gc, json, os, random, subprocess, sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from seqwarm.core import feed as reading, train as module
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import layout
from seqwarm.core.ledger import flops, units
from seqwarm.core.losses import _nll
from seqwarm.core.objectives import Draws, objective, shape
from seqwarm.core.stages import Chain, Stage, asleep, chains, optimizer
from seqwarm.core.train import _Loop, train
from seqwarm.methods.unfreeze import always, frozen_then, gradual, timetable
import train_seq2seq
from train_small import same, weights

SCRIPT, ENCODER = Path(train_seq2seq.__file__), ("encoder/", "embed.token")

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    gc.collect(); gc.freeze()   # accelerate collects after every stage, and what was imported need not be looked at each time
    yield tmp_path_factory.mktemp("unfreeze")
    gc.unfreeze(); torch.set_num_threads(threads)

@pytest.fixture(scope="module")
def given(folder): return train_seq2seq.given(str(folder))

@pytest.fixture
def run(folder, given):
    "Train the small model through stages."
    def call(store, stages, dropout=0.1, **changed):
        model = changed.pop("model", None) or train_seq2seq.model(given["tokenizer"], dropout)
        return train(model, stages=stages, store=folder/store, **given | dict(batch=4, every=6, save_every=4, sequences=4) | changed)
    return call

def lay_of(model): return layout(model.config, type(model).__name__)

# ---------------------------------------------------------------- what sleeps

@contextmanager
def spied(seen: list):
    "Every step's optimizer, modes and gradients, as they are before the update."
    update = _Loop.update
    def spy(self, model, opt, feed, step, rates):
        state = {id(p) for p in opt.state}
        held = {id(p) for g in opt.param_groups for p in g["params"]}
        seen.append(dict(step=step, rates=rates, held=held, moments=state, training={n for n, m in self.model.named_modules() if m.training},
                         grads={n for n, p in self.model.named_parameters() if p.requires_grad}))
        return update(self, model, opt, feed, step, rates)
    _Loop.update = spy
    try: yield seen
    finally: _Loop.update = update

@pytest.mark.parametrize("embeddings", ["sleep", "awake"])
def test_the_frozen_stay_bit_equal_and_in_evaluation_mode_without_optimizer_state(run, given, embeddings):
    start, model = train_seq2seq.model(given["tokenizer"], 0.1), train_seq2seq.model(given["tokenizer"], 0.1)
    lay = lay_of(model); stages = always(8, lay, embeddings=embeddings, objective="denoise", lr=5e-3)
    with spied([]) as seen: trained = run(f"still-{embeddings}", stages, model=model, every=3)
    after, sleeping = weights(trained.path), lay.select(stages[0].frozen)
    assert {n for n, p in start.named_parameters() if torch.equal(p, after[n])} == set(sleeping)   # all else has moved
    assert ("model.shared.weight" in sleeping) == (embeddings == "sleep")
    asleep_ids = {id(p) for n, p in model.named_parameters() if n in sleeping}
    inside = {n for n, _ in model.named_modules() if n.startswith("model.encoder.layers")}
    for s in seen:   # measurements in between call eval() and train()
        assert not s["held"] & asleep_ids and not s["moments"] & asleep_ids and not inside & s["training"] and "model.decoder.layers.0" in s["training"]
        assert ("model.encoder" in s["training"]) == (embeddings == "awake")   # the stack itself drops what the awake embedding gives
    model.train()
    assert all(m.training for m in model.modules())   # nothing of it is left behind

def test_the_embedding_is_one_storage_and_one_decision(run, given):
    for embeddings in ("sleep", "awake"):
        model = train_seq2seq.model(given["tokenizer"], 0.0); before = model.model.shared.weight.detach().clone()
        run(f"storage-{embeddings}", always(2, lay_of(model), embeddings=embeddings, objective="denoise", lr=5e-3), model=model)
        tied = (model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight, model.lm_head.weight, model.model.shared.weight)
        assert len({w.data_ptr() for w in tied}) == 1 and all(torch.equal(w, before) == (embeddings == "sleep") for w in tied)

def saved_bytes(model, call):
    "Bytes of the storages that autograd keeps beside the parameters, for what `call` computes; and that."
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    def pack(t): kept[t.untyped_storage().data_ptr()] = t.untyped_storage(); return t
    with saved_tensors_hooks(pack, lambda t: t): out = call()
    return sum(x.nbytes() for at, x in kept.items() if at not in parameters), out

@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_a_sleeping_encoder_keeps_no_graph(kind):
    "What is saved for the backward pass is what a decoder alone saves that is given the encoder's output."
    torch.manual_seed(0); ids, V = torch.randint(5, 60, (3, 9)), 64
    if kind == "bart":
        model = BartForConditionalGeneration(BartConfig(vocab_size=V, d_model=16, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                                                        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32, dropout=0.1))
    else: model = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2, decoder_start_token_id=0))
    lay = lay_of(model); inputs = dict(input_ids=ids, decoder_input_ids=ids, labels=ids)
    def step(**more):
        torch.manual_seed(1); return _nll(model, {k: v for k, v in (inputs | more).items() if not (more and k == "input_ids")})
    sizes = {}
    for name, frozen in dict(awake=(), embedding_awake=("encoder/",), asleep=ENCODER).items():
        optimizer(model, lay, Chain((Stage(1, frozen=frozen),)))
        with asleep(model): model.train(); sizes[name], loss = saved_bytes(model, step)
        with asleep(model), torch.no_grad(): out = model.get_encoder()(ids).last_hidden_state
    with asleep(model): model.train(); alone, again = saved_bytes(model, lambda: step(encoder_outputs=out))
    assert torch.equal(loss, again)   # and says the same
    assert sizes["asleep"] <= alone + ids.nbytes and sizes["embedding_awake"] > 1.3 * sizes["asleep"] and sizes["awake"] > 1.3 * sizes["asleep"]
    loss.backward()
    assert all((p.grad is None) == (n in lay.select(ENCODER)) for n, p in model.named_parameters())

def test_the_highest_modules_sleep_and_only_those_that_sleep_altogether():
    model = BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16))
    lay = lay_of(model); names = {id(m): n for n, m in model.named_modules()}
    for frozen, expected in [((), []), (("@0-0",), ["bert.encoder.layer.0"]), (("@0-1",), ["bert.encoder"]), (("attn.q",), [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]),
                             (("embed", "@0-1"), ["bert"])]:
        optimizer(model, lay, Chain((Stage(1, frozen=frozen),)))
        if frozen == ("embed", "@0-1"): assert not model.cls.predictions.decoder.weight.requires_grad   # tied: asleep in the head too, which has a bias awake
        with asleep(model) as found:
            model.train(); model.eval(); model.train()
            if "embed" not in frozen: assert [names[id(m)] for m in found] == expected
            else: assert names[id(found[0])] == "bert"
            assert all(not child.training for m in found for child in m.modules())
            down = {id(c) for m in found for c in m.modules()}
            assert all(m.training for m in model.modules() if id(m) not in down)

# ---------------------------------------------------------------- waking

STAGES = [Stage(6, 4e-3, "denoise", frozen=ENCODER), Stage(6, 4e-3, "denoise", warmup=0.5, continues=True), Stage(4, 2e-3, "denoise", frozen=("encoder/",))]

def test_waking_is_plain_adamw_in_two_groups(run, given):
    "By hand: one AdamW throughout, the encoder's group added at the switch, with a warm-up of its own; no dropout, no accelerate."
    trained = run("byhand", STAGES[:2], dropout=0.0)
    model = train_seq2seq.model(given["tokenizer"], 0.0).train(); lay = lay_of(model); ids = set(lay.select(ENCODER))
    whole, low, high = Stage(12, 4e-3), {n: p for n, p in model.named_parameters() if n in ids}, {n: p for n, p in model.named_parameters() if n not in ids}
    groups = lambda ps: [dict(params=[p for p in ps.values() if p.dim() > 1], weight_decay=0.1), dict(params=[p for p in ps.values() if p.dim() < 2], weight_decay=0.0)]
    opt = torch.optim.AdamW(groups(high), lr=4e-3, betas=(0.9, 0.98))
    for p in low.values(): p.requires_grad_(False)
    for step in range(12):
        if step == 6:
            for p in low.values(): p.requires_grad_(True)
            for g in groups(low): opt.add_param_group(g)
        packed = given["corpus"].sample(np.arange(step * 4, step * 4 + 4))
        inputs = {k: v for k, v in objective("denoise")(packed, Draws(0, step, packed.samples), model.config, given["tokenizer"]).items() if v is not None}
        labels = inputs.pop("labels")
        F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], 1.0)
        for i, g in enumerate(opt.param_groups): g["lr"] = whole.lr_at(step) * (min(1, (step - 5) / 3) if i > 1 else 1)
        opt.step(); opt.zero_grad()
    got, keys = weights(trained.path), lambda n: n.endswith("k_proj.bias")   # a key's bias has no gradient but rounding, which Adam blows up
    for n, p in model.named_parameters(): assert keys(n) or torch.allclose(got[n], p, atol=2e-5), n

def test_the_rate_of_what_was_awake_does_not_feel_the_switch(run):
    with spied([]) as seen: run("rates", STAGES[:2])
    whole = Stage(12, 4e-3)
    assert [s["rates"][0] for s in seen] == [whole.lr_at(i) for i in range(12)]
    assert [len(s["rates"]) for s in seen] == [1] * 6 + [2] * 6
    assert np.allclose([s["rates"][1] / s["rates"][0] for s in seen[6:]], [1/3, 2/3, 1, 1, 1, 1])
    first, later = len(seen[5]["moments"]), [len(s["moments"]) for s in seen[6:]]
    assert later[0] == first > 0 and later[1] == len(seen[6]["held"]) > first   # handed over at the switch; newcomers have theirs a step later

def test_what_falls_asleep_again_begins_anew(run, given):
    model = train_seq2seq.model(given["tokenizer"], 0.0)
    stages = [Stage(2, objective="denoise"), Stage(2, objective="denoise", frozen=ENCODER, continues=True), Stage(2, objective="denoise", continues=True)]
    with spied([]) as seen: run("again", stages, model=model)
    ids = {id(p) for n, p in model.named_parameters() if n in lay_of(model).select(ENCODER)}
    assert [ids <= s["moments"] for s in seen] == [False, True, False, False, False, True]
    assert [bool(ids & s["moments"]) for s in seen] == [False, True, False, False, False, True]

@pytest.mark.parametrize("at", [5, 6, 7, 12])
def test_stopped_before_at_or_after_the_switch_it_resumes_bit_equal(run, folder, at, calm):
    "The switches are at 6 (the chain goes on) and at 12 (a new one begins); a state is kept at every step."
    update = _Loop.update
    def struck(self, model, opt, feed, step, rates):
        if step == at: raise KeyboardInterrupt
        return update(self, model, opt, feed, step, rates)
    _Loop.update = struck
    try:
        with pytest.raises(KeyboardInterrupt): run(f"struck-{at}", STAGES, save_every=1)
    finally: _Loop.update = update
    [state] = (folder/f"struck-{at}").glob("*/state-*")
    assert int(state.name.split("-")[1]) == at
    assert same(run(f"struck-{at}", STAGES, save_every=1), calm)

@pytest.fixture(scope="module")
def calm(folder, given): return train(train_seq2seq.model(given["tokenizer"], 0.1), stages=STAGES, store=folder/"calm", **given, batch=4, every=6, save_every=100, sequences=4)

def test_sigkill_anywhere_and_resumed_is_bit_equal(folder):
    "Processes of their own, with kept outputs and a switch, killed at random one after the other; the last of all is let through."
    store, steps = folder/"killed", ["0", "2", "5", "4", "5", "4"]   # from the states 0, 0, 3, 6 and 9: before, at and after the switch in step 10
    done = subprocess.run([sys.executable, SCRIPT, "killed", folder, store, *steps], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["9"] * 6   # the signals they died of
    [begun] = [int(p.name.split("-")[1]) for p in store.glob("*/state-*")]
    trained, quiet = train_seq2seq.main(str(folder), str(store), 0.1), train_seq2seq.main(str(folder), str(folder/"unkilled"), 0.1)
    assert begun >= 12 and same(trained, quiet)   # each went on where the one before had stood
    assert not list(store.glob("*/.*.part")) and not list(store.glob("*/state-*"))

def test_two_ranks_wake_and_keep_as_one(folder):
    one = train_seq2seq.main(str(folder), str(folder/"one"))
    subprocess.run([sys.executable, SCRIPT, "ranks", folder, folder/"two", str(random.randint(20000, 60000))], check=True, capture_output=True,
                   env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    [history] = (folder/"two").glob("*/history.json")
    assert np.allclose([r["loss"] for r in json.loads(history.read_text())], one.history.loss, rtol=1e-5) and len(list((folder/"two").glob("kept-*"))) == 2

# ---------------------------------------------------------------- what it costs

def test_the_ledger_is_the_sum_by_hand(run, given, calm):
    lay, L = lay_of(train_seq2seq.model(given["tokenizer"], 0.1)), given["corpus"].length
    S, T = shape("denoise", L)
    by_hand = 4 * (6 * flops(lay, S, T, frozen=list(ENCODER)) + 6 * flops(lay, S, T) + 4 * flops(lay, S, T, frozen=["encoder/"]))
    cost = calm.card.cost
    assert cost["flops"] == by_hand and cost["tokens"] == 16 * 4 * L
    assert cost["units"] == pytest.approx((6 * (1 + 2) + 6 * 4 + 4 * (1 + 2)) / 12 / 1e5)   # 2 + 2 layers, a frozen one counts half
    assert calm.history.flops.tolist() == sorted(calm.history.flops) and calm.history.flops.iloc[-1] == by_hand

def test_flops_of_a_decoder_that_reads_kept_outputs_as_torch_counts():
    model = train_seq2seq.model(range(60), 0.0); model.set_attn_implementation("eager"); lay, (B, S, T) = lay_of(model), (2, 11, 7)
    optimizer(model, lay, Chain((Stage(1, frozen=ENCODER),)))
    out = torch.randn(B, S, model.config.d_model)
    with FlopCounterMode(display=False) as counter:
        model(encoder_outputs=BaseModelOutput(last_hidden_state=out), decoder_input_ids=torch.randint(5, 60, (B, T)), use_cache=False).logits.sum().backward()
    assert flops(lay, S, T, frozen=ENCODER, encoder=False) * B == counter.get_total_flops()
    with FlopCounterMode(display=False) as counter: model.get_encoder()(torch.randint(5, 60, (B, S)))
    assert (flops(lay, S, T, train=False) - flops(lay, S, T, train=False, encoder=False)) * B == counter.get_total_flops()
    assert units(lay, 12e5, ENCODER, encoder=False) == 2 and units(lay, 12e5, ENCODER) == 3

# ---------------------------------------------------------------- kept outputs

ROUNDS = dict(objective="denoise", lr=4e-3, repeat=3)

def test_kept_outputs_give_the_losses_of_the_plain_frozen_encoder(run, given, folder):
    lay = lay_of(train_seq2seq.model(given["tokenizer"], 0.1))
    plain, kept, half = (run(f"round-{keep}", frozen_then(12, 8, lay, keep=keep, **ROUNDS), every=3, accumulate=2) for keep in (None, "float32", "float16"))
    assert np.abs(plain.history.loss - kept.history.loss).max() < 1e-6 and np.abs(plain.history.train - kept.history.train).max() < 1e-6
    assert 0 < np.abs(plain.history.loss - half.history.loss).max() < 1e-2
    (S, T), L = shape("denoise", given["corpus"].length), given["corpus"].length
    forward = flops(lay, S, T, train=False) - flops(lay, S, T, train=False, encoder=False)
    assert kept.card.cost["flops"] == 4 * (3 * forward + 8 * flops(lay, S, T, frozen=ENCODER, encoder=False) + 4 * flops(lay, S, T))
    assert plain.card.cost["flops"] - kept.card.cost["flops"] == 4 * (8 - 3) * forward and kept.card.cost["tokens"] == 12 * 4 * L
    assert plain.card.cost["units"] - kept.card.cost["units"] == pytest.approx((8 - 3) * 0.5 * 2 / 12 / 1e5)
    [file] = (folder/"round-float16").glob("kept-*/outputs/outputs.npy")
    assert np.load(file, mmap_mode="r").shape == (3, 4, S, 16) and np.load(file, mmap_mode="r").dtype == np.float16

def test_a_round_reads_the_same_again_and_what_follows_reads_on(run, given):
    seen, parts = [], module.Feed.parts
    def spy(self, step): out = parts(self, step); seen.append((step, out[0]["input_ids"].clone())); return out
    module.Feed.parts = spy
    try: run("rounds", frozen_then(10, 7, lay_of(train_seq2seq.model(given["tokenizer"], 0.1)), **ROUNDS))
    finally: module.Feed.parts = parts
    seen = dict(seen)
    assert torch.equal(seen[0], seen[3]) and torch.equal(seen[2], seen[5]) and torch.equal(seen[0], seen[6]) and not torch.equal(seen[0], seen[1])
    for step in (7, 8, 9):   # as a plain training reads
        packed = given["corpus"].sample(np.arange(step * 4, step * 4 + 4))
        plain = objective("denoise")(packed, Draws(0, step, packed.samples), train_seq2seq.model(given["tokenizer"], 0.1).config, given["tokenizer"])
        assert torch.equal(plain["input_ids"], seen[step])

def test_kept_outputs_are_found_again_and_told_from_others(run, given, folder, monkeypatch):
    lay = lay_of(train_seq2seq.model(given["tokenizer"], 0.1)); stages = always(8, lay, keep="float32", **ROUNDS)
    first = run("shared", stages); filled, fill = [], reading._fill
    monkeypatch.setattr(reading, "_fill", lambda *a: (filled.append(1), fill(*a)))
    second = run("shared", [replace(stages[0], lr=1e-3)])
    assert not filled and second.card.cost["flops"] == first.card.cost["flops"] and second.path != first.path   # charged all the same
    other = train_seq2seq.model(given["tokenizer"], 0.1)
    with torch.no_grad(): other.model.encoder.layers[0].fc1.weight[0, 0] += 1e-3
    run("shared", stages, model=other); run("shared", stages, seed=1)
    assert len(filled) == 2 and len(list((folder/"shared").glob("kept-*"))) == 3

def test_filling_that_fails_leaves_nothing(run, given, folder):
    lay = lay_of(train_seq2seq.model(given["tokenizer"], 0.1)); model = train_seq2seq.model(given["tokenizer"], 0.1)
    with torch.no_grad(): model.model.encoder.layers[-1].final_layer_norm.weight.fill_(1e6)
    with pytest.raises(Refusal, match="no float16 numbers .* keep them as float32"): run("burst", always(8, lay, keep="float16", **ROUNDS), model=model)
    assert not (folder/"burst").exists()
    with pytest.raises(Refusal, match="bytes as float32 and may take 4,000"): run("much", always(8, lay, keep="float32", **ROUNDS), keep_bytes=4000)
    with pytest.raises(Refusal, match="model.shared.weight is awake; add 'embed.token'"): run("much", always(8, lay, embeddings="awake", keep="float32", **ROUNDS))
    assert not (folder/"much").exists()

# ---------------------------------------------------------------- schedules

def test_gradual_wakes_what_it_says_when_it_says(run, given):
    model = train_seq2seq.model(given["tokenizer"], 0.0); lay = lay_of(model)
    with spied([]) as seen: run("gradual", gradual(9, 2, 4, lay, objective="denoise"), model=model)
    layer = lambda i: {n for n, t in lay.stored().items() if t.stack == "encoder" and t.layer == i}
    for s in seen:
        awake = {n for n in lay.stored() if n in s["grads"]}
        assert (layer(1) <= awake) == (s["step"] >= 2) and bool(layer(1) & awake) == (s["step"] >= 2)
        assert (layer(0) <= awake) == (s["step"] >= 6) and ("model.shared.weight" in awake) == (s["step"] >= 6) == ("model.encoder.embed_positions.weight" in awake)
    assert [len(s["rates"]) for s in seen] == [1] * 2 + [2] * 4 + [3] * 3

def test_schedules_of_other_families():
    bert = layout(dict(model_type="bert", num_hidden_layers=3), "BertForMaskedLM")
    stages = gradual(30, 5, 5, bert, what="")
    for stage, low in zip(stages, (3, 2, 1, 0)):
        asleep_now = bert.select(stage.frozen)
        assert {t.layer for t in asleep_now.values() if t.layer is not None} == set(range(low)) and not any(t.role.startswith("head") for t in asleep_now.values())
        assert (bert.one("embed.token").name in asleep_now) == (low > 0)
    t5 = layout(dict(model_type="t5", num_layers=3), "T5ForConditionalGeneration")
    encoder = {n for n, t in t5.stored().items() if t.stack == "encoder"}
    assert set(t5.select(always(5, t5)[0].frozen)) == encoder | {"shared.weight"} and set(t5.select(always(5, t5, embeddings="awake")[0].frozen)) == encoder
    assert "encoder.final_layer_norm.weight" not in t5.select(gradual(30, 5, 5, t5)[1].frozen)
    untied = layout(dict(model_type="bart", tie_word_embeddings=False), "BartForConditionalGeneration")
    own, whole = "model.encoder.embed_tokens.weight", {n for n, t in untied.stored().items() if t.stack == "encoder"}
    assert set(untied.select(always(5, untied)[0].frozen)) == whole and set(untied.select(always(5, untied, embeddings="awake")[0].frozen)) == whole - {own}
    only = frozen_then(9, 3, t5, what="decoder/cross")
    assert only[0].frozen == ("decoder/cross",) and timetable(only, t5).embedding.tolist() == ["awake", "awake"]

def test_refusals(run, given):
    lay = lay_of(train_seq2seq.model(given["tokenizer"], 0.1))
    for call, says in [(lambda: frozen_then(10, 10, lay), "wakes in step 10, and the last step is 9"), (lambda: frozen_then(10, -1, lay), "wake_at cannot be -1"),
                       (lambda: frozen_then(10, 5, lay, what="encode"), "there is no tensor .* 'encode'"), (lambda: gradual(10, 5, 5, lay), "wakes in step 10"),
                       (lambda: gradual(10, 5, 0, lay), "every cannot be 0"), (lambda: gradual(10, 1, 1, lay, what="attn"), "there is no stack .* 'attn'"),
                       (lambda: always(10, lay, embeddings="tied"), "way with the embedding"), (lambda: always(10, lay, learning=1), "setting"),
                       (lambda: Stage(5, keep="float32"), "nothing does"), (lambda: Stage(5, keep="bf16", repeat=2), "way to keep"), (lambda: Stage(5, repeat=0), "repeat of a stage cannot be 0"),
                       (lambda: chains([Stage(5, continues=True)]), "none before it"), (lambda: chains([Stage(5), Stage(5, lr=1., continues=True)]), "stage 1 continues at lr 1"),
                       (lambda: run("no", [Stage(5)]), "can't do causal; its objectives are denoise"), (lambda: run("no", [Stage(5, objective="denoise"), Stage(5, objective="denoise", frozen="encoder/cross")]), "encoder/cross"),
                       (lambda: run("no", [Stage(5, objective="denoise", frozen=("",))]), "nothing is awake")]:
        with pytest.raises(Refusal, match=says): call()

def test_texts_longer_than_the_positions_are_refused(run, given):
    "BART's table has two rows more than a text may have tokens."
    config = train_seq2seq.model(given["tokenizer"], 0.0).config; n = max(shape("denoise", given["corpus"].length))
    for places, fits in [(n, True), (n - 1, False), (n - 2, False)]:
        model = BartForConditionalGeneration(BartConfig(**config.to_dict() | dict(max_position_embeddings=places)))
        try: run("places", [Stage(1, objective="denoise")], model=model); assert fits
        except Refusal as e: assert not fits and f"{n} tokens in a model with {places} positions" in str(e)

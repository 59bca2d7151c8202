"""METRO: labels from samples, no gradient from the detector to the auxiliary, three losses with numbers of their own, both models kept and found again."""
import json, math, os, random, subprocess, sys
from pathlib import Path
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (AutoModel, AutoModelForMaskedLM, BertConfig, BertForMaskedLM, BertModel, ElectraConfig, ElectraForMaskedLM, GPT2Config,
                          GPT2LMHeadModel, MPNetConfig, MPNetForMaskedLM, RobertaConfig, RobertaForMaskedLM, RobertaPreLayerNormConfig,
                          RobertaPreLayerNormForMaskedLM, XLMRobertaConfig, XLMRobertaForMaskedLM)
from seqwarm.core.checkpoint import Card
from seqwarm.core.corpus import Packed
from seqwarm.core.errors import Refusal
from seqwarm.core.ledger import Cost, flops, lineage, units
from seqwarm.core.losses import measured
from seqwarm.core.noise import Draws
from seqwarm.core.objectives import objective, shape
from seqwarm.core.stages import Chain, Stage, optimizer
from seqwarm.core.train import _Loop
from seqwarm.methods import metro as module
from seqwarm.core.fresh import shrink
from seqwarm.methods.metro import pair, sample
import train_metro
from train_small import equal, weights

V, S, B = 40, 14, 5
SMALL = dict(vocab_size=V, hidden_size=16, num_attention_heads=2, intermediate_size=32, max_position_embeddings=20, pad_token_id=1,
             hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
KINDS = {"bert": (BertForMaskedLM, BertConfig, {}), "mpnet": (MPNetForMaskedLM, MPNetConfig, {}), "roberta": (RobertaForMaskedLM, RobertaConfig, {}),
         "electra": (ElectraForMaskedLM, ElectraConfig, dict(embedding_size=8)), "xlm-roberta": (XLMRobertaForMaskedLM, XLMRobertaConfig, {}),
         "prenorm": (RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormConfig, {})}

class Tok:
    mask_token_id, pad_token_id, all_special_ids = 4, 1, [0, 1, 2, 3, 4]
    def __len__(self): return V

def mlm(kind="bert", layers=3, seed=0, **more):
    cls, config, own = KINDS[kind]
    torch.manual_seed(seed)
    model = cls(config(**SMALL | own | more, num_hidden_layers=layers))
    for p in model.parameters(): p.data += 0.1 * torch.randn_like(p)   # biases, too, are something; and guesses differ
    return model

def batch(rows="apart", rate=0.3, step=0, model=None, **options):
    "Rows of two documents, as the objective gives them."
    ids = np.random.default_rng(step).integers(5, V, (B, S)); ids[:, [0, 8]] = 0
    segments = np.repeat([[0] * 8 + [1] * 6], B, 0); places = np.repeat([[*range(8), *range(6)]], B, 0)
    name = f"metro?rate={rate}&rows={rows}" + "".join(f"&{k}={v}" for k, v in options.items())
    return objective(name)(Packed(ids, segments, places, np.arange(B)), Draws(0, step, np.arange(B)), (model or mlm()).config, Tok()), ids

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    threads = torch.get_num_threads(); torch.set_num_threads(1)
    yield tmp_path_factory.mktemp("metro")
    torch.set_num_threads(threads)

@pytest.fixture(scope="module")
def calm(folder): return train_metro.main(str(folder), str(folder/"calm"), 0.1)


# ---------------------------------------------------------------- the losses

def slow(made, x, ids, masks=None):
    "The three sums in plain steps: whole logits, one position after the other, draws in double precision."
    begin = {"roberta": 2, "xlm-roberta": 2, "roberta-prelayernorm": 2, "mpnet": 2}.get(made.config.model_type, 0)
    places = x["position_ids"] if "position_ids" in x else begin + torch.arange(S)[None].expand(len(ids), S)
    call = lambda m, i: m(input_ids=i, position_ids=places, attention_mask=x.get("attention_mask"), output_hidden_states=True)
    first, filled, aux, clm, rtd, wrong = call(made.auxiliary, x["input_ids"]).logits.double(), ids.clone(), 0.0, 0.0, 0.0, 0
    for b in range(len(ids)):
        for s in range(S):
            if x["labels"][b, s] == -100: continue
            aux = aux - first[b, s].log_softmax(0)[ids[b, s]]
            p, total, u = (first[b, s].detach() / x["temperature"][b]).softmax(0).tolist(), 0.0, x["chance"][b, s].item()
            for v in range(V):
                total += p[v]
                if total >= u: break
            filled[b, s] = v
    second = call(made.main, filled); states = made.main.base_model(input_ids=filled, position_ids=places, attention_mask=x.get("attention_mask"))[0].double()
    for b in range(len(ids)):
        for s in range(S):
            score = states[b, s] @ made.detect.weight[0].double() + made.detect.bias[0].double()
            is_wrong = bool(filled[b, s] != ids[b, s]); wrong += is_wrong
            if masks is None or masks[b, s]: rtd = rtd - torch.sigmoid(score if is_wrong else -score).log()
            if x["labels"][b, s] != -100: clm = clm - second.logits[b, s].double().log_softmax(0)[ids[b, s]]
    return torch.stack([aux, rtd, clm]), filled, wrong

@pytest.mark.parametrize("rows", ["apart", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_three_sums_are_those_of_plain_loops(kind, rows):
    "And their gradients: nothing flows where it should not."
    made = pair(mlm(kind)); x, ids = batch(rows, model=made.main, heat=1.7)
    for p in made.parameters(): p.requires_grad_(True)
    found = made(**x); (found * torch.tensor([1.0, 50, 1])).sum().backward()
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}; made.zero_grad()
    plain, filled, wrong = slow(made, x, torch.from_numpy(ids)); (plain * torch.tensor([1.0, 50, 1])).sum().backward()
    assert torch.allclose(found.double(), plain, rtol=1e-5) and 5 < wrong < (x["labels"] != -100).sum() + 1
    for n, p in made.named_parameters(): assert (p.grad is None) == (n not in grads) and (p.grad is None or torch.allclose(grads[n], p.grad, rtol=1e-3, atol=1e-3)), n
    assert made.counts(x).tolist() == [(x["labels"] != -100).sum(), B * S, (x["labels"] != -100).sum()]

def test_a_lucky_sample_is_original():
    "An auxiliary that always draws what stood there has replaced nothing; masks alone make no label."
    made = pair(mlm()); x, ids = batch()
    look, truth = module._logits, torch.from_numpy(ids)[x["labels"] != -100]
    sure = lambda model, states: torch.nn.functional.one_hot(truth, V).float() * 100 if model is made.auxiliary else look(model, states)
    try: module._logits = sure; _, _, filled, _, _ = made.seen(x); told = made.read(made.tally(**x))
    finally: module._logits = look
    assert torch.equal(filled, torch.from_numpy(ids)) and told["replaced"] == 0 and math.isnan(told["recall"])

def test_the_detector_teaches_the_auxiliary_nothing():
    made = pair(mlm()); x, _ = batch()
    words = made.main.get_input_embeddings().weight
    for k in (1, 2):
        made.zero_grad(); made(**x)[k].backward()
        assert all(p.grad is None or not p.grad.any() for p in made.auxiliary.parameters() if p is not words) and words.grad.abs().sum() > 0
    made.zero_grad(); made(**x)[0].backward()
    assert all(p.grad is None or not p.grad.any() for n, p in made.main.named_parameters() if p is not words) and made.detect.weight.grad is None or not made.detect.weight.grad.any()

def test_sampling_is_that_distribution():
    z = torch.randn(1, V, generator=torch.Generator().manual_seed(3)); u = (torch.arange(20_000) + 1) / 20_000
    for T in (1.0, 0.5, 3.0):
        drawn = torch.bincount(sample(z.expand(len(u), V), u, T), minlength=V) / len(u)
        assert torch.allclose(drawn, (z[0].double() / T).softmax(0).float(), atol=1e-4)
    assert torch.equal(sample(z.expand(len(u), V), u), sample(z.expand(len(u), V), u, torch.ones(len(u))))
    never = torch.full((3, V), -torch.inf); never[:, 7] = 0
    assert sample(never, torch.tensor([2.0**-24, 0.5, 1.0])).tolist() == [7, 7, 7]

def test_rows_of_padding_and_padded_rows():
    "Every token that is none is counted once; a row without any changes nothing, and nothing becomes no number."
    for kind in ("bert", "mpnet"):
        made = pair(mlm(kind)); x, ids = batch("whole", model=made.main)
        real = torch.ones(B, S, dtype=torch.long); real[1, 9:] = 0; real[3] = 0
        ids = torch.where(real.bool(), torch.from_numpy(ids), 1)
        x = x | dict(input_ids=torch.where(real.bool(), x["input_ids"], 1), labels=torch.where(real.bool(), x["labels"], -100), attention_mask=real)
        found, n = made(**x), made.counts(x); found.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
        assert n.tolist() == [(x["labels"] != -100).sum(), real.sum(), (x["labels"] != -100).sum()]
        some = [0, 1, 2, 4]; less = {k: v[some] for k, v in x.items()}
        assert torch.allclose(made(**less), found, rtol=1e-5)
        assert torch.allclose(found.double(), slow(made, less, ids[some], real[some].bool())[0], rtol=1e-5)
        told = made.read(made.tally(**x)); assert all(math.isfinite(v) for v in told.values())
        nothing = {k: v[[3]] for k, v in x.items()}
        assert made(**nothing).tolist() == [0, 0, 0] and made.counts(nothing).tolist() == [0, 0, 0]

def test_parts_are_one_large_batch():
    made = pair(mlm()); x, _ = batch("whole"); x["labels"][0] = -100   # parts with very different numbers
    weight, parts = torch.tensor([1.0, 50, 1]), [{k: v[i:j] for k, v in x.items()} for i, j in ((0, 1), (1, 3), (3, 5))]
    n = sum(made.counts(p) for p in parts)
    def grads(loss): made.zero_grad(); loss.backward(); return loss.item(), {m: p.grad.clone() for m, p in made.named_parameters() if p.grad is not None}
    one, whole = grads((made(**x) / made.counts(x) * weight).sum())
    several, added = grads(sum((made(**p) / n * weight).sum() for p in parts))
    assert several == pytest.approx(one, rel=1e-6) and whole.keys() == added.keys()
    for name in whole: assert torch.allclose(whole[name], added[name], atol=1e-6 * max(1, whole[name].abs().max().item())), name
    told = [made.tally(**p) for p in parts]
    assert made.read(sum(told)) == pytest.approx(made.read(made.tally(**x)), rel=1e-6)

def test_modes_are_restored_after_sampling():
    made = pair(mlm(), dropout=0.5, still=True).train(); made.auxiliary.bert.encoder.layer[0].eval(); x, _ = batch()
    before = {n: m.training for n, m in made.named_modules()}
    drawn = [made.seen(x)[2] for _ in range(3)]
    assert before == {n: m.training for n, m in made.named_modules()} and torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])
    made.still = False; wild = [made.seen(x)[2] for _ in range(3)]
    assert not torch.equal(wild[0], wild[1]) or not torch.equal(wild[1], wild[2])

def test_measures_against_plain_ones():
    made = pair(mlm()); x, ids = batch(); torch.manual_seed(0); made.detect.weight.data.normal_(0, 0.5)
    _, text, filled, states, scores = made.seen(x); wrong, told = (filled != torch.from_numpy(ids)).flatten(), made.read(made.tally(**x))
    a, b = scores.flatten()[wrong].tolist(), scores.flatten()[~wrong].tolist()
    auc = np.mean([(p > q) + (p == q) / 2 for p in a for q in b]); said = scores.flatten() > 0
    assert told["auc"] == pytest.approx(auc, abs=0.005) and told["recall"] == pytest.approx((said & wrong).sum() / wrong.sum())
    assert told["precision"] == pytest.approx((said & wrong).sum() / said.sum()) and told["replaced"] == pytest.approx(wrong.sum() / (x["labels"] != -100).sum())
    h = states.detach(); share = wrong.double().mean().item()
    assert told["spread"] == pytest.approx(np.mean([((r - r.mean(0))**2).sum(-1).mean().sqrt() / (r**2).sum(-1).mean().sqrt() for r in h]), rel=1e-5)
    assert told["over_base"] == pytest.approx(told["rtd"] / -(share * math.log(share) + (1 - share) * math.log(1 - share)), rel=1e-6)
    assert told["loss"] == pytest.approx(told["aux"] + 50 * told["rtd"] + told["clm"])

# ---------------------------------------------------------------- objective and models

def test_the_objective_masks_what_mlm_asks_and_hands_out_its_own_chance():
    x, ids = batch(rate=0.2)
    asked = x["labels"] != -100
    assert (x["input_ids"][asked] == 4).all() and (x["input_ids"][~asked] == torch.from_numpy(ids)[~asked]).all() and not asked[:, [0, 8]].any()
    packed = Packed(ids, np.repeat([[0] * 8 + [1] * 6], B, 0), np.zeros_like(ids), np.arange(B))
    assert torch.equal(objective("mlm?rate=0.2")(packed, Draws(0, 0, np.arange(B)), mlm().config, Tok())["labels"], x["labels"])
    some = np.array([4, 1]); part = Packed(ids[some], packed.segments[some], packed.positions[some], some)
    few = objective("metro?rate=0.2")(part, Draws(0, 0, some), mlm().config, Tok())
    assert torch.equal(few["chance"], x["chance"][some]) and torch.equal(few["labels"], x["labels"][some])   # any company
    assert (x["chance"] > 0).all() and (x["chance"] <= 1).all() and x["chance"].dtype == torch.float32 and (x["temperature"] == 1).all()
    assert shape("metro?rate=0.2", S) == (S, None) and x["input_ids"].shape == (B, S)
    for share in (0.0, 0.25, 1.0):
        hot = objective("metro?heat=3&tau=0.2")(packed, Draws(0, 0, np.arange(B), share), mlm().config, Tok())["temperature"]
        assert np.allclose(hot, 1 + 2 * math.exp(-share / 0.2))

def test_gradient_shares_are_those_of_each_loss_alone():
    made = pair(mlm()); x, _ = batch(); n, norms = made.counts(x), []
    for k, w in enumerate((1.0, 50.0, 1.0)):
        made.zero_grad(); (made(**x)[k] * w / n[k]).backward()
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in made.main.base_model.parameters() if p.grad is not None)))
    made.zero_grad(); told = made.shares(x)
    assert [told[k] for k in ("aux", "rtd", "clm")] == pytest.approx([v / sum(norms) for v in norms], rel=1e-4) and not any(p.grad is not None for p in made.parameters())
    alone = pair(mlm(), weights=dict(clm=0)); assert alone.shares(x)["clm"] == 0

def test_relative_bins_are_thirty_two():
    "MPNet's: exact to distance 7, then logarithmic to 128, either side on its own."
    def bin_of(i, j):
        n = abs(i - j)
        return 16 * (j > i) + (n if n < 8 else min(15, 8 + int(math.log(n / 8) / math.log(128 / 8) * 8)))
    encoder = mlm("mpnet").mpnet.encoder
    bias = encoder.compute_position_bias(torch.zeros(1, 150, 16))[0]
    bins = torch.tensor([[bin_of(i, j) for j in range(150)] for i in range(150)])
    assert torch.equal(bias, encoder.relative_attention_bias.weight[bins].permute(2, 0, 1)) and len(bins.unique()) == 31      # 16 means nothing: to the right at 0

@pytest.mark.parametrize("kind", KINDS)
def test_one_storage_for_words_and_its_own_for_the_rest(kind):
    main = mlm(kind, layers=6); before = torch.get_rng_state(); made = pair(main)
    assert torch.equal(before, torch.get_rng_state()) and made.auxiliary.config.num_hidden_layers == 2
    assert len({m.weight.data_ptr() for x in (made.main, made.auxiliary) for m in (x.get_input_embeddings(), x.get_output_embeddings())}) == 1
    twice = [n for n, p in made.auxiliary.named_parameters() if any(p is q for q in main.parameters())]
    assert twice == [n for n, p in made.auxiliary.named_parameters() if p is main.get_input_embeddings().weight]
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in made.auxiliary.modules())
    lay = made.layout
    names = dict(made.named_parameters(remove_duplicate=False))
    assert set(names) <= set(lay.tensors) and {n for n, t in lay.stored().items() if not t.optional} <= set(names) | {n for n, _ in made.named_buffers()}
    for n, p in names.items(): assert p is names[lay.storage(lay.tensors[n]).name], n
    assert sum(p.numel() for p in made.parameters()) == sum(t.size for n, t in lay.stored().items() if n in names)

def test_shrink_scales_what_writes_into_the_state():
    for kind in ("mpnet", "prenorm"):
        model, other = mlm(kind), shrink(mlm(kind)); now = dict(other.named_parameters())
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, now[n])}
        assert len(moved) == 6 and all(torch.allclose(now[n], dict(model.named_parameters())[n] / math.sqrt(6)) for n in moved)

# ---------------------------------------------------------------- cost

CASES = {"all": (dict(), ()), "auxiliary asleep": (dict(), ("auxiliary/",)), "words asleep": (dict(), ("embed.token",)), "detection alone": (dict(weights=dict(clm=0)), ("main/head",)),
         "main's body asleep": (dict(), ("main/attn", "main/ffn", "main/embed")), "found": (dict(auxiliary=2), ("auxiliary/",)), "found, learns": (dict(auxiliary=2, learns=True), ())}

@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["bert", "mpnet", "electra"])
def test_flops_as_torch_counts(kind, case):
    options, frozen = CASES[case]
    main = mlm(kind); main.set_attn_implementation("eager"); options = options | (dict(auxiliary=mlm(kind, 2)) if "auxiliary" in options else {})
    made = pair(main, **options).train(); made.auxiliary.set_attn_implementation("eager"); lay = made.layout
    optimizer(made, lay, Chain((Stage(1, objective="metro", frozen=frozen),)))
    x, _ = batch(model=main); x["labels"][:] = -100; x["labels"][:, 2:5] = 7   # three a row
    for train in (False, True):
        with FlopCounterMode(display=False) as counter:
            loss = made(**x).sum()
            if train: loss.backward()
        assert flops(lay, S, train=train, frozen=frozen, asked=3) == pytest.approx(counter.get_total_flops() / B, rel=1e-6), train
    assert units(lay, 1200, frozen) == pytest.approx(1e-3 * (3 + (len(made.auxiliary.base_model.encoder.layer) * (0.5 if "auxiliary/" in frozen else 1)))) or case == "main's body asleep"

# ---------------------------------------------------------------- training

def test_resumed_is_bit_equal_with_both_models(folder, calm, monkeypatch):
    update = _Loop.update
    def struck(self, model, opt, feed, step, rates):
        if step == 5: raise KeyboardInterrupt
        return update(self, model, opt, feed, step, rates)
    monkeypatch.setattr(_Loop, "update", struck)
    with pytest.raises(KeyboardInterrupt): train_metro.main(str(folder), str(folder/"struck"), 0.1)
    assert list((folder/"struck").glob("*/state-000000004"))
    monkeypatch.setattr(_Loop, "update", update)
    trained = train_metro.main(str(folder), str(folder/"struck"), 0.1)
    for where in ("", "auxiliary"): assert equal(weights(trained.path/where), weights(calm.path/where))
    assert (trained.path/"detect.safetensors").read_bytes() == (calm.path/"detect.safetensors").read_bytes()
    assert trained.history.drop(columns="seconds").equals(calm.history.drop(columns="seconds"))

def test_what_is_kept_is_plain(folder, calm):
    for cls in (AutoModel, AutoModelForMaskedLM):
        model, info = cls.from_pretrained(calm.path, output_loading_info=True)
        assert type(model) in (BertModel, BertForMaskedLM) and not [n for n in info["missing_keys"] if "pooler" not in n]
    other = AutoModelForMaskedLM.from_pretrained(calm.path/"auxiliary")
    assert torch.equal(other.get_input_embeddings().weight, model.get_input_embeddings().weight) and other.config.num_hidden_layers == 1
    assert (calm.path/"tokenizer.json").exists() and (calm.path/"auxiliary"/"tokenizer.json").exists()
    both = [Card.load(calm.path/w) for w in ("", "auxiliary")]
    assert lineage(both) == lineage(both[1]) == Cost.of(calm.card.cost) and both[1].parents == [both[0].id]
    assert {"aux", "rtd", "clm", "auc", "recall", "precision", "replaced", "over_base", "spread"} <= set(calm.history)
    assert calm.history.loss.iloc[-1] < calm.history.loss.iloc[0]

def test_the_step_s_loss_and_cost_are_those_told(folder, calm):
    data = train_metro.given(str(folder)); made = pair(train_metro.mlm(data["tokenizer"], dropout=0.1))
    told = measured(made, data["valid"], objective("metro?rate=0.3&heat=2&tau=0.5"), data["tokenizer"], 8)
    assert all(calm.history[k].iloc[0] == pytest.approx(v, nan_ok=True) for k, v in told.items())
    assert calm.card.cost["flops"] == 6 * 4 * flops(made.layout, 16, asked=5) and calm.card.cost["tokens"] == 6 * 4 * 16   # 0.3 of 16

def test_accumulated_parts_are_one_batch(folder):
    one, parts = (train_metro.main(str(folder), str(folder/f"parts{n}"), accumulate=n) for n in (1, 4))
    assert one.path.parent.name != parts.path.parent.name
    for k in ("train", "loss", "aux", "rtd", "clm"): assert np.allclose(one.history[k].dropna(), parts.history[k].dropna(), rtol=1e-4), k

def test_two_ranks_are_one(folder):
    one = train_metro.main(str(folder), str(folder/"one"))
    subprocess.run([sys.executable, Path(train_metro.__file__), folder, folder/"two", str(random.randint(20000, 60000))],
                   check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, capture_output=True)
    [history] = (folder/"two").glob("*/history.json"); rows = json.loads(history.read_text())
    for k in ("loss", "aux", "rtd", "clm", "spread"): assert np.allclose([r[k] for r in rows], one.history[k], rtol=1e-5), k

def test_a_frozen_auxiliary_that_exists_does_not_move(folder, calm):
    "Fast-ELECTRA: another training's model makes the signals."
    trained = train_metro.main(str(folder), str(folder/"fast"), auxiliary=str(calm.path/"auxiliary"))
    assert not (trained.path/"auxiliary").exists() and trained.card.cost["flops"] < calm.card.cost["flops"]
    assert trained.history.aux.nunique() == 1 and trained.history.rtd.nunique() > 1

# ---------------------------------------------------------------- bad input

def test_refusals(folder, calm):
    data = train_metro.given(str(folder)); tokenizer, main = data["tokenizer"], train_metro.mlm(data["tokenizer"])
    class NoMask(Tok): mask_token_id = None
    packed = Packed(np.full((1, S), 9), np.zeros((1, S), int), np.zeros((1, S), int), np.array([0]))
    from seqwarm.core.vocab import train_tokenizer
    train_tokenizer(["quite another text"] * 9, 300).save_pretrained(folder/"other")
    for says, call in {
        "no mask token": lambda: objective("metro")(packed, Draws(0, 0, packed.samples), main.config, NoMask()),
        "rate=0 of": lambda: objective("metro?rate=0"), "rate=1 of": lambda: objective("metro?rate=1"), "heat=0 of": lambda: objective("metro?heat=0"),
        "40 tokens and the main model": lambda: pair(main, auxiliary=mlm()), "tokenizer of the auxiliary .* differs": lambda: pair(main, auxiliary=folder/"other", tokenizer=tokenizer),
        "give tokenizer=": lambda: pair(main, auxiliary=calm.path/"auxiliary"), "no loss of METRO 'rdt'": lambda: pair(main, weights=dict(rdt=1)),
        "cannot be -1": lambda: pair(main, weights=dict(rtd=-1)), "prior cannot be 1": lambda: pair(main, prior=1), "layers of the auxiliary": lambda: pair(main, layers=0),
        "no head over the vocabulary": lambda: pair(BertModel(main.config)), "main model cannot be a .*Path; open it": lambda: pair(folder/"other"),
        "no encoder for METRO 'gpt2'": lambda: pair(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_head=1, n_layer=1))),
        "nothing trains main/head": lambda: pair(main, weights=dict(clm=0)).train()(**batch()[0]),
        "Pair can't do mlm; its objectives are metro": lambda: train_metro.train(pair(main), stages=[Stage(1, objective="mlm")], store=folder/"no", **data),
        "BertForMaskedLM can't do metro": lambda: train_metro.train(main, stages=[Stage(1, objective="metro")], store=folder/"no", **data)}.items():
        with pytest.raises(Refusal, match=says): call()
    assert not (folder/"no").exists()

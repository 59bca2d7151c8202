"""Early exit against the slow way: every layer computed for all tokens, and the states of those that left put back by hooks."""
import copy, json, os, random, subprocess, sys
from contextlib import contextmanager
from pathlib import Path
import pandas as pd
import pytest, torch, transformers as hf
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from safetensors.torch import load_file
from seqwarm.core.errors import Refusal
from seqwarm.core.ledger import flops
from seqwarm.core.train import _Loop
from seqwarm.methods import exit as module
from seqwarm.methods.exit import Early, exit_losses, exiting, spent, tradeoff
from seqwarm.methods.metro import pair
import train_metro, train_small

SIZES = dict(vocab_size=30, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24, max_position_embeddings=24, pad_token_id=1)
KINDS = {"bert": (hf.BertModel, hf.BertConfig), "roberta": (hf.RobertaModel, hf.RobertaConfig), "xlm-roberta": (hf.XLMRobertaModel, hf.XLMRobertaConfig),
         "electra, narrow": (hf.ElectraModel, hf.ElectraConfig), "mpnet": (hf.MPNetModel, hf.MPNetConfig),
         "roberta-prelayernorm": (hf.RobertaPreLayerNormModel, hf.RobertaPreLayerNormConfig)}
CLOSING = {"roberta-prelayernorm": "LayerNorm"}      # the norm that closes a pre-norm stack, by hand
LENGTHS = torch.tensor([10, 7, 0, 1, 10])
MASK = (torch.arange(10) < LENGTHS[:, None]).long()
REAL = MASK.bool()

def encoder(kind: str, seed: int = 0, dtype=torch.float64, **more):
    Model, Config = KINDS[kind]
    torch.manual_seed(seed)
    model = Model(Config(**SIZES | (dict(embedding_size=8) if "narrow" in kind else {}) | more)).to(dtype).eval()
    for p in model.parameters(): torch.nn.init.normal_(p, 0, 0.3) if p.dim() > 1 else torch.nn.init.normal_(p, p.mean().item(), 0.1)
    return model

def exits(kind: str, seed: int = 0, threshold: float = 0.5, every: int = 1, by: str = "token", **more):
    "An encoder with heads that are certain of something without any training."
    model = exiting(encoder(kind, seed, **more), every, threshold, by)
    for h in model.exits: torch.nn.init.normal_(h.weight, 0, 0.35); torch.nn.init.normal_(h.bias, 0, 0.2)
    return model

def given(seed: int = 1) -> dict:
    ids = torch.randint(3, 30, MASK.shape, generator=torch.Generator().manual_seed(seed))
    return dict(input_ids=torch.where(REAL, ids, 1), attention_mask=MASK)

@contextmanager
def slowly(model, real=REAL, kind=""):
    "The plain encoder, in which who has left is put back behind each layer; and a notebook of what the heads said to whom."
    norm = model.encoder.get_submodule(CLOSING[kind]) if kind in CLOSING else lambda t: t
    said, left = [], [torch.zeros_like(real)]
    def hook(i):
        def put_back(_, args, y):
            state = y[0] if isinstance(y, tuple) else y
            state = torch.where(left[-1][..., None], args[0], state)
            if (i + 1) % model.every == 0 or i + 1 == model.layers:
                z = model.exits[len(said)](norm(state))[..., 0]
                c, here = (2*z.detach().sigmoid() - 1).abs(), real & ~left[-1]
                if model.by == "sequence":
                    c = torch.stack([torch.full_like(row, row[ok].mean() if ok.any() else 0) for row, ok in zip(c, here)])
                said.append((i + 1, z, here))
                left.append(left[-1] | here & (c > model.threshold))
            return (state, *y[1:]) if isinstance(y, tuple) else state
        return put_back
    hooks = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(model.encoder.encoder.layer)]
    try: yield said
    finally: [h.remove() for h in hooks]

def slow(model, x, kind, real=REAL):
    with slowly(model, real, kind) as said: state = model.encoder(**x).last_hidden_state
    return state, said

# ---- what it computes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("by", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_leaves_at_threshold_one(kind, by, attention):
    if (kind, attention) == ("mpnet", "sdpa"): pytest.skip("transformers has only eager attention for MPNet")
    model = exits(kind, by=by, threshold=1, attn_implementation=attention)
    with torch.no_grad():
        for h in model.exits: h.weight.mul_(1e4)      # even of what is beyond doubt
        out, plain = model(**given()), model.encoder(**given()).last_hidden_state
    assert (out.last_hidden_state - plain)[REAL].abs().max() < 1e-10 and out.last_hidden_state.isfinite().all()
    assert out.kept == 1 and torch.equal(out.depth, 4*MASK) and out.work == [(50, 50, 500)]*4

@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("by,threshold", [("token", 0.5), ("token", 0.8), ("sequence", 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_states_losses_and_gradients_are_those_of_the_slow_way(kind, by, threshold, every):
    replaced, depths = torch.rand(REAL.shape, generator=torch.Generator().manual_seed(5)) < 0.3, set()
    for seed in range(3 if (by, threshold) == ("token", 0.5) else 1):
        model = exits(kind, seed, threshold, every, by)
        x, params = given(seed), dict(model.named_parameters())
        out = model(**x)
        state, said = slow(model, x, kind)
        assert (out.last_hidden_state - state)[REAL].abs().max() < 1e-10
        assert torch.equal(out.depth, sum((here.long() * (layer - before) for (layer, _, here), before in zip(said, [0, *[s[0] for s in said]])), torch.zeros_like(MASK)))
        sums, counts = exit_losses(out, replaced)
        by_hand = torch.stack([F.binary_cross_entropy_with_logits(z[here], replaced[here].double(), reduction="sum") for _, z, here in said])
        assert counts.tolist() == [int(here.sum()) for *_, here in said] and (sums - by_hand).abs().max() < 1e-9
        for (_, z, here), (_, _, later) in zip(said, [*said[1:], (0, 0, torch.zeros_like(REAL))]):
            gone = here & ~later
            assert torch.allclose(out.logits[gone], z[gone], rtol=0, atol=1e-10)
        grads = [torch.autograd.grad((s[REAL]**2).sum() + l.sum(), list(params.values()), allow_unused=True)
                 for s, l in ((out.last_hidden_state, sums), (state, by_hand))]
        for name, a, b in zip(params, *grads):
            assert (a is None) == (b is None) and (a is None or (a - b).abs().max() < 1e-9 * max(1, b.abs().max())), name
        depths |= {*out.depth[REAL].tolist()}
    if (by, threshold) == ("token", 0.5): assert depths == {*range(every, 4, every), 4}      # some leave at each exit, and some never

@pytest.mark.parametrize("kind,attention", [("bert", "sdpa"), ("bert", "eager"), ("roberta-prelayernorm", "sdpa"), ("mpnet", "eager")])
def test_packed_documents_stay_apart(kind, attention):
    "Masks [B, 1, S, S] are gathered by query; one document's tokens come out the same without the other."
    segments = torch.tensor([[0]*4 + [1]*5 + [2], [0]*9 + [1], [0]*10])
    shown = segments[:, None, :, None] == segments[:, None, None, :]
    mask = shown if attention == "sdpa" else torch.zeros(shown.shape, dtype=torch.float64).masked_fill(~shown, torch.finfo(torch.float32).min)
    ids = torch.randint(3, 30, segments.shape, generator=torch.Generator().manual_seed(2))
    model, real = exits(kind, attn_implementation=attention), torch.ones_like(shown[:, 0, 0])
    with torch.no_grad():
        x = dict(input_ids=ids, attention_mask=mask, position_ids=torch.arange(10)[None] + torch.full((3, 1), 2))
        out, (state, _) = model(**x), slow(model, x, kind, real)
        assert (out.last_hidden_state - state).abs().max() < 1e-10 and 0.3 < out.kept < 0.95
        assert any(asked < 30 and pairs < 300 for asked, _, pairs in out.work)
        other = model(**x | dict(input_ids=torch.where(segments == 1, 3, ids)))
    assert (out.last_hidden_state - other.last_hidden_state)[segments == 0].abs().max() < 1e-12
    assert torch.equal(out.depth[segments == 0], other.depth[segments == 0])

@pytest.mark.parametrize("by", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["bert", "mpnet", "roberta-prelayernorm"])
def test_who_has_left_does_not_change_by_a_bit(kind, by, monkeypatch):
    states, layer = [], module._layer
    monkeypatch.setattr(module, "_layer", lambda *a: (states.append((out := layer(*a))[0]), out)[1])
    with torch.no_grad(): out = exits(kind, by=by)(**given())
    assert len(states) == 4 and out.depth[REAL].min() < 4
    for i, state in enumerate(states):
        gone = (out.depth <= i) & REAL
        assert torch.equal(state[gone], states[i - 1][gone]) if i else not gone.any()

def test_a_sequence_leaves_by_the_mean_of_its_own_tokens():
    g = torch.Generator().manual_seed(0)
    kept = torch.rand(40, 7, generator=g) < 0.5
    at, z = kept.flatten().nonzero()[:, 0], torch.randn(int(kept.sum()), generator=g)*3
    right, i = [], 0
    for row in kept.tolist():
        c = [abs(2*torch.sigmoid(z[i + j]).item() - 1) for j in range(sum(row))]; i += len(c)
        right += [sum(c) / len(c) > 0.7]*len(c) if c else []
    assert module._gone(z, at, kept, 0.7, "sequence").tolist() == right and 0 < sum(right) < len(right)

# ---- padding -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("by", ["token", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_counts(kind, by):
    model, x = exits(kind, by=by, threshold=0.45), given()
    wide = {k: F.pad(t, (0, 5), value=0 if k == "attention_mask" else 1) for k, t in x.items()}
    with torch.no_grad(): out, more = model(**x), model(**wide)
    assert (out.last_hidden_state - more.last_hidden_state[:, :10])[REAL].abs().max() < 1e-10
    assert torch.equal(F.pad(out.depth, (0, 5)), more.depth) and out.kept == more.kept < 1 and not out.depth[~REAL].any() and not out.logits[~REAL].any()
    loss = lambda out, right: exit_losses(out, right)
    right = torch.arange(10).expand(5, 10) % 3 == 0
    for a, b in zip(loss(out, right), loss(more, F.pad(right, (0, 5), value=True))): assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert loss(out, right)[1][0] == LENGTHS.sum() and torch.isfinite(more.last_hidden_state).all()

def test_only_padding():
    model = exits("mpnet")
    out = model(input_ids=torch.full((2, 4), 1), attention_mask=torch.zeros(2, 4))
    sums, counts = exit_losses(out, torch.zeros(2, 4).bool())
    assert out.kept == 0 and not sums.any() and not counts.any() and out.last_hidden_state.isfinite().all()
    (sums.sum() + out.last_hidden_state.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

def test_tokens_that_do_not_count_though_they_are_seen():
    model, x = exits("bert", threshold=1), given()
    real = REAL & (torch.arange(10) > 0)
    out = model(**x, real=real)
    assert torch.equal(out.depth, 4*real) and exit_losses(out, REAL)[1].tolist() == [int(real.sum())]*4

# ---- what it saves -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_who_has_left_is_not_computed(kind):
    "What enters the products, seen by hooks: once rows are broken, kept tokens and no more."
    model, seen = exits(kind), {}
    name = "attn.{}" if kind == "mpnet" else "self.{}"
    for i, layer in enumerate(model.encoder.encoder.layer):
        parts = dict(q=layer.attention.get_submodule(name.format("q" if kind == "mpnet" else "query")), up=layer.intermediate.dense, down=layer.output.dense,
                     k=layer.attention.get_submodule(name.format("k" if kind == "mpnet" else "key")))
        for part, m in parts.items(): m.register_forward_hook(lambda _, x, y, at=(i, part): seen.update({at: x[0].numel() // x[0].shape[-1]}))
    with torch.no_grad(): out = model(**given())
    broken = [i for i in range(1, 4) if int((out.depth > i).sum()) != int((REAL & (out.depth > i).any(1, keepdim=True)).sum())]
    assert broken
    for i in broken:
        kept = out.depth > i
        assert [seen[i, part] for part in ("q", "up", "down")] == [int(kept.sum())]*3
        assert seen[i, "k"] == 10*int(kept.any(1).sum()) and out.work[i] == (int(kept.sum()), seen[i, "k"], seen[i, "k"]*int(kept.sum(1).max()))

@pytest.mark.parametrize("by,threshold", [("token", 0.5), ("sequence", 0.3), ("token", 1), ("token", 1e-9)])
@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(kind, by, threshold):
    model = exits(kind, by=by, threshold=threshold, attn_implementation="eager")
    for train in (False, True):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = model(**given())
            if train: (out.last_hidden_state.sum() + exit_losses(out, REAL)[0].sum()).backward()
        assert counter.get_total_flops() == spent(model, out, train)
    assert (out.kept < 1) == (threshold < 1)

def test_kept_is_a_share_of_layers_and_tokens():
    out = exits("bert")(**given())
    assert out.kept == pytest.approx(sum(out.depth[REAL].tolist()) / (4*28))

# ---- training ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["bert", "mpnet", "roberta-prelayernorm"])
def test_parts_of_a_batch_add_up_to_the_batch(kind):
    model, x, right = exits(kind), given(), REAL & (torch.arange(10) % 3 == 0)
    whole = exit_losses(model(**x), right)
    model.zero_grad(); (whole[0] / whole[1].clamp(min=1)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = [exit_losses(model(**{k: t[rows] for k, t in x.items()}), right[rows]) for rows in (slice(0, 2), slice(2, 5))]
    assert torch.equal(sum(c for _, c in parts), whole[1]) and torch.allclose(sum(s for s, _ in parts), whole[0], rtol=1e-12)
    for sums, _ in parts: (sums / whole[1].clamp(min=1)).sum().backward()
    assert all((p.grad - grads[n]).abs().max() < 1e-10 for n, p in model.named_parameters() if n in grads)

@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_nobody_enters_have_the_gradient_zero(kind):
    model = exits(kind, threshold=1e-12)
    out = model(**given())
    sums, counts = exit_losses(out, REAL)
    (sums.sum() + out.last_hidden_state.sum()).backward()
    assert counts.tolist() == [28, 0, 0, 0] and torch.equal(out.depth, MASK)
    upper = [p for layer in model.encoder.encoder.layer[1:] for p in layer.parameters()] + [p for h in model.exits[1:] for p in h.parameters()]
    assert all(p.grad is not None and not p.grad.any() for p in upper)
    assert model.encoder.encoder.layer[0].output.dense.weight.grad.any()

@pytest.mark.parametrize("kind", ["bert", "mpnet", "roberta-prelayernorm"])
def test_dropout_falls_where_the_plain_layer_has_it(kind):
    "At rate 1 it is not random: the slow way in training mode is the measure."
    for rates in (dict(hidden_dropout_prob=1.0, attention_probs_dropout_prob=0.0), dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=1.0)):
        model = exits(kind, **rates)
        model.encoder.embeddings.dropout.p = 0.0
        with torch.no_grad():
            calm = model(**given()).last_hidden_state
            model.train()
            out, (state, _) = model(**given()), slow(model, given(), kind)
        assert (out.last_hidden_state - state)[REAL].abs().max() < 1e-10 and (out.last_hidden_state - calm)[REAL].abs().max() > 1e-3
        assert any(w[0] < 50 and w[2] < w[0]*10*5 for w in out.work)

@pytest.mark.parametrize("kind", ["bert", "mpnet", "roberta-prelayernorm"])
def test_half_precision(kind):
    model, x = exits(kind, dtype=torch.float32), given()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**x)
        sums, counts = exit_losses(out, REAL)
    (sums / counts.clamp(min=1)).sum().backward()
    assert out.last_hidden_state.isfinite().all() and sums.dtype == torch.float32 and 0.25 < out.kept < 1
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    whole = exits(kind, dtype=torch.bfloat16)(**x)
    assert whole.last_hidden_state.dtype == torch.bfloat16 and whole.last_hidden_state.isfinite().all() and whole.logits.dtype == torch.float32

# ---- around a model ----------------------------------------------------------------------------------------------------------

def test_the_encoder_stays_what_it_was(tmp_path):
    whole = hf.MPNetForMaskedLM(hf.MPNetConfig(**SIZES)).double().eval()
    head, before = torch.nn.Linear(16, 1).double(), {n: p.clone() for n, p in whole.state_dict().items()}
    model = exiting(whole, 2, head=head)
    assert model.encoder is whole.mpnet and model.exits[-1] is head and len(model.exits) == 2 and model.places == [2, 4] and not model.training and model.config is whole.config
    assert whole.state_dict().keys() == before.keys()
    whole.save_pretrained(tmp_path)
    again = hf.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(model.encoder(**given()).last_hidden_state, again.mpnet(**given()).last_hidden_state)
        twin = copy.deepcopy(model)
        model.threshold = twin.threshold = 0.01
        a = model(**given())
        for p in model.parameters(): p.add_(1)
        b = twin(**given())
        assert a.kept == b.kept < 1 and torch.equal(a.last_hidden_state, b.last_hidden_state)        # a copy is on its own
        model.load_state_dict(twin.state_dict())
        assert torch.equal(model(**given()).logits, a.logits)

def test_fresh_heads_let_nobody_go():
    with torch.no_grad(): assert exiting(encoder("bert"), 1, 0.9)(**given()).kept == 1

def test_exits_stand_after_every_k_layers_and_at_the_top():
    assert [exiting(encoder("bert"), k).places for k in (1, 2, 3, 4)] == [[1, 2, 3, 4], [2, 4], [3, 4], [4]]

def test_the_table_of_compute_against_quality():
    model, batches = exits("bert", threshold=0.77), [(given(s), torch.rand(REAL.shape, generator=torch.Generator().manual_seed(s)) < 0.3) for s in (1, 2)]
    for h in model.exits: torch.nn.init.constant_(h.bias, 0.6)
    model.train()
    table = tradeoff(model, iter(batches), (0.9, 0.3, 1))
    assert (model.threshold, model.training, model.encoder.training) == (0.77, True, True) and table.threshold.tolist() == [0.3, 0.9, 1]
    assert table.kept.tolist()[2] == table.flops.tolist()[2] == 1 and table.kept[0] < table.kept[1] < 1 and table.flops[0] < table.flops[1] < 1
    model.eval()
    for row in table.itertuples():
        model.threshold = row.threshold
        with torch.no_grad(): outs = [model(**x) for x, _ in batches]
        z, right = torch.cat([o.logits[REAL] for o in outs]), torch.cat([r[REAL] for _, r in batches])
        pairs = [(a > b) + (a == b)/2 for a in z[right].tolist() for b in z[~right].tolist()]
        said = z > 0
        assert 0 < said.sum() < len(said) and row.auc == pytest.approx(sum(pairs)/len(pairs), abs=0.005)      # scores in bins of 1/128
        assert row.recall == pytest.approx(said[right].double().mean().item()) and row.precision == pytest.approx(right[said].double().mean().item())
        assert row.kept == pytest.approx(torch.cat([o.depth[REAL] for o in outs]).double().mean().item()/4)
        whole = sum(spent(model, o) for o in outs)
        if row.threshold == 1: full = whole
    model.threshold = 0.3
    with torch.no_grad(): assert table.flops[0] == pytest.approx(sum(spent(model, model(**x)) for x, _ in batches)/full)

# ---- in METRO ----------------------------------------------------------------------------------------------------------------

def mlm(kind="mpnet"):
    Model = {"mpnet": hf.MPNetForMaskedLM, "bert": hf.BertForMaskedLM, "roberta-prelayernorm": hf.RobertaPreLayerNormForMaskedLM}[kind]
    torch.manual_seed(0)
    return Model(Model.config_class(**SIZES | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), attn_implementation="eager"))

def early(kind="mpnet", sure=1.0, **options):
    "A pair whose heads, the detector too, are certain of something without any training."
    made = pair(mlm(kind), signals=[Early(**dict(every=1, threshold=0.5) | options)])
    g = torch.Generator().manual_seed(4)
    for h in (*made.signals["exits"].heads, made.detect): h.weight.data = sure*torch.randn(h.weight.shape, generator=g)*0.35
    return made

def inputs(padded=False, seed=2):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 30, (5, 10), generator=g); labels = torch.full_like(ids, -100); labels[:, 2:5] = ids[:, 2:5]
    real = MASK if padded else torch.ones_like(MASK)
    return dict(input_ids=torch.where(real.bool(), torch.where(labels == -100, ids, 4), 1), labels=torch.where(real.bool(), labels, -100),
                chance=1 - torch.rand(5, 10, generator=g), **(dict(attention_mask=MASK) if padded else {}))

@pytest.mark.parametrize("kind", ["mpnet", "bert", "roberta-prelayernorm"])
def test_a_pair_that_nobody_leaves_is_the_pair(kind):
    x, plain, made = inputs(True), pair(mlm(kind)), early(kind, threshold=1)
    made.detect.load_state_dict(plain.detect.state_dict())
    told, bare = made.read(made.tally(**x)), plain.read(plain.tally(**x))
    assert torch.allclose(made(**x)[:3], plain(**x), rtol=1e-5) and made.leaves and not plain.leaves and not plain.spared()
    assert all(told[k] == pytest.approx(v, rel=1e-4, nan_ok=True) for k, v in bare.items() if k != "loss") and told["kept"] == 1

@pytest.mark.parametrize("by", ["token", "sequence"])
def test_losses_of_a_pair_are_those_of_each_token_at_each_head(by):
    made, x = early(by=by, threshold=0.5 if by == "token" else 0.65), inputs(True)
    sums, text, filled, states, scores = made.seen(x)
    model, wrong = made.signals["exits"].around[0], filled != text.ids
    out = model(**made.signals["exits"].given(made, filled, text))
    assert 0.3 < out.kept < 1 and torch.equal(out.last_hidden_state, states) and torch.equal(out.logits, scores) and model.exits[-1] is made.detect
    last, way = 0.0, 0.0
    for e in out.exits:
        for at, z in zip(e.at.tolist(), e.logits):
            nll = F.binary_cross_entropy_with_logits(z, wrong.flatten()[at].float())
            if out.depth.flatten()[at] == e.layer: last = last + nll
            else: way = way + nll
    assert sums[1].item() == pytest.approx(last.item(), rel=1e-5) and sums[3].item() == pytest.approx(way.item(), rel=1e-5) and list(made.weights)[3] == "exits"
    assert (last + way).item() == pytest.approx(exit_losses(out, wrong)[0].sum().item(), rel=1e-5) and made.counts(x)[3] == REAL.sum()
    told = made.read(made.tally(**x)); assert told["kept"] == out.kept and 0 < told["flops_kept"] < 1
    assert made.shares(x)["exits"] > 0

@pytest.mark.parametrize("kind,by,threshold", [("mpnet", "token", 0.5), ("bert", "token", 0.8), ("bert", "sequence", 0.4), ("bert", "token", 1), ("roberta-prelayernorm", "token", 0.5)])
def test_a_step_takes_what_the_ledger_tells_less_what_was_left_out(kind, by, threshold):
    made = early(kind, by=by, threshold=threshold).train()
    made.auxiliary.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): made(**inputs()).sum().backward()
    left = made.spared()
    assert counter.get_total_flops() == 5*flops(made.layout, 10, asked=3) - left and (left > 0) == (threshold < 1) and made.spared() == 0
    with torch.no_grad(): made(**inputs())
    made.eval()(**inputs()); assert made.spared() == 0      # what is only looked at costs nothing

def test_what_was_left_out_is_taken_off_a_training_s_cost_in_any_cut_and_after_a_kill(tmp_path, monkeypatch):
    start = lambda store, **o: train_metro.early(str(tmp_path), str(tmp_path/store), **o)
    calm, update = start("calm"), _Loop.update
    whole = 6*4*flops(pair(train_metro.mlm(train_small.given(str(tmp_path))["tokenizer"], 3), signals=[Early(every=1)]).layout, 16, asked=5)
    assert 0 < calm.card.cost["flops"] < whole and calm.history.flops.iloc[-1] == calm.card.cost["flops"] and {"kept", "flops_kept", "exits"} <= set(calm.history)
    assert start("nobody", threshold=1).card.cost["flops"] == whole
    def struck(self, model, opt, feed, step, rates):
        if step == 5: raise KeyboardInterrupt
        return update(self, model, opt, feed, step, rates)
    monkeypatch.setattr(_Loop, "update", struck)
    with pytest.raises(KeyboardInterrupt): start("struck")
    monkeypatch.setattr(_Loop, "update", update)
    again = start("struck")
    assert train_small.same(again, calm) and again.card.cost["flops"] == calm.card.cost["flops"]
    parts = start("parts", accumulate=2)      # broken rows fill other rectangles, and everything else is one batch
    subprocess.run([sys.executable, Path(train_metro.__file__), tmp_path, tmp_path/"two", str(random.randint(20000, 60000)), "early"],
                   check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}, capture_output=True)
    [history] = (tmp_path/"two").glob("*/history.json"); two = pd.DataFrame(json.loads(history.read_text()))
    for k in ("loss", "rtd", "exits", "kept"):
        for other in (parts.history, two): assert other[k].tolist() == pytest.approx(calm.history[k].tolist(), rel=1e-4), k
    assert two.flops.iloc[-1] == parts.card.cost["flops"] < whole      # the same two halves of each batch
    assert set(load_file(calm.path/"detect.safetensors")) == {"weight", "bias", *(f"exits.heads.{i}.{n}" for i in (0, 1) for n in ("weight", "bias"))}

def test_heads_are_in_the_layout_and_begin_as_the_detector():
    made = pair(mlm(), signals=[Early(every=1)], prior=0.1, ramp=dict(exits=0.5)); lay = made.layout
    names = dict(made.named_parameters(remove_duplicate=False))
    assert set(names) <= set(lay.tensors) and {f"signals.exits.heads.{i}.weight" for i in range(3)} < set(lay.select("main/detect")) and len(made.signals["exits"].heads) == 3
    assert all(h.bias.item() == pytest.approx(-2.1972246) for h in (made.detect, *made.signals["exits"].heads))
    assert made.told["signals"] == dict(exits=dict(every=1, threshold=0.95, by="token")) and pair(mlm(), signals=[Early(0.0)]).told == pair(mlm()).told
    twin = copy.deepcopy(made); assert twin.signals["exits"].around[0].encoder is twin.main.base_model and twin.signals["exits"].around[0].exits[-1] is twin.detect
    for says, call in {"no way to leave by 'row'": lambda: Early(by="row"), "threshold cannot be 2": lambda: Early(threshold=2), "one exit, on the last of 4 layers": lambda: pair(mlm(), signals=[Early(every=4)]),
                       "is trained as a whole": lambda: asleep()}.items():
        with pytest.raises(Refusal, match=says): call()

def asleep():
    made = early().train(); made.main.get_input_embeddings().weight.requires_grad_(False); made(**inputs())

# ---- mistakes ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options,said", [
    (dict(every=0), "every cannot be 0; give a whole number of at least 1"), (dict(every=5), "an exit after every 5 layers, of 4; put exits closer"),
    (dict(every=1.5), "every cannot be 1.5"), (dict(threshold=0), "threshold cannot be 0; give a number above 0 and up to 1"), (dict(threshold=1.01), "up to 1, at which nobody leaves"),
    (dict(threshold=float("nan")), "threshold cannot be nan"), (dict(threshold="high"), "threshold cannot be 'high'"), (dict(by="row"), "there is no way to leave by 'row'")])
def test_refused_options(options, said):
    with pytest.raises(Refusal) as e: exiting(encoder("bert"), **options)
    assert said in str(e.value) and "\n" not in str(e.value)

def test_refused_models():
    small = dict(vocab_size=9, d_model=4, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1, encoder_ffn_dim=4, decoder_ffn_dim=4)
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    decoder = hf.BertForMaskedLM(hf.BertConfig(**SIZES, is_decoder=True))
    for model, said in ((gpt2, "a gpt2 model has no layers"), (hf.BartForConditionalGeneration(hf.BartConfig(**small)), "a bart model has no layers"),
                        (decoder, "a bert decoder has no layers"), (torch.nn.Linear(2, 2), "a Linear has no config"), (None, "a NoneType has no config")):
        with pytest.raises(Refusal, match=said + ".*; take an encoder: bert, electra, mpnet"): exiting(model, 1)
    flash = encoder("bert"); flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(Refusal, match="flash_attention_2 takes no mask for each query; load the model with sdpa"): exiting(flash)

def test_refused_batches():
    model = exits("bert")
    with pytest.raises(Refusal, match="an attention mask of 3 axes"): model(input_ids=given()["input_ids"], attention_mask=MASK[:, None])
    with pytest.raises(Refusal, match="nothing to measure on"): tradeoff(model, [])
    with pytest.raises(Refusal, match="threshold cannot be 2"): tradeoff(model, [(given(), REAL)], [2])
    assert model.threshold == 0.5

"""A decoder that reads a learned mix of all encoder layers: exact at the start, against a slow reference, through generation, training, disk and back."""
import copy, json, logging, shutil
import pytest, torch, transformers as hf
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_outputs import BaseModelOutput
from seqwarm.batch.cli import main
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.heads import with_head
from seqwarm.core.layout import layout
from seqwarm.core.ledger import flops
from seqwarm.core.mix import mixed, mixing, opened
from seqwarm.core.stages import Chain, Stage, asleep, optimizer
from seqwarm.core.train import _Loop, train
from seqwarm.core.write import build, save
from seqwarm.methods.graft import carry_out, extract, graft, told
from seqwarm.methods.unfreeze import always, frozen_then
from test_graft import EXACT, L, batch, encoder, equal, put
import train_seq2seq
from train_small import same, weights

pytestmark = pytest.mark.usefixtures("quick")
ALL = [(k, None) for k in EXACT if k != "roberta, pad 3"] + [(k, "encoder-decoder") for k in ("bert", "roberta-prelayernorm", "xlm-roberta-xl", "electra, narrow", "mpnet", "deberta-v2", "modernbert")]
FEW = [("bert", "bart"), ("roberta-prelayernorm", "mbart"), ("xlm-roberta-xl", "blenderbot"), ("t5", "t5"), ("bert", "encoder-decoder")]
NORM = {"mbart": "layer_norm", "blenderbot": "layer_norm", "t5": "final_layer_norm", "mt5": "final_layer_norm",   # what closes a pre-norm stack, by hand
        "roberta-prelayernorm": "LayerNorm", "xlm-roberta-xl": "encoder.LayerNorm", "modernbert": "final_norm"}
ENCODER = ("encoder/", "embed.token")

def pair(tmp_path, kind, family, dtype=torch.float64, **how):
    "An encoder, and its grafts: plain as transformers opens it, with a mix as we do."
    enc = encoder(kind, tmp_path/"e", dtype=dtype)
    plain, fused = (put(enc, tmp_path/f"g{f}", family=family, layers=2, fusion=f, **how) for f in (False, True))
    return enc, fused, hf.AutoModelForSeq2SeqLM.from_pretrained(plain.path, dtype=dtype).eval(), opened(fused.path, dtype)

def given(model) -> dict:
    "Padded texts, and what the decoder is to read of its own."
    ids, mask = batch(model.config.pad_token_id)
    return dict(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :5].flip(0).contiguous())

def settle(model, seed: int = 4) -> torch.Tensor:
    "A mix of some size in a model."
    mix = torch.randn(L, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad(): model.get_decoder().mix.copy_(mix)
    return mix

def moves(model) -> torch.Tensor:
    with torch.no_grad(): return model(**given(model)).logits

# ---- what it computes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind,family", ALL)
def test_it_begins_as_the_plain_graft_and_reads_what_a_slow_sum_gives(tmp_path, kind, family):
    _, new, plain, fused = pair(tmp_path, kind, family)
    assert new.config["layer_mix"] is True and (moves(plain) - moves(fused)).abs().max() < 1e-10
    mix, x = settle(fused), given(plain)
    with torch.no_grad():
        states = plain.get_encoder()(input_ids=x["input_ids"], attention_mask=x["attention_mask"], output_hidden_states=True).hidden_states
        if name := NORM.get(kind if family else plain.config.model_type): states = [*map(plain.get_encoder().get_submodule(name), states[:-1]), states[-1]]
        assert len(states) == L + 1
        slow = states[-1].clone()
        for m, h in zip(mix.tolist(), states): slow += m*(h - states[-1])
        want = plain(**x, encoder_outputs=BaseModelOutput(last_hidden_state=slow)).logits
    got = moves(fused)
    assert (got - want).abs().max() < 1e-10*max(1, want.abs().max()) and (got - moves(plain)).abs().max() > 1e-3

def test_the_sum_by_a_loop_over_single_numbers():
    torch.manual_seed(0)
    layers, mix = torch.randn(4, 2, 3, 5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    got = mixed(torch.cat(list(layers), -1), mix)
    for b, s, d in [(b, s, d) for b in range(2) for s in range(3) for d in range(5)]:
        last = layers[3, b, s, d].item()
        assert abs(got[b, s, d].item() - (last + sum(m*(layers[l, b, s, d].item() - last) for l, m in enumerate(mix.tolist())))) < 1e-12
    assert torch.autograd.gradcheck(mixed, (torch.cat(list(layers), -1).requires_grad_(), mix.requires_grad_()))

@pytest.mark.parametrize("kind,family", FEW)
def test_a_sleeping_encoder_gets_no_gradient_and_the_mix_gets_the_right_one(tmp_path, kind, family):
    _, _, _, model = pair(tmp_path, kind, family)
    mix, encoder_, loss = model.get_decoder().mix, model.get_encoder(), lambda: model(**given(model)).logits.square().mean()
    encoder_.requires_grad_(False)
    loss().backward()
    assert all(p.grad is None for p in encoder_.parameters()) and (mix.grad != 0).all() and torch.isfinite(mix.grad).all()
    for l in range(L):
        with torch.no_grad():
            ends = []
            for step in (1e-3, -2e-3): mix[l] += step; ends.append(loss().item())
            mix[l] += 1e-3
        assert (ends[0] - ends[1])/2e-3 == pytest.approx(mix.grad[l].item(), rel=2e-3, abs=1e-5)   # T5 norms in float32

@pytest.mark.parametrize("kind,family", FEW)
def test_it_generates_with_a_cache_as_without_and_with_beams(tmp_path, kind, family):
    _, _, plain, model = pair(tmp_path, kind, family)
    x = {k: v for k, v in given(model).items() if not k.startswith("decoder")}
    write = lambda m, **how: m.generate(**x, **dict(max_new_tokens=6, do_sample=False, num_beams=1) | how)
    assert torch.equal(write(model), write(plain)) and torch.equal(write(model, num_beams=3), write(plain, num_beams=3))   # as long as nothing is mixed
    settle(model)
    assert torch.equal(write(model), write(model, use_cache=False)) and torch.equal(write(model, num_beams=3), write(model, num_beams=3, use_cache=False))
    with torch.no_grad():     # word for word by the plain forward
        ids = write(model, min_new_tokens=6)
        logits = model(**x, decoder_input_ids=ids[:, :-1]).logits
    eos = model.generation_config.eos_token_id
    if eos is not None: logits[..., eos] = -torch.inf
    assert torch.equal(logits.argmax(-1), ids[:, 1:])
    other = copy.deepcopy(model); settle(other, 5)
    assert torch.equal(write(copy.deepcopy(model)), write(model)) and not torch.equal(moves(other), moves(model))

def test_what_else_an_encoder_is_asked_for(tmp_path):
    _, _, plain, model = pair(tmp_path, "bert", "bart")
    x = given(model)
    with torch.no_grad():
        a, b = (m(**x, output_hidden_states=True, output_attentions=True) for m in (plain.float(), model.float()))
        assert len(b.encoder_hidden_states) == L + 1 and all(torch.equal(i, j) for i, j in zip(a.encoder_hidden_states, b.encoder_hidden_states))
        assert all(torch.equal(i, j) for i, j in zip(a.encoder_attentions, b.encoder_attentions)) and model(**x).encoder_hidden_states is None
        assert torch.equal(model(**x, return_dict=False)[0], b.logits)
    assert b.encoder_last_hidden_state.shape == (3, 12, (L + 1)*16) and torch.equal(b.encoder_last_hidden_state[..., -16:], a.encoder_last_hidden_state)

# ---- disk --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind,family", FEW)
def test_saved_and_opened_it_is_the_same_to_the_bit(tmp_path, kind, family, caplog):
    enc, new, _, model = pair(tmp_path, kind, family)
    settle(model)
    again = save(model, None, tmp_path/"s", Card("s", "train"))
    hf.logging.set_verbosity_warning(); logger = logging.getLogger("transformers"); was, logger.propagate = logger.propagate, True
    try: back = opened(again.path, torch.float64)
    finally: hf.logging.set_verbosity_error(); logger.propagate = was
    assert not caplog.records and type(back).__name__ == again.architecture == type(model).__name__
    near = lambda a, b: torch.allclose(moves(a), moves(b), rtol=0, atol=1e-12)     # what lies elsewhere in memory may be summed in another order
    assert all(torch.equal(x, back.state_dict()[n]) for n, x in model.state_dict().items()) and near(back, model)
    assert near(with_head(again.path, "texts", []).double(), model.float().double()) and json.loads((again.path/"config.json").read_text())["layer_mix"] is True
    [mix] = again.layout.select("decoder/cross.mix").values()
    assert mix.shape == (L,) and mix.name in again.layout.select("decoder/cross") and set(again.names) == set(new.names)

def test_built_in_memory_it_is_what_is_written(tmp_path):
    enc = encoder("roberta-prelayernorm", tmp_path/"e")
    plan = graft(enc, layers=1, fusion=True)
    state, held = build(plan, {"encoder": enc}).state_dict(), load_file(carry_out(plan, enc, tmp_path/"g").path/"model.safetensors")
    assert "model.decoder.mix" in held and all(torch.equal(state[n], x) for n, x in held.items())
    assert "cross-attention reads a mix of 5 states, at first the last one alone" in told(plan) and plan.row("model.decoder.mix").op == "zeros"

def test_a_plain_graft_says_nothing_of_it(tmp_path):
    plan = graft(encoder("bert", tmp_path/"e"), layers=1)
    assert "layer_mix" not in plan.config and "fusion" not in plan.notes and not plan.layout.find("cross.mix") and not any("mix" in line for line in told(plan))

@pytest.mark.parametrize("kind,family", FEW)
def test_the_encoder_comes_back_to_the_bit(tmp_path, kind, family):
    enc, new, _, model = pair(tmp_path, kind, family, torch.float32)
    equal(enc, carry_out(extract(new), new, tmp_path/"x"))
    model.get_encoder().requires_grad_(False)
    rates = torch.optim.SGD([p for p in model.get_decoder().parameters() if p.requires_grad], 0.1)
    model(**given(model)).logits.square().mean().backward(); rates.step()
    later = save(model, None, tmp_path/"t", Card.child("t", "train", [new.card]))
    assert not torch.equal(later.read(later.layout.one("cross.mix").name), torch.zeros(L))
    equal(enc, carry_out(extract(later, new.path), later, tmp_path/"y", new.path))
    bare = carry_out(extract(later), later, tmp_path/"z")       # without what the graft kept
    assert "layer_mix" not in json.loads((bare.path/"config.json").read_text())
    if kind == "t5":     # the whole checkpoint read as its encoder, which has no mix to give on
        again = graft(Checkpoint(later.path, "T5EncoderModel"), layers=1)
        assert "layer_mix" not in again.config and not again.layout.find("cross.mix")

# ---- training ----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory): return train_seq2seq.given(str(tmp_path_factory.mktemp("data")))

@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    "Train the small model, with a mix, through stages."
    folder = tmp_path_factory.mktemp("runs")
    def call(store, stages, model=None, **changed):
        model = model or mixing(train_seq2seq.model(data["tokenizer"], 0.1))
        return train(model, stages=stages, store=folder/store, **data | dict(batch=4, every=4, save_every=2, sequences=4) | changed)
    call.folder = folder
    return call

def lay_of(model): return layout(model.config, type(model).__name__)

def test_the_mix_learns_while_the_encoder_sleeps_and_a_killed_run_is_the_same(run, data):
    lay = lay_of(mixing(train_seq2seq.model(data["tokenizer"], 0.1)))
    stages = frozen_then(10, 6, lay, objective="denoise", lr=4e-3)
    frozen = run("frozen", always(6, lay, objective="denoise", lr=4e-3))
    before, after = train_seq2seq.model(data["tokenizer"], 0.1).state_dict(), weights(frozen.path)
    assert (after["model.decoder.mix"].abs() > 1e-4).all()
    assert all(torch.equal(after[n], before[n]) for n in after if n.startswith("model.encoder") or n == "model.shared.weight")
    calm = run("calm", stages, save_every=100)
    update = _Loop.update
    for at in (5, 8):     # each time anew from what was kept, before and behind the waking
        def struck(self, model, opt, feed, step, rates, at=at):
            if step == at: raise KeyboardInterrupt
            return update(self, model, opt, feed, step, rates)
        _Loop.update = struck
        try:
            with pytest.raises(KeyboardInterrupt): run("struck", stages, save_every=1)
        finally: _Loop.update = update
        assert [int(p.name.split("-")[1]) for p in (run.folder/"struck").glob("*/state-*")] == [at]
    assert same(run("struck", stages, save_every=1), calm)

def test_kept_outputs_hold_all_layers(run, data):
    lay = lay_of(mixing(train_seq2seq.model(data["tokenizer"], 0.1)))
    rounds = dict(objective="denoise", lr=4e-3, repeat=3)
    plain, kept = (run(f"round-{k}", always(7, lay, keep=k, **rounds)) for k in (None, "float32"))
    x, y = weights(plain.path), weights(kept.path)
    assert abs(plain.history.loss - kept.history.loss).max() < 1e-6 and torch.allclose(x["model.decoder.mix"], y["model.decoder.mix"], atol=1e-6)
    [file] = (run.folder/"round-float32").glob("kept-*/outputs/outputs.npy")
    size = file.stat().st_size - 128     # numpy's header
    with pytest.raises(Refusal, match=f"take {size:,} bytes"): run("tight", always(7, lay, keep="float32", **rounds), keep_bytes=size - 1)
    assert size % (3*4*3*16*4) == 0      # steps, rows, two layers and the embeddings, numbers of four bytes

def test_a_config_that_promises_a_mix_is_not_trained_without(run, data):
    model = train_seq2seq.model(data["tokenizer"], 0.1); model.config.layer_mix = True
    with pytest.raises(Refusal, match="says layer_mix, and the model has no mix; open the checkpoint by core.mix.opened"): run("none", [Stage(2, objective="denoise")], model)
    assert not (run.folder/"none").exists()

@pytest.mark.parametrize("kind,family", FEW)
@pytest.mark.parametrize("frozen", [(), ENCODER, ("encoder/",), (*ENCODER, "cross.mix"), ("decoder/cross",)], ids=["awake", "encoder asleep", "its layers", "mix too", "cross"])
def test_flops_are_those_that_torch_counts(tmp_path, kind, family, frozen):
    if family == "encoder-decoder" and frozen in (ENCODER, (*ENCODER, "cross.mix")): frozen = ("encoder/", *frozen[2:])   # its decoder has words of its own
    enc = encoder(kind, tmp_path/"e", dtype=torch.float32)
    model = build(graft(enc, family, layers=2, fusion=True), {"encoder": enc}); model.set_attn_implementation("eager")
    lay, x = lay_of(model), given(model)
    del x["attention_mask"]
    optimizer(model, lay, Chain((Stage(1, objective="denoise", frozen=frozen),)))
    with asleep(model), FlopCounterMode(display=False) as counter: model.train()(**x, use_cache=False).logits.sum().backward()
    assert flops(lay, 12, 5, frozen=frozen)*3 == counter.get_total_flops()

# ---- mistakes ----------------------------------------------------------------------------------------------------------------

def test_refusals(tmp_path):
    enc, new, plain, model = pair(tmp_path, "bert", "bart")
    with pytest.raises(Refusal, match="mixes 80 numbers a token, of 5 layers, and gets 16; give it what its own encoder hands on"):
        model(**given(model), encoder_outputs=BaseModelOutput(last_hidden_state=torch.zeros(3, 12, 16, dtype=torch.float64)))
    with pytest.raises(Refusal, match="has a mix already"): mixing(model)
    with pytest.raises(Refusal, match="a mix of the shape \\(3,\\) for an encoder of 4 layers; give 4 numbers"): mixing(plain, torch.zeros(3))
    assert not hasattr(plain.config, "layer_mix") and type(plain.get_encoder()) is hf.BartModel(plain.config).encoder.__class__   # refused, it is what it was
    plain.config.encoder_layerdrop = 0.1
    with pytest.raises(Refusal, match="drops whole layers"): mixing(plain)
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(Refusal, match="no decoder that reads an encoder"): mixing(gpt2)
    with pytest.raises(Refusal, match="layer_mix cannot be 'yes'; say true"): layout(new.config | {"layer_mix": "yes"}, new.architecture)
    wide, small = (dict(vocab_size=9, hidden_size=d, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8) for d in (8, 4))
    two = hf.EncoderDecoderModel(hf.EncoderDecoderConfig(encoder=hf.BertConfig(**wide).to_dict(), decoder=hf.BertConfig(**small, is_decoder=True, add_cross_attention=True).to_dict()))
    with pytest.raises(Refusal, match="reads one layer through enc_to_dec_proj"): mixing(two)

def test_a_checkpoint_without_the_mix_that_it_promises(tmp_path):
    enc, new, plain, _ = pair(tmp_path, "bert", "bart")
    for file in (f for f in new.path.iterdir() if f.name != "model.safetensors"): (tmp_path/"no").mkdir(exist_ok=True); shutil.copy(file, tmp_path/"no")
    save_file({n: x for n, x in load_file(new.path/"model.safetensors").items() if n != "model.decoder.mix"}, tmp_path/"no/model.safetensors", {"format": "pt"})
    for call in (Checkpoint, opened, lambda f: with_head(f, "texts", [])):
        with pytest.raises(Refusal, match="lacks model.decoder.mix \\(cross.mix\\)"): call(tmp_path/"no")
    config = json.loads((new.path/"config.json").read_text()); del config["layer_mix"]
    (new.path/"config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="holds model.decoder.mix, which BartForConditionalGeneration does not have"): Checkpoint(new.path)

def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enc = encoder("t5", tmp_path/"e")
    assert main(["graft", "e", "g", "--fusion", "--decoder-layers", "1"]) == 0
    assert "cross-attention reads a mix of 5 states" in capsys.readouterr().out
    carry_out(graft(enc, layers=1, fusion=True), enc, tmp_path/"again")
    for f in (tmp_path/"again").glob("*.safetensors"): assert f.read_bytes() == (tmp_path/"g"/f.name).read_bytes()
    assert main(["describe", "g"]) == 0 and main(["extract", "g", "x"]) == 0
    equal(enc, Checkpoint(tmp_path/"x"))

"Models made of two: names, shapes, ties and order against transformers, to disk and back, FLOPs as torch counts them, and what is refused."
import json
import numpy as np
import pytest, torch, transformers as hf
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.corpus import Packed
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import family, layout
from seqwarm.core.ledger import describe, flops, units
from seqwarm.core.objectives import _inputs
from seqwarm.core.plan import Plan, Row
from seqwarm.core.write import build, save, write
from test_layout import as_written, make
from test_layout_encoders import MODERN, TINY, V3
from test_ledger import B, FROZEN, S, SEQ2SEQ, T

CROSS, WHOLE = dict(is_decoder=True, add_cross_attention=True), "EncoderDecoderModel"
def encoder(kind, **kw): return TINY | dict(model_type=kind) | kw
def decoder(kind, **kw): return encoder(kind, num_hidden_layers=3, intermediate_size=28) | CROSS | kw
def pair(e, d, **kw): return dict(encoder=e, decoder=d) | kw

PAIRS = {k: pair(encoder(k), decoder(k)) for k in ("bert", "roberta", "xlm-roberta", "roberta-prelayernorm", "xlm-roberta-xl")}
PAIRS |= {
    "electra": pair(encoder("electra", embedding_size=16), decoder("electra", embedding_size=16)),
    "electra, narrow embeddings": pair(encoder("electra", embedding_size=8), decoder("electra", embedding_size=8, hidden_size=32)),
    "bert, untied": pair(encoder("bert"), decoder("bert", tie_word_embeddings=False)),
    "bert, the whole untied": pair(encoder("bert"), decoder("bert"), tie_word_embeddings=False),
    "roberta under a wider bert": pair(encoder("roberta"), decoder("bert", hidden_size=32, vocab_size=40)),
    "bert under roberta before": pair(encoder("bert", num_attention_heads=2), decoder("roberta-prelayernorm")),
    "mpnet under roberta": pair(encoder("mpnet"), decoder("roberta")),
    "deberta under bert": pair(V3 | dict(model_type="deberta-v2"), decoder("bert")),
    "modernbert under xlm-roberta": pair(MODERN | dict(model_type="modernbert"), decoder("xlm-roberta"))}

@pytest.mark.parametrize("name", PAIRS)
def test_table_is_what_is_written(name, tmp_path):
    m, lay, state = as_written(WHOLE, PAIRS[name], tmp_path)
    if "xlm-roberta" not in name.split(): assert list(lay.tensors) == list(state)       # whose causal class declares its head first
    linear = {f"{n}.weight": 0 for n, x in m.named_modules() if isinstance(x, torch.nn.Linear)}
    assert {n: t.out for n, t in lay.tensors.items() if t.out is not None} == linear
    assert {t.stack for t in lay.tensors.values()} == {"encoder", "decoder"} and lay.layers == {
        "encoder": PAIRS[name]["encoder"]["num_hidden_layers"], "decoder": 3}
    assert all(n.startswith(f"{t.stack}.") or t.role.startswith("cross.project") for n, t in lay.tensors.items())
    assert lay.one("head").tied == (None if name == "bert, untied" else next(t.name for t in lay.find("embed.token", "decoder")))
    assert bool(lay.find("cross.project")) == (PAIRS[name]["encoder"]["hidden_size"] != PAIRS[name]["decoder"]["hidden_size"])

def test_the_encoder_is_its_base_model_and_the_decoder_bart_s_in_roles():
    lay = layout(hf.EncoderDecoderConfig(**PAIRS["bert"]), WHOLE)
    alone = layout(hf.BertConfig(**TINY), "BertModel")
    plain = lambda t: (t.role, t.layer, t.axes, t.shape, t.out)
    assert {n.removeprefix("encoder."): plain(t) for n, t in lay.select("encoder").items()} == {n: plain(t) for n, t in alone.stored().items()}
    bart = layout(hf.BartConfig(d_model=16), "BartForConditionalGeneration")
    in_layers = lambda x: {(t.role, t.axes) for t in x.tensors.values() if t.stack == "decoder" and t.layer is not None}
    assert in_layers(lay) == in_layers(bart)
    assert not lay.select("encoder").keys() & lay.select("decoder").keys() and len(lay.select(["encoder", "decoder"])) == len(lay.stored())

def test_a_head_of_its_own_is_told_by_the_numbers(tmp_path):
    m = make(WHOLE, PAIRS["bert"])
    m.decoder.cls.predictions.decoder.weight = torch.nn.Parameter(torch.randn(50, 16))
    state = {n: t.contiguous().clone() for n, t in m.state_dict().items()}
    m.config.architectures = [WHOLE]; m.config.save_pretrained(tmp_path); save_file(state, tmp_path/"model.safetensors")
    assert Checkpoint(tmp_path).untied == ["decoder.cls.predictions.decoder.weight"]
    old = lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    state["decoder.cls.predictions.decoder.weight"] = state["decoder.bert.embeddings.word_embeddings.weight"].clone()
    save_file({old(n): t for n, t in state.items()} | {"encoder.embeddings.position_ids": torch.ones(1, 20)}, tmp_path/"model.safetensors")
    c = Checkpoint(tmp_path)
    assert not c.untied and c.names == list(c.layout.stored())
    shared = {n: t.clone() for n, t in state.items() if not n.startswith("decoder.bert.encoder")}      # as when halves were one
    save_file(shared, tmp_path/"model.safetensors")
    with pytest.raises(Refusal, match="lacks decoder.bert.encoder.layer.0.attention.self.query.weight"): Checkpoint(tmp_path)

@pytest.mark.parametrize("name", ["bert, untied", "roberta under a wider bert", "xlm-roberta-xl"])
def test_from_two_checkpoints_to_one_and_back(name, tmp_path):
    "Joined from its halves by a plan, built, written, saved: always the model that transformers makes of the same numbers."
    torch.manual_seed(0)
    m = make(WHOLE, PAIRS[name]).eval()
    for half in (m.encoder, m.decoder): half.save_pretrained(tmp_path/type(half).__name__)
    lone = tmp_path/type(m.decoder).__name__
    with pytest.raises(Refusal, match="cross-attention has no table of its own"): Checkpoint(lone)
    enc, joined = Checkpoint(tmp_path/type(m.encoder).__name__), layout(m.config, WHOLE)
    first = save(m, None, tmp_path/"first", Card("first", "try"))
    rows = [Row(n, "copy", f"encoder:{n.removeprefix('encoder.')}" if n.startswith("encoder.") else f"first:{n}") for n in joined.stored()]
    plan = Plan("graft", first.config, WHOLE, rows, dropped={"first:encoder.*": "comes from the encoder"}, untied=list(first.untied))
    out = write(plan, {"encoder": enc, "first": first}, tmp_path/"out", None)
    assert out.layout.tensors == joined.tensors and load_file(out.path/"model.safetensors").keys() == joined.stored().keys()
    feed = dict(input_ids=torch.arange(5, 17).view(2, 6), attention_mask=torch.tensor([[1]*6, [1]*4 + [0]*2]), decoder_input_ids=torch.arange(20, 28).view(2, 4))
    again, info = hf.EncoderDecoderModel.from_pretrained(out.path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        want = m(**feed).logits
        for x in (again.eval(), build(plan, {"encoder": enc, "first": first})): assert torch.equal(x(**feed).logits, want)

FLOPS = {k: pair(PAIRS[k]["encoder"] | wide, PAIRS[k]["decoder"] | wide | more) for k, more in {
    "roberta under a wider bert": dict(hidden_size=96), "bert under roberta before": {}, "electra, narrow embeddings": dict(hidden_size=96),
    "mpnet under roberta": {}, "modernbert under xlm-roberta": {}}.items()
    for wide in [dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_attention_heads=4, max_position_embeddings=40)]}
PATTERNS = {k: (FROZEN | SEQ2SEQ)[k] for k in ("nothing", "embeddings", "all but norms", "all but one norm", "encoder and shared embedding", "decoder",
                                               "all but cross", "all but positions")}
ALSO = {"the encoder, by its name": ["encoder"], "all but the matrix between": lambda t: not t.role.startswith("cross.project"),
        "all but the encoder's last norm": lambda t: (t.role, t.stack, t.layer) != ("ffn.norm", "encoder", 1),
        "all but the pooler": lambda t: t.role != "pooler", "lower half of the encoder": ["encoder/embed", "encoder@0"]}

@pytest.mark.parametrize("name", FLOPS)
def test_flops_as_torch_counts(name):
    m = make(WHOLE, FLOPS[name]); m.set_attn_implementation("eager"); lay = layout(m.config, WHOLE)
    feed = dict(input_ids=torch.randint(5, 97, (B, S)), decoder_input_ids=torch.randint(5, 97, (B, T)), use_cache=False)
    for what, frozen in (PATTERNS | ALSO).items():
        asleep = {n for n, t in lay.stored().items() if frozen(t)} if callable(frozen) else set(lay.select(frozen))
        for n, p in m.named_parameters(remove_duplicate=False): p.requires_grad_(lay.storage(lay.tensors[n]).name not in asleep); p.grad = None
        for train in (False, True) if what == "nothing" else (True,):
            with FlopCounterMode(display=False) as counter:
                loss = m(**feed).logits.square().sum()
                if train and loss.requires_grad: loss.backward()
            assert flops(lay, S, T, train, frozen) * B == pytest.approx(counter.get_total_flops(), rel=1e-6), (what, train)
    table = describe(lay, S)
    assert table.flops.sum() * S == pytest.approx(flops(lay, S, S, train=False)) and table.parameters.sum() == m.num_parameters()

def test_the_scores_beside_deberta_s_own_are_counted_in_its_stack_alone():
    "The two wholes differ by what their encoders differ."
    whole, plain = (layout(hf.EncoderDecoderConfig(**PAIRS[k]), WHOLE) for k in ("deberta under bert", "bert"))
    alone = layout(hf.DebertaV2Config(**V3), "DebertaV2Model"), layout(hf.BertConfig(**TINY), "BertModel")
    between = flops(whole, S, T, train=False) - flops(plain, S, T, train=False)
    assert between == flops(alone[0], S, train=False) - flops(alone[1], S, train=False) != 0
    assert describe(whole, T).set_index("role").flops["c2p"] == describe(alone[0], T).set_index("role").flops["c2p"] > 0

def test_units_of_two_stacks():
    lay = layout(hf.EncoderDecoderConfig(**PAIRS["bert"]), WHOLE)
    assert units(lay, 1.2e6) == pytest.approx(2 + 3) and units(lay, 1.2e6, frozen="encoder") == pytest.approx(1 + 3)

@pytest.mark.parametrize("e,d,words", [
    (encoder("gpt2"), decoder("bert"), "a gpt2 model cannot be the encoder"), (encoder("bert"), decoder("modernbert"), "modernbert model cannot be the decoder"),
    (encoder("bert"), encoder("bert"), "decoder says is_decoder=False and add_cross_attention=False"),
    (encoder("bert"), decoder("bert", is_decoder=False), "is_decoder=False and add_cross_attention=True"),
    (decoder("bert"), decoder("bert"), "encoder says is_decoder=True"), (encoder("bert"), decoder("bert", num_attention_heads=0), "cut into its heads"),
    (encoder("bert"), decoder("bert", hidden_size=17), "cut into its heads"), (encoder("berd"), decoder("bert"), "not valid"),
    (encoder("bert"), decoder("bert", num_hidden_layers="many"), "not valid"), (encoder("bert"), 3, "not valid")])
def test_refused_in_one_line(e, d, words):
    with pytest.raises(Refusal) as refused: layout(dict(model_type="encoder-decoder", encoder=e, decoder=d), WHOLE)
    assert words in str(refused.value) and "\n" not in str(refused.value)

def test_config_in_a_file_states_only_what_differs(tmp_path):
    m = make(WHOLE, PAIRS["bert"]); m.save_pretrained(tmp_path)
    full = json.loads((tmp_path/"config.json").read_text())
    assert layout(full).tensors == layout(dict(model_type="encoder-decoder", **PAIRS["bert"]), WHOLE).tensors
    assert layout(dict(model_type="encoder-decoder"), WHOLE).layers == {"encoder": 12, "decoder": 12}   # two BERTs, as transformers has it

def test_it_is_not_packed():
    m = make(WHOLE, PAIRS["bert"]); one = np.array([[5, 6, 7]])
    assert not family("encoder-decoder").packs
    with pytest.raises(Refusal, match="reads one text and writes another"):
        _inputs(Packed(one, one*0, one - 5, np.array([0])), one, one, m.config, False)
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(RuntimeError): m(input_ids=torch.arange(5, 11)[None], attention_mask=mask, decoder_input_ids=torch.arange(4)[None])

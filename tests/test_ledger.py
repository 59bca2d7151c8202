"The ledger's FLOPs against torch's own counter, on every family, forward and backward, whole and frozen."
import pytest, torch, transformers as hf
from torch.utils.flop_counter import FlopCounterMode
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import layout
from seqwarm.core.ledger import Cost, crossing, describe, flops, lineage, saved, units

B, S, T = 2, 24, 16    # sequences, tokens of the source, tokens of the target
LLAMA = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
BERT = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=40)
BART = dict(vocab_size=97, d_model=64, encoder_ffn_dim=96, decoder_ffn_dim=80, encoder_layers=2, decoder_layers=3,
            encoder_attention_heads=2, decoder_attention_heads=4, max_position_embeddings=40)
T5 = dict(vocab_size=97, d_model=64, d_ff=96, d_kv=24, num_layers=2, num_decoder_layers=3, num_heads=4)
GPT2 = dict(vocab_size=97, n_positions=40, n_embd=64, n_layer=3, n_head=4)
MODELS = {"GPT2LMHeadModel": GPT2, "LlamaForCausalLM": LLAMA, "MistralForCausalLM": LLAMA,
          "Qwen2ForCausalLM": LLAMA | dict(tie_word_embeddings=True), "Qwen3ForCausalLM": LLAMA | dict(head_dim=24),
          "BertForMaskedLM": BERT, "BertModel": BERT, "BertForSequenceClassification": BERT, "RobertaForMaskedLM": BERT,
          "RobertaForSequenceClassification": BERT, "RobertaForTokenClassification": BERT, "BartForConditionalGeneration": BART,
          "RobertaPreLayerNormForMaskedLM": BERT, "RobertaPreLayerNormModel": BERT, "XLMRobertaXLForMaskedLM": BERT,
          "XLMRobertaXLForTokenClassification": BERT, "BlenderbotForConditionalGeneration": BART,
          "T5ForConditionalGeneration": T5, "T5EncoderModel": T5 | dict(feed_forward_proj="gated-gelu")}
FROZEN = {"nothing": [], "embeddings": ["embed"], "body": ["attn", "ffn"], "lower layers": ["embed", "attn@0-1", "ffn@0-1"],
          "all but norms": lambda t: not t.role.startswith(("attn.norm", "ffn.norm")), "values": ["attn.v"],
          "all but one norm": lambda t: t.role != "ffn.norm" or t.layer != 1,
          "all but biases of queries": lambda t: t.role not in ("attn.q.bias", "attn.qkv.bias", "attn.q_norm")}
SEQ2SEQ = {"encoder": ["encoder/"], "encoder and shared embedding": ["encoder/", "embed.token"], "decoder": ["decoder/"],
           "all but cross": lambda t: not t.role.startswith("cross"),
           "all but positions": lambda t: t.role not in ("attn.relative", "embed.position")}

def measured(architecture, kw, frozen, train):
    "FLOPs of one sequence by torch's counter, attention eager."
    torch.set_num_threads(1); torch.manual_seed(0)
    cls = getattr(hf, architecture)
    model = cls(cls.config_class(**kw)); model.set_attn_implementation("eager"); model.config.use_cache = False
    lay = layout(model.config, architecture)
    asleep = {n for n, t in lay.stored().items() if frozen(t)} if callable(frozen) else set(lay.select(frozen))
    for n, p in model.named_parameters(remove_duplicate=False): p.requires_grad_(lay.storage(lay.tensors[n]).name not in asleep)
    two = "decoder" in lay.layers
    kwargs = dict(input_ids=torch.randint(5, 97, (B, S))) | (dict(decoder_input_ids=torch.randint(5, 97, (B, T))) if two else {})
    with FlopCounterMode(display=False) as counter:
        out = model(**kwargs)
        used = [out[k] for k in ("logits", "last_hidden_state", "pooler_output") if k in out]
        loss = sum(u.float().square().sum() for u in used)
        if train and loss.requires_grad: loss.backward()
    return lay, T if two else None, counter.get_total_flops() / B

@pytest.mark.parametrize("architecture", MODELS)
def test_flops_as_torch_counts(architecture):
    for train in (False, True):
        lay, t, counted = measured(architecture, MODELS[architecture], [], train)
        assert flops(lay, S, t, train) == pytest.approx(counted, rel=1e-6), train
    assert flops(lay, S, t) > 2.5 * flops(lay, S, t, train=False)

@pytest.mark.parametrize("architecture", MODELS)
def test_frozen_flops_as_torch_counts(architecture):
    kinds = FROZEN | (SEQ2SEQ if "Conditional" in architecture else {})
    for name, frozen in kinds.items():
        if name == "values" and architecture.startswith("GPT2"): continue   # which has them in one matrix with queries and keys
        lay, t, counted = measured(architecture, MODELS[architecture], frozen, True)
        assert flops(lay, S, t, frozen=frozen) == pytest.approx(counted, rel=1e-6), name

def test_longer_sequences_cost_squares():
    lay = layout(hf.GPT2Config(vocab_size=9, n_positions=64, n_embd=8, n_layer=2, n_head=2), "GPT2LMHeadModel")
    f = [flops(lay, n, train=False) for n in (8, 16, 32)]
    assert (f[2] - 2*f[1]) == 4 * (f[1] - 2*f[0]) == 4*8*2 * (32**2 - 2*16**2)   # the linear part falls out

def test_describe_adds_up():
    for architecture, kw in MODELS.items():
        cls = getattr(hf, architecture); model = cls(cls.config_class(**kw)); lay = layout(model.config, architecture)
        table, two = describe(lay, S), "decoder" in lay.layers
        buffers = sum(b.numel() for n, b in model.named_buffers() if n in lay.stored())
        assert table.parameters.sum() == model.num_parameters() + buffers
        assert table.flops.sum() * S == pytest.approx(flops(lay, S, S if two else None, train=False))

def test_bad_lengths():
    gpt2, bart = layout(hf.GPT2Config(), "GPT2LMHeadModel"), layout(hf.BartConfig(), "BartModel")
    for lay, args, words in [(gpt2, (8, 8), "no decoder"), (bart, (8,), "has a decoder"), (gpt2, (0,), "at least one"),
                             (bart, (8, -1), "at least one")]:
        with pytest.raises(Refusal, match=words): flops(lay, *args)
    with pytest.raises(Refusal, match="did you mean"): flops(gpt2, 8, frozen=["atn"])
    for lay, args in [(gpt2, (1025,)), (bart, (8, 1025)), (bart, (1025, 8))]:
        with pytest.raises(Refusal, match="no places for 1,025 tokens; give a length of at most 1,024"): describe(lay, *args)
    assert describe(gpt2).flops.sum() == describe(gpt2, 512).flops.sum()
    short = layout(hf.GPT2Config(n_positions=64), "GPT2LMHeadModel")
    assert describe(short).flops.sum() == describe(short, 64).flops.sum()

def test_a_checkpoint_or_a_model_is_no_layout_no_card_no_history():
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1))
    for call in (lambda: flops(model, 8), lambda: units(model, 8), lambda: describe(model)):
        with pytest.raises(Refusal, match="a GPT2LMHeadModel is no layout; make"): call()
    for wrong, kind in ((model, "GPT2LMHeadModel"), ("runs/x", "str"), (None, "NoneType"), ([model], "GPT2LMHeadModel")):
        with pytest.raises(Refusal, match=f"a {kind} is no card; give"): lineage(wrong)
    good = dict(flops=[0, 1], loss=[2, 1])
    for wrong in (model, "history.json", None):
        with pytest.raises(Refusal, match="is no history; give"): saved(wrong, good)

def test_units():
    bart = layout(hf.BartConfig(encoder_layers=6, decoder_layers=3), "BartForConditionalGeneration")
    assert units(bart, 1e5) == pytest.approx(9/12) and units(bart, 2e5, frozen=["encoder/"]) == pytest.approx(2*(3 + 3)/12)
    assert units(bart, 1e5, frozen=["embed"]) == units(bart, 1e5, frozen=["encoder/attn"]) == units(bart, 1e5)  # no layer sleeps whole

class Card:
    def __init__(self, id, cost, parents=()):
        self.id, self.cost, self.ancestors = id, cost, {}
        for p in parents: self.ancestors |= p.ancestors | {p.id: dict(name=p.id, recipe="", parents=[], cost=p.cost)}

def test_lineage_counts_once():
    "A diamond: two children of one parent meet again; the sum is that of the distinct nodes, whatever is asked for and in which order."
    a = Card("a", Cost(1, 10, 100, 1000).as_dict()); b, c = Card("b", dict(tokens=2), [a]), Card("c", dict(tokens=4), [a])
    d = Card("d", dict(tokens=8, flops=.5), [b, c])
    assert lineage(d) == Cost(15, 10.5, 100, 1000) == lineage([a, d, c, b, d]) and lineage([b, c]).tokens == 7 and lineage([]) == Cost()
    forged = Card("e", {}, [Card("a", dict(tokens=0))])
    with pytest.raises(Refusal, match="differ in what checkpoint a cost"): lineage([d, forged])

def test_crossing_of_a_known_curve():
    "On y = 10 - x the crossing of any level is known; steps, plateaus and gaps too."
    xs = [0, 3, 4, 8]
    for level in (9.5, 7, 6.2, 3): assert crossing(xs, [10 - x for x in xs], level) == pytest.approx(10 - level)
    assert crossing(xs, [10, float("nan"), 6, 2], 8) == pytest.approx(2) and crossing([], [], 1) is None
    for bad in (([1, 2], [1]), ([2, 1], [3, 2])):
        with pytest.raises(Refusal): crossing(*bad, 0)

def test_saved_in_all_forms():
    import pandas as pd
    scratch = pd.DataFrame(dict(step=[0, 100, 200], tokens=[0, 10, 20], flops=[0, 1e3, 2e3], loss=[7., 5., 4.]))
    warm = pd.DataFrame(dict(step=[0, 50, 100], tokens=[0, 5, 10], flops=[0, 800, 1600], loss=[6., 5., 3.]))
    assert saved(warm, scratch, by="step") == pytest.approx(1 - 75/200) == saved(warm, scratch, by="tokens")
    assert saved(warm, scratch) == pytest.approx(1 - 1200/2000) and saved(warm, scratch, extra=1200) == pytest.approx(-.2)
    assert saved(warm.to_dict("records"), scratch.to_dict("list")) == saved(warm, scratch)
    assert saved(warm, scratch, level=5.) == pytest.approx(1 - 800/1000) and saved(scratch, scratch) == 0
    assert saved(scratch, warm) is None                                       # scratch never gets as far as the warm run
    with pytest.raises(Refusal, match="did you mean 'flops'"): saved(warm, scratch, by="flop")
    with pytest.raises(Refusal, match="never reaches"): saved(warm, scratch, level=1.)

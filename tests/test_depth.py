"Deeper models against transformers' own forward, cache and gradients, on tiny models in which no number is zero or one."
from dataclasses import replace
import pytest, torch, transformers as hf
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.mix import mixing, opened
from seqwarm.core.plan import OPS, Plan, operation
from seqwarm.core.stages import Stage, chains, optimizer
from seqwarm.core.write import build, save, write
from seqwarm.methods.depth import copied, deepened, depth
from seqwarm.methods.width import width

hf.logging.set_verbosity_error(); hf.logging.disable_progress_bar(); torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("quick")
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
             max_position_embeddings=32) | IDS
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
BERT = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0) | IDS
BART = dict(vocab_size=40, d_model=16, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=28, encoder_attention_heads=2,
            decoder_attention_heads=4, max_position_embeddings=32, decoder_start_token_id=1, forced_eos_token_id=None, dropout=0.0) | IDS
T5 = dict(vocab_size=40, d_model=16, d_kv=6, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2, dropout_rate=0.0, relative_attention_num_buckets=8,
          relative_attention_max_distance=9, decoder_start_token_id=0) | IDS
GPT2 = dict(vocab_size=40, n_embd=16, n_head=4, n_layer=3, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) | IDS
OPT = dict(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=16, max_position_embeddings=32, dropout=0.0) | IDS
PRE = {   # what `identity` holds for, with the class
    "gpt2": ("GPT2LMHeadModel", GPT2), "llama": ("LlamaForCausalLM", LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "llama, untied": ("LlamaForCausalLM", LLAMA | dict(tie_word_embeddings=False)), "qwen3": ("Qwen3ForCausalLM", LLAMA),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in LLAMA.items() if k != "head_dim"} | dict(use_sliding_window=True, sliding_window=3, max_window_layers=1)),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | dict(sliding_window=3, layer_types=WINDOWS, query_pre_attn_scalar=4)),
    "gemma3_text": ("Gemma3ForCausalLM", LLAMA | dict(sliding_window=3, layer_types=WINDOWS, query_pre_attn_scalar=4)),
    "olmo2": ("Olmo2ForCausalLM", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "bloom": ("BloomForCausalLM", dict(vocab_size=40, hidden_size=16, n_layer=3, n_head=4) | IDS), "opt": ("OPTForCausalLM", OPT),
    "roberta-prelayernorm": ("RobertaPreLayerNormForMaskedLM", BERT),
    "modernbert": ("ModernBertForMaskedLM", {k: v for k, v in BERT.items() if "dropout" not in k} | dict(global_attn_every_n_layers=2, local_attention=4,
                   cls_token_id=1, sep_token_id=2, attn_implementation="eager")),
    "t5": ("T5ForConditionalGeneration", T5), "t5, gated": ("T5ForConditionalGeneration", T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "mbart": ("MBartForConditionalGeneration", BART)}
POST = {"bert": ("BertForMaskedLM", BERT), "roberta": ("RobertaForMaskedLM", BERT), "electra": ("ElectraForMaskedLM", BERT | dict(embedding_size=8)),
        "mpnet": ("MPNetForMaskedLM", BERT | dict(pad_token_id=1)), "bart": ("BartForConditionalGeneration", BART),
        "opt, post": ("OPTForCausalLM", OPT | dict(do_layer_norm_before=False)),
        "deberta": ("DebertaV2ForMaskedLM", BERT | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], conv_kernel_size=3, position_buckets=4))}
ALL = PRE | POST
CACHED = [k for k in PRE if k not in ("roberta-prelayernorm", "modernbert")]
RMS = ("llama", "qwen", "gemma", "olmo2", "t5")   # their norms compute in float32

def random(model):
    "Every number its own, norms about one, none of them near what a new model has."
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.normal_(0, 0.25)
            if p.dim() == 1 and n.endswith("weight"): p.add_(0 if "gemma" in model.config.model_type else 1)
    return model.eval()

def source(kind: str, folder, dtype=torch.float64, **more) -> Checkpoint:
    cls, config = ALL[kind]
    torch.manual_seed(0)
    return save(random(getattr(hf, cls)(getattr(hf, cls).config_class(**config | more))).to(dtype), None, folder, Card(kind, "scratch", cost={"tokens": 5}))

def load(c: Checkpoint):
    model, info = getattr(hf, c.architecture).from_pretrained(c.path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()

def batch(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[1, 7:] = model.config.pad_token_id
    two = dict(decoder_input_ids=ids.flip(1)[:, :7].contiguous()) if model.config.is_encoder_decoder else {}
    return dict(input_ids=ids, attention_mask=(ids != model.config.pad_token_id).long(), **two)

def logits(model) -> torch.Tensor:
    with torch.no_grad(): return model(**batch(model)).logits

def grown(kind: str, tmp, *args, **how) -> tuple[Checkpoint, Plan, Checkpoint]:
    old = source(kind, tmp/"old"); plan = depth(old, *args, **how)
    return old, plan, write(plan, {"source": old}, tmp/"new")

def scale(kind: str) -> float: return 1e-5 if kind.startswith(RMS) else 1e-10

# ---- identity: the function stays, and learning begins

@pytest.mark.parametrize("kind", PRE)
def test_identity_keeps_the_function(kind, tmp_path):
    old, plan, new = grown(kind, tmp_path, method="identity") if "t5" not in kind else grown(kind, tmp_path, {"encoder": 5, "decoder": 4}, "identity")
    small, big = load(old), load(new)
    was, now = logits(small), logits(big)
    assert plan.notes["exact"] and was.std() > 0.01 and (was - now).abs().max() < scale(kind)*was.abs().max()
    assert new.layout.layers == {s: len(o) for s, o in plan.notes["layers"].items()} and min(new.layout.layers.values()) > min(old.layout.layers.values())
    assert new.card.recipe == "depth" and new.card.parents == [old.card.id]

@pytest.mark.parametrize("kind", CACHED)
def test_generation_with_and_without_a_cache_is_the_sources(kind, tmp_path):
    old, plan, new = grown(kind, tmp_path, method="identity")
    small, big = load(old), load(new)
    feed = {k: v[:, :6] for k, v in batch(small).items() if k != "decoder_input_ids"}
    how = dict(max_new_tokens=7, min_new_tokens=7, do_sample=False, output_logits=True, return_dict_in_generate=True)
    want = small.generate(**feed, **how, use_cache=False)
    for cache in (True, False):
        got = big.generate(**feed, **how, use_cache=cache)
        assert torch.equal(got.sequences, want.sequences) and len(got.logits) == 7
        for x, y in zip(got.logits, want.logits): assert (x - y).abs().max() < 1e-5*y.abs().max()    # handed out in float32

@pytest.mark.parametrize("kind", PRE)
def test_the_new_layers_learn_from_the_first_step(kind, tmp_path):
    old, plan, new = grown(kind, tmp_path, method="identity")
    big, lay = load(new), new.layout
    named, silent = dict(big.named_parameters()), [r.target for r in plan.rows if r.op in ("zeros", "fill")]
    assert {(lay.tensors[n].stack, lay.tensors[n].layer) for n in silent} == {(s, i) for s, found in plan.notes["new_layers"].items() for i in found}
    feed, want = batch(big), logits(big)
    big(**feed).logits.logsumexp(-1).sum().backward()
    for n in silent: assert named[n].grad.abs().max() > 1e-6, n
    with torch.no_grad():                                            # a step in nothing but what was silent
        for n in silent: named[n] -= 1e-2*named[n].grad/named[n].grad.norm()
    assert (logits(big) - want).abs().max() > 1e-4
    big.zero_grad(); big(**feed).logits.logsumexp(-1).sum().backward()
    idle = [n for n, p in big.named_parameters() if lay.tensors[n].layer is not None and (p.grad is None or not p.grad.any())]
    assert not [n for n in idle if "k_proj.bias" not in n], idle    # a bias of keys moves no score

# ---- where layers come from

WAYS = {"stack": [0, 1, 2, 0, 1, 2], "interpolate": [0, 0, 1, 1, 2, 2], "order": [2, 0, 1, 1]}
ONE = [k for k in ALL if "bart" not in k and "t5" not in k]

@pytest.mark.parametrize("kind", ONE)
def test_layers_come_from_where_they_should(kind, tmp_path):
    old = source(kind, tmp_path/"old"); was = old.layout
    for way, order in WAYS.items():
        plan = depth(old, order=order) if way == "order" else depth(old, method=way)
        new = write(plan, {"source": old}, tmp_path/way); now = new.layout
        assert plan.notes["layers"] == {"": order} and not plan.notes["exact"] and plan.notes["depth"] == way
        for t in now.tensors.values():
            if t.layer is None: assert t.tied or torch.equal(new.read(t.name), old.read(t.name)); continue
            found = [x for x in was.find(t.role, layer=order[t.layer]) if x.layer == order[t.layer]]
            if found: assert torch.equal(new.read(t.name), old.read(found[0].name)), t.name
            else: assert kind == "modernbert" and t.role == "attn.norm" and order[t.layer] == 0 and (new.read(t.name) == 1).all()
        if "layer_types" in old.config: assert new.config["layer_types"] == [old.config["layer_types"][k] for k in order]
    now, then = logits(load(new)), logits(load(old))
    assert now.isfinite().all() and (now - then).abs().max() > 1e-3

@pytest.mark.parametrize("kind", ["t5", "bart", "mbart"])
def test_two_stacks_grow_apart(kind, tmp_path):
    order = {"encoder": [1, 2, 2, 0], "decoder": [0, 1, 0]}
    old, plan, new = grown(kind, tmp_path, order=order)
    assert new.layout.layers == {"encoder": 4, "decoder": 3}
    for t in new.layout.tensors.values():
        if t.layer is None: continue
        k = 0 if t.role == "attn.relative" else order[t.stack][t.layer]
        [from_] = [x for x in old.layout.find(t.role, t.stack, k) if x.layer == k]
        assert torch.equal(new.read(t.name), old.read(from_.name))
    if kind == "t5": assert len(new.layout.find("attn.relative")) == 2
    model = load(new); feed = {k: v for k, v in batch(model).items() if "decoder" not in k}
    a, b = (model.generate(**feed, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(a, b)
    alone = depth(old, {"decoder": 3})
    assert alone.notes["layers"] == {"encoder": [0, 1, 2], "decoder": [0, 1, 1]} and alone.notes["new_layers"] == {"encoder": [], "decoder": [2]}

@pytest.mark.parametrize("kind", ALL)
def test_an_order_of_all_layers_is_a_copy(kind, tmp_path):
    old = source(kind, tmp_path/"old")
    plan, same = copied(old, "depth"), depth(old, order={s: list(range(L)) for s, L in old.layout.layers.items()})
    assert same.rows == plan.rows and same.config == plan.config and not same.dropped and same.notes["exact"] and same.notes["train"] == []

def test_layers_that_are_left_out_are_named(tmp_path):
    old, plan, new = grown("gpt2", tmp_path, order=[0, 2, 2])
    assert set(plan.dropped) == {f"source:{t.name}" for t in old.layout.find("*", layer=1) if t.layer == 1} and new.layout.layers == {"": 3}

def test_t5_keeps_the_table_of_a_first_layer_that_goes(tmp_path):
    old, plan, new = grown("t5", tmp_path, order={"encoder": [1, 2]})
    [was], [now] = (c.layout.find("attn.relative", "encoder") for c in (old, new))
    assert torch.equal(old.read(was.name), new.read(now.name)) and f"source:{was.name}" not in plan.dropped

# ---- experts

MOE = {k: v for k, v in LLAMA.items() if k != "head_dim"} | dict(num_experts_per_tok=2, output_router_logits=False)
QWEN = MOE | dict(num_experts=4, moe_intermediate_size=20, mlp_only_layers=[1])
EXPERTS = {"mixtral": ("MixtralForCausalLM", MOE | dict(num_local_experts=4)), "olmoe": ("OlmoeForCausalLM", MOE | dict(num_experts=4)),
           "qwen2_moe": ("Qwen2MoeForCausalLM", QWEN | dict(shared_expert_intermediate_size=12)), "qwen3_moe": ("Qwen3MoeForCausalLM", QWEN),
           "switch": ("SwitchTransformersForConditionalGeneration", T5 | dict(num_layers=4, num_decoder_layers=2, num_experts=4, num_sparse_encoder_layers=2,
                      num_sparse_decoder_layers=1))}
ALL |= EXPERTS

@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_go_with_their_layers(kind, tmp_path):
    old = source(kind, tmp_path/"old", torch.float32)
    order = {"encoder": [0, 1, 2, 3, 0, 1], "decoder": [0, 1, 0, 1]} if kind == "switch" else {"": [0, 1, 1, 2, 0]}
    new = write(depth(old, order=order), {"source": old}, tmp_path/"new")
    kept = {(t.stack, t.layer, t.role, t.expert): t.name for t in old.layout.stored().values()}
    for t in new.layout.stored().values():
        if t.layer is None or t.role == "attn.relative": continue
        assert torch.equal(new.read(t.name), old.read(kept[t.stack, order[t.stack][t.layer], t.role, t.expert])), t.name
    assert logits(load(new)).isfinite().all() and len({t.expert for t in new.layout.stored().values()}) == 5
    if kind == "switch": assert "stand where this family has them" in refused(old, order={"encoder": [0, 0, 1, 1]}); return
    same = write(depth(old, 5, method="identity"), {"source": old}, tmp_path/"same")
    was, now = logits(load(old)), logits(load(same))
    assert was.std() > 0.01 and (was - now).abs().max() < 1e-5*was.abs().max()

# ---- any plan can be deepened

def test_rows_of_any_plan_are_deepened_and_what_is_drawn_stays_drawn(tmp_path):
    old = source("llama", tmp_path/"old")
    plan = copied(old)
    up = old.layout.one("ffn.up", layer=1).name
    @operation("noise.test")
    def noise(x, y, *, seed, by): return x + by*torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) + y
    rows = [replace(r, op="noise.test", args={}, arrays={"by": "by"}, sources=r.sources*2) if r.target == up else r for r in plan.rows]
    plan = replace(plan, rows=rows, arrays={"by": torch.tensor(0.5)}, seed=7, notes={"exact": False, "wide": 1})
    small, big = build(plan, {"source": old}), build(deep := deepened(plan, 6, "identity"), {"source": old})
    with torch.no_grad(): assert torch.allclose(small(**batch(small)).logits, big.eval()(**batch(big)).logits, atol=1e-5)
    assert torch.equal(big.model.layers[2].mlp.up_proj.weight, small.model.layers[1].mlp.up_proj.weight) and deep.notes["wide"] == 1
    assert torch.equal(big.model.layers[3].mlp.up_proj.weight, small.model.layers[1].mlp.up_proj.weight) and not deep.notes["exact"]
    short = deepened(plan, order=[0, 2])
    assert not short.arrays and f"source:{up}" in short.dropped and short.check({"source": old})
    OPS.pop("noise.test")

@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma2", "olmo2", "bloom", "t5", "mbart"])
def test_wider_and_deeper_keeps_the_function(kind, tmp_path):
    old = source(kind, tmp_path/"old")
    plan = deepened(width(old, hidden=32), method="identity")
    new = write(plan, {"source": old}, tmp_path/"new")
    was, now = logits(load(old)), logits(load(new))
    assert plan.notes["exact"] and new.layout.size("hidden") == 32 and min(new.layout.layers.values()) > min(old.layout.layers.values())
    assert (was - now).abs().max() < max(scale(kind), 1e-6)*was.abs().max()

@pytest.mark.parametrize("kind", ["gpt2", "olmo2", "bert", "electra", "bart", "opt, post", "mbart"])
def test_wider_and_deeper_is_deeper_and_wider(kind, tmp_path):
    old = source(kind, tmp_path/"old")
    for order in ([0, 1, 0, 1, 1], [1, 1, 0]):
        a, b = depth(old, order=order), deepened(width(old, hidden=32), order=order)
        x, y = (logits(load(write(p, {"source": old}, tmp_path/f"{len(order)}{len(p.arrays)}"))) for p in (a, b))
        assert b.arrays and not a.arrays and (x - y).abs().max() < max(scale(kind), 1e-6)*x.abs().max()

@pytest.mark.parametrize("layers", [{"encoder": 5}, {"encoder": 3, "decoder": 4}])
def test_a_mix_of_states_follows_its_layers(tmp_path, layers):
    _, config = ALL["mbart"]
    torch.manual_seed(0)
    model = mixing(random(hf.MBartForConditionalGeneration(hf.MBartConfig(**config))).double(), torch.tensor([0.1, -0.2, 0.3]))
    old = save(model.eval(), None, tmp_path/"old", Card("mix", "scratch"))
    big = opened(write(depth(old, layers, "identity"), {"source": old}, tmp_path/"new").path, torch.float64)
    assert len(big.model.decoder.mix) == layers["encoder"] and (logits(big) - logits(model)).abs().max() < 1e-12

# ---- what is told, and what is refused

def test_stages_take_the_words_of_the_notes(tmp_path):
    for kind in ("gpt2", "t5"):
        old, plan, new = grown(kind, tmp_path/kind, method="identity")
        model, lay = load(new), new.layout
        optimizer(model, lay, chains([Stage(1, objective="causal", frozen=tuple(plan.notes["frozen"]))])[0])
        awake = {n for n, p in model.named_parameters() if p.requires_grad}
        assert awake == set(lay.select(plan.notes["train"])) and awake and {lay.tensors[n].layer for n in awake} <= {1, 3, 5}

def refused(*args, **how) -> str:
    with pytest.raises(Refusal) as e: depth(*args, **how)
    assert "\n" not in str(e.value)
    return str(e.value)

@pytest.mark.parametrize("kind", POST)
def test_identity_is_refused_where_norms_come_after_the_sum(kind, tmp_path):
    assert "norms after the sum" in (said := refused(source(kind, tmp_path/"old"), method="identity")) and "'interpolate' or 'stack'" in said

def test_refusals(tmp_path):
    gpt = source("gpt2", tmp_path/"gpt2"); t5 = source("t5", tmp_path/"t5")
    assert "has 3 layers, and growing makes none fewer: 2" in refused(gpt, 2)
    assert "has 3 layers already" in refused(gpt, 3) and "3 + 2 layers already" in refused(t5, {"encoder": 3})
    assert "there is no layer 3" in refused(gpt, order=[0, 3]) and "cannot be -1" in refused(gpt, order=[0, -1])
    assert "without layers" in refused(gpt, order=[]) and "cannot be 2.5" in refused(gpt, 2.5) and "cannot be 'x'" in refused(gpt, order=["x"])
    assert "'stack'" in refused(gpt, 6, "stck") and "no stack in T5ForConditionalGeneration 'decodr'" in refused(t5, {"decodr": 4})
    assert "give one of the two" in refused(gpt, 6, order=[0]) and "all its layers are there" in refused(gpt, order=[0, 2, 2], method="identity")
    assert "in their order" in refused(gpt, order=[1, 0, 2, 2], method="identity")
    assert "number of the layer" in refused(source("gpt2", tmp_path/"scaled", scale_attn_by_inverse_layer_idx=True), 6)
    odd = source("bloom", tmp_path/"bloom", apply_residual_connection_post_layernorm=True)
    assert "add to the normed state" in refused(odd, method="identity") and depth(odd, method="stack")

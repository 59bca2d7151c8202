"Models with experts: the tables against what transformers writes and loads, the ledger against torch's counter, and what upcycling, pruning and joining promise."
import json
import pytest, torch, transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import layout
from seqwarm.core.ledger import describe, flops
from seqwarm.core.stages import Stage, chains, optimizer

LLAMA = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
T5 = dict(vocab_size=50, d_model=16, d_ff=24, d_kv=6, num_layers=3, num_decoder_layers=4, num_heads=4)
TIES = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
MIXTRAL = LLAMA | dict(num_local_experts=4, num_experts_per_tok=2)
QWEN = LLAMA | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10)
SHARED = QWEN | dict(shared_expert_intermediate_size=12)
OLMOE = LLAMA | dict(num_experts=4, num_experts_per_tok=2, pad_token_id=1, eos_token_id=2)
SWITCH = T5 | dict(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=2)
CASES = [(k + "ForCausalLM", kw | t) for k, kw in (("Mixtral", MIXTRAL), ("Qwen2Moe", SHARED), ("Qwen3Moe", QWEN), ("Olmoe", OLMOE)) for t in TIES]
CASES += [("MixtralModel", MIXTRAL), ("Qwen2MoeModel", SHARED), ("Qwen3MoeModel", QWEN), ("OlmoeModel", OLMOE)]
CASES += [("MixtralForCausalLM", MIXTRAL | dict(head_dim=6)), ("Qwen2MoeForCausalLM", SHARED | dict(qkv_bias=False)), ("Qwen3MoeForCausalLM", QWEN | dict(attention_bias=True, head_dim=6)),
          ("OlmoeForCausalLM", OLMOE | dict(attention_bias=True))]
CASES += [(k, kw | o) for k, kw in (("Qwen2MoeForCausalLM", SHARED), ("Qwen3MoeForCausalLM", QWEN)) for o in (dict(decoder_sparse_step=2), dict(mlp_only_layers=[0, 2]))]
CASES += [("SwitchTransformers" + e, SWITCH | o) for e in ("ForConditionalGeneration", "Model", "EncoderModel") for o in ({}, dict(tie_word_embeddings=False))]
CASES += [("SwitchTransformersForConditionalGeneration", SWITCH | dict(num_sparse_encoder_layers=n, num_sparse_decoder_layers=m, router_bias=b)) for n, m, b in ((3, 4, True), (0, 0, False), (2, 1, False))]
NAMES = [a + "".join(f"-{k}={v}" for k, v in kw.items() if k not in LLAMA | T5 | SHARED or k.startswith("num_sparse")) for a, kw in CASES]

def make(architecture, kw):
    "A model with random numbers everywhere, gains near one."
    torch.set_num_threads(1); torch.manual_seed(0)
    cls = getattr(hf, architecture)
    m = cls(cls.config_class(**kw)).eval()
    for p in m.parameters(): p.data = torch.randn_like(p)*0.3 + (p.ndim == 1)
    return m

@pytest.mark.parametrize("architecture,kw", CASES, ids=NAMES)
def test_table_is_what_is_written(architecture, kw, tmp_path):
    "Names and shapes in the file; in memory the parameter that the table names holds each tensor's numbers, and no other does."
    m = make(architecture, kw); m.save_pretrained(tmp_path)
    file, lay = load_file(tmp_path/"model.safetensors"), layout(json.loads((tmp_path/"config.json").read_text()))
    written = {n: tuple(x.shape) for n, x in file.items()}
    assert {n: t.shape for n, t in lay.stored().items()} == written and lay.check(written) == {n: n for n in written}
    assert lay.tensors == layout(m.config, architecture).tensors
    state = m.state_dict()
    assert {lay.table.parameter(n) for n in lay.tensors} == set(state)
    for n, x in file.items():
        held, t = state[lay.table.parameter(n)], lay.tensors[n]
        if held.ndim == 3: held = held[t.expert]; half = len(held)//2; held = held if t.role == "ffn.down" else held[:half] if t.role == "ffn.gate" else held[half:]
        assert torch.equal(held, x), n
    again, info = type(m).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")) and all(torch.equal(x, state[n]) for n, x in again.state_dict().items())

@pytest.mark.parametrize("architecture,kw", [c for c in CASES if not c[0].endswith(("Model", "EncoderModel"))][::2])
def test_axes_by_two_models(architecture, kw, tmp_path):
    "Changing one size in the config changes exactly the axes that bear its name."
    def shapes(kw): make(architecture, kw).save_pretrained(tmp_path); return {n: x.shape for n, x in load_file(tmp_path/"model.safetensors").items()}
    sizes = dict(num_experts={"experts"}, hidden_size={"hidden"}, moe_intermediate_size={"expert_ffn"}, intermediate_size={"ffn"}, shared_expert_intermediate_size={"shared_ffn"}, d_ff={"ffn", "expert_ffn"})
    if "Mixtral" in architecture or "Olmoe" in architecture: sizes |= dict(intermediate_size={"expert_ffn"}, num_local_experts={"experts"})
    lay, old = layout(getattr(hf, architecture).config_class(**kw), architecture), shapes(kw)
    for key in set(kw) & set(sizes) - {"hidden_size"}:
        new = shapes(kw | {key: kw[key] + 3})
        changed = {(n, i) for n in old for i, (a, b) in enumerate(zip(old[n], new[n])) if a != b}
        assert changed == {(n, i) for n, t in lay.stored().items() for i, a in enumerate(t.axes) if a in sizes[key]}, key
        more = set(new) - set(old)
        assert not set(old) - set(new) and bool(more) == (sizes[key] == {"experts"}) and more == {n for n in layout(getattr(hf, architecture).config_class(**kw | {key: kw[key] + 3}), architecture).stored() if n not in old}

# ---- the ledger

WIDE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
EXPERTS = WIDE | dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)
LEDGER = [("MixtralForCausalLM", WIDE | dict(num_local_experts=5, num_experts_per_tok=3)), ("Qwen2MoeForCausalLM", EXPERTS | dict(shared_expert_intermediate_size=20)),
          ("Qwen3MoeForCausalLM", EXPERTS | dict(decoder_sparse_step=2)), ("OlmoeForCausalLM", EXPERTS | dict(pad_token_id=1, eos_token_id=2)),
          ("SwitchTransformersForConditionalGeneration", dict(vocab_size=97, d_model=32, d_ff=48, d_kv=12, num_layers=2, num_decoder_layers=3, num_heads=4, num_experts=5, num_sparse_encoder_layers=1, num_sparse_decoder_layers=3))]
S, T, B = 24, 16, 2
FROZEN = {"nothing": [], "embeddings": ["embed"], "nets": ["ffn"], "router": ["router"], "all but the router": lambda t: t.role != "router", "lower layers": ["embed", "@0-1"],
          "all but what goes down": lambda t: t.role != "ffn.down" or t.expert is None, "all but norms": lambda t: not t.role.startswith(("attn.norm", "ffn.norm")),
          "all but the shared net": lambda t: not t.role.startswith("ffn.shared"), "attention": ["attn"]}

@pytest.mark.parametrize("architecture,kw", LEDGER, ids=[a for a, _ in LEDGER])
def test_flops_are_torch_s_with_the_chosen_experts_only(architecture, kw):
    m = make(architecture, kw); m.set_attn_implementation("eager"); m.config.use_cache = False
    if "Switch" not in architecture: m.set_experts_implementation("eager")
    lay, two = layout(m.config, architecture), "Switch" in architecture
    kwargs = dict(input_ids=torch.randint(5, 97, (B, S))) | (dict(decoder_input_ids=torch.randint(5, 97, (B, T))) if two else {})
    for name, frozen in FROZEN.items():
        asleep = {n for n, t in lay.stored().items() if frozen(t)} if callable(frozen) else set(lay.select(frozen))
        awake = {lay.table.parameter(n) for n in lay.stored() if n not in asleep}
        for n, p in m.named_parameters(): p.requires_grad_(n in awake)
        for train in (False, True) if name == "nothing" else (True,):
            with FlopCounterMode(display=False) as counter:
                loss = m(**kwargs).logits.square().sum()
                if train and loss.requires_grad: loss.backward()
            assert flops(lay, S, T if two else None, train, frozen=frozen) == counter.get_total_flops()/B, (name, train)
    table = describe(lay, S)
    assert table.flops.sum()*S == pytest.approx(flops(lay, S, S if two else None, train=False)) and table.parameters.sum() == sum(t.size for t in lay.stored().values())

@pytest.mark.parametrize("architecture,kw", LEDGER, ids=[a for a, _ in LEDGER])
def test_active_parameters_are_those_of_a_model_with_as_many_experts_as_a_token_meets(architecture, kw):
    k = kw.get("num_experts_per_tok", 1); few = {("num_local_experts" if "num_local_experts" in kw else "num_experts"): k}
    table, less = describe(layout(getattr(hf, architecture).config_class(**kw), architecture)), make(architecture, kw | few)
    lay = layout(getattr(hf, architecture).config_class(**kw), architecture)
    idle = sum(t.size for t in lay.find("router*"))*(1 - k/lay.sizes["experts"])            # rows of the router that are read all the same
    assert table.active.sum() == sum(p.numel() for p in less.parameters()) + idle < table.parameters.sum()
    assert "active" not in describe(layout(hf.LlamaConfig(**LLAMA), "LlamaForCausalLM"))

# ---- freezing a living model

def test_experts_sleep_together_or_not_at_all():
    m = make("MixtralForCausalLM", MIXTRAL); lay, chain = layout(m.config, "MixtralForCausalLM"), lambda *words: chains([Stage(1, frozen=words)])[0]
    optimizer(m, lay, chain("ffn"))
    assert {n for n, p in m.named_parameters() if not p.requires_grad} == {n for n, _ in m.named_parameters() if "experts" in n or "post_attention" in n}
    optimizer(m, lay, chain("router@1", "ffn.down"))
    assert {n for n, p in m.named_parameters() if not p.requires_grad} == {"model.layers.1.mlp.gate.weight", *(f"model.layers.{i}.mlp.experts.down_proj" for i in range(3))}
    with pytest.raises(Refusal, match="experts.0.w3.weight can't but sleep as well: in memory it is one parameter"): optimizer(m, lay, chain("ffn.gate"))

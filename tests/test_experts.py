"Models with experts: the tables against what transformers writes and loads, the ledger against torch's counter, and what upcycling, pruning and joining promise."
import json
from dataclasses import replace
import pytest, torch, transformers as hf
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.fresh import shrink
from seqwarm.core.layout import layout
from seqwarm.core.ledger import describe, flops
from seqwarm.core.stages import Stage, chains, optimizer
from seqwarm.core.train import train
from seqwarm.core.write import build, write
from seqwarm.methods.experts import aggregate, prune, upcycle
from seqwarm.methods.router import Sparse, random_selection, usage
from train_small import given

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
        for whole in (False, True) if name == "nothing" else (True,):
            with FlopCounterMode(display=False) as counter:
                loss = m(**kwargs).logits.square().sum()
                if whole and loss.requires_grad: loss.backward()
            assert flops(lay, S, T if two else None, whole, frozen=frozen) == counter.get_total_flops()/B, (name, whole)
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
    whole = Sparse(m); optimizer(whole, whole.layout, chain("ffn.down"))                          # also inside a module that holds it
    assert {n for n, p in whole.named_parameters() if not p.requires_grad} == {f"main.model.layers.{i}.mlp.experts.down_proj" for i in range(3)}
    with pytest.raises(Refusal, match="experts.0.w3.weight can't but sleep as well: in memory it is one parameter"): optimizer(m, lay, chain("ffn.gate"))

def test_shrinking_scales_the_experts_once():
    m = make("Qwen3MoeForCausalLM", QWEN | dict(decoder_sparse_step=2)); old = {n: x.clone() for n, x in m.state_dict().items()}
    for n, x in shrink(m).state_dict().items(): assert torch.allclose(x, old[n]*(6**-0.5 if "down_proj" in n or "o_proj" in n else 1)), n

# ---- upcycling

NET = LLAMA | dict(intermediate_size=48)
DENSE = {"llama": ("LlamaForCausalLM", NET | dict(rope_theta=3000.0, rms_norm_eps=1e-4)), "mistral": ("MistralForCausalLM", NET | dict(head_dim=6, sliding_window=5)),
         "qwen2": ("Qwen2ForCausalLM", NET | dict(tie_word_embeddings=True)), "qwen3": ("Qwen3ForCausalLM", NET | dict(head_dim=6, attention_bias=True)), "t5": ("T5ForConditionalGeneration", T5 | dict(num_layers=4)),
         "qwen2, windows": ("Qwen2ForCausalLM", NET | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)), "qwen3, windows": ("Qwen3ForCausalLM", NET | dict(use_sliding_window=True, sliding_window=4, max_window_layers=0))}
IDS = torch.randint(3, 50, (2, 11), generator=torch.Generator().manual_seed(1))

@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    "Dense models by model type, each on disk."
    home = tmp_path_factory.mktemp("dense")
    for kind, (architecture, kw) in DENSE.items(): make(architecture, kw).double().save_pretrained(home/kind)       # so that scaling by three is exact to 1e-16
    return lambda kind: Checkpoint(home/kind)

def exact64(m):
    "A model whose norms and routers count in float64, as HF's do not."
    def norm(self, x): return self.weight*(x*torch.rsqrt(x.square().mean(-1, keepdim=True) + getattr(self, "variance_epsilon", None)))
    def route(self, x):
        z = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
        p, at = z.softmax(-1).topk(self.top_k)
        return z, p/p.sum(-1, keepdim=True) if getattr(self, "norm_topk_prob", True) else p, at
    for x in m.modules():
        if type(x).__name__.endswith("RMSNorm"): x.forward = norm.__get__(x)
        if type(x).__name__.endswith("TopKRouter"): x.forward = route.__get__(x)
    return m

def told_by(path, patched=False, dtype=torch.float64):
    "Logits of what lies at a path, loaded without loss."
    two = "t5" in str(path) or "switch" in str(path)
    m, info = (hf.AutoModelForSeq2SeqLM if two else hf.AutoModelForCausalLM).from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if not two and hasattr(m, "set_experts_implementation") and m._can_set_experts_implementation(): m.set_experts_implementation("eager")
    m.eval()
    with torch.no_grad(): return (exact64(m) if patched else m)(input_ids=IDS, **(dict(decoder_input_ids=IDS.flip(1)) if two else {})).logits

WAYS = [("llama", {}), ("llama", dict(experts=5, top_k=3)), ("llama", dict(fine=3)), ("llama", dict(family="qwen2_moe", every=2)), ("llama", dict(top_k=1, fine=2)), ("mistral", {}), ("mistral", dict(family="qwen2_moe", fine=4)),
        ("qwen2", {}), ("qwen2", dict(fine=2, every=2)), ("qwen3", dict(every=2)), ("qwen3", dict(fine=4, top_k=4)), ("qwen2, windows", {}), ("qwen3, windows", {})]

@pytest.mark.parametrize("kind,how", WAYS, ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}={x}" for k, x in v.items()))
def test_upcycled_is_the_dense_model(kind, how, dense, tmp_path):
    "Through the file and transformers' own classes: to HF's float32 norms as they are, to 1e-10 where these count in float64."
    source = dense(kind); plan = upcycle(source, **dict(experts=4) | how)
    assert plan.notes["exact"] and plan.notes["promise"].startswith("the dense model's")
    out = write(plan, {"source": source}, tmp_path/"out")
    assert (out.layout.sizes["experts"], out.layout.sizes["top_k"]) == tuple(how.get(k, n)*how.get("fine", 1) for k, n in (("experts", 4), ("top_k", 2)))
    assert {t.layer for t in out.layout.find("router")} == {i for i in range(3) if (i + 1) % how.get("every", 1) == 0}
    old = told_by(source.path)
    assert old.std() > 0.5 and (told_by(out.path) - old).abs().max() < 1e-5 and (told_by(out.path, True) - told_by(source.path, True)).abs().max() < 1e-10
    m, old = (hf.AutoModelForCausalLM.from_pretrained(x.path, dtype=torch.float32) for x in (out, source))
    assert m.generate(IDS[:1], max_new_tokens=4, do_sample=False).equal(old.generate(IDS[:1], max_new_tokens=4, do_sample=False))
    held = build(plan, {"source": source}).float().state_dict()
    assert set(held) == set(m.state_dict()) and all(torch.equal(x, held[n]) for n, x in m.state_dict().items())

def test_what_is_new_is_the_router_and_groups_of_it_are_alike(dense):
    plan = upcycle(dense("llama"), 4, fine=3, seed=5); R = plan.make("model.layers.1.block_sparse_moe.gate.weight", {})
    assert plan.notes["untrained"] == [t.name for t in plan.layout.find("router")] and R.shape == (12, 16)
    assert all(R[3*e].equal(R[3*e + g]) for e in range(4) for g in range(3)) and len(R.unique(dim=0)) == 4 and 0.01 < R.std() < 0.03
    other = upcycle(dense("llama"), 4, fine=3, seed=6).make("model.layers.1.block_sparse_moe.gate.weight", {})
    assert not R.equal(other) and R.equal(upcycle(dense("llama"), 4, fine=3, seed=5).make("model.layers.1.block_sparse_moe.gate.weight", {}))

def test_rows_of_a_group_that_differ_break_the_promise(dense, tmp_path):
    "The exactness of fine experts hangs on the groups: with a router drawn row by row a token meets pieces of several copies."
    source = dense("llama"); plan = upcycle(source, 4, fine=3)
    plan.rows = [replace(r, args={"std": 0.02}) if r.op == "experts.router" else r for r in plan.rows]
    assert (told_by(write(plan, {"source": source}, tmp_path/"out").path) - told_by(source.path)).abs().max() > 1e-2

def test_noise_makes_experts_differ_by_its_share(dense):
    plan, source = upcycle(dense("llama"), 4, noise=0.1, seed=3), dense("llama")
    old = source.read("model.layers.0.mlp.up_proj.weight")
    made = [plan.make(f"model.layers.0.block_sparse_moe.experts.{e}.w3.weight", {"source": source}) for e in range(4)]
    assert not plan.notes["exact"] and all(not made[i].equal(made[j]) for i in range(4) for j in range(i))
    assert (torch.stack(made) - old).std() == pytest.approx(0.1*old.std().item(), rel=0.1)

@pytest.mark.parametrize("every", [1, 2])
def test_switch_is_about_the_dense_t5_and_the_nearer_the_smaller_its_router(every, dense, tmp_path):
    source, gaps = dense("t5"), []
    for std in (1e-1, 1e-3, 1e-5):
        plan = upcycle(source, 4, 1, every=every, std=std); out = write(plan, {"source": source}, tmp_path/f"switch{std}")
        assert not plan.notes["exact"] and plan.notes["promise"].startswith("about") and {t.layer for t in out.layout.find("router", "encoder")} == {i for i in range(4) if every == 1 or i % every == 1}
        gaps.append(((told_by(out.path, dtype=torch.float32) - told_by(source.path, dtype=torch.float32)).abs().max()/told_by(source.path, dtype=torch.float32).std()).item())
    assert gaps[0] > 0.5 and 50 < gaps[1]/gaps[2] < 200 and gaps[2] < 2e-3, gaps      # in proportion
    made = [hf.AutoModelForSeq2SeqLM.from_pretrained(x.path, dtype=torch.float32).generate(IDS[:1], decoder_start_token_id=0, max_new_tokens=4, min_new_tokens=4, do_sample=False) for x in (source, out)]
    assert made[0].equal(made[1])

def test_encoder_and_base_model_keep_their_class(tmp_path):
    for architecture, kw, new in (("LlamaModel", LLAMA, "MixtralModel"), ("T5EncoderModel", T5 | dict(num_layers=4), "SwitchTransformersEncoderModel"), ("T5Model", T5 | dict(num_layers=4), "SwitchTransformersModel")):
        m = make(architecture, kw); m.save_pretrained(tmp_path/architecture)
        source = Checkpoint(tmp_path/architecture); plan = upcycle(source, 4, 1, std=1e-6)
        assert plan.architecture == new
        feed = dict(input_ids=IDS) | (dict(decoder_input_ids=IDS) if architecture == "T5Model" else {})
        with torch.no_grad(): assert torch.allclose(build(plan, {"source": source}).eval()(**feed).last_hidden_state, m(**feed).last_hidden_state, atol=1e-3)

def test_a_t5_whose_head_is_its_own(tmp_path):
    "As ReLU T5s with an untied head lie on the hub: not scaled before the head, whose numbers come along."
    m = make("T5ForConditionalGeneration", T5 | dict(num_layers=4, tie_word_embeddings=False)); m.lm_head.weight = torch.nn.Parameter(torch.randn(50, 16)*0.3)
    m.save_pretrained(tmp_path/"t5")
    config = json.loads((tmp_path/"t5"/"config.json").read_text()) | dict(tie_word_embeddings=False)
    (tmp_path/"t5"/"config.json").write_text(json.dumps(config))
    source = Checkpoint(tmp_path/"t5"); out = write(upcycle(source, 2, 1, std=1e-7), {"source": source}, tmp_path/"switch")
    assert not out.config["tie_word_embeddings"]
    assert (told_by(out.path, dtype=torch.float32) - told_by(source.path, dtype=torch.float32)).abs().max() < 1e-3

def test_bfloat16_stays_and_copies_stream(dense, tmp_path):
    make("LlamaForCausalLM", LLAMA).to(torch.bfloat16).save_pretrained(tmp_path/"in")
    source = Checkpoint(tmp_path/"in"); out = write(upcycle(source, 3), {"source": source}, tmp_path/"out")
    assert {out.dtype(n) for n in out.names} == {torch.bfloat16} and all(r.op in ("copy", "experts.router") for r in upcycle(source, 3).rows)
    assert out.card.parents == [source.card.id] and out.card.plan["notes"]["exact"]

def test_refusals_of_upcycling(dense, tmp_path):
    def no(match, kind="llama", **how):
        with pytest.raises(Refusal, match=match) as e: upcycle(dense(kind) if isinstance(kind, str) else kind, **dict(experts=4) | how)
        assert "\n" not in str(e.value)
    no("cannot meet 5 of 4 experts; give a top_k of at most 4", top_k=5); no("experts cannot be 1;", experts=1); no("nets of width 48 cannot be cut into 5 pieces", fine=5)
    no("no sparse family for a llama 'qwen3_moe'|there is no sparse family for a llama 'qwen3_moe'", family="qwen3_moe"); no("noise cannot be -1", noise=-1.0)
    no("mixtral cannot have experts in one of 2 layers.*nearest is every=1", every=2); no("a token meets one whole expert", "t5"); no("cannot have experts in one of 3 layers if it has 4; the nearest is every=2", "t5", top_k=1, every=3)
    no("a router of zeros", std=0); no("top_k cannot be 0", top_k=0); no("top_k cannot be True", top_k=True)
    def put(name, architecture, kw, **extra):
        make(architecture, kw).save_pretrained(tmp_path/name)
        (tmp_path/name/"config.json").write_text(json.dumps(json.loads((tmp_path/name/"config.json").read_text()) | extra))
        return tmp_path/name
    no("is sparse already \\(mixtral\\)", Checkpoint(put("mixtral", "MixtralForCausalLM", MIXTRAL)))
    no("no sparse family here computes what a olmo2 does", Checkpoint(put("olmo2", "Olmo2ForCausalLM", LLAMA | dict(pad_token_id=1, eos_token_id=2))))
    no("have a gate, and Switch's have none", Checkpoint(put("gated", "T5ForConditionalGeneration", T5 | dict(feed_forward_proj="gated-gelu"))), top_k=1)
    no("mixtral has no place for model.layers.0.self_attn.q_proj.bias", Checkpoint(put("bias", "LlamaForCausalLM", LLAMA | dict(attention_bias=True))))
    no("some layers of this qwen3 see a window", Checkpoint(put("window", "Qwen3ForCausalLM", LLAMA | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1))))
    with pytest.raises(Refusal, match="is quantised"): Checkpoint(put("quantised", "LlamaForCausalLM", LLAMA, quantization_config=dict(quant_method="gptq", bits=4)))

# ---- counting, leaving out, joining

def reference_use(m, ids):
    "Choices counted from HF's own router logits."
    out = m(input_ids=ids, output_router_logits=True)
    return [x.reshape(-1, x.shape[-1]).topk(2).indices.flatten().bincount(minlength=x.shape[-1]).tolist() for x in out.router_logits]

@pytest.fixture(scope="module")
def skewed(tmp_path_factory):
    "Sparse models of five experts by family, on disk, whose second expert is never chosen: two others always fit better."
    home, made = tmp_path_factory.mktemp("skewed"), {}
    for kind, architecture, kw in (("mixtral", "MixtralForCausalLM", MIXTRAL | dict(num_local_experts=5, intermediate_size=48)), ("renormalised", "Qwen3MoeForCausalLM", QWEN | dict(num_experts=5, moe_intermediate_size=12, norm_topk_prob=True, decoder_sparse_step=2)),
                                   ("qwen2_moe", "Qwen2MoeForCausalLM", SHARED | dict(num_experts=5, moe_intermediate_size=12)), ("olmoe", "OlmoeForCausalLM", OLMOE | dict(num_experts=5, intermediate_size=48))):
        m = make(architecture, kw); lay = layout(m.config, architecture)
        for t in lay.find("router"):
            R = m.get_parameter(lay.table.parameter(t.name)).data; R[:] = R[:1]*torch.tensor([[1.0], [0.0], [1.1], [-1.0], [-1.1]])
        m.save_pretrained(home/kind); made[kind] = m
    return home, made

@pytest.mark.parametrize("kind", ["mixtral", "renormalised", "qwen2_moe", "olmoe"])
def test_usage_is_what_hf_s_router_logits_say(kind, skewed):
    m = skewed[1][kind]; use = usage(m, [dict(input_ids=IDS), dict(input_ids=IDS[:1])])
    assert list(use.values()) == [[a + b for a, b in zip(*pair)] for pair in zip(reference_use(m, IDS), reference_use(m, IDS[:1]))]
    mask = torch.ones_like(IDS); mask[1, 6:] = 0                               # padding behind does not change what is before it
    few, alone = usage(m, [dict(input_ids=IDS, attention_mask=mask)]), usage(m, [dict(input_ids=IDS[:1]), dict(input_ids=IDS[1:, :6])])
    assert few == alone and sum(few[next(iter(few))]) == 2*17 and not m.training

def test_usage_of_switch_counts_both_stacks():
    m = make("SwitchTransformersForConditionalGeneration", SWITCH)
    use = usage(m, [dict(input_ids=IDS, decoder_input_ids=IDS[:, :5])])
    assert {n.split(".")[0]: sum(c) for n, c in use.items()} == dict(encoder=22, decoder=10)
    with torch.no_grad(): out = m(input_ids=IDS, decoder_input_ids=IDS[:, :5], output_router_logits=True)
    assert list(use.values()) == [x.argmax(-1).flatten().bincount(minlength=4).tolist() for x in (*out.encoder_router_logits, *out.decoder_router_logits)]

@pytest.mark.parametrize("kind", ["mixtral", "renormalised", "qwen2_moe", "olmoe"])
def test_pruning_keeps_the_most_used_and_where_the_others_are_idle_the_function(kind, skewed, tmp_path):
    home, made = skewed; source, renormalised = Checkpoint(home/kind), kind in ("mixtral", "renormalised")
    use = usage(made[kind], [dict(input_ids=IDS)])
    assert all(c[1] == 0 and min(c[:1] + c[2:]) > 0 for c in use.values())
    for keep in (4, 2):
        plan = prune(source, use, keep); out = write(plan, {"source": source}, tmp_path/str(keep))
        for t in out.layout.find("router"):
            here, counts = plan.notes["kept"][f"@{t.layer}"], use[t.name]
            assert here == sorted(here) and sorted(counts[e] for e in here) == sorted(counts)[-keep:] and out.read(t.name).equal(source.read(t.name)[here])
            for x in out.layout.find("ffn.*", layer=t.layer):
                if x.expert is not None: assert out.read(x.name).equal(source.read(next(o.name for o in source.layout.find(x.role, layer=t.layer) if o.expert == here[x.expert])))
        lost = sum(sum(sorted(c)[:5 - keep]) for c in use.values())
        assert plan.notes["lost"] == lost/sum(map(sum, use.values())) and (lost == 0) == (keep == 4) and plan.notes["exact"] == (keep == 4 and renormalised)
        gap = (told_by(out.path, dtype=torch.float32) - told_by(home/kind, dtype=torch.float32)).abs().max()
        assert (gap < 1e-5) == plan.notes["exact"] and plan.notes["promise"].startswith("the old" if renormalised else "not the old"), (keep, gap)

def test_pruning_a_switch_cuts_both_stacks(tmp_path):
    m = make("SwitchTransformersForConditionalGeneration", SWITCH | dict(router_bias=True)); m.save_pretrained(tmp_path/"in")
    source = Checkpoint(tmp_path/"in"); use = {t.name: [1, 5, 0, 3] for t in source.layout.find("router")}
    plan = prune(source, use, 2); out = write(plan, {"source": source}, tmp_path/"switch")
    assert not plan.notes["exact"] and plan.notes["lost"] == 1/9 and set(plan.notes["kept"]) == {"encoder@1", "decoder@1", "decoder@3"}
    for t in out.layout.find("router*"): assert out.read(t.name).equal(source.read(t.name)[[1, 3]])
    assert out.read("decoder.block.3.layer.2.mlp.experts.expert_1.wo.weight").equal(source.read("decoder.block.3.layer.2.mlp.experts.expert_3.wo.weight"))
    told_by(out.path, dtype=torch.float32)

def test_refusals_of_pruning_and_joining(skewed, dense, tmp_path):
    home, made = skewed; source = Checkpoint(home/"mixtral"); use = usage(made["mixtral"], [dict(input_ids=IDS)])
    make("MixtralForCausalLM", MIXTRAL | dict(num_local_experts=5, intermediate_size=48, rms_norm_eps=0.1)).save_pretrained(tmp_path/"other"); other = Checkpoint(tmp_path/"other")
    for match, f in [("keep cannot be 1", lambda: prune(source, use, 1)), ("has 5 experts, and 5 are to stay; keep 2 to 4", lambda: prune(source, use, 5)), ("has no experts", lambda: prune(dense("llama"), use, 2)),
                     ("no counts are given for model.layers.0.block_sparse", lambda: prune(source, {}, 2)), ("has 5 experts, and 3 counts", lambda: prune(source, {n: c[:3] for n, c in use.items()}, 2)),
                     ("has no experts", lambda: usage(make("LlamaForCausalLM", LLAMA), [])), ("has no experts; upcycle", lambda: aggregate(source, dense("llama"))), ("cannot meet 11 of 10", lambda: aggregate(source, source, 11)),
                     ("way with the rest 'sum'", lambda: aggregate(source, source, rest="sum")), ("differ in", lambda: aggregate(source, Checkpoint(home/"olmoe"))), ("differ in rms_norm_eps; join two", lambda: aggregate(source, other)), ("no causal LM with experts", lambda: Sparse(make("LlamaForCausalLM", LLAMA))),
                     ("no causal LM with experts", lambda: Sparse(make("SwitchTransformersForConditionalGeneration", SWITCH))), ("balance cannot be -1", lambda: Sparse(made["mixtral"], balance=-1.0))]:
        with pytest.raises(Refusal, match=match) as e: f()
        assert "\n" not in str(e.value)

@pytest.mark.parametrize("rest", ["mean", "first"])
def test_joining_takes_the_experts_of_both(rest, dense, tmp_path):
    "Two upcycled from one dense model, with other numbers of experts, then trained apart (here: noise)."
    one = Checkpoint(write(upcycle(dense("llama"), 2, noise=0.1, seed=1), {"source": dense("llama")}, tmp_path/"one").path)
    two = Checkpoint(write(upcycle(dense("llama"), 3, noise=0.1, seed=2), {"source": dense("llama")}, tmp_path/"two").path)
    plan = aggregate(one, two, rest=rest); out = write(plan, {"first": one, "second": two}, tmp_path/"out")
    assert out.config["num_local_experts"] == 5 and out.config["num_experts_per_tok"] == 2 and out.card.parents == [one.card.id, two.card.id]
    for t in out.layout.stored().values():
        if t.role == "router": want = torch.cat([one.read(t.name), two.read(t.name)])
        elif t.expert is None: want = (one.read(t.name) + two.read(t.name))/2 if rest == "mean" else one.read(t.name)
        else: want = (one if t.expert < 2 else two).read(t.name.replace(f"experts.{t.expert}.", f"experts.{t.expert - 2*(t.expert > 1)}."))
        assert out.read(t.name).equal(want), t.name
    told_by(out.path)

def test_a_model_joined_with_itself_is_itself_if_it_meets_twice_as_many(skewed, tmp_path):
    home, _ = skewed; source = Checkpoint(home/"mixtral")
    out = write(aggregate(source, source, top_k=4), {"first": source, "second": source}, tmp_path/"out")
    assert (told_by(out.path) - told_by(home/"mixtral")).abs().max() < 1e-5

# ---- training

def test_random_selection_drops_as_many_and_those_of_the_end_no_more_often(tmp_path):
    m = make("SwitchTransformersEncoderModel", SWITCH | dict(num_sparse_encoder_layers=1, expert_capacity=3, router_jitter_noise=0.0, dropout_rate=0.0))
    routers, seen = [x for x in m.modules() if hasattr(x, "expert_capacity")], []
    routers[0].register_forward_hook(lambda _, i, o: seen.append(o[0].sum(-1).float()))
    feed = lambda n: [m(input_ids=torch.randint(3, 50, (4, 24), generator=torch.Generator().manual_seed(i))) for i in range(n)]
    with torch.no_grad():
        m.train(); feed(30); by_place = torch.cat(seen).mean(0); kept = by_place.sum(); seen.clear()
        handles = len(routers[0]._forward_hooks); random_selection(m); assert len(routers[0]._forward_hooks) == handles + 1
        routers[0]._forward_hooks.move_to_end(next(iter(routers[0]._forward_hooks)))          # ours looks at what comes out in the end
        feed(30); drawn = torch.cat(seen).mean(0)
    assert drawn.sum() == pytest.approx(kept.item(), rel=1e-6) and by_place[:3].min() == 1 and by_place[-6:].mean() < 0.5*by_place[:6].mean() and abs(drawn[-6:].mean() - drawn[:6].mean()) < 0.12
    m.save_pretrained(tmp_path); assert set(load_file(tmp_path/"model.safetensors")) == set(layout(m.config, "SwitchTransformersEncoderModel").stored())
    with pytest.raises(Refusal, match="no experts whose capacity is limited"): random_selection(make("MixtralForCausalLM", MIXTRAL))

def test_the_losses_of_a_router_are_the_formulas():
    "Against HF's balance for a single layer, which it pools, and the z-loss by hand; sums over parts make the whole's means but for the balance."
    m = make("MixtralForCausalLM", MIXTRAL | dict(num_hidden_layers=1, vocab_size=50)); module = Sparse(m)
    labels = IDS.clone(); labels[:, :3] = -100
    with torch.no_grad(): found, out = module(input_ids=IDS, labels=labels)/module.counts(dict(input_ids=IDS, labels=labels)), m(input_ids=IDS, output_router_logits=True)
    assert found[0].item() == pytest.approx(torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5)
    assert found[1].item() == pytest.approx(out.aux_loss.item()/2, rel=1e-5)                     # HF counts each of the k choices as a whole
    assert found[2].item() == pytest.approx(out.router_logits[0].logsumexp(-1).square().mean().item(), rel=1e-5)
    with torch.no_grad(): parts = sum(module(input_ids=IDS[i:i+1], labels=labels[i:i+1]) for i in (0, 1))/module.counts(dict(input_ids=IDS, labels=labels))
    assert torch.allclose(parts[[0, 2]], found[[0, 2]], rtol=1e-5) and parts[1] > found[1]
    assert module.read(module.tally(input_ids=IDS, labels=labels)).keys() == {"loss", "balance", "router"}

def test_trained_it_is_a_plain_checkpoint_and_the_balance_works(tmp_path):
    "From a dense model to a trained sparse one; with the balance's weight experts are used more evenly than against it."
    data = given(str(tmp_path)); V, ends = len(data["tokenizer"]), {}
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | dict(vocab_size=V, intermediate_size=32))).save_pretrained(tmp_path/"dense")
    source = Checkpoint(tmp_path/"dense"); plan = upcycle(source, 4, std=0.3)
    for balance in (0.0, 1.0):
        model = Sparse(build(plan, {"source": source}).train(), balance=balance)
        out = train(model, *data.values(), [Stage(4, 1e-2, "causal", frozen=("embed",)), Stage(16, 1e-2, "causal")], tmp_path/"store", batch=4, every=10, sequences=8)
        ends[balance] = out.history.balance.iloc[-1]
        assert {"loss", "balance", "router"} <= set(out.history.columns) and out.history.loss.iloc[-1] < out.history.loss.iloc[0] - 0.5
        kept = hf.AutoModelForCausalLM.from_pretrained(out.path)
        assert type(kept).__name__ == "MixtralForCausalLM" and all(torch.equal(x, kept.state_dict()[n]) for n, x in model.main.state_dict().items())
        assert out.history.flops.iloc[-1] == 4*(4*flops(plan.layout, 16, frozen=("embed",)) + 16*flops(plan.layout, 16))
    assert 1 <= ends[1.0] < 1.1 and ends[1.0] < ends[0.0] - 0.02, ends

"CLP-Transfer against slow plain code, and from folder to folder into what transformers loads."
import json, os, subprocess, sys
import numpy as np, pytest, torch
from safetensors.torch import load_file, save_file
from transformers import (AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM)
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.plan import OPS, Plan
from seqwarm.core.vocab import overlap, spell, train_tokenizer
from seqwarm.core.write import build, save, write
from seqwarm.methods.clp import METHODS, clp, report

# ---- the rules against plain loops in float64 -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def space():
    g = torch.Generator().manual_seed(5)
    S = torch.randn(70, 11, generator=g, dtype=torch.float64) + 0.3
    H = torch.randn(60, 6, generator=g, dtype=torch.float64) + 0.2
    H[50] = 0  # a missing token that the helper never saw
    perm = torch.randperm(70, generator=g)
    origin = torch.cat([perm[:42], torch.full((18,), -1), torch.tensor([-2, -2])])
    return S, H, origin, torch.arange(2, 42)  # ids 0 and 1 are special: copied, no anchors

def weights_slow(method, S, H, origin, anchors, temperature=0.1, top_k=None, ridge=1e-3):
    "|missing| x |shared| weights by plain loops: the definition."
    Hn, Sn, an = H.numpy(), S.numpy(), anchors.tolist()
    A = np.stack([Sn[origin[j]] for j in an]); m = A.mean(0)
    r = np.sqrt(((A - m)**2).sum(1).mean())
    out = []
    for i in torch.nonzero(origin == -1)[:, 0].tolist():
        h = Hn[i]; n = np.linalg.norm(h)
        if n == 0: out.append(np.full(len(an), 1/len(an))); continue
        c = np.array([h @ Hn[j]/n/np.linalg.norm(Hn[j]) for j in an])
        if method == "clp": w = c/c.sum()
        if method == "guarded":
            z = max(c.sum(), np.linalg.norm(sum(cj*(a - m) for cj, a in zip(c, A)))/r)
            w = c/z + (1 - c.sum()/z)/len(an)
        if method == "softmax":
            e = np.exp((c - c.max())/temperature)
            if top_k: e[np.argsort(-c)[top_k:]] = 0
            w = e/e.sum()
        if method == "lstsq":
            C = np.stack([Hn[j] for j in an]); C = C - (mid := C.mean(0)); G = C.T @ C
            w = 1/len(an) + (h - mid) @ np.linalg.inv(G + ridge*np.trace(G)/len(G)*np.eye(len(G))) @ C.T
        out.append(w)
    return torch.tensor(np.stack(out))

def call(op, S, H, origin, anchors, E=None, **kw):
    tables = (S, H) if E is None else (S, H, E)
    return OPS[op](*tables, shape=(len(origin), S.shape[1]), origin=origin, anchors=anchors, **kw)

CASES = [("clp", {}), ("guarded", {}), ("lstsq", {"ridge": 1e-3}), ("softmax", {"temperature": 0.1}), ("softmax", {"temperature": 0.3, "top_k": 5})]

@pytest.mark.parametrize("method,options", CASES)
def test_rows_are_those_of_the_slow_rule(method, options, space):
    S, H, origin, anchors = space
    if method == "clp": H = H.clone(); H[50] = 0.1
    want = weights_slow(method, S, H, origin, anchors, **options) @ S[origin[anchors]]
    got = call(f"embed.{method}", S, H, origin, anchors, **options)
    tolerance = 1e-5 if method == "softmax" else 1e-10
    assert ((got[42:60] - want).norm(dim=1)/want.norm(dim=1)).max() < tolerance
    assert torch.equal(got[:42], S[origin[:42]])                               # shared and special rows: the same bits
    assert torch.allclose(got[60:], S[origin[anchors]].mean(0).expand(2, -1))  # padding: the mean

@pytest.mark.parametrize("method,options", CASES)
def test_weights_sum_to_one_and_serve_a_head_too(method, options, space):
    "An identity for S hands out the weights; E is what the guard goes by."
    S, H, origin, anchors = space
    if method == "clp": H = H.clone(); H[50] = 0.1
    E = S if method == "guarded" else None
    w = call(f"embed.{method}", torch.eye(70, dtype=torch.float64), H, origin, anchors, E, **options)[42:60]
    assert torch.allclose(w.sum(1), torch.ones(18).double(), atol=1e-5)
    assert torch.allclose(w[:, origin[anchors]], weights_slow(method, S, H, origin, anchors, **options), atol=1e-5)
    bias = torch.randn(1, 70, generator=torch.Generator().manual_seed(2), dtype=torch.float64)  # another axis, another width
    tables = (bias, H) if E is None else (bias, H, E)
    out = OPS[f"embed.{method}"](*tables, shape=(1, 62), origin=origin, anchors=anchors, axis=1, **options)
    assert torch.allclose(out[0, 42:60], w @ bias[0], atol=1e-4)

def test_the_guard_bounds_what_the_paper_does_not(space):
    S, H, origin, anchors = space
    H, z = H.clone(), torch.nn.functional.normalize(H[anchors], dim=1).sum(0)
    H[45] -= (H[45] @ z/(z @ z) - 1e-9)*z                                      # almost at right angles to the sum
    H[46] = -z                                                                 # all on the wrong side
    A = S[origin[anchors]]; m = A.mean(0); r = (A - m).norm(dim=1).square().mean().sqrt()
    paper, guarded = call("embed.clp", S, H.index_put((torch.tensor(50),), torch.tensor(.1).double()), origin, anchors), call("embed.guarded", S, H, origin, anchors)
    assert (paper[45] - m).norm() > 1e5*r and ((guarded[42:60] - m).norm(dim=1) <= r*(1 + 1e-9)).all()
    assert (paper[46] - m) @ (guarded[46] - m) < 0
    assert torch.allclose(guarded[50], m)
    sound = H + 20*z/z.norm()                                                  # a narrow cone: the paper's rule is sound, nothing is changed
    assert torch.allclose(call("embed.clp", S, sound, origin, anchors), call("embed.guarded", S, sound, origin, anchors), atol=1e-12)

def test_float32_is_as_good_as_float64_and_chunks_do_not_show(space, monkeypatch):
    import importlib
    mod = importlib.import_module("seqwarm.methods.clp")
    S, H, origin, anchors = space
    want = call("embed.guarded", S, H, origin, anchors)
    assert (call("embed.guarded", S.float(), H.float(), origin, anchors) - want).abs().max() < 1e-5
    whole = call("embed.softmax", S, H, origin, anchors)
    monkeypatch.setattr(mod, "_CHUNK", 7); monkeypatch.setattr(mod, "_BYTES", 1000)
    assert torch.allclose(call("embed.guarded", S, H, origin, anchors), want, atol=1e-12)
    assert torch.allclose(call("embed.softmax", S, H, origin, anchors), whole, atol=1e-6)

def test_controls(space):
    S, _, origin, anchors = space
    S = S*torch.linspace(0.1, 3, 11)
    big = torch.cat([origin, torch.full((4000,), -1)])
    draw = lambda **kw: OPS["embed.random"](S, shape=(len(big), 11), origin=big, anchors=anchors, seed=1, **kw)
    a, b = draw(), draw(copy=True)
    assert torch.equal(a[:2], S[big[:2]]) and not torch.equal(a[2:42], S[big[2:42]])      # random: specials only
    assert torch.equal(b[:42], S[big[:42]]) and torch.equal(a[42:60], b[42:60])
    assert torch.allclose(a[62:].mean(0), S.mean(0), atol=0.2) and torch.allclose(a[62:].std(0), S.std(0), rtol=0.1)

def test_nan_is_refused(space):
    S, H, origin, anchors = space
    for bad_s, bad_h, words in ((S.index_fill(0, torch.tensor([3]), float("nan")), H, "source"), (S, H.index_fill(0, torch.tensor([45]), float("inf")), "helper")):
        with pytest.raises(Refusal, match=f"the {words}'s token embeddings hold NaN"): call("embed.guarded", bad_s, bad_h, origin, anchors)
    with pytest.raises(Refusal, match="use the method 'guarded'"): call("embed.clp", S, H, origin, anchors)  # a zero row, without the guard

# ---- from folder to folder ----------------------------------------------------------------------------------------------------

EN = ["the hound sees the cat in the garden and the wind blows", "12 old trees stand in the garden, the cat does not see the hound"]*4
DE = ["der hund sieht die katze im garten und der wind weht", "12 alte bäume stehen im garten, die katze sieht den hund nicht"]*4
en, de = train_tokenizer(EN, 300), train_tokenizer(DE, 320)

def gpt2(tok, width=16, tied=True, rows=None):
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows or len(tok), n_embd=width, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied))
def llama(tok, width=12, tied=False, rows=None):
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows or len(tok), hidden_size=width, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=tied))
def bert(tok, width=8, rows=None, kind=(BertConfig, BertForMaskedLM), **kw):
    return kind[1](kind[0](vocab_size=rows or len(tok), hidden_size=width, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=40, **kw))

def put(folder, model, tok):
    torch.manual_seed(len(folder.name))
    for p in model.parameters(): torch.nn.init.normal_(p, std=0.3)
    model.tie_weights()
    return save(model, tok, folder, Card(folder.name, "scratch"))

def go(tmp_path, big, small, method="guarded", out="out", **kw):
    sources = {"source": put(tmp_path/"source", big, en), "helper": put(tmp_path/"helper", small, de)}
    plan = clp(**sources, method=method, **kw)
    return plan, sources, write(plan, sources, tmp_path/out, tokenizer=AutoTokenizer.from_pretrained(tmp_path/"helper"))

@pytest.mark.parametrize("big,small", [(gpt2(en), gpt2(de, 8)), (gpt2(en), llama(de)), (gpt2(en, tied=False), llama(de)), (llama(en, 16), gpt2(de, 8)),
                                       (llama(en, 16, tied=True), bert(de)), (gpt2(en).bfloat16(), llama(de)), (llama(en, 16).half(), llama(de))])
def test_folder_to_folder(big, small, tmp_path):
    plan, sources, out = go(tmp_path, big, small)
    model, tok = AutoModelForCausalLM.from_pretrained(tmp_path/"out"), AutoTokenizer.from_pretrained(tmp_path/"out")
    assert tok.get_vocab() == de.get_vocab() and model.config.vocab_size == len(de) == model.get_input_embeddings().weight.shape[0]
    ids = tok("der hund", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=2)
    assert made.shape[1] >= ids.shape[1] + 1 and model.config.eos_token_id == 1
    state, old, both = model.state_dict(), big.state_dict(), overlap(en, de)
    tables = {"transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight"} & set(state)
    for n in set(state) - tables: assert torch.equal(state[n], old[n]) and state[n].dtype == old[n].dtype, n
    for n in tables:
        assert torch.equal(state[n][both.shared_target], old[n][both.shared_source]) and state[n].dtype == old[n].dtype
        assert torch.equal(state[n][both.special_target], old[n][both.special_source])
        assert torch.isfinite(state[n]).all()
    tied = big.config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied and ("lm_head.weight" in out.names) != tied
    built = build(plan, sources)
    assert all(torch.equal(x, state[n]) for n, x in built.state_dict().items())
    assert set(out.card.parents) == {sources["source"].card.id, sources["helper"].card.id} and Plan.load(tmp_path/"out").rows == plan.rows

@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method(method, tmp_path):
    plan, sources, out = go(tmp_path, gpt2(en), llama(de), method)
    table, facts = out.read("transformer.wte.weight"), report(plan, sources)[0]
    assert torch.isfinite(table).all() and facts["new"] == len(overlap(en, de).missing) > 10
    assert build(plan, sources)(input_ids=torch.tensor([[0, 7, 9]])).logits.isfinite().all()
    if method == "fvt":
        i = overlap(en, de).missing[5]; flat, _ = spell(en, de, [i])
        assert torch.allclose(table[i], sources["source"].read("transformer.wte.weight")[flat].mean(0), atol=1e-6)

def test_untied_head_has_the_weights_of_the_embeddings(tmp_path):
    plan, sources, out = go(tmp_path, gpt2(en, tied=False), llama(de))
    S, L, H = sources["source"].read("transformer.wte.weight").double(), sources["source"].read("lm_head.weight").double(), sources["helper"].read("model.embed_tokens.weight").double()
    o, a = plan.arrays["origin"], plan.arrays["anchors"]
    w = weights_slow("guarded", S, H, o, a)
    assert torch.allclose(out.read("lm_head.weight")[o == -1].double(), w @ L[o[a]], atol=1e-4)
    assert torch.allclose(out.read("transformer.wte.weight")[o == -1].double(), w @ S[o[a]], atol=1e-4)

def test_masked_models_with_a_head_bias(tmp_path):
    big = bert(en, 16, pad_token_id=2)
    plan, sources, out = go(tmp_path, big, gpt2(de, 8))
    model = AutoModelForMaskedLM.from_pretrained(tmp_path/"out")
    both = overlap(en, de)
    assert torch.equal(model.cls.predictions.bias[both.shared_target], big.cls.predictions.bias[both.shared_source])
    assert model(input_ids=torch.tensor([[0, 4, 1]])).logits.shape == (1, 3, len(de))

def test_roberta_keeps_its_positions_when_the_padding_id_moves(tmp_path):
    big = bert(en, 16, kind=(RobertaConfig, RobertaForMaskedLM), pad_token_id=1, bos_token_id=0, eos_token_id=2).eval()
    plan, sources, _ = go(tmp_path, big, gpt2(de, 8), "overlap")
    model, both = AutoModelForMaskedLM.from_pretrained(tmp_path/"out").eval(), overlap(en, de)
    assert model.config.pad_token_id == 2 and model.config.max_position_embeddings == 41
    t, s = torch.tensor([both.shared_target[20:58]]), torch.tensor([both.shared_source[20:58]])
    with torch.no_grad(): new, old = (m(input_ids=i).logits for m, i in ((model, t), (big, s)))
    assert torch.allclose(new[0][:, both.shared_target], old[0][:, both.shared_source], atol=1e-5)   # full length, the same function

def test_ids_in_config_and_generation_config(tmp_path):
    big = gpt2(en); big.config.bos_token_id = big.config.eos_token_id = 33; big.generation_config.eos_token_id = [33]; big.generation_config.bos_token_id = 33
    en2 = train_tokenizer(EN, 300); en2.eos_token = en2.bos_token = en2.convert_ids_to_tokens(33)
    sources = {"source": put(tmp_path/"source", big, en2), "helper": put(tmp_path/"helper", gpt2(de, 8), de)}
    plan = clp(**sources, tokenizers=(en2, de)); write(plan, sources, tmp_path/"out", tokenizer=de)
    config, generation = (json.loads((tmp_path/"out"/n).read_text()) for n in ("config.json", "generation_config.json"))
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (0, 1, len(de))
    assert generation["eos_token_id"] == [1] and generation["bos_token_id"] == 0
    table = build(plan, sources).transformer.wte.weight
    assert torch.equal(table[1], sources["source"].read("transformer.wte.weight")[33])   # by role, not by spelling

def test_padded_vocabularies(tmp_path):
    plan, sources, out = go(tmp_path, gpt2(en, rows=len(en) + 28), llama(de, rows=len(de) + 9), pad_to=64)
    rows = -(-len(de)//64)*64
    facts, frame = report(plan, sources)
    assert out.shape("transformer.wte.weight") == (rows, 16) and facts["padding"] == rows - len(de) and out.config["vocab_size"] == rows
    assert set(frame.kind) == {"shared", "special", "new", "padding"} and len(frame) == rows

def test_report_tells_guarded_and_zero_rows(tmp_path):
    small = llama(de)
    sources = {"source": put(tmp_path/"source", gpt2(en), en), "helper": put(tmp_path/"helper", small, de)}
    new = overlap(en, de).missing
    held = load_file(tmp_path/"helper"/"model.safetensors"); held["model.embed_tokens.weight"][new[3]] = 0
    save_file(held, tmp_path/"helper"/"model.safetensors", metadata={"format": "pt"})
    sources["helper"] = Checkpoint(tmp_path/"helper")
    plan = clp(**sources); facts, frame = report(plan, sources)
    H, anchors = held["model.embed_tokens.weight"].double(), plan.arrays["anchors"]
    z = torch.nn.functional.normalize(H[new], dim=1) @ torch.nn.functional.normalize(H[anchors], dim=1).sum(0)
    assert facts["zero_helper_rows"] == 1 and bool(frame.guarded[new[3]]) and facts["negative_row_sums"] == int((z < 0).sum())
    assert np.allclose(frame.row_sum[new], z.numpy()) and facts["guarded"] >= facts["negative_row_sums"] > 0
    table = build(plan, sources).transformer.wte.weight.detach()
    assert np.allclose(frame.norm, table.norm(dim=1).numpy(), atol=1e-5)

@pytest.mark.parametrize("change,words", [
    (dict(method="guardd"), "did you mean 'guarded'"), (dict(method="softmax", topk=3), "did you mean 'top_k'"), (dict(method="fvt", ridge=1), "no option of fvt"),
])
def test_refused_options(change, words, tmp_path):
    sources = {"source": put(tmp_path/"source", gpt2(en), en), "helper": put(tmp_path/"helper", gpt2(de, 8), de)}
    with pytest.raises(Refusal, match=words): clp(**sources, **change)

def test_refused_models(tmp_path):
    source, helper = put(tmp_path/"source", gpt2(en), en), put(tmp_path/"helper", gpt2(de, 8, rows=len(de) - 7), de)
    with pytest.raises(Refusal, match="do tokenizer and model belong together"): clp(source, helper)
    with pytest.raises(Refusal, match="knows every token"): clp(source, source)

RUN = """
import sys, torch
torch.set_num_threads(1)
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.write import write
from seqwarm.methods.clp import clp
a, b = Checkpoint(sys.argv[1] + "/source"), Checkpoint(sys.argv[1] + "/helper")
for m in "guarded", "random": write(clp(a, b, method=m, seed=4), {"source": a, "helper": b}, sys.argv[2] + m)
"""

def test_the_same_bytes_in_two_processes(tmp_path):
    put(tmp_path/"source", gpt2(en), en), put(tmp_path/"helper", llama(de), de)
    for seed in "1", "2":
        subprocess.run([sys.executable, "-c", RUN, str(tmp_path), str(tmp_path/seed)], check=True, env=dict(os.environ, PYTHONHASHSEED=seed))
    for m in "guarded", "random":
        for f in ("model.safetensors", "plan.safetensors", "plan.json", "config.json"):
            assert (tmp_path/f"1{m}"/f).read_bytes() == (tmp_path/f"2{m}"/f).read_bytes()

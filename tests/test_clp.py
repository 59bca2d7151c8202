"CLP-Transfer against slow plain code, and from folder to folder into what transformers loads."
import json, os, subprocess, sys
import pytest, torch
from transformers import (AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, RobertaConfig, RobertaForMaskedLM)
from seqwarm.core.checkpoint import Card
from seqwarm.core.errors import Refusal
from seqwarm.core.overlap import overlap, spell
from seqwarm.core.plan import Plan
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.write import build, save, write
from seqwarm.methods.clp import clp
from seqwarm.methods.embed import METHODS, weights
from seqwarm.methods.transfer import report

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

@pytest.mark.parametrize("method", sorted(set(METHODS) - {"wechsel"}))
def test_every_method(method, tmp_path):
    plan, sources, out = go(tmp_path, gpt2(en), llama(de), method)
    table, facts = out.read("transformer.wte.weight"), report(plan, sources)[0]
    assert torch.isfinite(table).all() and facts["tokens"]["new"] == len(overlap(en, de).missing) > 10
    assert build(plan, sources)(input_ids=torch.tensor([[0, 7, 9]])).logits.isfinite().all()
    if method == "fvt":
        i = overlap(en, de).missing[5]; flat, _ = spell(en, de, [i])
        assert torch.allclose(table[i], sources["source"].read("transformer.wte.weight")[flat].mean(0), atol=1e-6)

def test_untied_head_has_the_weights_of_the_embeddings(tmp_path):
    plan, sources, out = go(tmp_path, gpt2(en, tied=False), llama(de))
    S, L, H = sources["source"].read("transformer.wte.weight").double(), sources["source"].read("lm_head.weight").double(), sources["helper"].read("model.embed_tokens.weight").double()
    o, a = plan.arrays["origin"], plan.arrays["anchors"]
    w = weights("embed.guarded", H, S, plan.arrays, torch.nonzero(o == -1)[:, 0], {})
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
    assert out.shape("transformer.wte.weight") == (rows, 16) and facts["tokens"]["padding"] == rows - len(de) and out.config["vocab_size"] == rows
    assert set(frame.kind) == {"shared", "special", "new", "padding"} and len(frame) == rows

@pytest.mark.parametrize("change,words", [
    (dict(method="guardd"), "did you mean 'guarded'"), (dict(method="softmax", topk=3), "did you mean 'top_k'"), (dict(method="fvt", ridge=1), "fvt has no ridge"),
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

def test_the_tokenizer_hands_out_what_the_body_takes(tmp_path):
    "BERT's token types would be looked up among GPT-2's words; what is saved and loaded gives the same logits as ids and mask alone."
    from transformers import BertTokenizer
    from seqwarm.methods.transfer import transfer
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), "der", "mond"]
    put(tmp_path/"source", gpt2(en), en); put(tmp_path/"helper", bert(words), BertTokenizer(vocab={w: i for i, w in enumerate(words)}))
    assert "token_type_ids" in AutoTokenizer.from_pretrained(tmp_path/"helper").model_input_names
    transfer(tmp_path/"source", tmp_path/"helper", match="canonical").write(tmp_path/"out")
    tok, model = AutoTokenizer.from_pretrained(tmp_path/"out"), AutoModelForCausalLM.from_pretrained(tmp_path/"out").eval()
    x = tok("der mond", return_tensors="pt")
    assert set(x) == {"input_ids", "attention_mask"} and model.generate(**x, max_new_tokens=2, do_sample=False, pad_token_id=0).shape[1] > x.input_ids.shape[1]

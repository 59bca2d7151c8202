"The tables against what transformers really writes: names, shapes, ties, order, and what is refused."
import json, subprocess, sys
import pytest, torch, transformers as hf
from safetensors import safe_open
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import layout

LLAMA = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
BERT = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=20)
BART = dict(vocab_size=50, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=28, encoder_layers=2, decoder_layers=3,
            encoder_attention_heads=2, decoder_attention_heads=4, max_position_embeddings=20)
T5 = dict(vocab_size=50, d_model=16, d_ff=24, d_kv=6, num_layers=2, num_decoder_layers=3, num_heads=4)
GPT2 = dict(vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2)
TIES = dict(tie_word_embeddings=True), dict(tie_word_embeddings=False)
GATED = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)   # as in files of version 1.1
LABELS = dict(id2label={0: "a", 1: "b", 2: "c"})
LLAMAS, BARTS = ("Llama", "Mistral", "Qwen2", "Qwen3"), ("Bart", "Blenderbot")
BERTS = "Bert", "Roberta", "XLMRoberta", "RobertaPreLayerNorm", "XLMRobertaXL"
CASES = [("GPT2LMHeadModel", GPT2 | t) for t in TIES] + [("GPT2Model", GPT2 | dict(n_inner=20))]
CASES += [(k + "ForCausalLM", LLAMA | t) for k in LLAMAS for t in TIES] + [(k + "Model", LLAMA) for k in LLAMAS]
CASES += [("LlamaForCausalLM", LLAMA | dict(attention_bias=True, mlp_bias=True)),
          ("Qwen3ForCausalLM", LLAMA | dict(attention_bias=True, head_dim=6)),
          ("LlamaForCausalLM", LLAMA | dict(num_key_value_heads=4)), ("MistralForCausalLM", LLAMA | dict(head_dim=6))]
CASES += [("Bert" + e, BERT | t) for e in ("ForMaskedLM", "LMHeadModel", "ForPreTraining") for t in TIES]
CASES += [(k + e, BERT | LABELS) for k in BERTS for e in ("Model", "ForSequenceClassification", "ForTokenClassification")]
CASES += [(k + e, BERT | t) for k in BERTS[1:] for e in ("ForMaskedLM", "ForCausalLM") for t in TIES]
CASES += [(k + e, BART | t) for k in BARTS for e in ("ForConditionalGeneration", "Model") for t in TIES]
CASES += [("T5" + e, T5 | g) for e in ("ForConditionalGeneration", "Model", "EncoderModel") for g in ({}, GATED)]
SHARED = LLAMA | BERT | BART | T5 | GPT2
NAMES = [a + "".join(f"-{k}={v}" for k, v in kw.items() if k not in SHARED or (k, v) == ("num_key_value_heads", 4)) for a, kw in CASES]

def make(architecture, kw):
    torch.set_num_threads(1)
    cls = getattr(hf, architecture)
    return cls(cls.config_class(**kw))

def shapes_of(lay): return {n: t.shape for n, t in lay.stored().items()}

def as_written(architecture, kw, folder):
    "The model, its layout and its state, once it is shown that the table names what is written, and ties what is tied."
    m = make(architecture, kw)
    m.save_pretrained(folder)
    with safe_open(folder/"model.safetensors", "pt") as f: written = {n: tuple(f.get_slice(n).get_shape()) for n in f.keys()}
    lay = layout(json.loads((folder/"config.json").read_text()))
    assert shapes_of(lay) == written and lay.check(written) == {n: n for n in written}
    assert lay.tensors == layout(m.config, architecture).tensors                       # told from the file or from the object
    state = m.state_dict(keep_vars=True)
    assert set(lay.tensors) == set(state)                                              # tied ones too
    assert {n: tuple(v.shape) for n, v in state.items()} == {n: t.shape for n, t in lay.tensors.items()}
    assert all(state[n].data_ptr() == state[lay.storage(t).name].data_ptr() for n, t in lay.tensors.items())
    assert len({v.data_ptr() for v in state.values()}) == len(lay.stored())            # and nothing else is shared
    return m, lay, state

@pytest.mark.parametrize("architecture,kw", CASES, ids=NAMES)
def test_table_is_what_is_written(architecture, kw, tmp_path):
    _, lay, state = as_written(architecture, kw, tmp_path)
    if not architecture.startswith("XLMRobertaFor"): assert list(lay.tensors) == list(state)     # that class declares its head first

def test_arrows_are_the_matrices_that_multiply():
    "A tensor has an arrow exactly if it is the weight of a Linear or Conv1D, and the arrow points to what comes out."
    for architecture, kw in CASES:
        m = make(architecture, kw)
        linear = {f"{n}.weight": 0 for n, x in m.named_modules() if isinstance(x, torch.nn.Linear)}
        linear |= {f"{n}.weight": 1 for n, x in m.named_modules() if isinstance(x, hf.pytorch_utils.Conv1D)}
        assert {n: t.out for n, t in layout(m.config, architecture).tensors.items() if t.out is not None} == linear, architecture

def test_axes_by_two_models():
    "Changing one size in the config changes exactly the axes that bear its name."
    wide, t5 = LLAMA | dict(head_dim=6), "T5ForConditionalGeneration"
    for architecture, kw, change, axes in [
            ("GPT2LMHeadModel", GPT2, dict(n_inner=40), {"ffn"}), ("GPT2LMHeadModel", GPT2, dict(n_positions=9), {"position"}),
            ("GPT2LMHeadModel", GPT2, dict(vocab_size=9), {"vocab"}), ("Qwen3ForCausalLM", wide, dict(num_key_value_heads=1), {"kv_heads"}),
            ("Qwen3ForCausalLM", wide, dict(hidden_size=32), {"hidden"}),
            ("MistralForCausalLM", wide, dict(num_attention_heads=8), {"heads"}),
            ("Qwen2ForCausalLM", LLAMA, dict(intermediate_size=31), {"ffn"}),
            ("BertForPreTraining", BERT, dict(type_vocab_size=3), {"type"}),
            ("RobertaForTokenClassification", BERT, LABELS, {"labels"}),
            ("BartForConditionalGeneration", BART, dict(vocab_size=9), {"vocab"}),
            ("BlenderbotForConditionalGeneration", BART, dict(max_position_embeddings=9), {"position"}),
            ("RobertaPreLayerNormModel", BERT, dict(intermediate_size=31), {"ffn"}), ("XLMRobertaXLModel", BERT, dict(vocab_size=9), {"vocab"}),
            (t5, T5, dict(num_heads=3), {"heads", "n_heads"}), (t5, T5, dict(relative_attention_num_buckets=8), {"buckets"})]:
        old, new = make(architecture, kw).state_dict(), make(architecture, kw | change).state_dict()
        changed = {(n, i) for n in old for i, (a, b) in enumerate(zip(old[n].shape, new[n].shape)) if a != b}
        lay = layout(getattr(hf, architecture).config_class(**kw), architecture)
        told = {(n, i) for n, t in lay.tensors.items() for i, a in enumerate(t.axes) if axes & set(a.split("+"))}
        assert changed == told, (architecture, change)

def test_names_as_they_lie_on_the_hub():
    bert = layout(hf.BertConfig(**BERT), "BertForMaskedLM")
    old = lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    legacy = {old(n): s for n, s in shapes_of(bert).items()}
    spare = {"bert.pooler.dense.weight": (16, 16), "bert.pooler.dense.bias": (16,), "cls.seq_relationship.weight": (2, 16),
             "cls.seq_relationship.bias": (2,), "bert.embeddings.position_ids": (1, 20)}
    known = bert.check(legacy | spare | {"cls.predictions.decoder.weight": (50, 16)})
    assert known["bert.embeddings.LayerNorm.gamma"] == "bert.embeddings.LayerNorm.weight" and all(known[n] is None for n in spare)
    assert known["cls.predictions.decoder.weight"] == "cls.predictions.decoder.weight"
    gpt2 = layout(hf.GPT2Config(**GPT2), "GPT2LMHeadModel")
    masks = {"transformer.h.1.attn.bias": (1, 1, 20, 20), "h.0.attn.masked_bias": ()}
    assert {gpt2.check(shapes_of(gpt2) | masks)[n] for n in masks} == {None}
    # only the head's copy was kept
    headed = {("lm_head.weight" if n == "transformer.wte.weight" else n): s for n, s in shapes_of(gpt2).items()}
    assert gpt2.check(headed)["lm_head.weight"] == "transformer.wte.weight"
    bart = layout(hf.BartConfig(**BART), "BartForConditionalGeneration")
    assert "final_logits_bias" in bart.stored() and bart.check({n: s for n, s in shapes_of(bart).items() if n != "final_logits_bias"})
    t5 = layout(hf.T5Config(**T5), "T5ForConditionalGeneration")
    assert t5.check(shapes_of(t5) | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 4)})
    assert not t5.untied(["lm_head.weight"]).tensors["lm_head.weight"].tied and t5.tensors["lm_head.weight"].tied

@pytest.mark.parametrize("head,base,kw", [
    ("GPT2LMHeadModel", "GPT2Model", GPT2), ("LlamaForCausalLM", "LlamaModel", LLAMA), ("BertForMaskedLM", "BertModel", BERT),
    ("RobertaForMaskedLM", "RobertaModel", BERT), ("BartForConditionalGeneration", "BartModel", BART),
    ("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormModel", BERT), ("XLMRobertaXLForMaskedLM", "XLMRobertaXLModel", BERT),
    ("BlenderbotForConditionalGeneration", "BlenderbotModel", BART)])
def test_with_and_without_prefix(head, base, kw):
    head, base = (layout(getattr(hf, a).config_class(**kw), a) for a in (head, base))
    prefix = head.table.prefix + "."
    assert set(head.check({n.removeprefix(prefix): s for n, s in shapes_of(head).items()}).values()) == set(head.stored())
    known = base.check(shapes_of(head))                                              # a base model out of one with a head
    assert {n for n in known.values() if n} == {n for n, t in base.stored().items() if not t.optional}
    assert all(known[n] is None for n in head.stored() if not n.startswith(prefix))

@pytest.mark.parametrize("change,words", [
    (lambda s: s.pop("transformer.h.1.ln_2.bias"), "lacks transformer.h.1.ln_2.bias (ffn.norm.bias)"),
    (lambda s: s.update({"transformer.h.2.ln_1.bias": (16,)}), "holds transformer.h.2.ln_1.bias, which GPT2LMHeadModel does not have"),
    (lambda s: s.update({"adapter.weight": (3,)}), "holds adapter.weight"),
    (lambda s: s.update({"transformer.wte.weight": (51, 16)}), "wte.weight in x has the shape (51, 16) and not (50, 16) (vocab x hidden)"),
    (lambda s: s.update({"lm_head.weight": (50, 17)}), "lm_head.weight in x has the shape"),
    (lambda s: s.update({"wte.weight": (50, 16)}), "twice")])
def test_refused_by_name(change, words):
    lay = layout(hf.GPT2Config(**GPT2), "GPT2LMHeadModel"); shapes = shapes_of(lay)
    lay.check(shapes); change(shapes)
    with pytest.raises(Refusal) as e: lay.check(shapes, "x")
    assert words in str(e.value) and "\n" not in str(e.value)

def test_refused_configs():
    for config, architecture, words in [
            ({"model_type": "berd"}, None, "did you mean 'bert'?"), ({}, None, "no model_type"),
            ({"model_type": "t5"}, None, "no architecture"),
            ({"model_type": "bert"}, "BertForMaskdLM", "did you mean 'BertForMaskedLM'?"),
            (hf.CTRLConfig(), None, "there is no family 'ctrl'"),
            (hf.GPT2Config(add_cross_attention=True), "GPT2LMHeadModel", "cross-attention"),
            ({"model_type": "gpt2", "n_layer": "many"}, "GPT2LMHeadModel", "not valid")]:
        with pytest.raises(Refusal) as e: layout(config, architecture)
        assert words in str(e.value) and "\n" not in str(e.value)

def test_select():
    bart = layout(hf.BartConfig(**BART), "BartForConditionalGeneration")
    assert set(bart.select("encoder/")) == {n for n in bart.stored() if n.startswith("model.encoder.")}
    assert bart.select("encoder") == bart.select("encoder/") and bart.select("decoder@1-2") == bart.select("decoder/@1-2")
    assert {t.layer for t in bart.select("decoder/cross@1-2").values()} == {1, 2}
    assert not set(bart.select("attn")) & set(bart.select("cross"))
    assert {"attn.q", "attn.q.bias"} < {t.role for t in bart.select("attn").values()}
    assert set(bart.select("embed")) == {n for n in bart.stored() if "embed" in n or "shared" in n}
    for words, said in [("head.dense", "there is no tensor"), ("encoder/cross", "there is no tensor"), ("ffn@9", "there is no tensor"),
                        ("att", "did you mean"), ("embed token", "names no tensors")]:
        with pytest.raises(Refusal, match=said): bart.select(words)
    with pytest.raises(Refusal, match="tied to model.shared.weight; say 'embed.token'"): bart.select("encoder/embed.token")

def test_sizes_by_name():
    bart, llama = layout(hf.BartConfig(**BART), "BartForConditionalGeneration"), layout(hf.LlamaConfig(**LLAMA), "LlamaForCausalLM")
    assert bart.size("ffn", "decoder") == 28 and llama.size("heads+kv_heads+kv_heads") == 32 and llama.size("one") == 1
    for lay, axis, said in ((llama, "hiden", "did you mean 'hidden'"), (llama, "heads+keys", "no axis of LlamaForCausalLM 'keys'"), (bart, "ffn", "no axis of BartForConditionalGeneration 'ffn'; there are")):
        with pytest.raises(Refusal, match=said): lay.size(axis)

def test_light_to_import():
    "The tables are read without torch or transformers."
    code = "import sys, seqwarm.core.layout as l; assert len(l._families()) >= 9; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

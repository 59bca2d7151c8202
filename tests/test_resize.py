"The layout of a model of another size: what each family's sizes become, beside a model of transformers that is made of them, and what cannot be."
import pytest, torch, transformers as hf
from families import FAMILIES
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import Layout, layout
from seqwarm.core.resize import resized

D, F = 24, 41     # widths; two heads of 12 (T5: of 6), one of keys and values where it has a number of its own
FREE = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen3_moe", "t5", "mt5", "switch_transformers"}   # of heads
GROUPS = FREE - {"t5", "mt5", "switch_transformers"} | {"qwen2_moe", "olmoe"}
DIVIDED = {"llama", "gemma2", "gemma3_text"}    # their class wants whole parts of the hidden size though it does not read them
NO_FFN = {"bloom"}

def small(kind: str, **more) -> Layout:
    architecture, sizes, *_ = FAMILIES[kind]
    ids = {f"{r}_token_id": 1 for r in ("bos", "eos", "pad", "cls", "sep")}
    return layout(getattr(hf, architecture).config_class(**dict(vocab_size=50) | ids | sizes(D) | more), architecture)

def heads(lay: Layout, axis: str = "heads") -> int:
    stack = list(lay.layers)[-1]
    return lay.size(axis, stack)//lay.size("head", stack)

def as_made(lay: Layout) -> None:
    "A model of that config has these tensors, and only the sizes differ from the old one's."
    config = hf.CONFIG_MAPPING[lay.config["model_type"]].from_dict(lay.config)
    with torch.device("meta"): model = getattr(hf, lay.architecture)(config)
    held = {n: tuple(x.shape) for n, x in model.state_dict().items()}
    for n, t in lay.stored().items():
        if lay.table.parameter(n) == n: assert held[n] == t.shape, n

def says(of: Layout, **sizes) -> str:
    with pytest.raises(Refusal) as e: resized(of, **sizes)
    assert "mend its config" not in str(e.value)
    return str(e.value)

@pytest.mark.parametrize("kind", FAMILIES)
def test_a_wider_model_keeps_its_proportions_and_the_size_of_its_heads(kind):
    old = small(kind); new = resized(old, hidden=2*D)
    stack = list(old.layers)[-1]
    t5 = "d_kv" in old.config
    assert new.size("hidden") == 2*D and new.layers == old.layers and new.size("head", stack) == old.size("head", stack)
    assert heads(new) == (2 if t5 else 4) and all(new.size(a, stack) == 2*old.size(a, stack) for a in ("ffn", "kv_heads") if a in old.sizes and not t5)
    assert new.find("ffn.up", stack) == [] or "ffn" not in old.sizes or new.size("ffn", stack) == 2*old.size("ffn", stack)
    names = [k for k in old.config if old.config[k] != new.config[k]]
    assert set(names) <= {"hidden_size", "d_model", "n_embd", "num_attention_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads", "head_dim",
                          "intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "pooler_hidden_size"}
    as_made(new)

@pytest.mark.parametrize("kind", FAMILIES)
def test_heads_and_nets_alone(kind):
    old = small(kind); stack = list(old.layers)[-1]
    if kind in FREE:
        more = resized(old, heads=4)
        assert heads(more) == 4 and more.size("hidden") == D and more.size("head", stack) == old.size("head", stack); as_made(more)
    else: assert f"give 2 heads, or a hidden size of {4*12}" in says(old, heads=4)
    if kind in DIVIDED: assert "give 4 or 6 heads, or a hidden size of 25" in says(old, heads=5)
    elif kind in FREE: as_made(resized(old, heads=5))
    if kind in GROUPS:
        assert heads(resized(old, kv_heads=2), "kv_heads") == heads(resized(old, hidden=2*D), "kv_heads") == 2
        assert heads(resized(old, hidden=2*D, kv_heads=4), "kv_heads") == 4
        assert "give 3 or 6 heads, or 2 or 4 for keys and values" in says(old, **(dict(heads=4) if kind in FREE else dict(hidden=2*D)), kv_heads=3)
    else: assert "key-value heads" in says(old, kv_heads=2) and "leave it out" in says(old, kv_heads=2)
    if kind in NO_FFN: assert "feed-forward size" in says(old, ffn=99) and "leave it out" in says(old, ffn=99)
    else: as_made(resized(old, ffn=99))

@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_smaller_or_does_not_divide_is_refused(kind):
    old = small(kind)
    assert f"give at least {D}" in says(old, hidden=D - 1) and "growth only adds" in says(old, heads=1) and "hidden size cannot be 'wide'" in says(old, hidden="wide")
    if kind not in NO_FFN: assert "feed-forward size" in says(old, ffn=1) and "give at least" in says(old, ffn=1)
    if kind not in FREE or heads(old)*old.size("head", list(old.layers)[-1]) == D: assert "give 24 or 36" in says(old, hidden=D + 1)
    else: assert resized(old, hidden=D + 1).size("hidden") == D + 1

def test_heads_that_do_not_fill_the_state_stay_and_a_class_may_want_it_divided():
    "As Gemma's, whose heads are wider than the state: their number is as it was, and the state has to be cut into as many."
    gemma = small("gemma2", num_attention_heads=4, head_dim=8)
    assert heads(resized(gemma, hidden=2*D)) == 4 and resized(gemma, hidden=28).size("head") == 8
    assert "give 5 or 10 heads" not in says(gemma, hidden=50) and "give 5 heads, or a hidden size of 48 or 52" in says(gemma, hidden=50)
    qwen = small("qwen3", num_attention_heads=4, head_dim=8)      # does not mind
    assert heads(resized(qwen, hidden=50)) == 4
    assert says(small("bert"), hidden=50, heads=3) == "3 heads of 12 are not the 50 of the hidden size, as bert wants it; give a hidden size of 36"

def test_key_value_heads_that_are_not_said_are_as_many_as_heads():
    for kind in ("llama", "olmo2"):
        old = small(kind, num_key_value_heads=None)
        assert old.config["num_key_value_heads"] == 2 and heads(resized(old, hidden=2*D), "kv_heads") == 4, kind

def test_what_is_as_wide_as_the_model_follows_it_and_what_is_narrower_stays():
    for kind, key in (("electra", "embedding_size"), ("opt", "word_embed_proj_dim")):
        for n, then in ((D//2, D//2), (D, 2*D)): assert resized(small(kind, **{key: n}), hidden=2*D).config[key] == then
    assert resized(small("gpt2", n_inner=None), hidden=2*D).config["n_inner"] == 8*D and resized(small("bert"), hidden=36).config["intermediate_size"] == 62    # 61.5

def test_layers_take_along_what_the_config_says_of_each():
    lay = small("gemma3_text", layer_types=["sliding_attention", "full_attention"])
    deep = resized(lay, layers={"": [0, 0, 1, 1, 0]})
    assert deep.layers == {"": 5} and deep.config["layer_types"] == [["sliding_attention", "full_attention"][i] for i in (0, 0, 1, 1, 0)]; as_made(deep)
    two = resized(small("bart"), layers={"decoder": [0, 1, 1]})
    assert two.layers == {"encoder": 2, "decoder": 3} and resized(small("t5"), layers={"encoder": [0, 1, 1]}).layers == {"encoder": 3, "decoder": 2}
    both = resized(small("llama"), hidden=2*D, layers={"": [1]})
    assert both.layers == {"": 1} and both.size("hidden") == 2*D; as_made(both)
    assert resized(small("qwen3_moe"), layers={"": [0, 1, 1]}).config["mlp_only_layers"] == [0]       # layer 1 has the experts

@pytest.mark.parametrize("layers, said", [({"": [0, 2]}, "there is no layer 2: BertForMaskedLM has 2; name layers from 0 to 1"), ({"": []}, "a model without layers"),
                                          ({"encoder": [0]}, "there is no stack in BertForMaskedLM 'encoder'"), ({"": [-1]}, "a layer cannot be -1"), ({"": [0.5]}, "a layer cannot be 0.5")])
def test_layers_that_are_not_there(layers, said): assert said in says(small("bert"), layers=layers)

def test_patterns_that_a_family_works_out_itself():
    "ModernBERT looks everywhere in each third layer; an order that would have it otherwise is refused, or said in its config."
    lay = small("modernbert")
    for order in ([0, 1, 2, 0, 1, 2], [0, 0, 1, 1, 2, 2]):
        try: new = resized(lay, layers={"": order})
        except Refusal as e: assert "choose other layers" in str(e); continue
        assert new.config["layer_types"] == [lay.config["layer_types"][i] for i in order]; as_made(new)

def test_two_models_in_one_are_refused():
    bert = hf.BertConfig(hidden_size=D, num_attention_heads=2, num_hidden_layers=1, intermediate_size=F, vocab_size=50)
    pair = hf.EncoderDecoderConfig.from_encoder_decoder_configs(bert, hf.BertConfig(**bert.to_dict() | dict(is_decoder=True, add_cross_attention=True)))
    assert "two models in one" in says(layout(pair, "EncoderDecoderModel"), hidden=2*D)

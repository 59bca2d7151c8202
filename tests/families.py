"""Every family through CLP, as tiny models with the tokenizers of their kind: what must hold of what comes out, a check a column.

    python tests/families.py     writes results/families.csv anew"""
import csv, json, os, shutil, subprocess, sys, tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
import torch, transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.overlap import overlap
from seqwarm.core.vocab import load_tokenizer, train_tokenizer
from seqwarm.core.write import write
from seqwarm.methods.clp import clp
from seqwarm.methods.embed import weights
from seqwarm.methods.transfer import transfer

TABLE = Path(__file__).parents[1]/"results"/"families.csv"
EN = ["the hound sees the cat in the warm hand of the wind", "12 old trees stand in the garden, and the wind is in the land", "an arm, a hand, a ring and a finger"]*3
DE = ["der hund sieht die katze in der warmen hand, und der wind weht im land", "12 alte bäume stehen im garten", "der arm, die hand, der ring und ein finger"]*3

# ---- tokenizers: the classes that come with the families, learned on the spot

ALPHABET, SPARE = sorted(pre_tokenizers.ByteLevel.alphabet()), [f"<0x{b:02X}>" for b in range(256)]

def _bpe(texts, pre, first, last=(), **more):
    "Vocabulary and merges; `first` are the first ids, `last` the last."
    core = Tokenizer(models.BPE(**more)); core.pre_tokenizer = pre
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=len(first) + 90, special_tokens=first, show_progress=False))
    model = json.loads(core.to_str())["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda x: x[1]))
    return vocab | {t: len(vocab) + i for i, t in enumerate(last)}, [tuple(m) for m in model["merges"]]

def _bytes(texts, first, last=()): return _bpe(texts, pre_tokenizers.ByteLevel(add_prefix_space=False), [*first, *ALPHABET], last)
def _pieces(texts, first, last=()):
    "Pieces of a unigram model with their scores."
    found = sorted(t for t in train_tokenizer(texts, 90, "unigram").get_vocab() if not t.startswith("<"))
    return [(t, 0.0) for t in first] + [(t, -1.0 - i/9) for i, t in enumerate(found)] + [(t, 0.0) for t in last]

def _wordpiece(texts, first, last=()):
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=len(first) + 110, special_tokens=first, show_progress=False))
    vocab = dict(sorted(core.get_vocab().items(), key=lambda x: x[1]))
    return vocab | {t: len(vocab) + i for i, t in enumerate(last)}

def _plain(texts, first, wraps=False, **roles):
    "A byte-level tokenizer that has no class of its own."
    vocab, merges = _bytes(texts, first)
    core = Tokenizer(models.BPE(vocab, merges)); core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in first])
    if wraps: core.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[(t, vocab[t]) for t in ("[CLS]", "[SEP]")])
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, **{f"{r}_token": t for r, t in roles.items()})

@cache
def tokenizer(kind: str, german: bool):
    texts, sp = DE if german else EN, pre_tokenizers.Metaspace()
    bpe = lambda *a: dict(zip(("vocab", "merges"), _bytes(texts, *a)))
    blank = lambda *a: dict(zip(("vocab", "merges"), _bpe(texts, sp, [*a, *SPARE], unk_token="<unk>", byte_fallback=True)))
    s = ["<s>", "<pad>", "</s>", "<unk>"]
    if kind == "gpt2": return hf.GPT2Tokenizer(**bpe(["<|endoftext|>"]))
    if kind == "qwen": return hf.Qwen2Tokenizer(**bpe(["<|endoftext|>"]))
    if kind == "blenderbot": return hf.BlenderbotTokenizer(**bpe(["<pad>", "<s>", "</s>", "<unk>"], ["<mask>"]))
    if kind == "roberta": return hf.RobertaTokenizer(**bpe(s, ["<mask>"]))
    if kind == "opt": return hf.GPT2Tokenizer(**bpe(s), bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
    if kind == "bloom": return _plain(texts, ["<unk>", "<s>", "</s>", "<pad>"], unk="<unk>", bos="<s>", eos="</s>", pad="<pad>")
    if kind == "olmo": return _plain(texts, ["<|endoftext|>", "<|pad|>"], eos="<|endoftext|>", pad="<|pad|>")
    if kind == "modernbert": return _plain(texts, ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"], True, unk="[UNK]", cls="[CLS]", sep="[SEP]", pad="[PAD]", mask="[MASK]")
    if kind == "llama": return hf.LlamaTokenizer(**blank("<unk>", "<s>", "</s>"))
    if kind == "gemma": return hf.GemmaTokenizer(**blank("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    if kind == "bert": return hf.BertTokenizer(vocab=_wordpiece(texts, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
    if kind == "mpnet": return hf.MPNetTokenizer(vocab=_wordpiece(texts, [*s, "[UNK]"], ["<mask>"]))
    if kind == "deberta": return hf.DebertaV2Tokenizer(vocab=_pieces(texts, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"], ["[MASK]"]))
    if kind == "xlmr": return hf.XLMRobertaTokenizer(vocab=_pieces(texts, s, ["<mask>"]))
    if kind == "t5": return hf.T5Tokenizer(vocab=_pieces(texts, ["<pad>", "</s>", "<unk>"]), extra_ids=4)
    if kind == "mbart":
        codes = hf.models.mbart.tokenization_mbart.FAIRSEQ_LANGUAGE_CODES
        return hf.MBartTokenizer(vocab=_pieces(texts, s, [*codes, "<mask>"]), src_lang="en_XX", tgt_lang="en_XX")
    raise KeyError(kind)

# ---- models: D is the width

def _gpt2(D): return dict(n_embd=D, n_layer=2, n_head=2, n_positions=40)
def _bloom(D): return dict(hidden_size=D, n_layer=2, n_head=2)
def _layers(D, **kw): return dict(hidden_size=D, intermediate_size=D + 17, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=40) | kw
def _llama(D, **kw): return _layers(D, num_key_value_heads=1, **kw)
def _opt(D): return dict(hidden_size=D, ffn_dim=D + 17, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=40, word_embed_proj_dim=D//2)
def _deberta(D): return _layers(D, relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=6, norm_rel_ebd="layer_norm", type_vocab_size=0)
def _t5(D, **kw): return dict(d_model=D, d_kv=6, d_ff=D + 17, num_layers=2, num_decoder_layers=2, num_heads=2) | kw
def _bart(D): return dict(d_model=D, max_position_embeddings=40) | {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 2), ("ffn_dim", D + 17), ("attention_heads", 2))}

def _switch(D): return _t5(D) | dict(num_experts=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=2)

CAUSAL, MASKED, SEQ2SEQ = "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"
AUTO = {CAUSAL: hf.AutoModelForCausalLM, MASKED: hf.AutoModelForMaskedLM, SEQ2SEQ: hf.AutoModelForSeq2SeqLM}
FAMILIES: dict[str, tuple[str, Callable, str, str]] = {   # model type: class, sizes, tokenizer, and the family whose helper it gets
    "gpt2": ("GPT2LMHeadModel", _gpt2, "gpt2", "llama"),
    "bloom": ("BloomForCausalLM", _bloom, "bloom", "gemma2"),
    "opt": ("OPTForCausalLM", _opt, "opt", "t5"),
    "llama": ("LlamaForCausalLM", _llama, "llama", "gpt2"),
    "mistral": ("MistralForCausalLM", _llama, "llama", "bert"),
    "qwen2": ("Qwen2ForCausalLM", _llama, "qwen", "bloom"),
    "qwen3": ("Qwen3ForCausalLM", lambda D: _llama(D, head_dim=D//2), "qwen", "mpnet"),
    "gemma2": ("Gemma2ForCausalLM", lambda D: _llama(D, head_dim=D//2), "gemma", "olmo2"),
    "gemma3_text": ("Gemma3ForCausalLM", lambda D: _llama(D, head_dim=D//2), "gemma", "xlm-roberta"),
    "olmo2": ("Olmo2ForCausalLM", _llama, "olmo", "qwen2"),
    "mixtral": ("MixtralForCausalLM", lambda D: _llama(D, num_local_experts=3, intermediate_size=D + 16), "llama", "qwen3_moe"),
    "qwen2_moe": ("Qwen2MoeForCausalLM", lambda D: _llama(D, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=D - 8, shared_expert_intermediate_size=D), "qwen", "t5"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", lambda D: _llama(D, head_dim=D//2, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=D - 8, decoder_sparse_step=2), "qwen", "mixtral"),
    "olmoe": ("OlmoeForCausalLM", lambda D: _llama(D, num_experts=3, num_experts_per_tok=2, intermediate_size=D + 16), "olmo", "gpt2"),
    "bert": ("BertForMaskedLM", _layers, "bert", "roberta"),
    "roberta": ("RobertaForMaskedLM", lambda D: _layers(D, type_vocab_size=1), "roberta", "bert"),
    "xlm-roberta": ("XLMRobertaForMaskedLM", lambda D: _layers(D, type_vocab_size=1), "xlmr", "modernbert"),
    "roberta-prelayernorm": ("RobertaPreLayerNormForMaskedLM", lambda D: _layers(D, type_vocab_size=1), "roberta", "electra"),
    "xlm-roberta-xl": ("XLMRobertaXLForMaskedLM", lambda D: _layers(D, type_vocab_size=1), "xlmr", "roberta-prelayernorm"),
    "electra": ("ElectraForMaskedLM", lambda D: _layers(D, embedding_size=D//2), "bert", "xlm-roberta"),
    "mpnet": ("MPNetForMaskedLM", _layers, "mpnet", "deberta-v2"),
    "deberta-v2": ("DebertaV2ForMaskedLM", _deberta, "deberta", "electra"),
    "modernbert": ("ModernBertForMaskedLM", lambda D: _layers(D, num_hidden_layers=3), "modernbert", "deberta-v2"),
    "t5": ("T5ForConditionalGeneration", _t5, "t5", "bart"),
    "mt5": ("MT5ForConditionalGeneration", lambda D: _t5(D, feed_forward_proj="gated-gelu"), "t5", "bert"),
    "switch_transformers": ("SwitchTransformersForConditionalGeneration", _switch, "t5", "bart"),
    "bart": ("BartForConditionalGeneration", _bart, "roberta", "t5"),
    "blenderbot": ("BlenderbotForConditionalGeneration", _bart, "blenderbot", "xlm-roberta-xl"),
    "mbart": ("MBartForConditionalGeneration", _bart, "mbart", "xlm-roberta")}
ROLES = "bos", "eos", "pad", "cls", "sep", "unk", "mask"

def model(kind: str, width: int, german: bool, tied: bool = True, seed: int = 0, architecture: str | None = None, **more):
    "A model with random numbers everywhere, so that none can be taken for another; `more` stands in its config."
    usual, sizes, tok, _ = FAMILIES[kind]
    architecture = architecture or usual
    tok, cls = tokenizer(tok, german), getattr(hf, architecture)
    known = cls.config_class().to_dict()
    ids = {f"{r}_token_id": getattr(tok, f"{r}_token_id") for r in ROLES if f"{r}_token_id" in known}
    if SEQ2SEQ in architecture: ids |= _decoder(kind, tok)
    config = cls.config_class(**dict(vocab_size=len(tok), tie_word_embeddings=tied) | sizes(width) | ids | more)
    m, made = cls(config).eval(), torch.Generator().manual_seed(seed)
    for name, x in m.named_parameters():
        x.data = torch.randn(x.shape, generator=made)*0.2 + (1.0 if x.ndim == 1 and name.endswith("weight") else 0.0)
    for name, x in m.named_buffers():
        if name == "final_logits_bias": x.copy_(torch.randn(x.shape, generator=made))
    m.tie_weights()
    out = m.get_output_embeddings()
    if not tied and out is not None and out.weight is m.get_input_embeddings().weight:   # T5 1.1: the config cannot say so, the file does by holding a head of its own
        out.weight = torch.nn.Parameter(torch.randn(out.weight.shape, generator=made)*0.2)
    return m

def _decoder(kind: str, tok) -> dict:
    "The ids with which a decoder begins and ends, as the family's checkpoints have them."
    if kind in ("t5", "mt5", "switch_transformers"): return dict(decoder_start_token_id=tok.pad_token_id)
    if kind == "bart": return dict(decoder_start_token_id=tok.eos_token_id, forced_bos_token_id=tok.bos_token_id, forced_eos_token_id=tok.eos_token_id)
    if kind == "blenderbot": return dict(decoder_start_token_id=tok.bos_token_id, forced_eos_token_id=tok.eos_token_id)
    return dict(decoder_start_token_id=tok.convert_tokens_to_ids("en_XX"), forced_eos_token_id=tok.eos_token_id)

def _save(folder: Path, m, tok):
    m.save_pretrained(folder); tok.save_pretrained(folder)
    return folder

# ---- a case: one family, tied or untied, carried through

@dataclass(frozen=True)
class Case:
    kind: str; tied: bool
    def __str__(self): return f"{self.kind}-{'tied' if self.tied else 'untied'}"
    @property
    def architecture(self): return FAMILIES[self.kind][0]
    @property
    def task(self): return next((t for t in AUTO if t in self.architecture), CAUSAL)

CASES = [Case(k, t) for k in FAMILIES for t in (True, False)]

class Made:
    "Source, helper and what came out, in folders; kept for all checks of a case."
    def __init__(self, case: Case, home: Path):
        self.case, self.home = case, home/str(case)
        _, _, kind, other = FAMILIES[case.kind]
        self.theirs, self.ours = tokenizer(kind, False), tokenizer(FAMILIES[other][2], True)
        self.big = model(case.kind, 24, False, case.tied, seed=len(str(case)))
        self.source = _save(self.home/"source", self.big, self.theirs)
        self.helper = _save(self.home/"helper", model(other, 20, True, seed=9), self.ours)
        self.old, self.both = load_file(self.source/"model.safetensors"), overlap(self.theirs, self.ours, "canonical")
        self.transfer = transfer(self.source, self.helper, method="guarded", match="canonical")
        self.transfer.write(self.home/"out")
        self.out, self.new = self.home/"out", load_file(self.home/"out"/"model.safetensors")
    def again(self, source: Path, helper: Path | None = None, name: str = "again", **how) -> Path:
        return carry(source, helper or self.helper, self.home/name, **how)
    def load(self, **kw): return AUTO[self.case.task].from_pretrained(self.out, **kw)
    @cached_property
    def loaded(self): return self.load().eval()
    def axis(self, name: str) -> int | None:
        "Where a source tensor has its vocabulary: told by size, as no other axis has this one."
        n = len(self.theirs)
        return self.old[name].shape.index(n) if n in self.old[name].shape else None
    def tables(self): return {n: self.axis(n) for n in self.old if self.axis(n) is not None}

def carry(source: Path, helper: Path, out: Path, **how) -> Path:
    "clp and write, without a report."
    a, b = Checkpoint(source), Checkpoint(helper)
    write(clp(a, b, **{"method": "guarded", "match": "canonical"} | how), {"source": a, "helper": b}, out, load_tokenizer(b.path))
    return out

FILES = "model.safetensors", "config.json", "generation_config.json", "plan.safetensors", "tokenizer.json"
def same_files(a: Path, b: Path, names=FILES):
    for n in names: assert (a/n).exists() == (b/n).exists() and (not (a/n).exists() or (a/n).read_bytes() == (b/n).read_bytes()), n

def ids_of(tok, text: str) -> torch.Tensor: return torch.tensor([tok(text).input_ids])

# ---- the checks, a column each

def loads(x: Made):
    m, info = x.load(output_loading_info=True)
    assert type(m).__name__ == x.case.architecture and not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tok = hf.AutoTokenizer.from_pretrained(x.out)
    assert tok.get_vocab() == x.ours.get_vocab() and tok(DE).input_ids == x.ours(DE).input_ids
    assert [getattr(tok, f"{r}_token_id") for r in ROLES] == [getattr(x.ours, f"{r}_token_id") for r in ROLES]
    text = ids_of(tok, "der hund")
    if x.case.task == MASKED: assert m.eval()(input_ids=text).logits.isfinite().all()
    else:
        made = m.generate(text, max_new_tokens=4, min_new_tokens=2, do_sample=False)
        assert made.max() < len(tok) and made.shape[1] >= 3 + (x.case.task == CAUSAL)*(text.shape[1] - 1)

def body(x: Made):
    "Every tensor without a vocabulary, in three dtypes."
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        old, new = x.old, x.new
        if dtype != torch.float32:
            part = x.home/str(dtype)
            _save(part, model(x.case.kind, 24, False, x.case.tied, seed=3).to(dtype), x.theirs)
            old, new = (load_file(f/"model.safetensors") for f in (part, x.again(part, name=f"{dtype}-out")))
            assert json.loads((x.home/f"{dtype}-out"/"config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert set(new) == set(old)
        for n, t in old.items():
            assert new[n].dtype == t.dtype == dtype, n
            if x.axis(n) is not None: continue
            if new[n].shape == t.shape: assert torch.equal(new[n], t), n
            else:
                assert "roberta" in x.case.kind and "position" in n, n       # their positions begin behind the padding id
                a, b = x.theirs.pad_token_id + 1, x.ours.pad_token_id + 1
                assert torch.equal(new[n][b:], t[a:]), n

STAND_IN = {"bos": ("bos", "cls", "eos"), "cls": ("cls", "bos", "eos"), "eos": ("eos", "sep"), "sep": ("sep", "eos")}
def rows(x: Made):
    tables, both, arrays = x.tables(), x.both, x.transfer.plan.arrays
    assert tables and len(both.missing) > 10 and len(both.shared_target) > 10
    H, = (t for n, t in load_file(x.helper/"model.safetensors").items() if t.ndim == 2 and t.shape[0] == len(x.ours) and "head" not in n and "predictions" not in n and n != "decoder.weight")
    E = x.old[Checkpoint(x.source).layout.one("embed.token").name]
    missing, anchors = torch.tensor(both.missing), torch.tensor(sorted(both.shared_target))
    assert torch.equal(torch.nonzero(arrays["origin"] == -1)[:, 0], missing) and torch.equal(arrays["anchors"], anchors)
    w = weights("embed.guarded", H.double(), E.double(), arrays, missing, {})
    of, spelt = dict(zip(both.shared_target, both.shared_source)), 0
    for n, axis in tables.items():
        old, new = x.old[n].movedim(axis, 0), x.new[n].movedim(axis, 0)
        assert len(new) == len(x.ours)
        assert torch.equal(new[both.shared_target], old[both.shared_source]), n
        for role in ROLES:
            t = getattr(x.ours, f"{role}_token_id")
            roles = [r for r in ROLES if t is not None and getattr(x.ours, f"{r}_token_id") == t]
            theirs = {getattr(x.theirs, f"{s}_token_id") for r in roles for s in STAND_IN.get(r, (r,))} - {None}
            if not theirs: continue
            spelt += any(x.theirs.convert_ids_to_tokens(s) != x.ours.convert_ids_to_tokens(t) for s in theirs)
            assert any(torch.equal(new[t], old[s]) for s in theirs), (n, role)
        want = w @ old.double().reshape(len(old), -1)[[of[t] for t in anchors.tolist()]]
        got = new[missing].double().reshape(len(missing), -1)
        assert (got - want).abs().max() <= 1e-5*max(1.0, float(want.abs().max())), n
    assert spelt or set(x.theirs.all_special_tokens) & set(x.ours.all_special_tokens)

def head(x: Made):
    "Tied stays tied; an untied head and a bias have rows of their own."
    m = x.loaded
    out, into = m.get_output_embeddings(), m.get_input_embeddings()
    was, now = (json.loads((f/"config.json").read_text()) for f in (x.source, x.out))
    assert (out.weight is into.weight) == x.case.tied and now["tie_word_embeddings"] == was["tie_word_embeddings"]
    wide = [t for n, t in x.new.items() if len(x.ours) in t.shape and min(t.shape) > 1 and t.ndim == 2]
    assert len(wide) == 1 if x.case.tied else len(wide) >= 2          # what is stored
    if not x.case.tied: assert out.weight.shape[0] == len(x.ours) and not torch.equal(out.weight[x.both.missing, :8], into.weight[x.both.missing, :8])
    big = x.big.get_output_embeddings()
    if getattr(big, "bias", None) is not None:
        assert out.bias.shape == (len(x.ours),) and torch.equal(out.bias[x.both.shared_target], big.bias[x.both.shared_source])
        assert out.bias[x.both.missing].std() > 0
    if hasattr(m, "final_logits_bias"):
        assert torch.equal(m.final_logits_bias[0, x.both.shared_target], x.big.final_logits_bias[0, x.both.shared_source])

def ids(x: Made):
    "By role in config, generation_config and the module; what a decoder begins with is a token of the new vocabulary."
    config, m = json.loads((x.out/"config.json").read_text()), x.loaded
    assert config["vocab_size"] == len(x.ours) == m.get_input_embeddings().weight.shape[0]
    there = x.out/"generation_config.json"
    assert there.exists() == (x.source/"generation_config.json").exists()
    has = lambda role: getattr(x.ours, f"{role}_token_id")
    also = dict(bos="cls", eos="sep", cls="bos", sep="eos")      # who serves where a tokenizer lacks a role
    for name in ["config.json"] + ["generation_config.json"]*there.exists():
        was, now = (json.loads((f/name).read_text()) for f in (x.source, x.out))
        for role in ROLES:
            key = f"{role}_token_id"
            want = has(role) if has(role) is not None or was.get(key) is None else has(also[role]) if role in also else None
            if key in was or role in ("bos", "eos", "pad"): assert now.get(key) == want, (name, key, now.get(key), want)
        assert all(0 <= i < len(x.ours) for k, i in now.items() if k.endswith("_token_id") and isinstance(i, int))
    pad = getattr(m.get_input_embeddings(), "padding_idx", None)
    if x.case.kind == "mpnet":        # its code takes id 1 for padding whatever the config says; that is reported
        assert pad == 1 and any("MPNet takes id 1" in w for w in x.transfer.facts["warnings"])
    elif getattr(x.big.get_input_embeddings(), "padding_idx", None) is not None: assert pad == m.config.pad_token_id
    if x.case.task == SEQ2SEQ:
        start, by = getattr(m.generation_config, "decoder_start_token_id", None) or m.config.to_dict().get("decoder_start_token_id"), x.ours
        assert start == {"t5": by.pad_token_id, "mt5": by.pad_token_id, "switch_transformers": by.pad_token_id, "bart": by.eos_token_id or by.sep_token_id, "mbart": by.bos_token_id,
                         "blenderbot": by.bos_token_id}[x.case.kind]
        assert m.config.pad_token_id == by.pad_token_id is not None
        if "bart" in x.case.kind or x.case.kind == "blenderbot": assert m.generation_config.forced_eos_token_id == by.eos_token_id

STRAYS = {  # what old versions stored, by family
    "gpt2": ["transformer.h.0.attn.bias", "h.1.attn.masked_bias"], "bloom": ["h.1.self_attention.scale_mask_softmax.causal_mask"],
    "opt": ["decoder.version"], "roberta-prelayernorm": ["roberta_prelayernorm.embeddings.position_ids"], "xlm-roberta-xl": ["roberta.embeddings.position_ids"],
    "t5": ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"], "mt5": ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"],
    "switch_transformers": ["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"],
    "deberta-v2": ["deberta.embeddings.position_ids"], "modernbert": []}
for _k in ("bart", "mbart", "blenderbot"): STRAYS[_k] = ["model.encoder.version", "model.decoder.version"]
for _k in ("bert", "roberta", "xlm-roberta", "electra", "mpnet"): STRAYS[_k] = [f"{_k.replace('xlm-', '')}.embeddings.position_ids"]
for _k in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"): STRAYS[_k] = ["model.layers.1.self_attn.rotary_emb.inv_freq"]

def on_the_hub(x: Made) -> dict[str, dict]:
    "The source as it may lie on the hub: what -> tensors by name."
    prefix, found = x.big.base_model_prefix + ".", {}
    if any(n.startswith(prefix) for n in x.old): found["no prefix"] = {n.removeprefix(prefix): t for n, t in x.old.items()}
    if any(".LayerNorm." in n for n in x.old):
        legacy = lambda n: n.replace(".LayerNorm.weight", ".LayerNorm.gamma").replace(".LayerNorm.bias", ".LayerNorm.beta")
        found["gamma and beta"] = {legacy(n): t for n, t in x.old.items()}
    if STRAYS[x.case.kind]: found["strays"] = x.old | {n: torch.ones(1, 3) for n in STRAYS[x.case.kind]}
    tied = {n for n, t in Checkpoint(x.source).layout.tensors.items() if t.tied}
    if x.case.tied: found["copies of what is tied"] = x.old | {n: t.clone() for n, t in x.big.state_dict().items() if n in tied}
    found["shards"] = dict(x.old)
    return found

def hub(x: Made):
    for what, tensors in on_the_hub(x).items():
        folder = x.home/what
        shutil.copytree(x.source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = {n: t.contiguous() for n, t in tensors.items()}
        if what != "shards": save_file(tensors, folder/"model.safetensors", metadata={"format": "pt"})
        else:
            names = sorted(tensors); where = {n: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, n in enumerate(names)}
            for f in sorted(set(where.values())): save_file({n: tensors[n] for n in names if where[n] == f}, folder/f, metadata={"format": "pt"})
            (folder/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
        same_files(x.out, x.again(folder, name=f"{what}-out"))

def _padded(folder: Path, to: Path, rows: int, by: int) -> Path:
    "The same checkpoint with more rows than its tokenizer has tokens."
    shutil.copytree(folder, to)
    state, made = load_file(folder/"model.safetensors"), torch.Generator().manual_seed(1)
    for n, t in state.items():
        if rows not in t.shape: continue
        axis = t.shape.index(rows); more = list(t.shape); more[axis] = by
        state[n] = torch.cat([t, torch.randn(more, generator=made)], axis)
    save_file(state, to/"model.safetensors", metadata={"format": "pt"})
    config = json.loads((to/"config.json").read_text()); config["vocab_size"] = rows + by
    (to/"config.json").write_text(json.dumps(config))
    return to

def padded(x: Made):
    "Rows of real tokens are those that come out without padding."
    source, helper = _padded(x.source, x.home/"wide", len(x.theirs), 13), _padded(x.helper, x.home/"wide helper", len(x.ours), 7)
    out, n = x.again(source, helper, "wide-out", pad_to=32), -(-len(x.ours)//32)*32
    new = load_file(out/"model.safetensors")
    assert n > len(x.ours) and set(new) == set(x.new)
    for name, t in new.items():
        axis = x.axis(name)
        if axis is None: assert torch.equal(t, x.new[name]), name
        else: assert t.shape[axis] == n and torch.equal(t.narrow(axis, 0, len(x.ours)), x.new[name]) and t.isfinite().all(), name
    was, now = (json.loads((f/"config.json").read_text()) for f in (x.out, out))
    assert now["vocab_size"] == n and {k for k in now if now[k] != was[k]} == {"vocab_size"}
    _, info = AUTO[x.case.task].from_pretrained(out, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))

def trains(x: Made):
    "In the Trainer of transformers, with its collators: all that it needs comes from the folder; untied ones in a plain loop."
    m, tok, n = x.load(), hf.AutoTokenizer.from_pretrained(x.out), 12
    data = []
    for text in DE[:3]:
        i = tok(text, truncation=True, max_length=n).input_ids
        data.append(dict(input_ids=i, labels=list(i)) if x.case.task != SEQ2SEQ else dict(input_ids=i, labels=i[1:n - 2]))
    size = min(len(d["input_ids"]) for d in data)
    if x.case.task == SEQ2SEQ: collate = hf.DataCollatorForSeq2Seq(tok, m)
    else: data, collate = [{k: v[:size] for k, v in d.items()} for d in data], hf.default_data_collator
    m.eval(); batch = collate([dict(d) for d in data])
    with torch.no_grad(): before = float(m(**batch).loss)
    m.train()
    if x.case.tied:
        how = hf.TrainingArguments(str(x.home/"runs"), max_steps=5, per_device_train_batch_size=3, learning_rate=5e-3, lr_scheduler_type="constant", use_cpu=True,
                                   report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0)
        trainer = hf.Trainer(m, how, train_dataset=data, data_collator=collate)
        trainer.remove_callback(hf.trainer_callback.PrinterCallback)
        trainer.train()
    else:
        torch.manual_seed(0); by = torch.optim.AdamW(m.parameters(), 5e-3)
        for _ in range(5): m(**batch).loss.backward(); by.step(); by.zero_grad()
    m.eval()
    with torch.no_grad(): after = float(m(**batch).loss)
    assert after < 0.97*before, (before, after)

def function(x: Made):
    "Where all tokens are shared, the logits of shared tokens are the source's."
    made, keep = torch.Generator().manual_seed(2), list(zip(x.both.shared_target, x.both.shared_source))
    if x.case.kind == "mpnet": keep = [(t, s) for t, s in keep if t != 1 and s != 1]    # the id of its padding, see `ids`
    pick = torch.randint(len(keep), (2, 9), generator=made)
    t, s = (torch.tensor([k[i] for k in keep])[pick] for i in (0, 1))
    feed = lambda i: dict(input_ids=i, attention_mask=torch.ones_like(i)) | (dict(decoder_input_ids=i.flip(1)) if x.case.task == SEQ2SEQ else {})
    with torch.no_grad(): new, old = x.loaded(**feed(t)).logits, x.big(**feed(s)).logits
    new, old = new[..., x.both.shared_target], old[..., x.both.shared_source]
    assert old.std() > 0.05 and (new - old).abs().max() <= 1e-5*max(1.0, float(old.abs().max()))

# ---- the table

class Shop:
    "All cases in one folder, each made once, each check run once."
    def __init__(self, home: Path): self.home, self._made, self._found = home, {}, {}
    def made(self, case: Case) -> Made:
        if case not in self._made: self._made[case] = Made(case, self.home)
        return self._made[case]
    @cached_property
    def other(self) -> Path:
        "The same cases done in another process, which hashes strings in another way."
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
        done = [str(c) for c in CASES if self._try(c)]
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(TABLE.parents[1]), os.environ.get("PYTHONPATH", "")])}
        subprocess.run([sys.executable, __file__, "again", str(self.home), *done], check=True, env=env, capture_output=True, text=True)
        return self.home
    def _try(self, case: Case) -> bool:
        try: self.made(case)
        except Exception: return False
        return True
    def bytes(self, x: Made):
        same_files(x.out, self.other/str(x.case)/"elsewhere", (*FILES, "plan.json"))
    def cell(self, case: Case, check: str) -> str:
        "'yes', or what is wrong."
        if (case, check) not in self._found:
            try: (self.bytes if check == "bytes" else CHECKS[check])(self.made(case)); self._found[case, check] = "yes"
            except Exception as e: self._found[case, check] = f"no: {type(e).__name__}: {e}".splitlines()[0][:300]
        return self._found[case, check]

CHECKS = {f.__name__: f for f in (loads, body, rows, head, ids, hub, padded, trains, function)} | {"bytes": None}

def lines(shop: Shop) -> list[dict[str, str]]:
    return [dict(model_type=c.kind, architecture=c.architecture, words="tied" if c.tied else "untied",
                 **{k: shop.cell(c, k) for k in CHECKS}) for c in CASES]

def write_table(table: list[dict[str, str]], to: Path = TABLE):
    with open(to, "w", newline="") as f:
        out = csv.DictWriter(f, list(table[0]), lineterminator="\n")
        out.writeheader(); out.writerows(table)

if __name__ == "__main__":
    torch.set_num_threads(1)
    hf.utils.logging.set_verbosity_error(); hf.utils.logging.disable_progress_bar()
    if sys.argv[1:2] == ["again"]:
        for place in (Path(sys.argv[2])/name for name in sys.argv[3:]): carry(place/"source", place/"helper", place/"elsewhere")
    else:
        with tempfile.TemporaryDirectory() as folder: table = lines(Shop(Path(folder)))
        wrong = [f"{r['architecture']} ({r['words']}) {k}: {v}" for r in table for k, v in r.items() if v.startswith("no")]
        if wrong: sys.exit("\n".join(wrong))
        write_table(table)

"Tokenizers: the same bytes in every process, the same through files, refusals in one line."
import json, os, subprocess, sys
import pytest
from transformers import ByT5Tokenizer, GPT2Config, GPT2Tokenizer, LlamaConfig
from seqwarm.core import vocab
from seqwarm.core.errors import Refusal
from seqwarm.core.vocab import load_tokenizer, tokenizer_fingerprint, train_tokenizer

GERMAN = ["der hund sieht die katze im garten", "die katze sieht den hund nicht", "im garten stehen 12 alte bäume, und der wind weht"]*4

MAKE = """
import hashlib, random, sys
from seqwarm.core.vocab import train_tokenizer
r = random.Random(1); syllables = ["ka", "lo", "mi", "tur", "ben", "sa", "ri", "en", "a"]
words = ["".join(r.choice(syllables) for _ in range(r.randint(1, 4))) for _ in range(400)]
texts = [" ".join(r.choice(words) for _ in range(20)) for _ in range(300)]
tok = train_tokenizer(iter(texts), 500, kind=sys.argv[1])
tok.save_pretrained(sys.argv[2])
print(hashlib.sha256(tok.backend_tokenizer.to_str().encode()).hexdigest())
"""

@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_same_bytes_in_two_processes(kind, tmp_path):
    sums = []
    for seed in "1", "2":
        env = dict(os.environ, PYTHONHASHSEED=seed)
        out = subprocess.run([sys.executable, "-c", MAKE, kind, str(tmp_path/seed)], env=env, capture_output=True, text=True, check=True).stdout
        sums.append(out.strip())
    assert sums[0] == sums[1] and len(sums[0]) == 64
    for name in ("tokenizer.json", "tokenizer_config.json"): assert (tmp_path/"1"/name).read_bytes() == (tmp_path/"2"/name).read_bytes()

@pytest.mark.parametrize("kind,size", [("bpe", 340), ("unigram", 120)])
def test_round_trip_through_files(kind, size, tmp_path):
    tok = train_tokenizer(GERMAN, size, kind)
    assert len(tok) <= size and sorted(tok.get_vocab().values()) == list(range(len(tok)))
    assert [tok.bos_token, tok.eos_token, tok.pad_token, tok.unk_token, tok.mask_token] == ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    text = "der wind sieht die bäume, 12"
    assert tok.decode(tok(text).input_ids) == text and tok.tokenize("<mask>") == ["<mask>"]
    tok.save_pretrained(tmp_path/"t")
    for config in None, GPT2Config(), LlamaConfig():  # the family beside it must not change what the tokenizer does
        if config is not None: config.save_pretrained(tmp_path/"t")
        again = load_tokenizer(tmp_path/"t")
        assert again(text).input_ids == tok(text).input_ids and again.get_vocab() == tok.get_vocab()
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id, again.mask_token_id) == (0, 1, 2, 4)

def test_unigram_prefers_whole_words_and_knows_its_limits():
    tok = train_tokenizer(GERMAN, 200, "unigram")
    assert "▁garten" in tok.get_vocab() and tok.tokenize("garten") == ["▁garten"]
    assert tok.unk_token_id in tok("ξ").input_ids
    assert tok.tokenize("hund\nhund") != tok.tokenize("hund hund")

@pytest.mark.parametrize("call,words", [
    (lambda p: train_tokenizer([], 400), "no text"), (lambda p: train_tokenizer(["  ", ""], 400), "no text"),
    (lambda p: train_tokenizer(GERMAN, 100), "too small"), (lambda p: train_tokenizer(GERMAN, 400, "bp"), "did you mean 'bpe'"),
    (lambda p: train_tokenizer(None, 400), "learned from a NoneType; give texts"), (lambda p: train_tokenizer(GERMAN + [3], 400), "learned from a int"),
    (lambda p: train_tokenizer([{"text": "x"}], 400, "unigram"), "learned from a dict"),
    (lambda p: load_tokenizer(p), "holds no tokenizer"), (lambda p: load_tokenizer(p/"nowhere"), "not a folder"),
])
def test_refusals(call, words, tmp_path):
    with pytest.raises(Refusal, match=words) as e: call(tmp_path)
    assert "\n" not in str(e.value)

def test_broken_tokenizer_file_is_refused(tmp_path):
    train_tokenizer(GERMAN, 340).save_pretrained(tmp_path)
    (tmp_path/"tokenizer.json").write_text((tmp_path/"tokenizer.json").read_text()[:500])
    with pytest.raises(Refusal, match="not readable JSON"): load_tokenizer(tmp_path)

CODE = {"auto_map": {"AutoTokenizer": ["tokenization_ours.OurTokenizer", None]}}

@pytest.mark.parametrize("config", [CODE, CODE | {"tokenizer_class": "OurTokenizer"},
                                    {"auto_map": ["tokenization_ours.OurTokenizer", "tokenization_ours.OurTokenizerFast"]}])
@pytest.mark.parametrize("with_json", [True, False])
def test_code_of_the_repository_is_never_run(config, with_json, tmp_path):
    if with_json: train_tokenizer(GERMAN, 340).save_pretrained(tmp_path)
    else: (tmp_path/"vocab.txt").write_text("hund\n")
    (tmp_path/"tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path/"tokenization_ours.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')\nclass OurTokenizer: pass\nclass OurTokenizerFast: pass\n")
    with pytest.raises(Refusal, match="asks to run code of its own") as e: load_tokenizer(tmp_path)
    assert "\n" not in str(e.value) and not (tmp_path/"ran").exists()

def test_a_class_of_transformers_beside_the_code_is_used(tmp_path):
    tok = train_tokenizer(GERMAN, 340)
    tok.save_pretrained(tmp_path)
    (tmp_path/"tokenization_ours.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')\n")
    (tmp_path/"tokenizer_config.json").write_text(json.dumps(CODE | {"tokenizer_class": "GPT2Tokenizer"}))
    again = load_tokenizer(tmp_path)
    assert isinstance(again, GPT2Tokenizer) and again.get_vocab().items() >= tok.get_vocab().items() and not (tmp_path/"ran").exists()

@pytest.mark.parametrize("name,family", [("spiece.model", "t5"), ("tokenizer.model", "llama"), ("sentencepiece.bpe.model", "xlm-roberta"), ("spiece.model", None)])
def test_a_sentencepiece_model_alone_says_what_to_install(name, family, tmp_path, monkeypatch):
    (tmp_path/name).write_bytes(b"abcd")
    if family: (tmp_path/"config.json").write_text(json.dumps({"model_type": family}))
    monkeypatch.setattr(vocab, "find_spec", lambda library: None)
    with pytest.raises(Refusal, match=f"{name} is a SentencePiece model.*pip install sentencepiece") as e: load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)
    monkeypatch.setattr(vocab, "find_spec", lambda library: object())   # installed, or thought to be: the loader's own word, in one line
    with pytest.raises(Refusal, match="cannot be loaded") as e: load_tokenizer(tmp_path)
    assert "\n" not in str(e.value) and "; " in str(e.value)

@pytest.mark.parametrize("name,text,words", [
    ("tokenizer_config.json", "[1]", "no JSON object"), ("tokenizer.json", "{}", "cannot be loaded"), ("vocab.json", '{"a": 0', "not readable JSON"),
    ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nothing"}}', "cannot be loaded"), ("tokenizer_config.json", '{"auto_map": 3}', "cannot be loaded"),
])
def test_nonsense_in_the_files_is_one_line(name, text, words, tmp_path):
    (tmp_path/name).write_text(text)
    with pytest.raises(Refusal, match=words) as e: load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)

def test_fingerprint_tells_vocabularies_apart(tmp_path):
    a, b = train_tokenizer(GERMAN, 340), train_tokenizer(GERMAN, 300)
    a.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == tokenizer_fingerprint(a) != tokenizer_fingerprint(b)
    assert tokenizer_fingerprint(ByT5Tokenizer()) == tokenizer_fingerprint(ByT5Tokenizer()) != tokenizer_fingerprint(ByT5Tokenizer(extra_ids=3))

"Tokenizers: the same bytes in every process, overlap against a plain loop, refusals in one line."
import os, subprocess, sys
import pytest
from transformers import BertTokenizerFast, GPT2Config, LlamaConfig
from seqwarm.core.errors import Refusal
from seqwarm.core.vocab import load_tokenizer, overlap, spell, train_tokenizer

GERMAN = ["der hund sieht die katze im garten", "die katze sieht den hund nicht", "im garten stehen 12 alte bäume, und der wind weht"]*4
ENGLISH = ["the hound sees the cat in the garden", "the cat does not see the hound", "in the garden stand 12 old trees, and the wind blows"]*4

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

def test_overlap_against_a_plain_loop():
    source, target = train_tokenizer(ENGLISH, 320), train_tokenizer(GERMAN, 340)
    got, s_of, special = overlap(source, target), source.get_vocab(), set(range(5))
    want = [(i, s_of[t]) for i in range(len(target)) if (t := target.convert_ids_to_tokens(i)) in s_of and i not in special]
    assert list(zip(got.shared_target, got.shared_source)) == want and len(want) > 256
    assert got.special_target == got.special_source == [0, 1, 2, 3, 4]
    assert got.missing == sorted(set(range(len(target))) - {t for t, _ in want} - special) and got.missing
    assert got.size == len(target) and got.share == len(want)/len(target)

def wordpiece(words):
    return BertTokenizerFast(vocab={w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])})

def test_specials_by_role_not_by_spelling():
    source, target = wordpiece(["hund", "wind", ","]), train_tokenizer(GERMAN, 340)
    got = overlap(source, target)
    assert dict(zip(got.special_target, got.special_source)) == {0: 2, 1: 3, 2: 0, 3: 1, 4: 4}  # <s>=[CLS], </s>=[SEP], ...
    back = overlap(target, source)
    assert dict(zip(back.special_target, back.special_source)) == {0: 2, 1: 3, 2: 0, 3: 1, 4: 4}
    plain = overlap(wordpiece(["hund", "<mask>", ","]), target)  # an ordinary token of the source that is spelt like our special one
    assert 4 not in plain.shared_target and dict(zip(plain.special_target, plain.special_source))[4] == 4
    lone = train_tokenizer(ENGLISH, 320)
    lone.mask_token = lone.pad_token = None
    assert {2, 4} <= set(overlap(lone, target).missing)

def test_no_shared_token_is_refused():
    with pytest.raises(Refusal, match="share no ordinary token"): overlap(wordpiece(["foo", "bar"]), wordpiece(["baz"]))

def test_spell_bytes_and_text():
    source, target = train_tokenizer(ENGLISH, 300), train_tokenizer(GERMAN, 340)
    ids = overlap(source, target).missing
    flat, offsets = spell(source, target, ids)
    assert len(offsets) == len(ids) + 1 and offsets[-1] == len(flat)
    for k, i in enumerate(ids):
        assert "".join(source.convert_ids_to_tokens(flat[offsets[k]:offsets[k + 1]])) == target.convert_ids_to_tokens(i)
    wp = wordpiece(["gar", "##ten", "den"])
    g = train_tokenizer(GERMAN, 200, "unigram")
    flat, offsets = spell(wp, g, [g.convert_tokens_to_ids("▁garten"), 0])
    assert wp.convert_ids_to_tokens(flat) == ["gar", "##ten"] and offsets == [0, 2, 2]

@pytest.mark.parametrize("call,words", [
    (lambda p: train_tokenizer([], 400), "no text"), (lambda p: train_tokenizer(["  ", ""], 400), "no text"),
    (lambda p: train_tokenizer(GERMAN, 100), "too small"), (lambda p: train_tokenizer(GERMAN, 400, "bp"), "did you mean 'bpe'"),
    (lambda p: load_tokenizer(p), "holds no tokenizer"), (lambda p: load_tokenizer(p/"nowhere"), "not a folder"),
])
def test_refusals(call, words, tmp_path):
    with pytest.raises(Refusal, match=words) as e: call(tmp_path)
    assert "\n" not in str(e.value)

def test_broken_tokenizer_file_is_refused(tmp_path):
    train_tokenizer(GERMAN, 340).save_pretrained(tmp_path)
    (tmp_path/"tokenizer.json").write_text((tmp_path/"tokenizer.json").read_text()[:500])
    with pytest.raises(Refusal, match="not readable JSON"): load_tokenizer(tmp_path)

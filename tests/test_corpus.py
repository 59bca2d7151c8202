"""Corpora: strings, files of every kind, the hub's layout, packing against a plain reference, an order without a state."""
import gzip, json
import numpy as np
import pandas as pd
import pytest
from transformers import ByT5Tokenizer
from seqwarm.core.corpus import Corpus, Tokens, documents, pack, parse, tokenize
from seqwarm.core.errors import Refusal
from seqwarm.core.vocab import train_tokenizer

LINES = [f"the {i}th line has {i * i} letters and {i % 7} words" for i in range(400)]

@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("SEQWARM_CACHE", str(tmp_path/"cache"))

@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer(LINES, 320)

def write(folder, kind: str) -> str:
    path = folder/f"text.{kind}"
    if kind == "txt": path.write_text("\n".join(LINES))
    elif kind == "txt.gz": path.write_bytes(gzip.compress("\n".join(LINES).encode()))
    elif kind == "jsonl": path.write_text("\n".join(json.dumps({"text": l}) for l in LINES))
    elif kind == "jsonl.gz": path.write_bytes(gzip.compress("\n".join(json.dumps({"text": l}) for l in LINES).encode()))
    else: pd.DataFrame({"text": LINES}).to_parquet(path)
    return str(path)

@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_file_reads_alike(tmp_path, kind):
    source = parse(f"text:{write(tmp_path, kind)}")[0]
    assert list(documents(source, "all")) == LINES
    train, valid = list(documents(source, "train")), list(documents(source, "valid"))
    assert valid and sorted(train + valid) == sorted(LINES) and not set(train) & set(valid)

def test_hub_layout_is_streamed(tmp_path):
    for config in ("en", "de"):
        (tmp_path/"set"/config).mkdir(parents=True)
        pd.DataFrame({"body": [f"{config} {l}" for l in LINES]}).to_parquet(tmp_path/"set"/config/"train-00000-of-00001.parquet")
    (tmp_path/"set"/"README.md").write_text("---\nconfigs:\n- config_name: en\n  data_files: en/*.parquet\n- config_name: de\n  data_files: de/*.parquet\n---\n")
    source = parse(f"hub:{tmp_path}/set?config=de&split=train&column=body&documents=10")[0]
    assert list(documents(source, "all")) == [f"de {l}" for l in LINES[:10]]

def test_packing_against_a_plain_loop():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 60); starts = np.r_[0, np.cumsum(lengths)[:-1]]; ids = rng.integers(0, 99, lengths.sum()).astype(np.uint16)
    S = 7; which = rng.permutation(len(ids) // S)
    got = pack(Tokens(ids, starts, 1, ""), which, S)
    for row, k in enumerate(which):
        segment, position = 0, 0
        for s in range(S):
            if s and k * S + s in starts: segment, position = segment + 1, 0
            assert (got[0][row, s], got[1][row, s], got[2][row, s]) == (ids[k * S + s], segment, position)
            position += 1

def test_an_epoch_holds_each_sequence_once_and_the_order_has_no_state(tmp_path, tokenizer):
    corpus = Corpus(f"text:{write(tmp_path, 'txt')}", tokenizer, 16, seed=3)
    n = len(corpus)
    rows = lambda c, *span: [tuple(r) for r in c.sample(np.arange(*span)).ids.tolist()]
    first, second = rows(corpus, 0, n), rows(corpus, n, 2 * n)
    assert sorted(first) == sorted(second) == sorted(tuple(r) for r in np.asarray(corpus.parts[0].ids[:n * 16]).reshape(n, 16).tolist()) and first != second
    again = Corpus(f"text:{tmp_path}/text.txt", tokenizer, 16, seed=3)
    assert rows(again, n - 5, n + 5) == (first + second)[n - 5:n + 5]
    assert rows(Corpus(f"text:{tmp_path}/text.txt", tokenizer, 16, seed=4), 0, n) != first

def test_mixture_by_weight_and_by_size(tmp_path, tokenizer):
    a = write(tmp_path, "txt"); (tmp_path/"few.txt").write_text("\n".join(LINES[:80]))
    parts = lambda spec, **kw: (c := Corpus(spec, tokenizer, 16, **kw)).counts / len(c)
    assert abs(parts(f"text:{a}?weight=0.3 + text:{tmp_path}/few.txt?weight=0.7")[1] - 0.7) < 0.01
    sizes = Corpus(f"text:{a} + text:{tmp_path}/few.txt", tokenizer, 16).sizes
    assert np.allclose(parts(f"text:{a} + text:{tmp_path}/few.txt", alpha=0.5), sizes**0.5 / (sizes**0.5).sum(), atol=0.01)

def test_tokens_are_the_tokenizer_s_and_cached(tmp_path, tokenizer, monkeypatch):
    source = parse(f"text:{write(tmp_path, 'txt')}")[0]
    tokens = tokenize(source, tokenizer, "all")
    expected = [i for l in LINES for i in [tokenizer.bos_token_id, *tokenizer(l, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    assert tokens.ids.tolist() == expected and tokens.words == sum(len(l.split()) for l in LINES) and len(tokens.starts) == len(LINES)
    monkeypatch.setattr("seqwarm.core.corpus.documents", lambda *_: pytest.fail("read again"))
    assert tokenize(source, tokenizer, "all").fingerprint == tokens.fingerprint

def refused(spec: str) -> str:
    with pytest.raises(Refusal) as e:
        for s in parse(spec): next(documents(s))
    assert "\n" not in str(e.value)
    return str(e.value)

def test_bad_corpora_are_refused_in_one_line(tmp_path):
    (tmp_path/"empty.txt").touch(); (tmp_path/"broken.jsonl").write_text('{"text": '); (tmp_path/"broken.parquet").write_text("PAR?")
    (tmp_path/"false.txt.gz").write_text("not zipped"); (tmp_path/"numbers.jsonl").write_text('{"text": 3}\n'); (tmp_path/"other.doc").write_text("x")
    assert "no text" in refused(f"text:{tmp_path}/empty.txt")
    for name in ("broken.jsonl", "broken.parquet", "false.txt.gz"): assert "can't be read" in refused(f"text:{tmp_path}/{name}")
    assert "not text" in refused(f"text:{tmp_path}/numbers.jsonl")
    assert "ends in .doc" in refused(f"text:{tmp_path}/other.doc")
    assert "no file" in refused(f"text:{tmp_path}/nowhere*.txt")
    assert "did you mean 'text'" in refused(f"text:{write(tmp_path, 'jsonl')}?column=txt")
    assert "did you mean 'world:'" in refused("wordl:a")
    assert "language" in refused("world:z") and "no such number" in refused("world:a?words=-3") and "no such number" in refused("world:a?words=many")

def test_a_name_is_neither_a_tokenizer_nor_a_source(tmp_path):
    for wrong in ("gpt2", None, ByT5Tokenizer()):
        with pytest.raises(Refusal, match=f"a {type(wrong).__name__} cannot cut a corpus; load"): Corpus(f"text:{write(tmp_path, 'txt')}", wrong, 16)
    with pytest.raises(Refusal, match="is no source of documents; give one that `parse`"): list(documents(f"text:{tmp_path}/text.txt"))
    assert not (tmp_path/"cache").exists()

def test_a_corpus_too_short_is_refused(tmp_path, tokenizer):
    (tmp_path/"short.txt").write_text("one line\n")
    with pytest.raises(Refusal, match="shorter than one sequence"): Corpus(f"text:{tmp_path}/short.txt", tokenizer, 512)
    with pytest.raises(Refusal, match="weight"): Corpus(f"text:{write(tmp_path, 'txt')}?weight=1 + text:{tmp_path}/text.txt", tokenizer, 16)

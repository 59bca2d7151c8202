"""Labelled data: strings, files, the toy world; spans against a reading of another kind; bad input in one line."""
import gzip, json, os, re
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from seqwarm.core.errors import Refusal
from seqwarm.core.examples import examples, spans
from seqwarm.core.world import World

DATA = Path(os.environ.get("SEQWARM_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"))
ROWS = [{"tokens": f"play song {i} on radio {i % 7}".split(), "slots": ["O", "B-song", "I-song", "O", "B-service", "I-service"], "intent": f"Play{i % 3}",
         "en": f"song {i}", "de": f"Lied {i}"} for i in range(40)]

def write(folder, kind: str = "jsonl", rows=ROWS) -> str:
    path, text = folder/f"rows.{kind}", "\n".join(json.dumps(r) for r in rows)
    if kind == "jsonl": path.write_text(text)
    elif kind == "jsonl.gz": path.write_bytes(gzip.compress(text.encode()))
    else: pd.DataFrame(rows).to_parquet(path)
    return str(path)

@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_every_form_reads_every_kind_of_file(tmp_path, kind):
    path = write(tmp_path, kind)
    tags, labels = examples(f"tags:{path}?labels=slots"), examples(f"labels:{path}?text=tokens&label=intent")
    two, pairs, trees = examples(f"labels:{path}?text=en&pair=de&label=intent"), examples(f"pairs:{path}?src=en&tgt=de"), examples(f"parse:{path}?labels=slots&label=intent")
    assert [d.kind for d in (tags, labels, two, pairs, trees)] == ["tags", "labels", "labels", "texts", "texts"]
    assert tags.rows[3] == {"tokens": ROWS[3]["tokens"], "labels": ROWS[3]["slots"]} and tags.bio and len(tags) == 40
    assert tags.labels == ["B-service", "B-song", "I-service", "I-song", "O"] and labels.labels == ["Play0", "Play1", "Play2"] and not pairs.labels
    assert labels.rows[3] == {"text": "play song 3 on radio 3", "label": "Play0"} and two.rows[3] == {"text": "song 3", "pair": "Lied 3", "label": "Play0"}
    assert pairs.rows[3] == {"text": "song 3", "target": "Lied 3"}
    assert trees.rows[3] == {"text": "play song 3 on radio 3", "target": "( Play0 ( song song 3 ) ( service radio 3 ) )"}

def test_a_subset_is_drawn_nested_and_the_same_each_time(tmp_path):
    path = write(tmp_path)
    texts = lambda n: [r["text"] for r in examples(f"pairs:{path}?src=en&tgt=de&n={n}").rows]
    few, more, all_ = texts(5), texts(20), texts(400)
    assert len(few) == 5 and set(few) < set(more) < set(all_) and len(all_) == 40
    assert few != all_[:5] and more == [t for t in all_ if t in more]        # not the first ones, but in their order

def test_a_file_that_changed_is_read_again(tmp_path):
    path = write(tmp_path); before = examples(f"pairs:{path}?src=en&tgt=de")
    assert examples(f"pairs:{path}?src=en&tgt=de") is before
    write(tmp_path, rows=ROWS[:7]); after = examples(f"pairs:{path}?src=en&tgt=de")
    assert len(after) == 7 and after.fingerprint != before.fingerprint
    assert examples(f"pairs:{path}?src=de&tgt=en").fingerprint != after.fingerprint

def by_pattern(tags: list[str]) -> set:
    "Spans read from the tags as one string."
    out, text = set(), " ".join(tags) + " "
    for kind in {t[2:] for t in tags if t != "O"}:
        for m in re.finditer(rf"(?:(?:B-{kind} )|(?<![BI]-{kind} )(?:I-{kind} ))(?:I-{kind} )*", text):
            first = text[:m.start()].count(" "); out.add((kind, first, first + m[0].count(" ")))
    return out

def test_spans_against_a_pattern_and_against_seqeval():
    rng = np.random.default_rng(0)
    for _ in range(500):
        tags = [str(t) for t in rng.choice(["O", "B-x", "I-x", "B-y", "I-y"], rng.integers(1, 9))]
        assert set(spans(tags)) == by_pattern(tags), tags
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling", reason="seqeval is NOT installed, spans are not compared with it").get_entities
    for _ in range(2000):
        tags = [str(t) for t in rng.choice(["O", "B-x", "I-x", "B-y", "I-y"], rng.integers(1, 9))]
        assert spans(tags) == [(kind, a, b + 1) for kind, a, b in get_entities(tags)], tags

def test_the_toy_world_gives_what_it_is_asked_for():
    world = World()
    assert examples("world:b?task=pos&n=30").rows == world.labelled("b", "pos", n=30)
    assert examples("world:b?task=entities&split=valid&n=30").rows == world.labelled("b", "entities", "valid", 30)
    one = world.labelled("c", "entailment", n=1)[0]
    assert examples("world:c?task=entailment&n=5").rows[0] == {"text": one["premise"], "pair": one["hypothesis"], "label": one["label"]}
    one = world.labelled("a", "parse", n=1)[0]
    assert examples("world:a?task=parse&n=5").rows[0] == {"text": one["text"], "target": one["label"]}
    one = world.parallel("a", "c", n=1)[0]
    assert examples("world:a?task=translation&to=c&n=5").rows[0] == {"text": one["a"], "target": one["c"]}
    assert examples("world:a?task=topic&n=5&seed=3").rows == World(seed=3).labelled("a", "topic", n=5) != world.labelled("a", "topic", n=5)
    assert (len(examples("world:a?task=pos")), len(examples("world:a?task=pos&split=test"))) == (2000, 500)
    both = examples("world:a?task=pos&n=3 + world:b?task=pos&n=2")
    assert len(both) == 5 and both.rows[3:] == world.labelled("b", "pos", n=2)
    valid, test = ([tuple(r["tokens"]) for r in examples(f"world:a?task=pos&split={s}").rows] for s in ("valid", "test"))
    assert valid != test and len(set(valid) & set(test)) < 0.2 * 500

def refused(spec: str) -> str:
    with pytest.raises(Refusal) as e: examples(spec)
    assert "\n" not in str(e.value)
    return str(e.value)

def test_bad_input_is_refused_in_one_line(tmp_path):
    path = write(tmp_path); (tmp_path/"bad").mkdir()
    assert "did you mean 'slots'" in refused(f"tags:{path}?labels=slotz") and "there are: labels:" in refused(f"tag:{path}")
    assert "no corpus" in refused(path) and "did you mean 'labels'" in refused(f"tags:{path}?label=slots") and "no file" in refused("tags:nowhere.jsonl")
    assert "lists of words" in refused(f"tags:{path}?labels=intent") and "no such number" in refused(f"tags:{path}?labels=slots&n=0")
    assert "1 words and 2 labels" in refused(f"tags:{write(tmp_path/'bad', rows=[dict(words=['a'], labels=['x', 'y'])])}?tokens=words")
    assert "holds no example" in refused(f"tags:{write(tmp_path/'bad', rows=[dict(tokens=[], labels=[])])}")
    assert "holds int, not text" in refused(f"labels:{write(tmp_path/'bad', rows=[dict(text='a', label=3)])}")
    assert "one kind" in refused(f"tags:{path}?labels=slots + pairs:{path}?src=en&tgt=de")
    assert "to=LANGUAGE" in refused("world:a?task=translation") and "to=LANGUAGE" in refused("world:a?task=pos&to=b") and "language" in refused("world:z?task=pos")
    assert "did you mean 'entities'" in refused("world:a?task=entites") and "there is no task" in refused("world:a") and "split" in refused("world:a?task=pos&split=tset")
    (tmp_path/"bad"/"cut.jsonl").write_text('{"tokens": ["a"')
    assert "can't be read" in refused(f"tags:{tmp_path}/bad/cut.jsonl")

@pytest.mark.skipif(not DATA.exists(), reason=f"REAL DATA IS MISSING: {DATA}")
def test_real_data():
    slots = examples(f"tags:{DATA}/snips/test.jsonl.gz?labels=slots"); trees = examples(f"parse:{DATA}/snips/test.jsonl.gz?labels=slots&label=intent")
    assert len(slots) == 700 and slots.bio and len(examples(f"labels:{DATA}/snips/test.jsonl.gz?text=tokens&label=intent").labels) == 7
    for row, tree in zip(slots.rows, trees.rows): assert tree["target"].count("(") == 1 + len(spans(row["labels"])) + " ".join(row["tokens"]).count("(")
    english, german = (examples(f"tags:{DATA}/ud/{x}.test.jsonl.gz?labels=upos") for x in ("en_ewt", "de_gsd"))
    assert not english.bio and set(german.labels) <= set(english.labels) and len(english) > 2000
    assert len(examples(f"pairs:{DATA}/multi30k/parallel.test.en-de.jsonl.gz?src=en&tgt=de")) == 1000

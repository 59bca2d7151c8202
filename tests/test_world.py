"The toy world: the same bytes everywhere, probabilities that add up, splits that do not touch."
import hashlib, math, os, subprocess, sys
from collections import Counter
from fractions import Fraction
from itertools import islice
import pytest
from seqwarm.core.errors import Refusal
from seqwarm.core.grammar import _KINDS
from seqwarm.core.language import Dice, parse
from seqwarm.core.world import World

LANGS = ("a", "b", "c")
PINNED = {"a": "c8cbf499619cae15", "b": "2a419616729fd0aa", "c": "8f8920bf45534d4b"}

@pytest.fixture(scope="module")
def world(): return World()

def digest(world, lang, size=100): return hashlib.sha256("\n".join(islice(world.documents(lang), size)).encode()).hexdigest()[:16]
def sentences(text): return [s.split(" ") for s in text.removesuffix(" .").split(" . ")]
def read(world, lang, words): return parse(world.lexicons[lang], words, world.roles)
def core(frame): return frame[0], frame[2], tuple(p and p[0] for p in frame[3])
def cores(world, lang, text): return {core(read(world, lang, s)[1]) for s in sentences(text)}

@pytest.mark.parametrize("lang", LANGS)
def test_bytes_are_pinned(world, lang): assert digest(world, lang) == PINNED[lang]

def test_bytes_do_not_depend_on_the_process(world):
    code = "import hashlib; from itertools import islice; from seqwarm.core.world import World\n" \
           "print(hashlib.sha256('\\n'.join(islice(World().documents('b'), 100)).encode()).hexdigest()[:16])"
    for hashseed in ("1", "77"):
        out = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": hashseed}, capture_output=True, text=True)
        assert out.stdout.strip() == digest(world, "b"), out.stderr

def test_documents_start_anywhere_and_end_where_asked(world):
    ten = list(islice(world.documents("c"), 10))
    assert list(islice(world.documents("c", start=4), 6)) == ten[4:] and len(set(ten)) == 10
    some = list(world.documents("a", words=1000))
    assert sum(len(d.split(" ")) for d in some[:-1]) < 1000 <= sum(len(d.split(" ")) for d in some)
    assert next(World(seed=1).documents("a")) != next(world.documents("a"))

class Traced(Dice):
    "Dice that note the exact probability of each choice."
    __slots__ = ("odds",)
    def pick(self, table):
        item = super().pick(table)
        i = table.items.index(item)
        self.odds.append(Fraction(table.ends[i] - (table.ends[i - 1] if i else 0), table.ends[-1]))
        return item

def exact(world, lang, text):
    "The probability as a rational number, straight from the tables' running totals: an independent road to logp."
    def odds(table, item):
        i = table.items.index(item)
        return Fraction(table.ends[i] - (table.ends[i - 1] if i else 0), table.ends[-1])
    frames = [read(world, lang, s) for s in sentences(text)]
    total, (tense, _) = Fraction(0), frames[0]
    for topic in world.topic.items:
        p = odds(world.topic, topic) * odds(world.tenses, tense) * odds(world.lengths, len(frames))
        for _, (verb, denied, adjective, parts) in frames:
            kind = world.kind[verb]
            p *= odds(world.kinds, kind) * odds(world.verbs[kind, topic], verb) * odds(world.nots, denied)
            if kind == "be": p *= odds(world.adjectives[world.cls[parts[0][0]]], adjective)
            for pool, part in zip((_KINDS[kind][2], _KINDS[kind][3], _KINDS[kind][5]), parts):
                if part is None: continue
                noun, number, det, extra = part
                p *= odds(world.nouns[pool, topic], noun)
                if world.cls[noun] == "name":
                    p *= odds(world.surname, int(extra >= 0)) * (odds(world.surnames, extra) if extra >= 0 else 1)
                elif world.cls[noun] != "town":
                    p *= odds(world.shapes, (number, min(det, 2), int(extra >= 0)))
                    p *= odds(world.numerals, det) if det > 1 else 1
                    p *= odds(world.adjectives[world.cls[noun]], extra) if extra >= 0 else 1
        total += p
    return math.log2(total.numerator) - math.log2(total.denominator)

@pytest.mark.parametrize("lang", LANGS)
def test_logp_is_the_exact_rational(world, lang):
    for text in islice(world.documents(lang, "all"), 12): assert world.logp(text, lang) == pytest.approx(exact(world, lang, text), abs=1e-7)

def test_logp_agrees_with_the_choices_made(world):
    for i in range(1000):
        lang, dice = LANGS[i % 3], Traced("traced", i)
        dice.odds = []
        topic, tense, frames = world.document(dice, "all")
        chosen = sum(math.log2(p) for p in dice.odds)  # with the topic that was drawn
        bits = [world.frame_bits(f) for f in frames]
        joint = world.topic.bits[topic] + world.tenses.bits[tense] + world.lengths.bits[len(frames)] + sum(c + t[topic] for c, t in bits)
        assert chosen == pytest.approx(joint, abs=1e-7)
        text = " ".join(w for f in frames for w in world.say(lang, f, tense))
        assert chosen - 1e-7 <= world.logp(text, lang) <= 0
        assert [read(world, lang, s) for s in sentences(text)] == [(tense, f) for f in frames]

@pytest.mark.parametrize("kind", ["live", "be", "grow", "drive"])
def test_sentences_of_a_kind_add_up(world, kind):
    "Noun phrases held at one form: the sum over cores is p(kind) times the probability of those forms."
    verbs, (_, _, s, o, _, x) = world.of[kind], _KINDS[kind]
    nouns = [[n for c in pool.split() for n in world.of[c]] or [None] for pool in (s, o, x)]
    plain = lambda n: n if n is None else (n, 0, 0 if world.cls[n] in ("name", "town") else 1, -1)
    total = [0.] * world.topics
    for subject in nouns[0]:
        for object in nouns[1]:
            for goal in nouns[2]:
                parts = tuple(plain(n) for n in (subject, object, goal))
                form = sum(world.phrase_bits(p) for p in parts if p) + world.nots.bits[0]
                for verb in verbs:
                    for adjective in world.adjectives[world.cls[subject]].items if kind == "be" else (-1,):
                        common, topics = world.frame_bits((verb, 0, adjective, parts))
                        total = [a + 2 ** (common + t - form) for a, t in zip(total, topics)]
    assert total == pytest.approx([2 ** world.kinds.bits[kind]] * world.topics, rel=1e-9)

def test_frequencies_are_the_probabilities(world):
    "Verbs of 2,000 first sentences, read from the text, against the sum over topics: chi-square a degree of freedom near 1."
    n = 2000
    p = {v: 2 ** world.kinds.bits[k] * sum(2 ** world.verbs[k, t].bits[v] for t in range(world.topics)) / world.topics
         for v, k in world.kind.items()}
    assert sum(p.values()) == pytest.approx(1)
    seen = Counter(read(world, "a", sentences(text)[0])[1][0] for text in islice(world.documents("a", "all"), n))
    chi = sum((seen[v] - n * x) ** 2 / (n * x) for v, x in p.items())
    free = len(p) - 1
    assert abs(chi - free) < 4 * (2 * free) ** 0.5

def test_splits_are_disjoint_by_frame(world):
    held, shown = set(), set()
    for lang in LANGS:
        for split, into in (("train", shown), ("valid", held)):
            for text in islice(world.documents(lang, split), 400): into |= cores(world, lang, text)
            for task in ("topic", "parse", "entailment"):
                for e in world.labelled(lang, task, split, 60):
                    for key in {"text", "premise", "hypothesis"} & e.keys(): into |= cores(world, lang, e[key])
            for e in world.labelled(lang, "pos", split, 60): into |= cores(world, lang, " ".join(e["tokens"]))
    for split, into in (("train", shown), ("valid", held)):
        for e in world.parallel("a", "c", split, 200): into |= cores(world, "a", e["a"]) | cores(world, "c", e["c"])
    assert len(held) > 3000 and len(shown) > 3000 and not held & shown

def test_sizes_and_shared_words(world):
    large = World("large", 3)
    assert 550 <= len(world.concepts) <= 650 and 4700 <= len(large.concepts) <= 5300
    assert large.logp(next(large.documents("b")), "b") > -math.inf
    for w in (world, large):  # of all forms; a text shows the common ones, and of a large vocabulary never the same
        words = {x: w.lexicons[x].reading.keys() for x in LANGS}
        assert 1 / 3 < len(words["a"] & words["b"]) / len(words["b"]) < 1 / 2 and len(words["a"] & words["c"]) / len(words["c"]) < 0.05
    words = {x: set(" ".join(world.documents(x, words=120_000)).split(" ")) for x in LANGS}
    share = lambda x, y: len(words[x] & words[y]) / len(words[y])
    assert 1 / 3 < share("a", "b") < 1 / 2 and share("a", "c") < 0.05
    assert all(t == "." or t.isdigit() or (t.isascii() and t[0].isupper()) for t in words["a"] & words["c"])

def test_every_seed_is_a_world():
    for seed in (1, 2, 3, -5, 2**70):
        w = World(seed=seed)
        assert all(w.logp(next(w.documents(x)), x) > -math.inf for x in LANGS)

@pytest.mark.parametrize("lang", LANGS)
def test_what_is_not_of_the_language_has_no_probability(world, lang):
    for text in islice(world.documents(lang), 30):
        words = text.split(" ")
        assert world.logp(text, lang) > -math.inf
        swapped = " ".join([words[1], words[0], *words[2:]])
        for wrong in (swapped, text + " .", text[:-2], text + " ", " " + text, text.replace(" ", "  ", 1), "", ".", "zzz .",
                          " ".join([words[0], *words])):
            assert world.logp(wrong, lang) == -math.inf, wrong
        assert all(world.logp(text, other) == -math.inf for other in LANGS if other != lang)

def test_the_floor_is_what_it_says(world):
    texts = list(islice(world.documents("b", "valid"), 20))
    by_hand = -sum(world.logp(t, "b") for t in texts) / len(" ".join(texts).split())
    assert world.floor("b", texts) == world.floor("b", 20) == pytest.approx(by_hand)
    assert world.floor("b", iter(texts)) == world.floor("b", texts) and 3 < by_hand < 4.5
    assert abs(world.floor("a", 400) - world.floor("a", 400, split="train")) < 0.2

def test_labels(world):
    for lang in LANGS:
        for e in world.labelled(lang, "pos", n=100):
            assert len(e["tokens"]) == len(e["labels"]) and e["labels"][-1] == "PUNCT"
            assert sum(t in ("VERB", "AUX") for t in e["labels"]) == 1
        for e in world.labelled(lang, "entities", n=200):
            for before, t, word in zip(["", *e["labels"]], e["labels"], e["tokens"]):
                assert t != "I-PER" or before == "B-PER"
                assert (t != "O") == (word.isascii() and word[0].isupper())
        assert len({e["label"] for e in world.labelled(lang, "topic", n=200)}) == world.topics
        said = world.labelled(lang, "parse", n=300)
        assert len({e["text"] for e in said}) == len({e["label"] for e in said})
    assert world.labelled("a", "pos", n=5)[3:] == world.labelled("a", "pos", n=2, start=3)

def test_entailment_is_told_by_the_frames(world):
    seen = Counter()
    for e in world.labelled("a", "entailment", n=600):
        (_, f), (_, h) = (read(world, "a", sentences(e[x])[0]) for x in ("premise", "hypothesis"))
        same = core(f) == core(h)
        expected = "neutral" if not same else "entailment" if f[1] == h[1] else "contradiction"
        assert e["label"] == expected and e["premise"] != e["hypothesis"]
        seen[e["label"], f[1] == h[1]] += 1
    assert min(seen["neutral", True], seen["neutral", False], seen["entailment", True], seen["contradiction", False]) > 60

def test_parallel_sentences_say_the_same(world):
    for e in world.parallel("a", "b", n=200): assert read(world, "a", sentences(e["a"])[0]) == read(world, "b", sentences(e["b"])[0])

def test_agreement_in_a(world):
    "Article, adjective and noun of a phrase end alike, verbs follow the number of their subject."
    checked = 0
    for e in world.labelled("a", "pos", n=300):
        for (w1, t1), (w2, t2) in zip(zip(e["tokens"], e["labels"]), list(zip(e["tokens"], e["labels"]))[1:]):
            if t1 in ("DET", "ADJ") and t2 in ("ADJ", "NOUN"):
                ending = lambda w: w[len(w.rstrip("nl").rstrip("i")) - 1:]
                assert ending(w1) == ending(w2); checked += 1
    assert checked > 200

@pytest.mark.parametrize("wrong, says", [
    (lambda: World("larg"), "large"), (lambda: World(seed="x"), "integer"), (lambda: World().documents("d"), "no language"),
    (lambda: World().documents("a", "vaild"), "valid"), (lambda: World().labelled("a", "entity"), "entities"),
    (lambda: World().floor("a", []), "document")])
def test_refusals(wrong, says):
    with pytest.raises(Refusal, match=says): wrong()

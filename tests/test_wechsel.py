"WECHSEL on the toy world: gensim's vectors against chance and against plain loops, and files that are not what they say."
import json
from collections import defaultdict
from pathlib import Path
import numpy as np, pytest, torch
from gensim.models import KeyedVectors, Word2Vec
from scipy.linalg import orthogonal_procrustes
from transformers import GPT2Config, GPT2LMHeadModel
from seqwarm.batch.cli import main
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.world import World
from seqwarm.core.write import build, save
from seqwarm.methods import wechsel as module
from seqwarm.methods.clp import clp
from seqwarm.methods.wechsel import wechsel

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Folder with vectors of a and b, a dictionary of every second concept, the pairs it lacks, and two tokenizers."
    home, world, tokenizers = tmp_path_factory.mktemp("words"), World(), []
    for lang in "ab":
        texts = list(world.documents(lang, words=80_000))
        Word2Vec([t.split() for t in texts], vector_size=48, window=4, min_count=3, epochs=8, workers=1, seed=1, sg=1).wv.save_word2vec_format(home/f"{lang}.vec")
        tokenizers.append(train_tokenizer(texts[:1500], 1500))
    forms = [world.lexicons[lang].forms for lang in "ab"]
    pairs = [[(x, y) for x, y in zip(forms[0][c], forms[1][c]) if x != y] for c in forms[0] if c in forms[1]]   # names are the same in both
    (home/"pairs.txt").write_text("".join(f"{x}\t{y}\n" for concept in pairs[::2] for x, y in concept))
    return home, [p for concept in pairs[1::2] for p in concept], tokenizers

def files(home): return (home/"a.vec", home/"b.vec"), home/"pairs.txt"

def token(tok, word):
    "The id of a word that is one token behind a blank, or None."
    ids = tok(" " + word, add_special_tokens=False).input_ids
    return ids[0] if len(ids) == 1 else None

def test_neighbours_beat_chance_on_words_that_the_dictionary_lacks(world):
    home, unseen, (ta, tb) = world
    asked = {t: s for x, y in unseen if (s := token(ta, x)) is not None and (t := token(tb, y)) is not None and s > 300 and t > 300}
    assert len(asked) > 60
    found = wechsel((ta, tb), *files(home), len(ta), torch.tensor(sorted(asked)), top_k=10)
    at = found["offsets"].tolist()
    hits = [asked[t] in found["flat"][a:b].tolist() for t, a, b in zip(sorted(asked), at, at[1:])]
    chance = 10/len(set(found["flat"].tolist()))   # among those that were ever answered: a high estimate of chance
    assert np.mean(hits) > 5*chance and np.mean(hits) > 0.4, (np.mean(hits), chance)

def slow(home, tokenizers, missing, top_k, temperature):
    "token -> {source id: weight}, by loops over what gensim reads; None where two tokens vie for the last place."
    (va, vb), dictionary = files(home)
    a, b = KeyedVectors.load_word2vec_format(va), KeyedVectors.load_word2vec_format(vb)
    pairs = [line.split("\t") for line in dictionary.read_text().splitlines()]
    pairs = [(a.get_vector(x, norm=True), b.get_vector(y, norm=True)) for x, y in pairs if x in a and y in b]
    Q = orthogonal_procrustes(*(np.stack(side).astype(float) for side in zip(*pairs)))[0]
    spaces = []
    for kv, tok, turn in ((a, tokenizers[0], Q), (b, tokenizers[1], np.eye(48))):
        u = defaultdict(lambda: np.zeros(48))
        for rank, word in enumerate(kv.index_to_key, 1):
            for form in (word, " " + word):
                for i in tok.encode(form, add_special_tokens=False): u[i] += kv.get_vector(word, norm=True).astype(float) @ turn/rank
        spaces.append({i: x/np.linalg.norm(x) for i, x in u.items() if i not in tok.all_special_ids})
    out = {}
    for t in missing:
        if t not in spaces[1]: out[t] = {}; continue
        cos = sorted(((spaces[1][t] @ x, s) for s, x in spaces[0].items()), reverse=True)[:top_k + 1]
        if cos[-2][0] - cos.pop()[0] < 1e-5: out[t] = None; continue   # pieces of one word only have one vector
        e = np.exp(np.array([c for c, _ in cos])/temperature)
        out[t] = {s: w for (_, s), w in zip(cos, e/e.sum())}
    return out

@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    home, tokenizers = tmp_path_factory.mktemp("models"), world[2]
    torch.manual_seed(3)
    for name, tok in zip(("source", "helper"), tokenizers):
        config = GPT2Config(vocab_size=len(tok), n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1, tie_word_embeddings=name == "helper")
        save(GPT2LMHeadModel(config), tok, home/name, Card(name, "scratch"))
    return {name: Checkpoint(home/name) for name in ("source", "helper")}

def test_rows_are_weighted_means_of_the_neighbours_rows(world, models):
    vectors, dictionary = files(world[0])
    plan = clp(**models, method="wechsel", vectors=vectors, dictionary=dictionary, top_k=4, temperature=0.2)
    new = torch.nonzero(plan.arrays["origin"] == -1)[:, 0].tolist()
    want, model, anchors = slow(world[0], world[2], new, 4, 0.2), build(plan, models), plan.arrays["anchors"]
    for name, table in (("transformer.wte.weight", model.transformer.wte.weight), ("lm_head.weight", model.lm_head.weight)):
        S = models["source"].read(name).double().numpy()
        mean = S[plan.arrays["origin"][anchors].numpy()].mean(0)
        for t in new:
            if want[t] is not None: assert np.allclose(table[t].detach().numpy(), sum(w*S[s] for s, w in want[t].items()) if want[t] else mean, atol=1e-5)
    assert 0 < sum(want[t] == {} for t in new) < len(new)/2 and sum(want[t] is None for t in new) < len(new)/4   # all kinds are met

def test_blocks_and_repeated_words_change_nothing(world, monkeypatch, tmp_path):
    home, _, tokenizers = world
    some = torch.arange(300, 900)
    plain = wechsel(tokenizers, *files(home), 1500, some)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert all(torch.allclose(x.double(), plain[k].double()) for k, x in wechsel(tokenizers, *files(home), 1500, some).items())
    text = (home/"pairs.txt").read_text()
    (tmp_path/"twice.txt").write_bytes(("\r\n\r\n" + text.replace("\t", "  ").replace("\n", " \r\n")).encode())   # of another system
    again = wechsel(tokenizers, (home/"a.vec", home/"b.vec"), tmp_path/"twice.txt", 1500, some)
    assert all(torch.allclose(x.double(), plain[k].double()) for k, x in again.items())

GOOD = b"3 2\nsol 1 0\nluna .6 .8\nvia 0 -1e0\n"

@pytest.mark.parametrize("content,says", [
    (b"", "line 1 of"), (b"\n", "line 1 of"), (b"sol 1 0\n", "line 1 of"), (b"3\nsol 1 0\n", "line 1 of"), (b"0 2\n", "line 1 of"), (b"-3 2\n", "line 1 of"),
    (b"900000000 300\nsol 1 0\n", "more than it can hold"), (b"\x1f\x8b\x08\x00junk", "line 1 of"),
    (GOOD.replace(b"3 2", b"4 2"), "ends behind line 4 and says that it holds 4"), (GOOD.replace(b"3 2", b"2 2"), "goes on behind line 3"),
    (GOOD.replace(b"3 2", b"3 1"), "line 2 of .* has 2 numbers and not 1"), (GOOD.replace(b".6 .8", b".6"), "line 3 of .* has 1 numbers and not 2"),
    (GOOD.replace(b".6 .8", b".6").replace(b"-1e0", b"-1 3"), "line 3 of .* has 1 numbers"),      # as many numbers in all
    (GOOD.replace(b".8", b"nan"), "line 3 of .* holds NaN or infinity"), (GOOD.replace(b".8", b"-inf"), "line 3 of .* holds NaN or infinity"),
    (GOOD.replace(b".8", b"1e99"), "line 3 of .* holds NaN or infinity"), (GOOD.replace(b".8", b"x"), "line 3 of .* holds what is no number"),
    (GOOD.replace(b"via", b"v\xeda"), "line 4 of .* is not UTF-8"), (GOOD.replace(b"via", b""), None), (GOOD.replace(b"0 -1e0", b"0  -1e0 "), None)])
def test_files_of_vectors(content, says, tmp_path):
    (tmp_path/"x.vec").write_bytes(content)
    if says is None: assert module._read_vectors(tmp_path/"x.vec")[1].tolist()[2] == [0, -1]; return
    with pytest.raises(Refusal, match=says) as e: module._read_vectors(tmp_path/"x.vec")
    assert "\n" not in str(e.value) and "; " in str(e.value)

@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_numbers_are_gensim_s(block, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block); (tmp_path/"x.vec").write_bytes(GOOD)
    words, x = module._read_vectors(tmp_path/"x.vec")
    kv = KeyedVectors.load_word2vec_format(tmp_path/"x.vec")
    assert words == kv.index_to_key and np.allclose(x, kv.get_normed_vectors()) and x.dtype == torch.float32

def test_dictionaries_and_the_command(world, models, tmp_path, capsys):
    home = world[0]
    swapped = "".join("\t".join(reversed(line.split("\t"))) + "\n" for line in (home/"pairs.txt").read_text().splitlines())
    narrow = tmp_path/"narrow.vec"; narrow.write_bytes(GOOD)
    wrong = {"swapped.txt": (swapped, "the source's word comes first"), "empty.txt": ("", "no pair of"), "strange.txt": ("ho\thum\n", "are its words spelt as"),
             "three.txt": ("\na\tb\na b c\n", "line 3 of the dictionary"), "half.txt": ("a\t\n", "line 1 of the dictionary"), "latin.txt": (b"a\tb\n\xe4\tb\n", "line 2 of the dictionary")}
    for name, (text, _) in wrong.items(): (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    base = ["clp", str(models["source"].path), str(models["helper"].path), str(tmp_path/"out"), "--method", "wechsel"]
    a, b, pairs = (str(home/n) for n in ("a.vec", "b.vec", "pairs.txt"))
    tries = [(["--source-vectors", a, "--helper-vectors", b, "--dictionary", str(tmp_path/n)], says) for n, (_, says) in wrong.items()] + [
        ([], "wechsel needs vectors"), (["--source-vectors", a, "--dictionary", pairs], "needs two files of word vectors"), (["--source-vectors", a, "--helper-vectors", b], "needs dictionary"),
        (["--source-vectors", a, "--helper-vectors", str(narrow), "--dictionary", pairs], "48 and 2 wide"),
        (["--source-vectors", a, "--helper-vectors", str(home/"no.vec"), "--dictionary", pairs], "No such file"),
        (["--source-vectors", str(home), "--helper-vectors", b, "--dictionary", pairs], "Is a directory"),
        (["--source-vectors", a, "--helper-vectors", b, "--dictionary", pairs, "--top-k", "0"], "top_k cannot be 0"),
        (["--source-vectors", a, "--helper-vectors", b, "--dictionary", pairs, "--ridge", "1"], "wechsel has no ridge; leave it out, or take a method that has one: lstsq")]
    before = sorted(tmp_path.rglob("*"))
    for words, says in tries:
        assert main([*base, *words]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1, err
    assert main([*base[:3], str(tmp_path/"out"), "--dictionary", pairs]) == 2 and "uses no word vectors" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert main([*base, "--source-vectors", a, "--helper-vectors", b, "--dictionary", pairs, "--top-k", "3"]) == 0
    facts = json.loads((tmp_path/"out"/"report.json").read_text())
    assert facts["method"] == "wechsel" and facts["options"] == {"top_k": 3, "temperature": 0.1} and Path(tmp_path/"out"/"model.safetensors").exists()

"""Probes: measures against hand and libraries, learning above the majority, sleep, transfer, generation, seeds, the store, refusals."""
import os, random
from collections import Counter
from pathlib import Path
import numpy as np
import pytest
import torch
from transformers import (BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, BertForSequenceClassification, EncoderDecoderConfig,
                          EncoderDecoderModel, GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM, T5Config, T5EncoderModel,
                          T5ForConditionalGeneration)
from seqwarm.core import heads, probes, write
from seqwarm.core.checkpoint import Card
from seqwarm.core.errors import Refusal
from seqwarm.core.examples import Examples, examples
from seqwarm.core.heads import coder, encode, with_head
from seqwarm.core.probes import Probe, probe, score
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.world import World

DATA = Path(os.environ.get("SEQWARM_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"))
IDS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
ENCODER = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64, pad_token_id=2,
               initializer_range=0.18)   # 32 ** -0.5: the usual 0.02 is for wide models, and a narrow one wakes up slowly from it
torch.set_num_threads(1)

@pytest.fixture(scope="module")
def tokenizer(): return train_tokenizer([t for lang in "abc" for t in World().documents(lang, words=3000)], 900)

def save(model, tokenizer, folder) -> str:
    write.save(model, tokenizer, folder, Card("tiny", "test"))
    return str(folder)

@pytest.fixture(scope="module")
def bert(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    return save(BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **ENCODER)), tokenizer, tmp_path_factory.mktemp("bert")/"model")

def bart_config(vocab: int) -> BartConfig:
    return BartConfig(vocab_size=vocab, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
                      decoder_ffn_dim=64, max_position_embeddings=64, decoder_start_token_id=1, forced_eos_token_id=None, dropout=0.0, init_std=0.18, **IDS)

POS = Probe("pos", "world:a?task=pos&n=600", {"a": "world:a?task=pos&split=test&n=200"}, steps=50)

def test_measures_by_hand():
    right, found = [["B-x", "I-x", "O"], ["B-y", "O"]], [["B-x", "O", "O"], ["B-y", "B-x"]]
    assert score("f1", found, right) == pytest.approx(200 / 5) and score("accuracy", found, right) == pytest.approx(60)     # one right of 3 found and 2 there
    assert score("f1", [["O"]], [["O"]]) == 0 and score("f1", right, right) == 100
    assert score("accuracy", ["x", "y", "y"], ["x", "y", "x"]) == pytest.approx(200 / 3) and score("exact", ["a b"], ["a  b"]) == 0
    assert score("bleu", ["a b c d e"], ["a b c d e"]) == pytest.approx(100) and score("bleu", ["x"], ["a b c d e"]) < 1
    # chrF2 of 'ab' against 'abc': character n-grams up to 6, words off; only orders 1 and 2 (and 3 of the reference) occur
    assert 0 < score("chrf", ["ab"], ["abc"]) < score("chrf", ["abc"], ["abc"]) == pytest.approx(100)
    for bad, says in [(("f2", [], []), "did you mean 'f1'"), (("exact", ["a"], []), "0 questions")]:
        with pytest.raises(Refusal, match=says): score(*bad)

def test_f1_is_seqeval_s_and_texts_are_sacrebleu_s():
    import sacrebleu
    found, right = ["the cat sat on a mat .", "two dogs run"], ["the cat sat on the mat .", "two dogs are running"]
    assert score("bleu", found, right) == sacrebleu.BLEU().corpus_score(found, [right]).score and score("chrf", found, right) == sacrebleu.CHRF().corpus_score(found, [right]).score
    metrics = pytest.importorskip("seqeval.metrics", reason="seqeval is NOT installed, F1 is not compared with it")
    rng = np.random.default_rng(0)
    for _ in range(50):
        right, found = ([[str(t) for t in rng.choice(["O", "B-x", "I-x", "B-y", "I-y"], 6)] for _ in range(5)] for _ in range(2))
        assert score("f1", found, right) == pytest.approx(100 * metrics.f1_score(right, found))

def test_words_find_their_pieces(tokenizer):
    data = examples("world:b?task=pos&n=50")
    coded = encode(data, coder(tokenizer, 64), {l: i for i, l in enumerate(data.labels)})
    for row, x, places in zip(data.rows, coded.inputs, coded.places):
        whole = tokenizer(" ".join(row["tokens"]))["input_ids"]                    # the sentence as a text, with no word marked
        assert x["input_ids"] == [0, *whole, 1] and [w for _, w in places] == list(range(len(row["tokens"])))
        for at, w in places: assert x["labels"][at] == data.labels.index(row["labels"][w]) and row["tokens"][w].startswith(tokenizer.decode([x["input_ids"][at]]).strip())
        assert sum(l != -100 for l in x["labels"]) == len(places)
    assert coded.cut == 0 and (few := encode(data, coder(tokenizer, 5), {})).cut == 50 and all(len(x["input_ids"]) == 5 for x in few.inputs)

def test_a_template_of_the_tokenizer_s_own_is_kept(tokenizer):
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    core = tokenizer.backend_tokenizer.__class__.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)])
    own = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")
    pair = Examples("", "labels", [{"text": "le", "pair": "lo", "label": "x"}])
    [x] = encode(pair, coder(own, 64), {"x": 0}, types=True).inputs
    assert x["input_ids"] == own("le", "lo")["input_ids"] and x["input_ids"][-1] == 1 and x["token_type_ids"][-1] == 1 and 0 not in x["input_ids"]
    [x] = encode(pair, coder(tokenizer, 64), {"x": 0}).inputs
    assert x["input_ids"] == [0, *tokenizer("le")["input_ids"], 1, *tokenizer("lo")["input_ids"], 1] and "token_type_ids" not in x

@pytest.fixture(scope="module")
def learned(bert, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    task = Probe("pos", POS.train, {lang: f"world:{lang}?task=pos&split=test&n=200" for lang in "ab"}, steps=50)
    return task, store, probe(bert, task, store)

def test_tagging_beats_the_majority_and_transfers_worse(learned):
    task, _, rows = learned
    words = Counter(l for r in examples(task.tests["a"]).rows for l in r["labels"])
    value = rows.set_index("test").value
    assert list(rows.metric) == ["accuracy", "accuracy"] and list(rows.n) == [200, 200] and list(rows.cut) == [0, 0]
    assert value["a"] > 100 * max(words.values()) / sum(words.values()) + 20 and value["a"] > value["b"]
    assert rows.lr[0] == pytest.approx(32 ** -1.5) and rows.steps[0] == 50 and rows.seconds[0] > 0

def test_flops_are_the_ledger_s(learned, bert):
    from seqwarm.core.layout import layout
    from seqwarm.core.ledger import flops
    task, _, rows = learned
    data = examples(task.train); model = with_head(bert, "tags", data.labels)
    lengths = [len(x["input_ids"]) for x in encode(data, coder(probes.load_tokenizer(bert), 64), {}).inputs]
    assert rows.flops[0] == 50 * 32 * flops(layout(model.config, "BertForTokenClassification"), round(np.mean(lengths)))

def test_the_store_finds_and_tells_apart(learned, bert, monkeypatch):
    task, store, rows = learned
    monkeypatch.setattr(probes, "_rows", lambda *_: pytest.fail("done again"))
    assert probe(bert, task, store).equals(rows) and len(list(store.iterdir())) == 1
    for other in (dict(seed=1), dict(task=Probe(**{**vars(task), "steps": 51})), dict(task=Probe(**{**vars(task), "train": "world:a?task=pos&n=601"}))):
        with pytest.raises(pytest.fail.Exception): probe(bert, **{"task": task, "store": store, **other})
    [file] = store.iterdir(); text = file.read_text(); file.write_text(text[:50])
    with pytest.raises(pytest.fail.Exception): probe(bert, task, store)      # damaged: made anew
    file.write_text(text)

def test_a_seed_gives_a_number_and_leaves_the_callers_dice(learned, bert, tmp_path):
    task, _, rows = learned
    torch.manual_seed(5); random.seed(5); np.random.seed(5)
    again = probe(bert, task, tmp_path)
    here = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5); random.seed(5); np.random.seed(5)
    assert here == (torch.rand(1).item(), random.random(), np.random.rand())
    assert again.drop(columns="seconds").equals(rows.drop(columns="seconds"))
    other = probe(bert, POS, tmp_path, seed=1)
    assert other.value[0] != rows.value[0] and abs(other.value[0] - rows.value[0]) < 15

def caught(monkeypatch) -> list:
    "The models that are loaded from now on."
    found, load = [], probes.with_head
    monkeypatch.setattr(probes, "with_head", lambda *a: found.append(load(*a)) or found[-1])
    return found

@pytest.mark.parametrize("spec", ["world:a?task=pos", "world:a?task=entailment"])
def test_frozen_moves_the_head_alone(bert, tmp_path, monkeypatch, spec):
    models, states, train, data = caught(monkeypatch), [], probes._Trainer.compute_loss, examples(f"{spec}&n=64")
    def spy(self, model, *args, **options):
        out = train(self, model, *args, **options); states.append((model.bert.encoder.training, model.training)); return out
    monkeypatch.setattr(probes._Trainer, "compute_loss", spy)
    rows = probe(bert, Probe("f", f"{spec}&n=64", {"a": f"{spec}&n=32"}, frozen=True, steps=6), tmp_path)
    with probes._dice(0): fresh = with_head(bert, data.kind, data.labels)      # the same head, not yet taught
    own = {n for n, p in models[0].named_parameters() if n.startswith("classifier") or "pooler" in n}
    for n, p in models[0].named_parameters(): assert torch.equal(p, fresh.get_parameter(n)) == (n not in own), n
    assert own and set(states) == {(False, True)} and rows.frozen[0] and rows.lr[0] == 0.5 / 32
    before = {n: p.clone() for n, p in models[0].named_parameters()}
    rows = probe(bert, Probe("w", f"{spec}&n=64", {"a": f"{spec}&n=32"}, steps=6), tmp_path)
    assert states[-1] == (True, True) and not torch.equal(models[-1].bert.encoder.layer[0].output.dense.weight, before["bert.encoder.layer.0.output.dense.weight"])

def test_pairs_and_several_rates(bert, tmp_path):
    task = Probe("nli", "world:a?task=entailment&n=64", {"a": "world:a?task=entailment&split=test&n=50"}, valid="world:a?task=entailment&split=valid&n=50",
                 lr=(1e-9, 3e-3), steps=5, batch=8)
    rows = probe(bert, task, tmp_path)
    assert rows.lr[0] in (1e-9, 3e-3) and rows.metric[0] == "accuracy" and 0 < rows.value[0] < 100
    one = probe(bert, Probe(**{**vars(task), "lr": float(rows.lr[0])}), tmp_path)
    assert one.value[0] == rows.value[0] and rows.flops[0] == 2 * one.flops[0]

def test_rates_are_chosen_by_the_valid_set(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "_teach", lambda f, t, task, train, seed, rate: (lambda data: (
        [["NOUN"] * len(r["tokens"]) if data.spec.endswith("valid&n=20") and rate == 2.0 else r["labels"] if rate == 1.0 and "test" in data.spec else ["X"] * len(r["tokens"])
         for r in data.rows], 0), dict(lr=rate, steps=1, seconds=1.0, flops=None)))
    task = Probe("pos", "world:a?task=pos&n=50", {"a": "world:a?task=pos&split=test&n=20"}, valid="world:a?task=pos&split=valid&n=20", lr=(1.0, 2.0, 3.0))
    rows = probe(bert, task, tmp_path)
    assert rows.lr[0] == 2.0 and rows.value[0] == 0 and rows.seconds[0] == 3      # though 1.0 knows the test set by heart

def copy_rows(n: int, start: int = 0) -> list[dict]:
    rng = np.random.default_rng(start)
    texts = (" ".join(rng.choice(list("bdfgk"), rng.integers(1, 4))) for _ in range(n))
    return [{"text": t, "target": t} for t in texts]

def jsonl(rows, path) -> str:
    import json
    path.write_text("\n".join(json.dumps(r) for r in rows)); return str(path)

def test_a_tiny_bart_learns_to_copy(tmp_path):
    tokenizer = train_tokenizer([r["text"] for r in copy_rows(50)], 270)
    torch.manual_seed(0)
    model = save(BartForConditionalGeneration(bart_config(len(tokenizer))), tokenizer, tmp_path/"bart")
    train, test = (jsonl(copy_rows(n, s), tmp_path/f"{s}.jsonl") for n, s in ((600, 1), (100, 2)))
    task = Probe("copy", f"pairs:{train}?src=text&tgt=target", {"t": f"pairs:{test}?src=text&tgt=target"}, steps=150)
    rows = probe(model, task, tmp_path/"store").set_index("metric")
    assert list(rows.index) == ["exact", "chrf", "bleu"] and rows.value["exact"] > 90 and rows.value["chrf"] > 95 and rows.flops["exact"] > 0
    worse = probe(model, Probe("copy", task.train, task.tests, steps=2), tmp_path/"store").set_index("metric")
    assert worse.value["exact"] < 20

def tiny(kind: str, vocab: int):
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=vocab, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, pad_token_id=2, eos_token_id=1, decoder_start_token_id=2)
    bert = BertConfig(vocab_size=vocab, **ENCODER)
    made = {"roberta": lambda: RobertaForMaskedLM(RobertaConfig(vocab_size=vocab, **ENCODER)), "t5 encoder": lambda: T5EncoderModel(t5),
            "t5": lambda: T5ForConditionalGeneration(t5), "bart": lambda: BartForConditionalGeneration(bart_config(vocab)),
            "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=vocab, n_embd=16, n_layer=1, n_head=1, n_positions=32)),
            "two berts": lambda: EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(bert, BertConfig(vocab_size=vocab, **ENCODER)))}
    return made[kind]()

@pytest.mark.parametrize("kind, spec", [("roberta", "world:a?task=entities"), ("roberta", "world:a?task=entailment"), ("t5 encoder", "world:a?task=pos"),
                                        ("t5 encoder", "world:a?task=topic"), ("t5", "world:a?task=parse"), ("two berts", "world:a?task=translation&to=b")])
def test_every_kind_of_model_takes_its_tasks(tokenizer, tmp_path, kind, spec):
    model = tiny(kind, len(tokenizer)); model.save_pretrained(tmp_path/"model"); tokenizer.save_pretrained(tmp_path/"model")   # no card: found somewhere
    rows = probe(tmp_path/"model", Probe("p", f"{spec}&n=40", {"a": f"{spec}&split=test&n=10"}, steps=2, batch=4, frozen="roberta" in kind), tmp_path/"store")
    assert np.isfinite(rows.value.astype(float)).all() and (rows.n == 10).all()
    weights = dict(model.named_parameters()); fresh = with_head(tmp_path/"model", examples(f"{spec}&n=40").kind, examples(f"{spec}&n=40").labels)
    body = {id(p) for p in heads.body(fresh)}
    same = [any(p.shape == w.shape and torch.equal(p, w) for w in weights.values()) for n, p in fresh.named_parameters() if id(p) in body]
    assert same and all(same), "the body is the checkpoint's"

def refused(model, task: Probe, store) -> str:
    with pytest.raises(Refusal) as e: probe(model, task, store)
    assert "\n" not in str(e.value) and not Path(store).exists()
    return str(e.value)

def test_what_cannot_work_is_told_in_one_line(bert, tokenizer, tmp_path):
    store, parse = tmp_path/"store", Probe("parse", "world:a?task=parse&n=9", {"a": "world:a?task=parse&n=9"}, steps=1)
    folders = {k: save(tiny(k, len(tokenizer)), tokenizer, tmp_path/k) for k in ("gpt2", "bart")}
    with_ = lambda **new: Probe(**{**vars(POS), "steps": 1, **new})
    assert "holds an encoder (BertForMaskedLM)" in refused(bert, parse, store) and "holds a seq2seq model" in refused(folders["bart"], POS, store)
    assert "holds a decoder (GPT2LMHeadModel)" in refused(folders["gpt2"], POS, store) and "not a folder" in refused(tmp_path/"nowhere", POS, store)
    assert "the task of a probe cannot be 'pos'; give a Probe" in refused(bert, "pos", store)
    assert "a checkpoint cannot be a GPT2LMHeadModel; give its folder" in refused(tiny("gpt2", len(tokenizer)), POS, store)
    assert "128 tokens, the model 64 positions" in refused(bert, with_(length=128), store)
    assert "bleu does not measure tags" in refused(bert, with_(metrics=("bleu",)), store) and "mark no entities" in refused(bert, with_(metrics=("f1",)), store)
    assert "no head" in refused(folders["bart"], Probe(**{**vars(parse), "frozen": True}), store)
    assert "do not occur" in refused(bert, with_(tests={"e": "world:a?task=entities&n=20"}), store)
    assert "holds labels, its train tags" in refused(bert, with_(tests={"t": "world:a?task=topic&n=20"}), store)
    assert "did you mean 'pos'" in refused(bert, with_(train="world:a?task=poss"), store)
    assert "became" in refused(bert, with_(lr=1e30, steps=12), store)
    big = train_tokenizer([t for t in World().documents("a", words=9000)], 1500)
    other = save(BertForMaskedLM(BertConfig(vocab_size=900, **ENCODER)), big, tmp_path/"big")
    assert "rows for 900" in refused(other, POS, store)
    for bad, says in [(dict(metrics=("bleuu",)), "did you mean 'bleu'"), (dict(lr=(1e-3, 1e-4)), "valid"), (dict(lr=-1.0), "lr"), (dict(batch=0), "batch"), (dict(tests={}), "tests"),
                      (dict(tests="world:a?task=pos"), "give each set a name")]:
        with pytest.raises(Refusal, match=says): with_(**bad)

def test_a_body_that_is_not_there_is_told(tokenizer, tmp_path):
    import json
    save(BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **ENCODER)), tokenizer, tmp_path/"m")
    assert with_head(tmp_path/"m", "labels", list("abcde")).classifier.out_features == 5      # another task's head is no obstacle
    config = json.loads((tmp_path/"m"/"config.json").read_text()); (tmp_path/"m"/"config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(Refusal, match="lacks bert.encoder.layer.1"): with_head(tmp_path/"m", "tags", ["x"])

def test_cut_words_count_as_unanswered(bert, learned, tmp_path):
    rows = probe(bert, Probe(**{**vars(POS), "length": 6}), tmp_path)
    assert rows.cut[0] > 150 and rows.value[0] < learned[2].value[0] - 20

@pytest.mark.skipif(not DATA.exists(), reason=f"REAL DATA IS MISSING: {DATA}")
def test_real_data(tmp_path):
    tokenizer = train_tokenizer([r["text"] for r in examples(f"labels:{DATA}/snips/train.jsonl.gz?text=tokens&label=intent").rows], 1000)
    torch.manual_seed(0)
    model = save(BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **ENCODER)), tokenizer, tmp_path/"bert")
    snips, ud = f"tags:{DATA}/snips/%s.jsonl.gz?labels=slots&n=%d", f"tags:{DATA}/ud/%s.jsonl.gz?labels=upos&n=%d"
    slots = probe(model, Probe("slots", snips % ("train", 2000), {"en": snips % ("test", 300)}, steps=80), tmp_path/"store")
    assert slots.metric[0] == "f1" and slots.value[0] > 5
    tests = {lang: ud % (f"{name}.test", 100) for lang, name in (("en", "en_ewt"), ("de", "de_gsd"))}
    upos = probe(model, Probe("upos", ud % ("en_ewt.train", 500), tests, steps=40, batch=16), tmp_path/"store").set_index("test")
    assert upos.value["en"] > upos.value["de"] > 10 and upos.metric["de"] == "accuracy"

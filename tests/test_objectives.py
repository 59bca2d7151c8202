"""Objectives against Hugging Face's own losses, documents kept apart in every causal and masked class we serve, and noise against plain loops."""
import math
from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, EncoderDecoderConfig, EncoderDecoderModel, GPT2Config,
                          GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MT5Config, RobertaConfig, RobertaForMaskedLM, T5Config, T5ForConditionalGeneration)
from seqwarm.core.corpus import Packed
from seqwarm.core.errors import Refusal
from seqwarm.core.noise import cut, pieces, poisson
from seqwarm.core.objectives import Draws, causal, denoise, mlm, objective, omit, shape, spans
from seqwarm.core.vocab import load_tokenizer, train_tokenizer

V, S = 60, 24
SMALL = dict(vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, pad_token_id=1)
MODELS = {"gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=S, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2)),
          "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, max_position_embeddings=S)),
          "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=S)),
          "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SMALL, max_position_embeddings=S + 2))}

class Tok:
    mask_token_id, all_special_ids = 4, [0, 1, 2, 3, 4]
    def __len__(self): return V

def documents(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    docs = [np.r_[0, rng.integers(5, V, n - 2), 2] for n in lengths]
    segments = np.concatenate([np.full(len(d), i) for i, d in enumerate(docs)])
    packed = Packed(np.concatenate(docs)[None], segments[None], np.concatenate([np.arange(len(d)) for d in docs])[None], np.array([0]))
    return docs, packed

@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_read_as_if_alone(name, attention):
    torch.manual_seed(0)
    model = MODELS[name]().eval(); model.set_attn_implementation(attention)
    ask = causal if name in ("gpt2", "llama") else mlm
    docs, packed = documents(5, 12, 7)
    with torch.no_grad():
        batch = ask(packed, Draws(0, 0, packed.samples), model.config, Tok()); ids = batch["input_ids"]; batch.pop("labels")
        together, begin = model(**batch).logits[0], 0
        for d in docs:  # plain calls, with the model's own masks and positions
            alone = model(input_ids=ids[:, begin:begin + len(d)]).logits[0]
            assert torch.allclose(together[begin:begin + len(d)], alone, atol=2e-5)
            begin += len(d)

def test_causal_loss_is_hugging_face_s():
    torch.manual_seed(0)
    model = MODELS["gpt2"]().eval(); docs, packed = documents(9)
    batch = causal(packed, None, model.config, None); labels = batch.pop("labels")
    with torch.no_grad():
        ours = F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten())
        assert torch.allclose(ours, model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss, atol=1e-6)

def test_mlm_depends_on_seed_step_and_sample_alone():
    ids = np.random.default_rng(0).integers(5, V, (6, S)); zeros = np.zeros_like(ids)
    batch = lambda rows, seed=0, step=0: mlm(Packed(ids[rows], zeros[rows], zeros[rows], np.array(rows)), Draws(seed, step, np.array(rows)), MODELS["bert"]().config, Tok())["input_ids"]
    whole = batch([0, 1, 2, 3, 4, 5])
    assert torch.equal(whole[[4, 1]], batch([4, 1]))
    assert not torch.equal(whole, batch([0, 1, 2, 3, 4, 5], step=1)) and not torch.equal(whole, batch([0, 1, 2, 3, 4, 5], seed=1))

def test_uniform_numbers_are_uniform():
    u = np.concatenate([Draws(s, t, np.arange(50)).uniform(40).ravel() for s in range(5) for t in range(5)])
    counts = np.histogram(u, 20, (0, 1))[0]
    assert ((counts - len(u) / 20)**2 / (len(u) / 20)).sum() < 43.8  # chi square, 19 degrees of freedom, one in a thousand

def test_refusals():
    with pytest.raises(Refusal, match="did you mean 'causal'"): objective("casual")
    class NoMask(Tok): mask_token_id = None
    _, packed = documents(5)
    with pytest.raises(Refusal, match="mask token"): mlm(packed, Draws(0, 0, packed.samples), None, NoMask())

# ---- two stacks ----
SENTINELS = range(10, 45)

class Two:
    "Ids 0 to 49 are special, sentinels among them; 50 and up are text."
    bos_token_id, eos_token_id, pad_token_id, unk_token_id, mask_token_id, cls_token_id, sep_token_id = 0, 1, 2, 3, 4, 0, 1
    unk_token, all_special_ids = "<unk>", [*range(50)]
    def __len__(self): return 300
    def convert_tokens_to_ids(self, token):
        return 7 if token == "<clm>" else SENTINELS[int(token[10:-1])] if token.startswith("<extra_id_") and int(token[10:-1]) < 35 else 3

BART = BartConfig(vocab_size=300, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                  decoder_ffn_dim=16, max_position_embeddings=128, pad_token_id=2, bos_token_id=0, eos_token_id=1, decoder_start_token_id=1)
NOISY = [("denoise", {}), ("denoise", dict(rate=0.5, mean=1.5)), ("omit", {}), ("omit", dict(mean=6.0)), ("spans", {}), ("spans", dict(rate=0.4, mean=2.0)),
         ("spans", dict(rate=0.6)), ("denoise", dict(rate=0.6, mean=4.0))]

def rows(B, T, seed=0, documents=(1, 30), unk=0.0, first=0):
    "Packed rows of documents of so many words, cut as a corpus cuts them."
    rng = np.random.default_rng(seed)
    flat = []
    while len(flat) < B * T + T: flat += [0, *rng.integers(50, 300, rng.integers(*documents)), 1]
    ids = np.array(flat[rng.integers(T):][:B * T]).reshape(B, T)
    ids = np.where((rng.random(ids.shape) < unk) & (ids >= 50), 3, ids)
    return Packed(ids, np.zeros_like(ids), np.zeros_like(ids), first + np.arange(B))

def slow_holes(ids, lengths, u, v, least):
    "One row in plain steps: for each span, before which token its mark stands, and which tokens go."
    ordinary, runs = [i >= 50 for i in ids], []
    for s, yes in enumerate(ordinary):
        if yes and s and ordinary[s - 1]: runs[-1].append(s)
        elif yes: runs.append([s])
    n, O = len(lengths), sum(ordinary)
    deal = lambda sizes, things: np.diff([0, *(min(things, math.floor(c * things / sum(sizes) + v)) for c in np.cumsum(sizes))]).tolist()
    everything, short = [s for r in runs for s in r], sum(lengths) / n
    while True:
        counts, rest = deal([len(r) for r in runs], n), [int(x) for x in lengths]
        mine = [[rest.pop(0) for _ in range(k)] for k in counts]
        for r, m in zip(runs, mine):    # too long for its run: the last spans lose first
            while sum(m) > len(r):
                i = max(i for i, x in enumerate(m) if x > least); m[i] -= 1
        left, spare = int(sum(lengths)) - sum(map(sum, mine)), [len(r) - sum(m) if m else 0 for r, m in zip(runs, mine)]
        if left > sum(spare):
            runs = [r for r in runs if len(r) >= short]; short *= 2
            if sum(map(len, runs)) < sum(lengths): runs = [everything]
            continue
        for m, more in zip(mine, deal(spare, left) if left else [0] * len(runs)):
            if more: m[-1] += more
        break
    holes, u = [], list(u)
    for r, m in zip(runs, mine):
        stay, at = len(r) - sum(m), 0
        step = least if stay >= len(m) - 1 else 0
        gaps = stay - step * (len(m) - 1)
        for i, x in enumerate(sorted(u.pop(0) for _ in m)):
            start = int(x * (gaps + 1)) + i * step + at
            holes.append((r[start] if start < len(r) else r[-1] + 1, r[start:start + m[i]])); at += m[i]
    assert sum(len(t) for _, t in holes) == sum(lengths) and O
    return holes

def slow(name, ids, draws, rate=None, mean=3.0):
    "Input and labels of one row, as lists."
    rate = rate or (0.15 if name == "spans" else 0.3)
    m = max(1, int(rate * len(ids) + 0.5)); n = max(1, int(m / mean + 0.5))
    u = draws.uniform(m - 1 if name == "spans" else m)[0]
    if name == "spans": lengths = np.diff([0, *sorted(1 + i for i in sorted(range(m - 1), key=u.__getitem__)[:n - 1]), m])
    else: lengths = [sum(int(x * n) == i for x in u) for i in range(n)]
    holes = slow_holes(ids, lengths, draws.uniform(n)[0], draws.uniform(1)[0, 0], int(name == "spans"))
    gone, read, written = {s for _, t in holes for s in t}, [], []
    for s in range(len(ids) + 1):
        for i, (at, t) in enumerate(holes):
            if at == s and name != "omit": read.append(4 if name == "denoise" else SENTINELS[i])
            if at == s: written += [SENTINELS[i], *(ids[k] for k in t)]
        if s < len(ids) and s not in gone: read.append(ids[s])
    return read, written + [1] if name == "spans" else list(ids)

@pytest.mark.parametrize("documents", [(1, 3), (3, 9), (1, 30), (10, 60), (400, 401)], ids=str)
@pytest.mark.parametrize("name,options", NOISY, ids=str)
def test_noise_is_that_of_plain_loops(name, options, documents):
    for T in (8, 9, 33, 96):
        packed = rows(20, T, seed=T, documents=documents, unk=0.02, first=70)
        enough = (packed.ids >= 50).sum(1) >= options.get("rate", 0.3) * T + 0.5
        packed = Packed(*(x[enough] for x in (packed.ids, packed.segments, packed.positions, packed.samples)))
        if not len(packed): continue
        batch = objective(name)(packed, Draws(3, 5, packed.samples), BART, Two(), **options)
        assert set(batch) == {"input_ids", "decoder_input_ids", "labels"} and all(v.dtype == torch.int64 for v in batch.values())
        spec = name + ("?" + "&".join(f"{k}={v}" for k, v in options.items()) if options else "")
        assert (batch["input_ids"].shape[1], batch["labels"].shape[1]) == shape(spec, T)
        for b, ids in enumerate(packed.ids.tolist()):
            read, written = slow(name, ids, Draws(3, 5, packed.samples[[b]]), **options)
            assert batch["input_ids"][b].tolist() == read and batch["labels"][b].tolist() == written
            assert batch["decoder_input_ids"][b].tolist() == [1, *written[:-1]]

@pytest.mark.parametrize("T", [8, 24, 200])
def test_the_text_can_be_put_together_again(T):
    packed = rows(40, T, documents=(12, 60), unk=0.02)
    batch = spans(packed, Draws(0, 1, packed.samples), BART, Two())
    for text, read, written in zip(packed.ids.tolist(), batch["input_ids"].tolist(), batch["labels"].tolist()):
        holes, sign = {}, None
        assert written[-1] == 1
        for x in written[:-1]:
            if x in SENTINELS: sign = x; holes[sign] = []
            else: holes[sign].append(x)
        assert [x for x in read if x in SENTINELS] == list(holes) == [*SENTINELS[:len(holes)]] and all(holes.values())
        assert [y for x in read for y in holes.get(x, [x])] == text
    for ask in denoise, omit:
        batch = ask(packed, Draws(0, 1, packed.samples), BART, Two())
        assert batch["labels"].tolist() == packed.ids.tolist()
        for text, read in zip(packed.ids.tolist(), batch["input_ids"].tolist()):
            rest = iter(text)    # what is read is the text with holes: a subsequence of it
            assert all(x in rest for x in read if x != 4) and [x for x in read if x < 50 and x != 4] == [x for x in text if x < 50]

def test_nothing_is_lost_where_documents_are_smaller_than_spans():
    packed = rows(60, 32, documents=(1, 3))
    for ask in spans, denoise:
        batch = ask(packed, Draws(0, 1, packed.samples), BART, Two(), rate=0.3)
        for text, read, written in zip(packed.ids.tolist(), batch["input_ids"].tolist(), batch["labels"].tolist()):
            assert [x for x in read if x < 2] == [x for x in text if x < 2]      # each document still begins and ends
            if ask is spans: assert sorted(x for x in read + written if x >= 50) == sorted(x for x in text if x >= 50)

@pytest.mark.parametrize("name", ["denoise", "omit", "spans", "denoise?causal=0.5"])
def test_a_sample_s_noise_is_its_own(name):
    packed, ask = rows(9, 40), objective(name)
    some = np.array([7, 2, 5])
    part = Packed(packed.ids[some], packed.segments[some], packed.positions[some], packed.samples[some])
    whole = ask(packed, Draws(1, 2, packed.samples), BART, Two())
    for k, v in ask(part, Draws(1, 2, part.samples), BART, Two()).items(): assert torch.equal(v, whole[k][some])
    for other in Draws(2, 2, packed.samples), Draws(1, 3, packed.samples), Draws(1, 2, packed.samples + 1):
        assert not torch.equal(ask(packed, other, BART, Two())["input_ids"], whole["input_ids"])

def chi2(counts, expected): return float(((counts - expected)**2 / expected).sum())

def test_lengths_and_places_are_distributed_as_said():
    B, T = 4000, 60
    packed = Packed(np.full((B, T), 99), None, None, np.arange(B))
    draws = Draws(11, 0, packed.samples)
    found = cut(packed.ids >= 50, poisson(draws, 18, 6), draws)   # one text: nothing is lost of the law
    assert (found.length.sum(1) == 18).all()
    binomial = np.array([math.comb(18, k) * 5**(18 - k) / 6**18 for k in range(19)])   # a length of Multinomial(18; 1/6, ...)
    one = np.bincount(found.length[:, 2], minlength=19)[:10]                           # one of each row: independent
    tail = np.append(one[:7], B - one[:7].sum())
    assert chi2(tail, B * np.append(binomial[:7], 1 - binomial[:7].sum())) < 24.3       # 7 degrees of freedom, one in a thousand
    assert abs((found.length == 0).mean() - binomial[0]) < 0.005 and abs(found.length.var() - 18 * 5 / 36) < 0.1
    cov = np.cov(found.length[:, 1], found.length[:, 4])[0, 1]
    assert abs(cov + 18 / 36) < 0.15                                                   # negative, as their sum is known
    place = (found.place - (np.cumsum(found.length, 1) - found.length))[np.arange(B), np.arange(B) % 6]   # tokens that stay before it
    draws = Draws(12, 0, packed.samples)
    lone = cut(packed.ids >= 50, poisson(draws, 18, 1), draws).place[:, 0]             # a lone span: all 43 gaps alike
    assert chi2(np.bincount(lone, minlength=43), B / 43) < 76.1 and place.min() == 0 and place.max() == 42
    draws = Draws(13, 0, packed.samples)
    lengths = pieces(draws, 6, 3)                                                      # 10 ways of cutting six into three
    ways = np.unique(lengths, axis=0, return_counts=True)[1]
    assert lengths.min() == 1 and len(ways) == 10 and chi2(ways, B / 10) < 27.9
    apart = cut(packed.ids >= 50, lengths, draws, apart=True)
    assert ((apart.place[:, 1:] - apart.place[:, :-1] - apart.length[:, :-1]) >= 1).all()

def test_documents_lose_their_share():
    packed = rows(300, 120, documents=(5, 40))
    gone = np.zeros(packed.ids.size, bool); draws = Draws(5, 0, packed.samples)
    gone[cut(packed.ids >= 50, poisson(draws, 36, 12), draws).gone] = True
    gone = gone.reshape(packed.ids.shape); ordinary = packed.ids >= 50
    assert not gone[~ordinary].any() and (gone.sum(1) == 36).all()
    inner = np.diff(np.pad(ordinary, ((0, 0), (1, 1))).astype(int), axis=1)
    size = np.concatenate([np.flatnonzero(r == -1) - np.flatnonzero(r == 1) for r in inner])
    lost = np.concatenate([[gone[b, i:j].sum() for i, j in zip(np.flatnonzero(r == 1), np.flatnonzero(r == -1))] for b, r in enumerate(inner)])
    share = 36 * 300 / ordinary.sum()
    for low, high in (5, 12), (12, 25), (25, 40):
        mine = (size >= low) & (size < high)
        assert abs(lost[mine].sum() / size[mine].sum() - share) < 0.02   # long and short ones alike

@pytest.mark.parametrize("name", ["denoise?causal=0.4", "omit?causal=0.4"])
def test_continuing(name):
    packed = rows(400, 50)
    batch = objective(name)(packed, Draws(0, 9, packed.samples), BART, Two())
    plain = objective(name.split("?")[0])(packed, Draws(0, 9, packed.samples), BART, Two())
    S, T = shape(name, 50)
    assert {k: v.shape[1] for k, v in batch.items()} == dict(input_ids=S, attention_mask=S, decoder_input_ids=T, labels=T)
    lengths = []
    for b, text in enumerate(packed.ids.tolist()):
        read, labels, mask = (batch[k][b].tolist() for k in ("input_ids", "labels", "attention_mask"))
        if read[0] != 7:
            assert read == plain["input_ids"][b].tolist() and labels == text and sum(mask) == S; continue
        k = sum(mask) - 1; lengths.append(k)
        assert mask == [1] * (k + 1) + [0] * (S - k - 1) and read == [7, *text[:k], *[2] * (S - k - 1)]
        assert labels == text[k:] + [-100] * k and batch["decoder_input_ids"][b].tolist() == [1, *text[k:-1], *[text[-1]], *[2] * (k - 1)]
    assert abs(len(lengths) / 400 - 0.4) < 0.1 and min(lengths) == 10 and max(lengths) == min(40, S - 1)

def two_stacks():
    small = dict(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=128, pad_token_id=2)
    pair = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**small), BertConfig(**small))
    pair.decoder_start_token_id, pair.pad_token_id = 0, 2
    t5 = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=2, eos_token_id=1, decoder_start_token_id=2)
    return {"bart": (BartForConditionalGeneration, BART, 1), "t5": (T5ForConditionalGeneration, t5, 2), "encoder-decoder": (EncoderDecoderModel, pair, 0)}

@pytest.mark.parametrize("name", ["denoise", "omit", "spans", "denoise?causal=0.5"])
@pytest.mark.parametrize("kind", ["bart", "t5", "encoder-decoder"])
def test_loss_is_hugging_face_s(kind, name):
    torch.manual_seed(0)
    cls, config, start = two_stacks()[kind]
    model, packed = cls(config).eval(), rows(4, 40)
    batch = objective(name)(packed, Draws(0, 0, packed.samples), model.config, Two())
    labels = batch.pop("labels")
    assert (batch["decoder_input_ids"][:, 0] == start).all()
    with torch.no_grad():
        ours = F.cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten())
        del batch["decoder_input_ids"]   # theirs are made from the labels
        assert torch.allclose(ours, model(**batch, labels=labels).loss, atol=1e-6)

def test_what_a_decoder_begins_with():
    packed = rows(1, 16)
    first = lambda config: objective("omit")(packed, Draws(0, 0, packed.samples), config, Two())["decoder_input_ids"][0, 0].item()
    assert first(T5Config()) == 0 and first(MT5Config(pad_token_id=5, decoder_start_token_id=None)) == 5   # T5 names none: its padding
    config = BartConfig(decoder_start_token_id=None)
    assert first(config) == 0                                                                               # the tokenizer's bos

def test_with_a_tokenizer_that_was_trained_for_it(tmp_path):
    texts = [f"the dog of house {i} sees the cat in the garden of house {i + 1} and sleeps" for i in range(60)]
    names = [f"<extra_id_{i}>" for i in range(5)]
    plain, tok = train_tokenizer(texts, 400), train_tokenizer(texts, 406, extra=[*names, "<clm>"])
    assert len(tok) == len(plain) + 6 <= 406 and tok(texts[3]).input_ids == plain(texts[3]).input_ids
    tok.save_pretrained(tmp_path); tok = load_tokenizer(tmp_path)
    assert set(tok.all_special_ids) >= {*range(5), *range(len(plain), len(tok))} and tok.tokenize("a<extra_id_3>b")[1] == "<extra_id_3>"
    ids = np.array([[0, *tok(t).input_ids, 1] for t in texts if len(tok(t).input_ids) == len(tok(texts[11]).input_ids)])
    packed = Packed(ids, None, None, np.arange(len(ids)))
    batch = spans(packed, Draws(0, 0, packed.samples), BART, tok)
    read, written = (tok.decode(batch[k][0]) for k in ("input_ids", "labels"))
    n = read.count("<extra_id_")
    assert n == max(1, int(int(0.15 * ids.shape[1] + 0.5) / 3 + 0.5)) and written.startswith("<extra_id_0>") and written.endswith("</s>")
    assert "<clm>" in tok.decode(denoise(packed, Draws(0, 0, packed.samples), BART, tok, causal=0.9)["input_ids"].flatten())
    with pytest.raises(Refusal, match="need sentinels <extra_id_0> to <extra_id_[0-9]+>, and the tokenizer has 5"):
        spans(packed, Draws(0, 0, packed.samples), BART, tok, rate=0.6, mean=1.0)
    with pytest.raises(Refusal, match="and the tokenizer has 0 of them"): spans(packed, Draws(0, 0, packed.samples), BART, plain)
    with pytest.raises(Refusal, match="no token <clm>"): omit(packed, Draws(0, 0, packed.samples), BART, plain, causal=0.2)
    for extra, kind in (["<mask>"], "bpe"), (["<a>", "<a>"], "unigram"), (["the"], "bpe"), ([" "], "bpe"):
        with pytest.raises(Refusal, match="cannot be one more special token"): train_tokenizer(texts, 400, kind, extra=extra)
    with pytest.raises(Refusal, match="ask for at least 262"): train_tokenizer(texts, 261, extra="<clm>")

@pytest.mark.parametrize("name,words", [
    ("denose", "did you mean 'denoise'"), ("denoise?rat=0.3", "did you mean 'rate'"), ("denoise?rate=x", "rate=x .* makes no sense; give a number more than 0"),
    ("denoise?rate=1", "less than 1"), ("spans?rate=0", "more than 0"), ("omit?mean=0.5", "at least 1"), ("omit?mean=nan", "at least 1"),
    ("denoise?causal=1.5", "from 0 to 1"), ("spans?causal=0.2", "no option of the objective spans"), ("causal?rate=0.2", "takes no options"),
    ("mlm?rate=0.2&rate=0.3", "twice"), ("mlm?rate", "makes no sense"), ("mlm?rows=hole", "did you mean 'whole'"), (None, "no objective"),
])
def test_a_name_that_means_nothing_is_refused(name, words):
    for call in objective, partial(shape, length=64):
        with pytest.raises(Refusal, match=words) as e: call(name)
        assert "\n" not in str(e.value)

def test_refusals_of_two_stacks():
    packed = rows(2, 16); draws = lambda: Draws(0, 0, packed.samples)
    class NoMask(Two): mask_token_id = None
    class NoEnd(Two): eos_token_id = sep_token_id = None
    with pytest.raises(Refusal, match="mask token, which denoise needs"): denoise(packed, draws(), BART, NoMask())
    assert omit(packed, draws(), BART, NoMask())["input_ids"].shape == (2, 11)
    with pytest.raises(Refusal, match="no token that ends a text"): spans(packed, draws(), BART, NoEnd())
    with pytest.raises(Refusal, match="a bert model has no decoder"): denoise(packed, draws(), MODELS["bert"]().config, Two())
    with pytest.raises(Refusal, match="a bart model reads one text and writes another"): mlm(packed, draws(), BART, Two())
    with pytest.raises(Refusal, match="a row of 16 tokens has 2 that may be masked, and 5 are to be"):
        denoise(Packed(np.array([[0, 1] * 7 + [77, 88]]), None, None, np.array([0])), Draws(0, 0, np.array([0])), BART, Two())
    with pytest.raises(Refusal, match="length of a row"): shape("denoise", 1)

def test_options_reach_the_objective():
    packed = rows(20, 64)
    short = Packed(packed.ids % 60, packed.segments, packed.positions, packed.samples)
    ask = lambda name: objective(name)(short, Draws(0, 0, short.samples), MODELS["bert"]().config, Tok())
    few, many = ((ask(name)["labels"] != -100).float().mean().item() for name in ("mlm", "mlm?rate=0.6"))
    assert few < 0.2 and many > 0.45 and objective("mlm") is mlm and shape("mlm?rate=0.6", 64) == shape("causal", 64) == (64, None)
    assert shape("denoise", 8) == (7, 8) and shape("omit", 8) == (6, 8) and shape("spans", 8) == (8, 3) and shape("denoise?rate=0.5&mean=5", 100) == (60, 100)

def test_a_whole_row_is_one_text():
    packed = rows(4, 24)
    short = Packed(packed.ids % 60, packed.segments, packed.positions, packed.samples); model = MODELS["bert"]().eval()
    ask = lambda name: objective(name)(short, Draws(0, 0, short.samples), model.config, Tok())
    whole, apart = ask("mlm?rows=whole"), ask("mlm")
    assert sorted(whole) == ["input_ids", "labels"] and all(torch.equal(whole[k], apart[k]) for k in whole)
    with torch.no_grad():   # as a model reads a plain text that nobody has cut
        plain = model(input_ids=whole["input_ids"], attention_mask=torch.ones_like(whole["input_ids"])).logits
        assert torch.allclose(model(input_ids=whole["input_ids"]).logits, plain, atol=1e-6)
    class Deberta: model_type, pad_token_id = "deberta-v2", 0
    with pytest.raises(Refusal, match="rows=whole"): mlm(short, Draws(0, 0, short.samples), Deberta, Tok())
    assert mlm(short, Draws(0, 0, short.samples), Deberta, Tok(), rows="whole").keys() == whole.keys()

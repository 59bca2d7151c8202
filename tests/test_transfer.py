"The report of a transfer: its numbers against slow plain code, its warnings provoked and absent, its files as others read them."
import json, re
from html import escape
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from seqwarm.core.checkpoint import Card, Checkpoint
from seqwarm.core.errors import Refusal
from seqwarm.core.overlap import overlap, spell
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.world import World
from seqwarm.core.write import save
from seqwarm.methods import transfer as module
from seqwarm.methods.transfer import transfer

EMBED, WTE = "model.embed_tokens.weight", "transformer.wte.weight"

@pytest.fixture(scope="module")
def tokenizers():
    world = World()
    return [train_tokenizer(list(world.documents(lang, words=8000)), 450) for lang in "ab"]

@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizers):
    "A source, and a helper whose rows lie in a narrow cone, as those of trained models do; some rows of both are zero."
    home, (ta, tb) = tmp_path_factory.mktemp("made"), tokenizers
    torch.manual_seed(0)
    big = GPT2LMHeadModel(GPT2Config(vocab_size=len(ta) + 3, n_embd=24, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=1))
    small = LlamaForCausalLM(LlamaConfig(vocab_size=len(tb), hidden_size=10, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                         num_key_value_heads=1, bos_token_id=0, eos_token_id=1))
    both = overlap(ta, tb)
    zero = SimpleNamespace(helper=[both.missing[3], both.missing[-1], both.shared_target[8]], source=[both.shared_source[30], both.shared_source[31]])
    S, H = big.transformer.wte.weight.data, small.model.embed_tokens.weight.data
    S.normal_(0.02, 0.1); H.normal_(); H += 0.25*torch.randn(10); S[zero.source] = 0; H[zero.helper] = 0
    save(big, ta, home/"source", Card("source", "scratch")); save(small, tb, home/"helper", Card("helper", "scratch"))
    (home/"text.txt").write_text("\n".join(World().documents("b", "valid", words=3000)) + "\n")
    return home, zero, S.double().numpy(), H.double().numpy()

def tables(new):
    "What a plan makes, and which rows are new, by plain lists."
    origin = new.plan.arrays["origin"].tolist()
    return origin, [i for i, o in enumerate(origin) if o == -1], new.plan.make(WTE, new.sources).double().numpy()

def test_counts_and_shares_of_a_text(made, tokenizers, monkeypatch):
    home, zero, _, _ = made
    ta, tb = tokenizers
    monkeypatch.setattr(module, "_DOCUMENTS", 40)
    new = transfer(home/"source", home/"helper", f"text:{home/'text.txt'}", pad_to=64)
    special = set(tb.all_special_ids)
    shared = [i for token, i in tb.get_vocab().items() if i not in special and token in ta.get_vocab() and ta.get_vocab()[token] not in zero.source]
    t, n = new.facts["tokens"], len(tb)
    assert (t["rows"], t["shared"], t["special"], t["padding"]) == (-(-n//64)*64, len(shared), len(special), -n % 64) and t["new"] == n - len(shared) - len(special)
    assert t["anchors"] == len(shared) - 1 and t["zero_helper"] == 2 and new.facts["unlearned"] == 2    # a shared token that the helper never saw is no anchor
    assert new.facts["share"] == pytest.approx(len(shared)/n)
    ids = [i for line in (home/"text.txt").read_text().splitlines()[:40] for i in tb(line, add_special_tokens=False).input_ids]
    text = new.facts["text"]
    assert text["tokens"] == len(ids) and text["shared"] == pytest.approx(sum(i in shared for i in ids)/len(ids)) and text["special"] == 0
    assert text["new"] == pytest.approx(1 - text["shared"]) and text["corpus"] == f"text:{home/'text.txt'}"
    assert new.rows.kind.tolist() == ["padding" if i >= n else "special" if i in special else "shared" if i in shared else "new" for i in range(t["rows"])]

def test_row_sums_and_the_guard(made):
    home, zero, S, H = made
    new = transfer(home/"source", home/"helper")
    origin, missing, _ = tables(new)
    unit = lambda x: x/np.linalg.norm(x) if x.any() else x
    anchors = [i for i, k in enumerate(new.rows.kind) if k == "shared" and H[i].any()]
    A = np.stack([S[origin[j]] for j in anchors]); m = A.mean(0); r = np.sqrt(((A - m)**2).sum(1).mean())
    sums, held = [], []
    for i in missing:
        c = np.array([unit(H[i]) @ unit(H[j]) for j in anchors])
        sums.append(c.sum()); held.append(not H[i].any() or c.sum() < np.linalg.norm(sum(cj*(a - m) for cj, a in zip(c, A)))/r)
    assert np.allclose(new.rows.row_sum[missing], sums) and new.rows.guarded[missing].tolist() == held and not new.rows.guarded.drop(missing).any()
    assert new.rows.row_sum.drop(missing).isna().all() and new.facts["guarded"] == sum(held) and 0 < sum(held) < len(missing)
    assert new.facts["row_sums"] == dict(smallest=pytest.approx(min(sums)), smallest_abs=pytest.approx(min(map(abs, sums)), abs=1e-12), negative=sum(s < 0 for s in sums))
    assert new.rows.guarded[zero.helper[0]] and new.rows.guarded[zero.helper[1]]

@pytest.mark.parametrize("method,options", [("clp", {}), ("clp+", {}), ("softmax", dict(temperature=0.05, top_k=6)), ("mean", {}), ("random", {}), ("fvt", {})])
def test_weights(made, tokenizers, method, options):
    home, zero, S, H = made
    ta, tb = tokenizers
    new = transfer(home/"source", home/"helper", method=method, **options)
    origin, missing, table = tables(new)
    if method == "random": assert new.facts["weights"] == {}; return
    if method == "fvt":
        flat, offsets = spell(ta, tb, missing)
        n = np.diff(offsets)
        assert new.facts["weights"] == dict(negative=0.0, pieces=pytest.approx(n.mean()), without_pieces=(n == 0).sum()); return
    anchors = [i for i, k in enumerate(new.rows.kind) if k == "shared" and H[i].any()]
    C = H[anchors]/np.linalg.norm(H[anchors], axis=1, keepdims=True)
    negative, effective = [], []
    for i in [missing[int(k)] for k in np.linspace(0, len(missing) - 1, min(64, len(missing)))]:
        c = C @ H[i]/max(np.linalg.norm(H[i]), 1e-300)
        if method == "mean" or not H[i].any(): w = np.full(len(anchors), 1/len(anchors))
        elif method == "clp": w = c/c.sum()
        elif method == "softmax": w = np.exp((c - c.max())/0.05); w[np.argsort(-c)[6:]] = 0; w /= w.sum()
        else: w = np.maximum(c - next(x for x in [(np.sort(c)[::-1][:k].sum() - 1)/k for k in range(len(c), 0, -1)] if (c > x).sum() and np.isclose(np.maximum(c - x, 0).sum(), 1)), 0)
        negative.append(-w[w < 0].sum()/abs(w).sum()); effective.append(abs(w).sum()**2/(w**2).sum())
    median = lambda x: sorted(x)[(len(x) - 1)//2]     # as torch has it
    assert new.facts["weights"] == dict(negative=pytest.approx(median(negative), abs=1e-6), effective_anchors=pytest.approx(median(effective), rel=1e-4))

def test_norms_spread_rank_and_neighbours(made, tokenizers):
    home, zero, S, H = made
    ta, tb = tokenizers
    for method, rank in dict(clp=10, mean=0, random=24, lstsq=10, procrustes=10, softmax=24).items():
        new = transfer(home/"source", home/"helper", method=method)
        origin, missing, table = tables(new)
        copied = [i for i, k in enumerate(new.rows.kind) if k == "shared"]
        norm = np.linalg.norm(table, axis=1)
        assert np.allclose(new.rows.norm, norm)
        spread = lambda ids, table=table: np.sqrt(((table[ids] - table[ids].mean(0))**2).sum(1).mean())
        f = new.facts["rows"]
        assert f["norm_new"] == pytest.approx(np.median(norm[missing])) and f["norm_ratio"] == pytest.approx(np.median(norm[missing])/np.median(norm[copied]))
        assert f["norm_largest"] == pytest.approx(norm[missing].max()) and f["spread_ratio"] == pytest.approx(spread(missing)/spread(copied), abs=1e-6)
        assert (f["rank"], f["rank_at_most"]) == (rank, 24), method
        sample = new.facts["sample"]
        assert 5 < len(sample) <= 24 and {s["id"] for s in sample} <= set(missing)
        for s in sample:
            with np.errstate(invalid="ignore"): cos = S @ table[s["id"]]/np.linalg.norm(S, axis=1)/norm[s["id"]]
            order = np.sort(np.nan_to_num(cos, nan=0))[::-1]
            assert s["token"] == tb.convert_ids_to_tokens(s["id"]) and len(s["nearest"]) == 5
            near = [ta.convert_tokens_to_ids(x) if not x.startswith("row ") else int(x[4:]) for x in s["nearest"]]
            assert np.allclose(np.nan_to_num(cos[near], nan=0), order[:5], atol=1e-5)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_direction(dtype):
    torch.manual_seed(1)
    for n, D, rank in ((300, 64, 7), (40, 64, 7), (3000, 20, 5)):
        rows = (torch.randn(n, rank) @ torch.randn(rank, D) + 3*torch.randn(D)).to(dtype)
        assert module._rank(rows, torch.arange(len(rows))) == (rank, min(n - 1, D))
    assert module._rank(torch.ones(50, 8, dtype=dtype)*0.1, torch.arange(50)) == (0, 8) and module._rank(torch.randn(1, 8).to(dtype), torch.arange(1)) == (0, 0)

def spoilt(home, to, **change):
    "Copies of source and helper, with functions applied to the table of either."
    out = {}
    for name in ("source", "helper"):
        out[name] = to/name
        out[name].mkdir(parents=True)
        for f in (home/name).iterdir(): (out[name]/f.name).write_bytes(f.read_bytes())
        held = load_file(out[name]/"model.safetensors")
        if name in change: change[name](held[WTE if name == "source" else EMBED])
        save_file(held, out[name]/"model.safetensors", metadata={"format": "pt"})
    return out

def sound(made, to, tokenizers):
    "A pair of which nothing bad can be said: every row learned, all rows of the helper on one side."
    torch.manual_seed(2)
    def source(x): x[:] = 0.1*torch.randn(x.shape)
    def helper(x): x[:] = torch.randn(x.shape) + 12*torch.eye(10)[0]
    return spoilt(made[0], to, source=source, helper=helper)

def test_a_sound_pair_gets_no_warning(made, tokenizers, tmp_path):
    for method in ("guarded", "clp", "softmax", "overlap", "fvt"):
        pair = sound(made, tmp_path/method, tokenizers)
        new = transfer(**pair, method=method, norm=True, **dict(temperature=0.002) if method == "softmax" else {})
        assert [w for w in new.facts["warnings"] if "lie close together" not in w] == [], method     # a narrow cone of cosines mixes much
    assert not transfer(**pair, method="overlap").facts["warnings"]

def test_each_warning_can_be_provoked(made, tokenizers, tmp_path):
    ta, tb = tokenizers
    pair, said = sound(made, tmp_path/"sound", tokenizers), lambda **how: " | ".join(transfer(**how).facts["warnings"])
    base = said(**pair, method="overlap")
    missing = overlap(ta, tb).missing
    def wild(x): x[:] = torch.randn(x.shape)
    def unseen(x): x[missing[:3]] = 0
    def unknown(x): x[overlap(ta, tb).shared_source[5:9]] = 0
    def long(x): x[:] = 0.1*torch.randn(x.shape) + 1
    broken = {name: spoilt(pair["source"].parent, tmp_path/name, **change) for name, change in
              dict(wild=dict(helper=wild), unseen=dict(helper=unseen), unknown=dict(source=unknown)).items()}
    for words, how in {"like no anchors in particular": broken["wild"], "are they in the right order?": dict(source=pair["helper"], helper=pair["source"]), "this method has no guard": broken["wild"] | dict(method="clp"),
                       "3 new tokens have a helper row of zeros": broken["unseen"], "4 shared tokens have a source row of zeros": broken["unknown"],
                       "times as long as copied ones": pair | dict(method="mean"), "lie close together": pair | dict(method="mean"),
                       "of the weight is negative": broken["wild"] | dict(method="clp")}.items():
        assert words in said(**how) and words not in base, words
    assert "guard" not in said(**broken["wild"], method="fvt") and "zeros" not in said(**broken["unseen"], method="fvt")   # it reads no helper rows

def test_warnings_that_numbers_alone_provoke(made):
    "Those whose models would be large, by facts made up for the purpose."
    facts = transfer(made[0]/"source", made[0]/"helper", method="overlap").facts
    facts["unlearned"] = 0
    assert module._warnings(facts) == []
    for words, change in {"only 4.0% of the vocabulary is shared: try --match canonical": dict(share=0.04), "do they belong together": dict(fits=dict(source=[50257, 300])),
                          "adds 2 special tokens to a text and the helper's 1": dict(wraps=[2, 1]),
                          "MPNet takes id 1": dict(architecture="MPNetForMaskedLM", pad=0), "mask_token_id has no counterpart": dict(ids=dict(mask_token_id=[5, None])),
                          "100 anchors are fewer than the helper is wide (768)": dict(method="guarded", helper_width=768, tokens=facts["tokens"] | dict(anchors=100, zero_helper=0), guarded=0),
                          "90 new tokens got the mean row: they cannot be spelt": dict(method="fvt", weights=dict(without_pieces=90)),
                          "90 new tokens got the mean row: they occur in no word": dict(method="wechsel", weights=dict(without_pieces=90))}.items():
        assert len(found := module._warnings(facts | change)) == 1 and words in found[0], (words, found)
    assert "canonical" not in module._warnings(facts | dict(share=0.04, match="canonical"))[0]

def strict(text): return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

@pytest.mark.parametrize("method", ["guarded", "clp", "lstsq", "mean", "fvt"])
def test_files_of_the_report(made, tmp_path, method):
    home = made[0]
    new = transfer(str(home/"source"), Checkpoint(home/"helper"), f"text:{home/'text.txt'}", method=method)
    out = new.write(tmp_path/"out")
    facts, html = strict((tmp_path/"out"/"report.json").read_text(encoding="utf-8")), (tmp_path/"out"/"report.html").read_text(encoding="utf-8")
    assert facts == new.facts and isinstance(new.rows, pd.DataFrame) and out.shape(WTE)[0] == len(new.rows)
    assert not re.search(r"""<(?:script|link|img)[^>]+(?:src|href)=["']?http""", html) and "NaN" not in html[html.index("<h1>"):]   # one page, alone
    assert html.count("Plotly.newPlot(") == 3 == html.count("<figure>") and all(w in html for w in ("What the new vocabulary is made of", "How long the rows are", "What a text is made of"))
    assert all(escape(line) in html for line in new.told())
    assert len(new.told()) < 30 and not any("\n" in line for line in new.told())

def test_what_is_not_finite_is_null_in_json():
    assert strict(json.dumps(module._plain(dict(a=np.float64("nan"), b=[float("inf")], c=np.int64(3))))) == dict(a=None, b=[None], c=3)

def test_a_corpus_is_refused_by_name(made, tmp_path):
    home = made[0]
    (tmp_path/"empty.txt").write_text("\n")
    for corpus, words in {"wrld:b": "did you mean 'world:'", f"text:{tmp_path}/no.txt": "there is no file", f"text:{tmp_path}/empty.txt": "holds no text"}.items():
        with pytest.raises(Refusal, match=words) as e: transfer(home/"source", home/"helper", corpus)
        assert "\n" not in str(e.value)

def test_no_token_says_anything_to_the_terminal():
    text = {"Ľ": "\x1b", "Ġhaus": " haus", "Ã": "\ufffd", "a": "a", "x": ""}
    tokenizer = SimpleNamespace(convert_tokens_to_string=lambda tokens: text[tokens[0]])
    assert [module._shown(tokenizer, t) for t in text] == ["Ľ", "␣haus", "Ã", "a", "x"]

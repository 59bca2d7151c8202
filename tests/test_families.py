"Every family through CLP (tests/families.py), and the table of results/ that says so."
import csv
import pytest, torch, transformers as hf
from families import CASES, CHECKS, TABLE, Case, Shop, _save, carry, lines, model, tokenizer
from seqwarm.core.errors import Refusal
from seqwarm.core.layout import _families
from transformers.utils import logging

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "All cases, each made once; one thread, as for models this small several only wait for each other."
    threads, level, bars = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1); logging.set_verbosity_error(); logging.disable_progress_bar()
    yield Shop(tmp_path_factory.mktemp("families"))
    torch.set_num_threads(threads); logging.set_verbosity(level)
    if bars: logging.enable_progress_bar()

@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_family(case, check, shop): assert shop.cell(case, check) == "yes"

def test_every_family_is_in_the_table():
    "But for models made of two, which have two vocabularies and are refused."
    assert {c.kind for c in CASES} == {kind for kind, table in _families().items() if not table.halves}

def test_a_model_with_two_vocabularies_is_refused_in_one_line(shop, tmp_path):
    halves = (model("bert", 24, False).bert, model("roberta", 24, False))
    for half in halves: half.config.is_decoder = half.config.add_cross_attention = half is halves[1]
    config = hf.EncoderDecoderConfig(encoder=halves[0].config.to_dict(), decoder=halves[1].config.to_dict())
    source = _save(tmp_path/"source", hf.EncoderDecoderModel(config), tokenizer("bert", False))
    helper = _save(tmp_path/"helper", model("gpt2", 20, True), tokenizer("gpt2", True))
    with pytest.raises(Refusal, match="^EncoderDecoderModel has a vocabulary in each half") as e: carry(source, helper, tmp_path/"out")
    assert "\n" not in str(e.value) and not (tmp_path/"out").exists()

def test_the_table_is_what_was_found(shop):
    with open(TABLE, newline="") as f: committed = list(csv.DictReader(f))
    assert committed == lines(shop), "python tests/families.py writes it anew"

@pytest.mark.parametrize("kind", ["t5", "mbart", "roberta"])
def test_what_needs_padding_is_refused_a_tokenizer_without(kind, shop, tmp_path):
    helper = _save(tmp_path/"helper", model("gpt2", 20, True), tokenizer("gpt2", True))
    with pytest.raises(Refusal, match="without a padding token"): carry(shop.made(Case(kind, True)).source, helper, tmp_path/"out")
    assert not (tmp_path/"out").exists()

def test_a_check_sees_a_single_wrong_number(shop):
    "Of the body, of a shared row and of a new row."
    x = shop.made(Case("llama", True)); name = "model.embed_tokens.weight"
    for n, row, check in (("model.norm.weight", 3, "body"), (name, x.both.shared_target[0], "rows"), (name, x.both.missing[0], "rows")):
        was = x.new[n].clone()
        x.new[n][row] += 1e-3
        with pytest.raises(AssertionError): CHECKS[check](x)
        x.new[n].copy_(was)

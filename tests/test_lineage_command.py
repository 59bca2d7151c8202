"""`seqwarm lineage` and `seqwarm verify`, the card that they read, and the README that lies beside it."""
import json, shutil
from itertools import islice
from pathlib import Path
import pytest
import torch
from huggingface_hub import metadata_load
from transformers import GPT2Config, GPT2LMHeadModel
from seqwarm.batch.cli import main
from seqwarm.core.card import Card, faults
from seqwarm.core.checkpoint import Checkpoint
from seqwarm.core.files import file_fingerprint, fingerprint
from seqwarm.core.ledger import lineage
from seqwarm.core.plan import Plan, Row
from seqwarm.core.world import World
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.write import save, write

@pytest.fixture(scope="module")
def made(quick, tmp_path_factory):
    "A model that was found, with a licence, one that was made of it in two shards, and one that was trained from there."
    home, tok = tmp_path_factory.mktemp("made"), train_tokenizer(islice(World().documents("a"), 60), 300)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=1))
    model.save_pretrained(home/"found")
    (home/"found"/"README.md").write_text("---\nlicense: mit\nlanguage: en\n---\nBy somebody.\n")
    found = Checkpoint(home/"found")
    plan = Plan("copy", found.config, found.architecture, [Row(n, "copy", f"s:{n}") for n in found.names])
    start = write(plan, {"s": found}, home/"start", tok, shard=12_000)
    save(model, tok, home/"trained", Card.child("trained", "train", [start.card], dict(tokens=70, flops=9e3, seconds=2)))
    return home

@pytest.fixture
def here(made, tmp_path, monkeypatch):
    for p in made.iterdir(): shutil.copytree(p, tmp_path/p.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path

def verify(capsys, folder: str) -> tuple[int, str]:
    code = main(["verify", folder])
    out, err = capsys.readouterr()
    assert (out + err).count("\n") == 1
    return code, out + err

def flip(file: Path, at: int = -1) -> None:
    raw = bytearray(file.read_bytes()); raw[at] ^= 1; file.write_bytes(raw)

WHOLE = "; the weights are as they were written"

# ---- whole or not --------------------------------------------------------------------------------------------------------------

def test_a_bit_in_any_file_is_noticed_and_the_file_named(here, capsys):
    files = sorted(p.name for p in (here/"start").iterdir())
    assert verify(capsys, "start") == (0, f"start is whole: {len(files) - 2} files as they were written\n")
    assert len([f for f in files if f.endswith("of-00002.safetensors")]) == 2 and {"plan.json", "tokenizer.json", "config.json"} <= set(files)
    for name in files:
        whole = (here/"start"/name).read_bytes(); flip(here/"start"/name, len(whole)//2)
        code, said = verify(capsys, "start")
        if name == "README.md": assert code == 0                         # people may write there
        elif name == "seqwarm.json": assert code in (1, 2) and name in said
        else: assert (code, said) == (1, f"start is not whole: {name} differs{'' if '.safetensors' in name else WHOLE}\n")
        (here/"start"/name).write_bytes(whole)
    assert verify(capsys, "start")[0] == verify(capsys, "trained")[0] == 0

def test_missing_and_extra(here, capsys):
    (here/"start"/"plan.json").unlink(); (here/"start"/"added_tokens.json").write_text("{}")
    assert verify(capsys, "start") == (1, "start is not whole: plan.json is missing; added_tokens.json is extra" + WHOLE + "\n")
    for name in ("README.md", "LICENSE", "receipt.json", ".gitattributes"): (here/"trained"/name).write_text("by somebody")
    assert verify(capsys, "trained")[0] == 0

def test_an_edited_card_is_noticed(here, capsys):
    for change in (lambda c: c["cost"].update(flops=1), lambda c: c.update(name="mine"), lambda c: next(iter(c["ancestors"].values()))["cost"].update(tokens=1)):
        text = (here/"trained/seqwarm.json").read_text(); card = json.loads(text); change(card)
        (here/"trained/seqwarm.json").write_text(json.dumps(card))
        assert verify(capsys, "trained") == (1, f"trained is not whole: seqwarm.json was changed{WHOLE}\n")
        (here/"trained/seqwarm.json").write_text(text)

def test_a_card_from_before_files_were_named(here, capsys):
    for name in ("start", "trained"):
        card = json.loads((here/name/"seqwarm.json").read_text())
        for new in ("files", "seal", "terms"): del card[new]
        (here/name/"seqwarm.json").write_text(json.dumps(card))
        assert Checkpoint(name).card.id == card["id"]
        code, said = verify(capsys, name); assert code == 0 and "early version" in said
        flip(next((here/name).glob("model*.safetensors")))
        code, said = verify(capsys, name); assert code == 1 and "the weights are not those of the card" in said

def test_ids_are_what_they_were(made):
    for name in ("start", "trained"):
        weights = fingerprint([file_fingerprint(f) for f in sorted((made/name).glob("model*.safetensors"))])
        card = Card.load(made/name)
        assert card.id == fingerprint([card.recipe, card.parents, weights]) == card.sealed(weights).id and Checkpoint(made/name).fingerprint == weights

def test_a_folder_inside_answers_for_itself(here):
    shutil.copytree("start", "trained/auxiliary")
    assert faults("trained") == []
    flip(here/"trained/auxiliary/config.json", 0)
    assert faults("trained") == ["auxiliary/config.json differs"]

@pytest.mark.parametrize("command", ["verify", "lineage"])
def test_without_a_card_there_is_one_line(here, capsys, command):
    (here/"torn").mkdir(); (here/"torn/seqwarm.json").write_text("{")
    (here/"other").mkdir(); (here/"other/seqwarm.json").write_text('{"name": "x", "recipe": "y", "colour": "red"}')
    for folder, says in {"nowhere": "there is no folder", "found": "holds no seqwarm.json", "torn": "cannot be read as JSON", "other": "is no card", "": "seqwarm"}.items():
        assert main([command, folder]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and says in err

# ---- lineage -------------------------------------------------------------------------------------------------------------------

def test_the_lineage_counts_each_once(here, capsys):
    assert main(["lineage", "trained"]) == 0
    head, *rows, last, legend = capsys.readouterr().out.splitlines()
    assert legend.startswith("found: ")
    assert [r.split()[-4 if "train" in r.split()[1] else -3:] for r in rows[:1]] == [["train", "70", "9e+03", "2.0"]] and len(rows) == 3
    assert rows[1].startswith("└ start") and rows[2].startswith("  └ found") and rows[2].split()[-3:] == ["unknown"]*3
    assert last.split()[-3:] == ["70", "9e+03", "2.0"] and lineage(Card.load("trained")).tokens == 70
    twice = Card.child("twice", "join", [Card.load("trained"), Card.load("start")], dict(tokens=5)).sealed("w")
    twice.write(here/"found"); assert main(["lineage", "found"]) == 0
    out = capsys.readouterr().out
    assert out.count("see above") == 1 and out.splitlines()[-2].split()[-3] == "75"

def test_cards_that_make_no_sense_end(here, capsys):
    for ancestors in ({"a": dict(name="a", recipe="x", parents=["b"], cost={}), "b": dict(name="b", recipe="x", parents=["a"], cost={})}, {}):
        Card("odd", "x", ["a"], ancestors=ancestors, id="o").write(here/"found")
        assert main(["lineage", "found"]) == 0
    assert "not on this card" in capsys.readouterr().out

# ---- README --------------------------------------------------------------------------------------------------------------------

def test_the_readme_is_true(here):
    for name in ("start", "trained"):
        text, head = (here/name/"README.md").read_text(), metadata_load(here/name/"README.md")
        assert head == {"library_name": "transformers", "license": "mit", "language": "en", "tags": ["seqwarm", Card.load(name).recipe, "gpt2"]}
        assert f"# {name}" in text and "| found | found | unknown | unknown | unknown | mit |" in text
        code = text.split("```python\n")[1].split("```")[0].replace("FOLDER", str(here/name))
        scope = {}; exec(code, scope)
        assert type(scope["model"]).__name__ == "GPT2LMHeadModel" and scope["tokenizer"]("x").input_ids
    assert f"operations: copy {len(Checkpoint('start').names)};" in (here/"start"/"README.md").read_text()
    assert "| all, each counted once | | 70 | 9e+03 | 2.0 | |" in (here/"trained"/"README.md").read_text()

def test_a_licence_is_told_by_all_or_none(here):
    source = Checkpoint("found")
    plan = Plan("copy", source.config, source.architecture, [Row(n, "copy", f"s:{n}") for n in source.names])
    for written, told in {"": None, "---\nlicense: [a, {b: c}]\n---\n": None, "no header\n": None, "---\nlicense: apache-2.0\nlanguage:\n- de\n---\n": "apache-2.0"}.items():
        (here/"found"/"README.md").write_text(written)
        out = write(plan, {"s": Checkpoint("found")}, here/f"out-{told}-{len(written)}").path
        assert metadata_load(out/"README.md").get("license") == told and ("| unknown | unknown | unknown | unknown |" in (out/"README.md").read_text()) == (told is None)
    kept = write(plan, {"s": source}, here/"kept", extra={"README.md": "mine"}).path
    assert (kept/"README.md").read_text() == "mine" and faults(kept) == []

def test_what_the_hub_calls_it_is_the_base_model(here, monkeypatch):
    import seqwarm.core.checkpoint as module
    with monkeypatch.context() as m:
        m.setattr(module, "_folder", lambda path: here/"found")
        source = Checkpoint("somebody/model")
    plan = Plan("copy", source.config, source.architecture, [Row(n, "copy", f"s:{n}") for n in source.names])
    first = write(plan, {"s": source}, here/"first")
    assert metadata_load(first.path/"README.md")["base_model"] == ["somebody/model"]
    assert first.card.ancestors[source.card.id]["terms"] == {"license": "mit", "language": "en", "hub": "somebody/model"}

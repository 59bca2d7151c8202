"""What README and the site's pages tell people to type is typed here: every block of shell, Python and TOML, in its order, a folder for each page.

Names on the hub are folders of these names in the working folder, with tiny models of the family that has the name. What would take long is made small:
`SMALLER` says of each size in a block what stands in its place, and `TINY` what a run of a recipe is given besides; `ELSEWHERE` names the few lines that
other tests carry out. An entry that no page needs is an error, so that none of these hides anything for longer than it has to."""
import json, os, re, shlex, shutil, subprocess, sys
from functools import cache
from pathlib import Path
import pytest, torch, typer
import transformers as hf
from seqwarm.batch.cli import app, main
from seqwarm.core.vocab import train_tokenizer
from seqwarm.core.world import World

ROOT = Path(__file__).parents[1]
PAGES = [ROOT/"README.md", *sorted((ROOT/"nbs/site").rglob("*.md"))]
SMALLER = {"--hidden-size 1536": "--hidden-size 64", "--hidden-size 1024": "--hidden-size 64", "--hidden-size 3072": "--hidden-size 48",
           "--hidden-size 864": "--hidden-size 48", "--num-layers 24": "--num-layers 4", "--num-layers 40": "--num-layers 4", "--order 0-19,10-29": "--order 0-1,0-1",
           "layers=24": "layers=4", ".h.13.": ".h.3.", "Stage(1000": "Stage(2", "Stage(200": "Stage(2", "length=128": "length=16", "length=64": "length=16",
           "--experts 8": "--experts 4", "attn@0-5', 'ffn@0-5": "attn@0', 'ffn@0", " --scale demo": "", " --scale full": "", 'scale = "demo"': "small_steps = 2\nsteps = 4\nthreads = 1",
           "seeds = [0, 1]\n": "seeds = [0]\n", 'kind = ["gpt2", "llama"]': 'kind = ["llama"]', "-p seeds '[0, 1]'": "-p seeds '[0]'"}
TINY = {"clp": dict(source_steps=2, helper_steps=2, horizons=[2]), "sequential": dict(mlm_steps=4, seq_steps=4, probe_steps=2), "metro": dict(steps=4, probe_steps=2),
        "growth": dict(small_steps=2, steps=4), "together": dict(small_steps=2, helper_steps=2, steps=4)}
TINY["lessons/10_clp.ipynb"] = TINY["clp"]
ELSEWHERE = {"make demo": ".ci/run", "make test": ".ci/run", "pip install seqwarm": "tests/checks.py", "seqwarm sweep growth.toml --executor slurm": "tests/test_slurm.py"}

def blocks(page: Path) -> list[tuple[str, str]]:
    "Language and text of each block of a page."
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S)

def lines(text: str) -> list[str]:
    "The commands of a block of shell, without comments and empty lines."
    return [" ".join(words) for line in text.replace("\\\n", " ").splitlines() if (words := shlex_words(line))]

def shlex_words(line: str) -> list[str]:
    return [w if re.fullmatch(r"[\w@%+=:,./>-]+", w) else shlex.quote(w) for w in shlex.split(line, comments=True)]

# ---- what stands for the models of the hub

@cache
def words(language: str) -> tuple[str, ...]: return tuple(World().documents(language, words=8000))

def stand_ins(home: Path) -> None:
    "A folder for each model that a page names, and texts."
    torch.manual_seed(0)
    english, german = (train_tokenizer(list(words(x)), 400) for x in "ab")
    sentinels = train_tokenizer(list(words("a")), 450, extra=[f"<extra_id_{i}>" for i in range(40)])
    ids = lambda tok: dict(vocab_size=len(tok), pad_token_id=tok.pad_token_id, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    wide = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    gpt2 = lambda tok, width: hf.GPT2LMHeadModel(hf.GPT2Config(**ids(tok), n_embd=width, n_layer=2, n_head=2, n_positions=1024))
    llama = lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ids(english), **wide, num_key_value_heads=1, max_position_embeddings=64))
    masked = lambda kind: getattr(hf, f"{kind}ForMaskedLM")(getattr(hf, f"{kind}Config")(**ids(english), **wide, layer_norm_eps=1e-5, max_position_embeddings=70))
    bart = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48)
    made = {"openai-community/gpt2": (gpt2(english, 32), english), "openai-community/gpt2-large": (gpt2(english, 32), english), "gpt2-large": (gpt2(english, 32), english),
            "my-gpt2": (gpt2(english, 32), english), "dbmdz/german-gpt2": (gpt2(german, 16), german), "my-small-german-gpt2": (gpt2(german, 16), german),
            "HuggingFaceTB/SmolLM2-135M": (llama(), english), "HuggingFaceTB/SmolLM2-360M": (llama(), english), "my-llama": (llama(), english),
            "FacebookAI/xlm-roberta-base": (masked("XLMRoberta"), english), "my-encoder": (masked("XLMRoberta"), english), "FacebookAI/roberta-base": (masked("Roberta"), english),
            "distilbert/distilroberta-base": (masked("Roberta"), english),
            "facebook/bart-base": (hf.BartForConditionalGeneration(hf.BartConfig(**ids(english), **bart, max_position_embeddings=1024)), english),
            "google-t5/t5-base": (hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=len(sentinels), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
                pad_token_id=sentinels.pad_token_id, eos_token_id=sentinels.eos_token_id, decoder_start_token_id=sentinels.pad_token_id)), sentinels)}
    for name, (model, tok) in made.items(): model.save_pretrained(home/name); tok.save_pretrained(home/name)
    for name, language in {"english/a.txt": "a", "german/a.txt": "b", "valid.txt": "b"}.items():
        (home/name).parent.mkdir(exist_ok=True); (home/name).write_text("\n".join(words(language)) + "\n")
    for name, language in {"english": "a", "german": "b"}.items():       # words with labels: whether a word is long
        rows = [dict(tokens=t, upos=["LONG" if len(w) > 4 else "SHORT" for w in t]) for text in words(language)[:80] if (t := text.split()[:12])]
        (home/"tagged").mkdir(exist_ok=True); (home/"tagged"/f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("made")
    stand_ins(home)
    return home

@pytest.fixture
def here(tmp_path, monkeypatch, made):
    "A folder of one's own with copies of all of them, and a home that is nobody's."
    shutil.copytree(made, tmp_path/"here")
    monkeypatch.chdir(tmp_path/"here"); monkeypatch.setenv("HOME", str(tmp_path)); monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SEQWARM_CACHE", str(tmp_path/"cache")); monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path/"here"

# ---- typing

def smaller(text: str) -> str:
    for long, short in SMALLER.items(): text = text.replace(long, short)
    return text

def command(line: str) -> None:
    "One command, in this process where that is the same."
    args = shlex.split(smaller(line))
    if args[:2] == ["seqwarm", "run"]:
        given = {args[i + 1] for i, a in enumerate(args) if a == "-p"}
        args += [x for key, value in {**TINY[args[2]], "threads": 1}.items() if key not in given for x in ("-p", key, str(value).replace("'", '"'))]
    assert args[0] == "seqwarm", f"no test knows how to type {line}"
    if args[1] in ("run", "sweep", "--install-completion"):
        program = [sys.executable, "-c", "from seqwarm.batch.cli import main; main()"]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        done = subprocess.run([*program, *args[1:]], env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    else: assert main(args[1:]) == 0, line

def files(text: str) -> list[str]: return re.findall(r"\S+\.toml", text)

@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.stem)
def test_every_block_of_a_page_works_as_it_stands_there(page, here, quick):
    names, kept = {"__name__": "page"}, None
    for language, text in blocks(page):
        if language == "toml": kept = smaller(text)
        elif language == "python": exec(compile(smaller(text), page.name, "exec"), names)
        elif language == "sh":
            if kept: Path(files(text)[0]).write_text(kept); kept = None     # the file that the next block names
            for line in filter(lambda x: x not in ELSEWHERE, lines(text)): command(line)
        else: raise AssertionError(f"{page.name} has a block of {language}, which nobody runs")
    assert kept is None, "a file that no command reads"

def test_what_is_made_small_or_left_to_others_is_there():
    every = [b for p in PAGES for b in blocks(p)]
    typed = [line for language, text in every if language == "sh" for line in lines(text)]
    for long in SMALLER: assert any(long in text for _, text in every), long
    for line, other in ELSEWHERE.items(): assert line in typed and (ROOT/other).is_file(), line
    for recipe in TINY: assert any(line.startswith(f"seqwarm run {recipe} ") for line in typed), recipe

def test_each_command_ends_its_help_with_an_example_that_a_page_shows():
    typed = {line for p in PAGES for language, text in blocks(p) if language == "sh" for line in lines(text)}
    known = {name: c for name, c in typer.main.get_command(app).commands.items() if not c.hidden}
    assert len(known) > 12
    for name, c in known.items():
        assert c.epilog and c.epilog.startswith(f"Example: seqwarm {name} "), name
        assert " ".join(shlex_words(c.epilog.removeprefix("Example: "))) in typed, c.epilog

def test_the_shell_completes_commands_and_options():
    def after(words: str) -> list[str]:
        env = {**os.environ, "_SEQWARM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run([sys.executable, "-c", "from seqwarm.batch.cli import main; main()"], env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        return done.stdout.split()
    assert after("seqwarm gr") == ["graft", "grow"] and "--hidden-size" in after("seqwarm grow --hid")

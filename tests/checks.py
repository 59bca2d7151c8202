"""The checks of `make test`, each in a scratch copy so that a working tree is never touched: style, clean, wheel, notebooks, pytest."""
import filecmp, json, os, shutil, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
       "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore::DeprecationWarning"}
ENV.pop("PYTHONPATH", None)

def sh(*cmd, **kw) -> None:
    "Run a command; its failure ends the checks."
    kw["env"] = {**ENV, **kw.pop("env", {})}
    words = [str(c) for c in cmd]
    if (code := subprocess.run(words, **kw).returncode): raise SystemExit(f"failed ({code}): {' '.join(w for w in words if len(w) < 200)[:500]}")

def project_files() -> list[str]:
    "What belongs to the project: tracked, or new and not ignored; without git, the folders that matter."
    git = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0: return sorted({f for f in git.stdout.split("\0") if f and (ROOT/f).is_file()})
    top = [f for f in ROOT.iterdir() if f.is_file()]
    deep = [f for d in ("nbs", "seqwarm", "tests", "results") for f in (ROOT/d).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    return sorted(str(f.relative_to(ROOT)) for f in top + deep)

def copy_project(to: Path) -> Path:
    for f in project_files():
        (to/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, to/f)
    return to

def style(tmp: Path) -> None:
    "ruff finds nothing, in notebooks, tests and benchmarks."
    sh(sys.executable, "-m", "ruff", "check", "--no-cache", ".", cwd=ROOT)

def clean(tmp: Path) -> None:
    "nbdev_clean and nbdev_export change nothing."
    copy = copy_project(tmp/"clean")
    for command in ("nbdev_clean", "nbdev_export"): sh(BIN/command, cwd=copy, env={"PYTHONPATH": str(copy)})
    now = {str(f.relative_to(copy)) for f in copy.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    was = set(project_files())
    stray = sorted(f for f in now ^ was if f.startswith(("nbs/", "seqwarm/")))
    differ = sorted(f for f in now & was if not filecmp.cmp(ROOT/f, copy/f, shallow=False))
    if stray or differ: raise SystemExit("run nbdev_clean and nbdev_export; they change: " + ", ".join(stray + differ))
    print(f"{len(was)} files, unchanged by nbdev_clean and nbdev_export")

def notebooks(tmp: Path) -> None:
    "Every notebook runs, from a copy of the tree, two at a time."
    copy = copy_project(tmp/"notebooks")
    workers = str(min(2, os.cpu_count() or 1))
    sh(BIN/"nbdev_test", "--n_workers", workers, "--do_print", "--timing", cwd=copy, env={"PYTHONPATH": str(copy)})

IMPORT_ALL = """
import importlib, pkgutil, sys, seqwarm
from pathlib import Path
home = Path(seqwarm.__file__).parent
assert Path(sys.prefix).resolve() in home.resolve().parents, f"imported from {home}, not from the wheel"
names = [m.name for m in pkgutil.walk_packages(seqwarm.__path__, "seqwarm.")]
for name in names: importlib.import_module(name)
lost = set(sys.argv[1:]) - set(names)
assert not lost, f"not in the wheel: {sorted(lost)}"
bad = {"nbdev", "fastcore"} & set(sys.modules)
assert not bad, f"the package imports {bad}"
print(len(names), "modules imported from", home)
"""

FEW = dict(clp=dict(source_steps=2, helper_steps=2, horizons=[2]), sequential=dict(mlm_steps=4, seq_steps=4, two_steps=4, probe_steps=2),
           metro=dict(steps=8, probe_steps=2), growth=dict(small_steps=4, steps=8), together=dict(small_steps=4, helper_steps=4, steps=10))   # a recipe in seconds
RUN_ONE = """
import json, sys, nbformat, papermill
notebook, parameters = sys.argv[1], json.loads(sys.argv[2])
nb = nbformat.read(notebook, 4)
assert "google.colab" in nb.cells[2].source, "the cell that installs the package is missing"
nb.cells.append(nbformat.v4.new_code_cell('''
import seqwarm, sys
from pathlib import Path
assert Path(sys.prefix).resolve() in Path(seqwarm.__file__).resolve().parents, seqwarm.__file__
'''))
nbformat.write(nb, notebook)
papermill.execute_notebook(notebook, notebook, parameters, kernel_name="python3", progress_bar=False)
"""

def alone(python: Path, notebook: Path, cache: Path) -> None:
    "A recipe's notebook runs in an empty folder, by a Python that has the wheel and no checkout, and leaves a record there."
    folder, name = notebook.parent/notebook.stem, notebook.stem.split("_")[1]
    folder.mkdir()
    sh(python, "-I", "-W", "ignore", "-c", RUN_ONE, notebook, json.dumps(FEW[name] | dict(threads=1)), cwd=folder, env={"SEQWARM_CACHE": str(cache)})
    record = json.loads((folder/"runs"/name/"record.json").read_text())
    if record["environment"]["commit"] or [f.name for f in folder.iterdir()] != ["runs"]: raise SystemExit(f"{name} knows of a checkout, or wrote beside its runs")

def wheel(tmp: Path) -> None:
    "The wheel is built, installed in another environment; everything is imported and called from there, and each recipe runs in an empty folder."
    copy, env = copy_project(tmp/"build"), tmp/"env"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    sh(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp/"dist", copy)
    [whl] = (tmp/"dist").glob("*.whl")
    sh(sys.executable, "-m", "venv", "--without-pip", env)
    sh(*pip, "--python", env/"bin/python", "install", "--no-deps", "--no-index", whl)
    site = next(env.glob("lib/python*/site-packages"))
    deps = next(Path(p) for p in sys.path if p.endswith("site-packages"))
    (site/"dependencies.pth").write_text(f"{deps}\n")  # they are found, but not the .pth of the editable install among them
    away = tmp/"away"; away.mkdir()
    modules = [f[:-3].replace("/", ".").removesuffix(".__init__") for f in project_files() if f.startswith("seqwarm/") and f.endswith(".py")]
    sh(env/"bin/python", "-I", "-c", IMPORT_ALL, *(m for m in modules if m != "seqwarm"), cwd=away)
    seqwarm = env/"bin/seqwarm"
    if not seqwarm.exists(): raise SystemExit("the wheel has no seqwarm command")
    sh(seqwarm, "--version", cwd=away); sh(seqwarm, "recipes", cwd=away); sh(seqwarm, "notebooks", "out", cwd=away)
    want = sorted(Path(f).name for f in project_files() if f.startswith("nbs/recipes/") and f.endswith(".ipynb"))
    got = sorted(f.name for f in (away/"out").glob("*.ipynb"))
    if want != got: raise SystemExit(f"seqwarm notebooks wrote {got}, the recipes are {want}")
    tiny = {"source_steps": 2, "helper_steps": 2, "horizons": 2, "words": 8000}   # the recipe itself, from the wheel alone
    sh(seqwarm, "run", "clp", *(x for k, v in tiny.items() for x in ("-p", k, str(v))), cwd=away, env={"SEQWARM_CACHE": str(tmp/"cache")})
    if not (away/"runs"/"clp"/"record.json").exists(): raise SystemExit("the recipe left no record")
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool: list(pool.map(lambda f: alone(env/"bin/python", f, tmp/"cache"), sorted((away/"out").glob("*.ipynb"))))
    if (ROOT/"claims.toml").exists() and not (site/"seqwarm/claims.toml").exists(): raise SystemExit("claims.toml is not in the wheel")
    print(f"{whl.name}: {whl.stat().st_size / 1000:.0f} kB, {len(want)} recipe notebooks")

def pytest(tmp: Path) -> None:
    sh(sys.executable, "-m", "pytest", "-n", min(2, os.cpu_count() or 1), "--dist", "loadfile", cwd=ROOT)   # a file's tests stay together: they share what is costly

CHECKS = {f.__name__: f for f in (style, clean, wheel, notebooks, pytest)}

if __name__ == "__main__":
    asked = sys.argv[1:] or list(CHECKS)
    if wrong := [a for a in asked if a not in CHECKS]: raise SystemExit(f"no check {wrong[0]!r}; there are: {', '.join(CHECKS)}")
    seconds = {}
    for i, name in enumerate(asked, 1):
        print(f"--- {i}/{len(asked)} {name}: {(CHECKS[name].__doc__ or 'the tests').strip()}", flush=True)
        start = time.perf_counter()
        if name == "pytest" and len(seconds): print("    so far: " + ", ".join(f"{k} {v:.0f} s" for k, v in seconds.items()), flush=True)
        with tempfile.TemporaryDirectory(prefix="seqwarm-") as d: CHECKS[name](Path(d))
        seconds[name] = time.perf_counter() - start
        if name != "pytest": print(f"    {seconds[name]:.0f} s", flush=True)

"""What holds the house together: names, floors, sizes, and the three places that name versions."""
import ast, configparser, json, re, sys
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts and "runs" not in p.parts)
MODULES = sorted(p for p in (ROOT/"seqwarm").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
FLOORS = ["core", "families", "methods", "recipes", "batch"]   # bottom to top
settings = configparser.ConfigParser(delimiters=["="]); settings.read(ROOT/"settings.ini")
settings = settings["DEFAULT"]
label = lambda p: str(p.relative_to(ROOT))

def cells(path: Path) -> list[dict]: return json.loads(path.read_text())["cells"]
def source(cell: dict) -> str: return "".join(cell["source"])
def exported(cell: dict) -> bool: return cell["cell_type"] == "code" and re.match(r"\s*#\|\s*export\b", source(cell)) is not None
def module_of(nb: Path) -> str: return f"{nb.parent.name}.{re.sub(r'^[0-9]+_', '', nb.stem)}"
NUMBER = {module_of(nb): (FLOORS.index(nb.parent.name), int(re.match(r"\d+", nb.stem)[0])) for nb in NOTEBOOKS if nb.parent.name in FLOORS}

def imports(tree: ast.AST, module: str) -> set[str]:
    "Full names of the modules of seqwarm that a module's code imports, anywhere in it."
    package, found = ["seqwarm", *module.split(".")[:-1]], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {base} | {f"{base}.{a.name}" for a in node.names}
    return found

def up(module: str, names: set[str]) -> list[str]:
    "Those of the imported names that an arrow from `module` may not reach."
    here, wrong = NUMBER[module], []
    for name in sorted(names):
        other = ".".join(name.split(".")[1:3])
        if not name.startswith("seqwarm.") or other == module: continue
        floor = other.split(".")[0]
        if floor in FLOORS and FLOORS.index(floor) > here[0]: wrong.append(name)
        elif other in NUMBER and NUMBER[other] >= here: wrong.append(name)
        elif floor == "recipes" and here[0] == FLOORS.index("recipes"): wrong.append(name)   # a recipe knows no other recipe
    return wrong

@pytest.mark.parametrize("nb", NOTEBOOKS, ids=label)
def test_folder_name_and_default_exp_agree(nb):
    said = [m[1] for c in cells(nb) if c["cell_type"] == "code" for m in [re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M)] if m]
    if nb.parent == ROOT/"nbs": assert nb.name == "index.ipynb" and not said, "only the README's notebook lies outside the floors"; return
    assert nb.parent.name in FLOORS and re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", nb.stem)
    assert said == [module_of(nb)]
    assert (ROOT/"seqwarm"/nb.parent.name/f"{module_of(nb).split('.')[1]}.py").exists()

def test_numbers_within_a_floor_differ_and_modules_have_notebooks():
    assert len({NUMBER[m] for m in NUMBER}) == len(NUMBER)
    assert {label(m) for m in MODULES} == {f"seqwarm/{m.replace('.', '/')}.py" for m in NUMBER}

@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_go_down_only(path):
    module = f"{path.parent.name}.{path.stem}"
    assert not (wrong := up(module, imports(ast.parse(path.read_text()), module))), f"{module} reaches up to {wrong}"

def test_the_layer_test_would_see_an_arrow_that_points_up():
    bad = {"core.files": ["from seqwarm.batch.run import run", "from ..batch import run", "def f():\n    import seqwarm.batch.run"],
           "core.errors": ["from seqwarm.core.files import Lock", "from .files import Lock", "from seqwarm.core import files"]}
    for module, codes in bad.items():
        for code in codes: assert up(module, imports(ast.parse(code), module)), code
    assert not up("batch.run", imports(ast.parse("from seqwarm.core.files import Lock\nfrom ..core.errors import Refusal\nimport torch"), "batch.run"))

def top_names(path: Path) -> set[str]: return {n.split(".")[0] for n in imports(ast.parse(path.read_text()), f"{path.parent.name}.{path.stem}")}

def top_level(path: Path) -> set[str]: return {name.split(".")[0] for node in ast.parse(path.read_text()).body for name in imports(ast.Module([node], []), "core.x") if isinstance(node, (ast.Import, ast.ImportFrom))}

@pytest.mark.parametrize("path", MODULES, ids=label)
def test_a_module_imports_only_what_is_installed_with_it(path):
    distribution = {"yaml": "pyyaml", "huggingface_hub": "transformers", "jupyter_client": "nbclient", "IPython": "ipykernel", "packaging": "transformers", "rich": "typer", "psutil": "accelerate"}
    wanted = {distribution.get(n, n) for n in top_names(path)} - set(sys.stdlib_module_names) - {"seqwarm", "__future__", ""}
    has = {canonicalize_name(Requirement(r).name) for r in settings["requirements"].split()}
    extra = {canonicalize_name(Requirement(r).name) for key in ("slurm", "lab") for r in settings[f"{key}_requirements"].split()} - top_level(path)   # imported late, where it is asked for
    assert {canonicalize_name(n) for n in wanted} <= has | extra
    assert not {"nbdev", "fastcore"} & top_names(path)

@pytest.mark.parametrize("nb", NOTEBOOKS, ids=label)
def test_a_notebook_is_small_and_clean(nb):
    all_cells = cells(nb)
    assert len(all_cells) <= 80 and nb.stat().st_size <= 300_000
    lines = sum(1 for c in all_cells if exported(c) for line in source(c).splitlines() if line.strip() and not line.lstrip().startswith("#|"))
    assert lines <= 300, f"{lines} exported lines"
    for c in all_cells:
        assert set(c["metadata"]) <= {"tags"}, c["metadata"]
        if c["cell_type"] != "code": continue
        assert c["execution_count"] is None
        assert not re.search(r"^\s*(from|import) (nbdev|fastcore)\b", source(c), re.M)
        for out in c["outputs"]:
            assert out["output_type"] == "display_data", "only figures are committed"
            assert len(json.dumps(out)) <= 200_000
    prose = [c for c in all_cells if c["cell_type"] == "markdown"]
    assert source(prose[0]).startswith("# ") and (nb.stem == "index" or re.search(r"^> \S", source(prose[0]), re.M)), "a title, and what it is about in one sentence"
    assert not re.search(r"^> .*\n[^\n]", source(prose[0]), re.M), "the sentence becomes the module's docstring, so it stands on one line"
    tagged = [c for c in all_cells if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == (1 if nb.parent.name == "recipes" else 0)

def public(path: Path) -> tuple[list[str], list[ast.stmt]]:
    "`__all__` of a module, and its public functions and classes."
    tree = ast.parse(path.read_text())
    [names] = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    return names, [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]

@pytest.mark.parametrize("path", MODULES, ids=label)
def test_public_names_are_few(path): assert len(names := public(path)[0]) <= 8, names

@pytest.mark.parametrize("path", MODULES, ids=label)
def test_what_is_public_says_what_it_does_and_takes(path):
    bare = [d.name for d in public(path)[1] if not ast.get_docstring(d)]
    untyped = [f"{f.name}({a.arg})" for f in public(path)[1] if isinstance(f, ast.FunctionDef)
               for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.annotation is None]
    assert not bare and not untyped, f"no docstring: {bare}; no type: {untyped}"

def pins() -> dict[str, Version]:
    lines = [line for line in (ROOT/"constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines), "one exact pin a line"
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return {k: Version(v) for k, v in found.items()}

def test_environment_yml_names_the_tested_set():
    import yaml
    env = yaml.safe_load((ROOT/"environment.yml").read_text())
    assert env["channels"] == ["conda-forge"]
    python = next(d for d in env["dependencies"] if isinstance(d, str) and d.startswith("python="))
    low, high = (tuple(map(int, settings[k].split("."))) for k in ("min_python", "max_python"))
    assert low <= tuple(map(int, python.removeprefix("python=").split("."))) <= high
    assert {k: Version(v) for k, v in (d.split("==") for d in next(d["pip"] for d in env["dependencies"] if isinstance(d, dict)))} == pins()

def test_the_ranges_admit_the_pins():
    tested = pins()
    for key in (k for k in settings if k.endswith("requirements")):
        for r in map(Requirement, settings[key].split()):
            assert tested[canonicalize_name(r.name)] in r.specifier, f"{key}: {r} does not admit what constraints.txt pins"

def test_the_ranges_admit_what_users_have():
    ranges = {r.name: r.specifier for r in map(Requirement, settings["requirements"].split())}
    for name, versions in {"torch": ["2.11.0", "2.13.0"], "transformers": ["5.17.0", "5.23.0"]}.items():
        for v in versions: assert v in ranges[name]
    assert "4.57.0" not in ranges["transformers"] and "6.0.0" not in ranges["transformers"]

def test_the_installed_set_is_the_pinned_one():
    from importlib.metadata import distributions
    tested, wrong = pins(), {}
    for d in distributions():
        name = canonicalize_name(d.metadata["Name"])
        if name in tested and Version(Version(d.version).public) != tested[name]: wrong[name] = (d.version, str(tested[name]))
    if wrong and Path(sys.prefix).resolve() != (ROOT/".venv").resolve(): pytest.skip(f"NOT the environment of make test: {wrong}")
    assert not wrong

def test_python_versions_agree():
    import tomllib
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    low, high = settings["min_python"], settings["max_python"]
    assert project["requires-python"] == f">={low},<3.{int(high.split('.')[1]) + 1}"
    cff, version = (ROOT/"CITATION.cff").read_text(), settings["version"]
    assert f"version: {version}\n" in cff and f'__version__ = "{version}"' in (ROOT/"seqwarm"/"__init__.py").read_text()

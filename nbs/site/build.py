"""`make docs`: notebooks as they ran, what the modules give, and the pages beside this file become a site that needs no network."""
import argparse, ast, hashlib, html, importlib, inspect, json, multiprocessing, os, re, shutil, sys, tempfile, tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLOORS = {"core": "parts that all of it is built from", "families": "model families, a table each", "methods": "what papers propose, built",
          "recipes": "what papers claim, tested", "batch": "what runs them"}

# --- the notebooks

def notebooks() -> dict[str, Path]:
    "Page -> notebook, in the order of reading: core/10_plan -> nbs/core/10_plan.ipynb."
    of = {f"{floor}/{p.stem}": p for floor in FLOORS for p in sorted((ROOT/"nbs"/floor).glob("*.ipynb"))}
    return {"readme": ROOT/"nbs/index.ipynb"} | of

def module(page: str) -> str: return re.sub(r"/\d+_", ".", page)
def source(cell: dict) -> str: return "".join(cell["source"])

def reached(text: str) -> set[str]:
    "Names of the modules that a module or a notebook imports, at any depth; every family, where the layout is among them."
    found, todo = set(), [("", text)]
    while todo:
        floor, text = todo.pop()
        names = {f"{a}.{b}" for a, b in re.findall(r"(?:seqwarm\.|from \.\.)(\w+)\.(\w+)", text)}
        near = re.findall(r"from \.(?:(\w+)| import (.+))", text)
        names |= {f"{floor}.{b.strip()}" for one, many in near for b in (one or many.split("#")[0]).split(",")}
        if "core.layout" in names: names |= {f"families.{p.stem}" for p in (ROOT/"seqwarm/families").glob("[a-z]*.py")}
        for name in sorted(names - found):
            file = ROOT/"seqwarm"/(name.replace(".", "/") + ".py")
            if file.is_file(): found.add(name); todo.append((name.split(".")[0], file.read_text()))
    return found

def key(path: Path) -> str:
    "Of all that a notebook's output depends on: its cells, the modules that it reaches, claims and results."
    text = "\n".join(source(c) for c in json.loads(path.read_text())["cells"])
    files = [ROOT/"seqwarm"/(m.replace(".", "/") + ".py") for m in sorted(reached(text))] + [ROOT/"claims.toml", ROOT/"constraints.txt"]
    if "results" in text: files += sorted(p for p in (ROOT/"results").iterdir() if p.suffix in (".json", ".csv"))
    seen = hashlib.sha256(text.encode())
    for f in files: seen.update(f.read_bytes())
    return seen.hexdigest()[:24]

def execute(path: Path, to: Path, scratch: Path) -> str:
    "Run a notebook in a folder of its own and keep it with its outputs; what went wrong, if anything."
    os.environ.update(PLOTLY_RENDERER="plotly_mimetype", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", IN_TEST="1")
    sys.path.insert(0, str(ROOT))
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    os.chdir(ROOT/"nbs" if path.stem == "index" else Path(tempfile.mkdtemp(dir=scratch)))
    book, shell = read_nb(path), CaptureShell(path)
    try: shell.run_all(book, exc_stop=True)
    except BaseException: return f"{path.relative_to(ROOT)} fails:\n{shell.prettytb(fname=path)}"
    finally: os.chdir(ROOT)
    write_nb(book, to.with_suffix(".part"))
    to.with_suffix(".part").rename(to)
    return ""

def executed(pages: dict[str, Path], cache: Path, workers: int) -> dict[str, Path]:
    "Page -> notebook with its outputs; what ran before, and would run the same, is found."
    cache.mkdir(parents=True, exist_ok=True)
    places = {page: cache/f"{path.stem}-{key(path)}.ipynb" for page, path in pages.items()}
    todo = [page for page, place in places.items() if not place.exists()]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1)   # each takes __main__ for itself
    with tempfile.TemporaryDirectory(prefix="seqwarm-") as scratch, pool:
        jobs = {pool.submit(execute, pages[page], places[page], Path(scratch)): page for page in todo}
        for i, job in enumerate(as_completed(jobs), 1):
            if wrong := job.result():
                pool.shutdown(cancel_futures=True)
                raise SystemExit(wrong)
            print(f"{i}/{len(todo)} {jobs[job]}", flush=True)
    for old in set(cache.iterdir()) - set(places.values()): old.unlink()
    return places

# --- a notebook as a page

def fence(text: str, kind: str) -> str:
    "A block of code, whatever stands in it."
    ticks = "`"*max([3, *(len(m) + 1 for m in re.findall("`{3,}", text))])
    return f"{ticks}{kind}\n{text.rstrip()}\n{ticks}\n"

def raw(text: str) -> str: return fence(text, "{raw} html")

def drawn(fig: dict) -> str:
    "A figure, drawn when it comes into view; the script that draws is loaded once, by the page."
    data = json.dumps(dict(data=fig["data"], layout=fig["layout"])).replace("</", "<\\/")
    height = fig["layout"].get("height", 450)
    return raw(f'<div class="figure" style="min-height:{height}px"><script type="application/json">{data}</script></div>')

def output(out: dict) -> str:
    "One output of a cell, in the richest of its forms that a page can show."
    text = lambda x: x if isinstance(x, str) else "".join(x)
    plain = lambda x: fence(x, "{code-block} text\n:class: output") if x.strip() else ""
    if out["output_type"] == "stream": return plain(text(out["text"])) if out["name"] == "stdout" else ""
    data = out.get("data", {})
    if fig := data.get("application/vnd.plotly.v1+json"): return drawn(fig)
    if png := data.get("image/png"): return raw(f'<img class="output" alt="" src="data:image/png;base64,{text(png).strip()}">')
    for kind in ("text/html", "image/svg+xml"):
        if kind in data: return raw(f'<div class="output">{text(data[kind])}</div>')
    if "text/markdown" in data: return text(data["text/markdown"]) + "\n"
    last = text(data.get("text/plain", ""))
    return "" if last.startswith("<IPython") else plain(last)

def linked(text: str, pages: dict[str, str], here: str) -> str:
    "Prose whose names of modules lead to their pages, and whose pictures are those of `results/`."
    def link(m: re.Match) -> str:
        name = m[1].removeprefix("seqwarm.")
        owner, _, rest = name.rpartition(".")
        if name in pages and name != here: return f"[`{m[1]}`](/{pages[name]}.md)"
        if owner in pages and owner != here and rest in public(owner): return f"[`{m[1]}`](#seqwarm.{name})"
        return m[0]
    parts = re.split(r"(^```.*?^```[^\n]*$)", text, flags=re.M | re.S)
    plain = lambda p: re.sub(r"!\[([^\]]*)\]\(https?://[^)]+\)", r"\1", p)      # a badge lies elsewhere; a page loads nothing
    parts[::2] = [re.sub(r"(?<![`\[])`([\w.]+)`(?!`)", link, re.sub(r"\]\(results/", "](/results/", plain(p))) for p in parts[::2]]
    return "".join(parts)

def public(name: str) -> list[str]:
    "The names that a module gives."
    tree = ast.parse((ROOT/"seqwarm"/(name.replace(".", "/") + ".py")).read_text())
    return next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")

def page_of(page: str, path: Path, known: dict[str, str]) -> str:
    "A notebook in MyST's markdown."
    parts, name = [], module(page)
    for cell in json.loads(path.read_text())["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown": parts.append(linked(text, known, name)); continue
        if re.search(r"^#\|\s*(default_exp|hide)\b", text, re.M): continue
        kept = "\n".join(line for line in text.splitlines() if not line.startswith("#|"))
        if kept.strip() and page != "readme":
            code = fence(kept, "{code-block} python" + ("\n:class: exported" if re.match(r"\s*#\|\s*export\b", text) else ""))
            long = kept.count("\n") > 45
            parts.append(f"{raw('<details><summary>code</summary>')}{code}{raw('</details>')}" if long else code)
        parts += filter(None, map(output, cell.get("outputs", [])))
    if page != "readme":
        head, parts[0] = parts[0].split("\n", 1)
        parts[0] = f"({page.replace('/', '-')})=\n{head}\n{parts[0]}\n\n[What it gives: `seqwarm.{name}`](/api/{name}.md)"
    return "\n\n".join(parts) + "\n"

# --- what a module gives

def told(kind: object) -> str:
    "A type as one writes it."
    if kind is None or kind is inspect.Parameter.empty: return ""
    text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", text).strip("'\"")

def default(value: object) -> str | None:
    "A default as one writes it; None for one that cannot be written."
    try: ast.literal_eval(repr(value)); return repr(value)
    except (ValueError, SyntaxError): return None

def cell_of(text: str) -> str: return " ".join(text.split()).replace("|", "\\|")

def takes(f: Callable) -> tuple[str, str]:
    "The signature of a function or class, and a table of what it takes and gives, from the comments beside the parameters."
    from fastcore.docments import docments
    try: said, params = docments(f, full=True), inspect.signature(f).parameters
    except (TypeError, ValueError): return "()", ""
    words, rows = [], []
    for name, p in params.items():
        if name in ("self", "cls"): continue
        lead = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        if p.kind is p.KEYWORD_ONLY and "*" not in words and not any(w.startswith("*") for w in words): words.append("*")
        short = "" if p.default is p.empty else f"={default(p.default) or '...'}"
        words.append(f"{lead}{name}{short}")
        comment, given = (said.get(name) or {}).get("docment") or "", default(p.default) if p.default is not p.empty else None
        rows.append(f"| `{lead}{name}` | {code(told(p.annotation))} | {code(given or '')} | {cell_of(comment)} |")
    back = said.get("return") or {}
    kind = told(back.get("anno")) if not isinstance(f, type) else ""
    if kind and kind != "None": rows.append(f"| *gives* | {code(kind)} |  | {cell_of(back.get('docment') or '')} |")
    table = "\n".join(["| | type | default | |", "|---|---|---|---|", *rows]) if rows else ""
    return f"({', '.join(words)})", table

def code(text: str) -> str: return f"`{cell_of(text)}`" if text else ""

def directive(kind: str, head: str, body: list[str], depth: int = 0) -> str:
    "One object of the Python domain, so that it is indexed and searched."
    colons = ":"*(5 - depth)
    return f"{colons}{{py:{kind}}} {head}\n" + "\n\n".join(filter(None, body)) + f"\n{colons}\n"

def first_words(thing: object) -> str:
    text = inspect.getdoc(thing) or ""
    return "" if re.match(r"\w+\(.*\)$", text, re.S) else text      # what a dataclass says of itself

def methods(cls: type) -> Iterator[str]:
    "What a class of this package can do."
    for name, thing in vars(cls).items():
        f = getattr(thing, "__func__", thing)
        if name.startswith("_"): continue
        if isinstance(thing, property) or type(thing).__name__ == "cached_property":
            yield directive("property", name, [first_words(thing)], 1)
        elif inspect.isfunction(f) and f.__module__.startswith("seqwarm"):
            head, table = takes(f)
            yield directive("method", name + head, [first_words(f), table], 1)

def api_of(name: str, page: str) -> str:
    "The page of a module: each public name with its signature, docstring and parameters."
    m = importlib.import_module(f"seqwarm.{name}")
    text = inspect.getsource(m)
    parts = [f"# {name}", m.__doc__ or "", f"How it is built: [{page}](/{page}.md).", f":::{{py:module}} seqwarm.{name}\n:::"]
    for one in public(name):
        thing = getattr(m, one)
        if isinstance(thing, type):
            head, table = takes(thing)
            parts.append(directive("class", one + head, [first_words(thing), table, *methods(thing)]))
        elif inspect.isroutine(thing):
            head, table = takes(thing)
            parts.append(directive("function", one + head, [first_words(thing), table]))
        else:
            said = re.search(rf"^{one}\b[^\n]*?=[^\n]*(?:\n[ \t}})\]][^\n]*)*?[ ]{{2,}}# ([^\n]*)", text, re.M)
            parts.append(directive("data", one, [said[1] if said else ""]))
    return "\n\n".join(parts) + "\n"

# --- pages made of what is there

def floor_page(floor: str, pages: list[str]) -> str:
    "A floor's notebooks, each with its sentence."
    lines = [f"- [{module(p)}](/{p}.md): {re.search(r'^> (.+)$', source(json.loads(path.read_text())['cells'][0]), re.M)[1]}"
             for p, path in notebooks().items() if p in pages]
    tree = fence("\n".join([":hidden:", "", *(f"/{p}" for p in pages)]), "{toctree}")
    return f"# {floor}: {FLOORS[floor]}\n\n" + "\n".join(lines) + f"\n\n{tree}"

def api_page(names: list[str]) -> str:
    "All modules, with what each gives."
    lines = [f"- [{n}](/api/{n}.md): {', '.join(f'`{x}`' for x in public(n))}" for n in names]
    tree = fence("\n".join([":hidden:", "", *(f"/api/{n}" for n in names)]), "{toctree}")
    return "# What each module gives\n\n" + "\n".join(lines) + f"\n\n{tree}"

def claims_page() -> str:
    "Every claim of claims.toml, in full."
    claims = tomllib.loads((ROOT/"claims.toml").read_text())
    parts = ["# All claims", "Each claim of a paper in our own words, what the paper says, and how it is measured here. What was measured, "
             "with verdicts, stands on [the page of results](/readme.md); `seqwarm report` makes such a page of runs of your own."]
    for name, c in claims.items():
        wanted = c.get("written", "{:.0%}")
        says = {"paper": c["paper"], "the paper's value": wanted.format(c["value"]) if "value" in c else "none that is known for certain",
                "counts as reproduced": f"from {wanted.format(c['at_least'])} on", "measured": c["measured"]}
        parts.append(f"## {name}\n\n{c['says']}\n\n" + "\n".join(f"- *{k}*: {v}" for k, v in says.items()))
    return "\n\n".join(parts) + "\n"

def put(file: Path, text: str) -> None:
    "Write what is new: an unchanged file is not built again."
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists() or file.read_text() != text: file.write_text(text)

def lay(work: Path, books: dict[str, Path]) -> None:
    "All that Sphinx reads."
    known = {module(p): p for p in books if p != "readme"}
    made = {f"{p}.md": page_of(p, path, known) for p, path in books.items()}
    made |= {f"{floor}/index.md": floor_page(floor, [p for p in books if p.startswith(floor)]) for floor in FLOORS}
    made |= {f"api/{name}.md": api_of(name, page) for name, page in known.items()}
    made |= {"api/index.md": api_page(list(known)), "claims.md": claims_page()}
    made |= {str(p.relative_to(HERE)): linked(p.read_text(), known, "") for p in sorted(HERE.rglob("*.md"))}
    for name, text in made.items(): put(work/name, text)
    for old in (p for p in work.rglob("*.md") if str(p.relative_to(work)) not in made): old.unlink()
    for picture in (ROOT/"results").glob("*.svg"):
        (work/"results").mkdir(exist_ok=True); shutil.copy(picture, work/"results")
    from plotly.offline import get_plotlyjs
    put(work/"drawing/plotly.min.js", get_plotlyjs())

# --- the site, and whether it holds together

class Links(HTMLParser):
    "What a page refers to, what it loads, and what may be referred to in it."
    def __init__(self, text: str):
        super().__init__(); self.to, self.loads, self.ids = set(), set(), set(); self.feed(text)
    def handle_starttag(self, tag: str, attrs: list) -> None:
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.to.add(a["href"])
        if a.get("src"): self.loads.add(a["src"])
        if tag == "link" and a.get("href") and a.get("rel") not in ("canonical",): self.loads.add(a["href"])

def faults(site: Path) -> list[str]:
    "Links that lead nowhere, and what a page would fetch from elsewhere."
    pages = {p: Links(p.read_text()) for p in site.rglob("*.html")}
    wrong = []
    for page, links in pages.items():
        outside = re.compile(r"(?:[a-z][a-z+.-]*:)?//|data:|mailto:")
        where = page.relative_to(site)
        wrong += [f"{where} loads {x}" for x in sorted(links.loads) if outside.match(x) and not x.startswith("data:")]
        for link in sorted(links.to | links.loads):
            if outside.match(link): continue
            file, at = urldefrag(link)
            target = (page.parent/unquote(file.split("?")[0])).resolve() if file else page
            if not target.is_file(): wrong.append(f"{where} leads to {link}, which is not there")
            elif at and target in pages and unquote(at) not in pages[target].ids: wrong.append(f"{where} leads to {link}: no such place")
    for style in site.rglob("*.css"):
        outside = re.findall(r"""(?:url\(|@import )["']?((?:https?:)?//[^"')]+)""", style.read_text())
        wrong += [f"{style.relative_to(site)} loads {x}" for x in outside]
    return wrong

def build(out: Path, work: Path, quick: bool = False, workers: int = 2) -> None:
    "The whole site; quick: notebooks are not run, and stand there without their outputs."
    from sphinx.cmd.build import build_main
    sys.path.insert(0, str(ROOT))
    books = notebooks() if quick else executed(notebooks(), work.parent/"executed", workers)
    work.mkdir(parents=True, exist_ok=True)
    lay(work, books)
    asked = ["-q", "-W", "--keep-going", "-j", str(workers), "-b", "html", "-c", str(HERE), "-d", str(work.parent/f"{work.name}.trees")]
    if code := build_main([*asked, str(work), str(out)]): raise SystemExit(code)
    if wrong := faults(out): raise SystemExit("\n".join([*wrong[:40], f"{len(wrong)} faults"]))
    print(f"{sum(1 for _ in out.rglob('*.html'))} pages; open {html.escape(str(out/'index.html'))}")

if __name__ == "__main__":
    say = argparse.ArgumentParser(description=__doc__)
    say.add_argument("--out", type=Path, default=ROOT/"_docs", help="the site")
    say.add_argument("--work", type=Path, default=ROOT/"_proc/site", help="what it is built from")
    say.add_argument("--quick", action="store_true", help="do not run the notebooks")
    say.add_argument("--workers", type=int, default=2)
    given = say.parse_args()
    build(given.out.resolve(), given.work.resolve(), given.quick, given.workers)

"""The site: it is built without a network and a warning, its links lead somewhere, and what it shows is what the notebooks and modules say."""
import json, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/"nbs/site"))
import build  # noqa: E402

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The whole site but for the outputs of notebooks, which another check runs."
    home = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, ROOT/"nbs/site/build.py", "--quick", "--workers", "1", "--out", home/"out", "--work", home/"work"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]      # a warning, a link that leads nowhere, or something that a page would fetch
    return home/"out"

def test_every_notebook_and_module_has_a_page_and_is_found(site):
    index = (site/"searchindex.js").read_text()
    for page, path in build.notebooks().items():
        title = build.source(json.loads(path.read_text())["cells"][0]).splitlines()[0].removeprefix("# ")
        assert f"<h1>{title.split('`')[0][:20]}" in (site/f"{page}.html").read_text().replace("&#x27;", "'").replace("’", "'"), page
        if page != "readme": assert (site/f"api/{build.module(page)}.html").is_file() and json.dumps(page) in index

def test_the_order_of_reading_is_the_one_of_the_first_page(site):
    captions = re.findall(r'class="caption-text">([^<]+)<', (site/"index.html").read_text())
    assert list(dict.fromkeys(captions)) == ["Begin", "Recipes", "On your own checkpoint", "Concepts", "Reference", "Claims"]

def test_a_function_is_shown_with_the_comments_beside_its_parameters(site):
    page = (site/"api/core.figures.html").read_text()
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))
    assert "loss_curves(metrics, by='tokens', reference='scratch', floor=None, title='', log=False, level=None)" in plain
    assert "arm that the others are compared with" in plain and 'id="seqwarm.core.figures.loss_curves"' in page
    assert "the new checkpoint" in (site/"api/core.plan.html").read_text() and 'id="seqwarm.core.plan.Plan.check"' in (site/"api/core.plan.html").read_text()

def test_formulas_are_drawn_without_a_script(site):
    page = (site/"methods/50_width.html").read_text()
    loaded = re.findall(r'<script[^>]* src="([^"?]+)', page)
    assert "<math" in page and loaded and all(x.startswith("../_static/") and "math" not in x.lower() for x in loaded)

def test_a_figure_waits_as_data_and_nothing_ends_it_early():
    out = dict(output_type="display_data", data={"application/vnd.plotly.v1+json": dict(data=[dict(text=["</script>"])], layout=dict(height=99))})
    page = build.output(out)
    assert page.count("</script>") == 1 and "min-height:99px" in page and json.loads(re.search(r"json\">(.*)</script>", page)[1])["data"][0]["text"] == ["</script>"]

def test_what_is_wrong_with_a_site_is_told(tmp_path):
    (tmp_path/"a.html").write_text('<a href="b.html#there">x</a><a href="b.html#gone">x</a><a href="c.html">x</a><a href="https://x.org">x</a><img src="https://x.org/y.png">')
    (tmp_path/"b.html").write_text('<p id="there"></p>'); (tmp_path/"s.css").write_text("@import url(//fonts.org/a.css);")
    told = build.faults(tmp_path)
    assert len(told) == 4 and all(any(word in t for t in told) for word in ("b.html#gone", "c.html", "x.org/y.png", "fonts.org"))

def test_an_output_is_found_again_as_long_as_nothing_it_depends_on_changes():
    assert {"core.errors", "core.files"} <= build.reached("from seqwarm.core.plan import Plan") and "families.llama" in build.reached("from seqwarm.core.plan import Plan")
    assert not build.reached("import numpy") and "core.train" not in build.reached("from seqwarm.core.errors import Refusal")
    assert build.key(ROOT/"nbs/core/10_plan.ipynb") != build.key(ROOT/"nbs/core/20_checkpoint.ipynb")

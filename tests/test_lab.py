"The recipes in JupyterLab and Colab: what a notebook brings for both, the panel where its packages are missing, and one recipe in a real browser."
import json, sys
from pathlib import Path
import pandas as pd
import plotly.graph_objects as go
import pytest
from seqwarm.core import panel as module
from seqwarm.core.errors import Refusal
from seqwarm.core.ledger import Cost
from seqwarm.core.panel import goals, panel, to_goal

sys.path.insert(0, str(Path(__file__).parent))
from lab import RECIPES, ROOT, browser, check, lab, missing    # noqa: E402
from test_house import cells, settings, source    # noqa: E402

@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_opens_in_colab_and_says_what_it_learned(recipe):
    file = ROOT/"nbs"/"recipes"/f"{recipe}.ipynb"
    own, where = cells(file), f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/nbs/recipes/{file.name}"
    assert f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({where})" in source(own[0])
    [install] = [i for i, c in enumerate(own) if "pip install" in source(c) and c["cell_type"] == "code"]
    assert install == 2 and 'if "google.colab" in sys.modules' in source(own[2]) and "export" not in source(own[2])      # before anything of the package is asked for
    assert f"%pip install -q {settings['lib_name']}" in source(own[2])
    heads = [line for c in own if c["cell_type"] == "markdown" for line in source(c).splitlines() if line.startswith("## ")]
    assert heads[-2:] == ["## What we learned", "## What would change our mind"]
    assert sum("panel(" in source(c) for c in own) == 1

def test_what_was_measured_fits_a_small_gpu_and_stands_in_the_recipe():
    table = pd.read_csv(ROOT/"results"/"memory.csv").set_index("recipe")
    for recipe in RECIPES:
        row, text = table.loc[recipe.split("_")[1]], "".join(map(source, cells(ROOT/"nbs"/"recipes"/f"{recipe}.ipynb")))
        assert row.state_mb < row.process_mb < 15_000/4, "a T4 has 15 GB"
        assert f"{row.parameters/1e6:.2g} million parameters" in text and f"{row.process_mb/1e3:.1f} GB" in text, (recipe, row.to_dict())

def test_a_panel_is_nothing_unless_somebody_looks_on(monkeypatch, capsys):
    fig = lambda x: go.Figure(go.Scatter(y=[x]))
    for key in ("JPY_SESSION_NAME", "VSCODE_PID"): monkeypatch.delenv(key, raising=False)
    assert panel(fig, x=[1, 2]) is None and not capsys.readouterr().out
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert panel(fig, x=[1, 2]) is None and capsys.readouterr().out == "here controls would be, with ipywidgets: pip install 'seqwarm[lab]'\n"

def test_each_turn_draws_once_with_all_values(monkeypatch):
    pytest.importorskip("ipywidgets")
    monkeypatch.setenv("JPY_SESSION_NAME", "x.ipynb")
    seen = []
    controls = panel(lambda **now: seen.append(now) or go.Figure(), x=(0.0, 2.0, 0.5, 2.0), n=(0, 3, 1, 0), by=["a", "b"]).children[0].children
    controls[2].value = "b"; controls[0].value = 1; controls[1].value = 3; controls[1].value = 3
    assert seen == [dict(x=2.0, n=0, by="a"), dict(x=2.0, n=0, by="b"), dict(x=1.0, n=0, by="b"), dict(x=1.0, n=3, by="b")]
    assert [type(c).__name__ for c in controls] == ["FloatSlider", "IntSlider", "Dropdown"]

def test_a_goal_can_be_any_loss_that_the_reference_passes():
    falls = lambda arm, begin, seed: pd.DataFrame(dict(arm=arm, seed=seed, step=range(11), flops=[10.0*i for i in range(11)], tokens=[100*i for i in range(11)], loss=[begin - 0.3*i for i in range(11)]))
    metrics = pd.concat([falls("scratch", 5.0, 0), falls("scratch", 5.2, 1), falls("warm", 4.1, 0), falls("stuck", 9.0, 0)])
    low, high, step, first = goals(metrics)
    assert low == first == pytest.approx(2.1) and low < high < 5.1 and step > 0
    for level in (low, high):
        names = {t.name for t in to_goal(metrics, level).data if t.name}
        assert "stuck: never there" in names and any(n.startswith("warm: ") for n in names)
    [told] = [t.name for t in to_goal(metrics, 3.5, "tokens", {"warm": Cost(tokens=100)}).data if t.name and t.name.startswith("warm")]
    assert told == f"warm: {100*(1 - (200 + 100)/(1600/3)):.0f} % saved"        # 2 steps beside 5 1/3, and one step paid before
    with pytest.raises(Refusal, match="never reaches"): to_goal(metrics, low - 1)

@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if lost := missing(): pytest.skip(f"NO BROWSER TEST: {', '.join(lost)} cannot be had")
    folder = tmp_path_factory.mktemp("lab")
    with lab(folder) as address, browser() as seen: yield folder, address, seen

@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_in_jupyterlab(recipe, page):
    folder, address, seen = page
    print(json.dumps(check(seen, address, recipe, folder/"nbs", folder)))

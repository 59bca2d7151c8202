"""The recipes in JupyterLab, by a real browser: python tests/lab.py [--shots FOLDER] [10_clp ...]. It needs Chromium and its driver (Debian: chromium, chromium-driver)."""
import json, os, shutil, socket, subprocess, sys, tempfile, time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parents[1]
RECIPES = [p.stem for p in sorted((ROOT/"nbs"/"recipes").glob("*.ipynb"))]
PACKAGES = "jupyterlab", "ipywidgets", "selenium"
SETTINGS = {"notebook-extension/tracker": dict(windowingMode="none"),        # all cells are in the page, not those in sight alone
            "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False)}
UNUSED = {f"@jupyterlab/{x}-extension": True for x in ("debugger", "extensionmanager", "lsp", "terminal", "toc", "mathjax", "hub", "csvviewer", "pdf")}

def _program(*names: str) -> str | None: return next(filter(None, map(shutil.which, names)), None)
def _chromium() -> str | None: return _program("chromium", "chromium-browser", "google-chrome")
def _driver() -> str | None: return _program("chromedriver")

def missing() -> list[str]:
    "What is not there, and cannot be had."
    if not (_chromium() and _driver()) and os.geteuid() == 0 and shutil.which("apt-get"):
        for words in (["update"], ["install", "-y", "chromium", "chromium-driver"]):
            try: subprocess.run(["apt-get", "-qq", *words], env=os.environ | dict(DEBIAN_FRONTEND="noninteractive"), capture_output=True, timeout=300)
            except subprocess.TimeoutExpired: pass
    return [p for p in PACKAGES if not find_spec(p)] + ["chromium"]*(not _chromium()) + ["chromedriver"]*(not _driver())

def wait(there: Callable[[], Any], seconds: float, what: str, every: float = 0.2) -> Any:
    "What `there` gives, as soon as it gives something."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if got := there(): return got
        time.sleep(every)
    raise TimeoutError(f"{what} did not happen within {seconds:g} s")

def act(find: Callable[[], list[Any]], do: Callable[[Any], None], what: str, which: int = 0, seconds: float = 60) -> None:
    "Do something to an element that is waited for; JupyterLab draws anew whenever it likes, so one that is gone or covered meanwhile is looked for again."
    from selenium.common.exceptions import ElementClickInterceptedException, ElementNotInteractableException, StaleElementReferenceException
    def done() -> bool:
        try:
            if len(found := find()) <= which: return False
            do(found[which]); return True
        except (ElementClickInterceptedException, ElementNotInteractableException, StaleElementReferenceException): return False
    wait(done, seconds, what)

@contextmanager
def lab(folder: Path) -> Iterator[str]:       # the address, with its token
    "JupyterLab on a copy of the notebooks, as `make lab` starts it, on a free port; settings of its own."
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns("runs", ".ipynb_checkpoints"))
    for name, own in SETTINGS.items():
        file = folder/"settings"/"@jupyterlab"/f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True); file.write_text(json.dumps(own))
    (folder/"config"/"labconfig").mkdir(parents=True); (folder/"config"/"labconfig"/"page_config.json").write_text(json.dumps(dict(disabledExtensions=UNUSED)))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    token = os.urandom(16).hex()
    env = os.environ | {f"JUPYTER_{k}_DIR": str(folder/k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")}
    env |= dict(JUPYTERLAB_SETTINGS_DIR=str(folder/"settings"), JUPYTERLAB_WORKSPACES_DIR=str(folder/"workspaces"), PYTHONPATH=str(ROOT))
    words = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    with open(folder/"server.log", "w") as log: server = subprocess.Popen([sys.executable, "-m", "jupyterlab", str(folder/"nbs"), *words], env=env, stdout=log, stderr=log)
    def answers() -> bool:
        if server.poll() is not None: raise RuntimeError((folder/"server.log").read_text()[-2000:])
        try: return urlopen(f"http://127.0.0.1:{port}/api/status?token={token}").status == 200
        except OSError: return False
    try: wait(answers, 120, "the start of JupyterLab"); yield f"http://127.0.0.1:{port}/lab/tree/recipes/%s.ipynb?reset&token={token}"
    finally:
        server.terminate()       # it ends its kernels
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()

@contextmanager
def browser() -> Iterator[Any]:
    from selenium import webdriver
    options = webdriver.ChromeOptions(); options.binary_location, options.page_load_strategy = _chromium(), "none"
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1100", "--no-first-run"): options.add_argument(word)
    seen = webdriver.Chrome(options=options, service=webdriver.ChromeService(_driver()))
    seen.set_script_timeout(120); seen.set_page_load_timeout(300)
    try: yield seen
    finally: seen.quit()

IDLE = """return location.pathname === arguments[0]       // for a while the page before it is still there, and idle
  && !!document.querySelector('.jp-Notebook .jp-CodeCell')
  && [...document.querySelectorAll('.jp-StatusBar-TextItem')].some(e => e.textContent.endsWith('| Idle') && e.textContent.startsWith('Python 3'))"""
LOOK = """const text = q => [...document.querySelectorAll(q)].map(e => e.textContent)
return {prompts: text('.jp-CodeCell .jp-InputPrompt'), errors: text('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]'),
  bars: text('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]').filter(t => t.includes('step')),
  figures: [...document.querySelectorAll('.jp-CodeCell')].flatMap(c => [...c.querySelectorAll('.js-plotly-plot')]).filter(e => !e.closest('.widget-vbox') && e.querySelector('.main-svg')).length}"""
DRAWN = """const plot = document.querySelector('.widget-vbox .js-plotly-plot'); if (!plot) return null
const all = q => [...plot.querySelectorAll(q)]; if (!all('path.js-line').length) return null
return JSON.stringify([all('.main-svg').length, all('path.js-line, .shapelayer path, .point').map(e => e.getAttribute('d') + e.getAttribute('transform')), all('text').map(e => e.textContent)])"""

def run_all(seen: Any, address: str, seconds: float = 1200) -> dict[str, Any]:    # figures drawn, progress bars' states seen, errors
    "Open a notebook, choose Run All Cells in the menu, and look at the page until its last cell has run."
    from selenium.webdriver.common.by import By
    seen.get(address)
    find = lambda how, what: lambda: seen.find_elements(how, what)
    click = lambda element: element.click()
    wait(lambda: seen.execute_script(IDLE, urlsplit(address).path), 300, "an idle kernel", 1)      # who runs cells before that is asked for a kernel
    act(find(By.XPATH, "//div[contains(@class, 'lm-MenuBar-itemLabel') and text()='Run']"), click, "the menu")
    act(find(By.CSS_SELECTOR, "li[data-command='runmenu:run-all']"), click, "its entry")
    bars = set()
    def over() -> dict[str, Any] | None:
        page = seen.execute_script(LOOK)
        bars.update(page["bars"])
        ran = [p for p in page["prompts"] if p.strip("[]: \xa0")]
        return page if page["errors"] or (len(ran) == len(page["prompts"]) and not any("*" in p for p in ran)) else None
    page = wait(over, seconds, "the last cell's end", 1)
    return dict(figures=page["figures"], bars=len(bars), errors=page["errors"])

def turn_all(seen: Any) -> dict[str, float]:     # control -> seconds until the figure was another one
    "Turn each control of the panel, and wait for another drawing."
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select
    wait(lambda: seen.execute_script(DRAWN), 60, "a panel with a figure")
    took = {}
    controls = lambda: seen.find_elements(By.CSS_SELECTOR, ".widget-vbox .widget-slider, .widget-vbox .widget-dropdown")
    def turn(control: Any) -> None:
        nonlocal name
        seen.execute_script("arguments[0].scrollIntoView({block: 'start'})", control)
        name = control.find_element(By.CSS_SELECTOR, ".widget-label").text
        if selects := control.find_elements(By.TAG_NAME, "select"): Select(selects[0]).select_by_index(1)
        else: control.find_element(By.CSS_SELECTOR, ".noUi-handle").send_keys(Keys.ARROW_RIGHT*5)
    for which in range(len(controls())):
        name, before, start = "", seen.execute_script(DRAWN), time.monotonic()
        act(controls, turn, "a control", which)
        wait(lambda before=before: seen.execute_script(DRAWN) not in (before, None), 30, f"another figure after {name} was turned", 0.05)
        took[name] = round(time.monotonic() - start, 2)
    return took

def check(seen: Any, address: str, recipe: str, nbs: Path, shots: Path) -> dict[str, Any]:
    "One recipe, top to bottom: no error, all figures of its run drawn, its bars alive, its controls at work; and some pictures."
    start, name = time.monotonic(), recipe.split("_")[1]
    try:
        found = run_all(seen, address % recipe)
        assert not found["errors"], found["errors"][0][-2000:]
        run = nbs/"recipes"/"runs"/name
        made = len(list((run/"figures").glob("*.html")))
        assert (run/"record.json").exists() and found["figures"] >= made > 3, f"{found['figures']} figures are drawn, the run made {made}"
        assert found["bars"] > 1, "no progress bar was seen to move"
        found["seconds"] = round(time.monotonic() - start)
        found["controls"] = turn_all(seen)
        assert len(found["controls"]) > 1
        return dict(recipe=recipe, **found)
    finally:
        seen.save_screenshot(str(shots/f"{recipe}-panel.png"))
        for i in range(3):
            seen.execute_script("document.querySelectorAll('.jp-OutputArea .js-plotly-plot')[arguments[0]]?.scrollIntoView({block: 'center'})", i)
            seen.save_screenshot(str(shots/f"{recipe}-{i}.png"))

if __name__ == "__main__":
    words = sys.argv[1:]
    shots = Path(words.pop(words.index("--shots") + 1)) if "--shots" in words else Path(tempfile.mkdtemp(prefix="shots-"))
    asked = [w for w in words if w != "--shots"] or RECIPES
    if wrong := [w for w in asked if w not in RECIPES]: raise SystemExit(f"no recipe {wrong[0]!r}; there are: {', '.join(RECIPES)}")
    if lost := missing(): raise SystemExit(f"not here: {', '.join(lost)}")
    shots.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lab-") as d, lab(Path(d)) as address, browser() as seen:
        for recipe in asked: print(check(seen, address, recipe, Path(d)/"nbs", shots), flush=True)
    print(f"pictures in {shots}")

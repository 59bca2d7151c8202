"""How Sphinx makes pages of what build.py lays out: light and dark, searched without a server, formulas as MathML."""
import configparser, re
from pathlib import Path
from docutils.nodes import SkipNode
from latex2mathml.converter import convert

HERE = Path(__file__).resolve().parent
settings = configparser.ConfigParser(delimiters=["="]); settings.read(HERE.parents[1]/"settings.ini")
settings = settings["DEFAULT"]

project, author, release = settings["lib_name"], settings["author"], settings["version"]
project_copyright = settings["copyright"]
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "misc.highlighting_failure"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = [str(HERE/"static")]      # and what build.py puts into drawing/
html_css_files, html_js_files = ["site.css"], ["figures.js"]
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

def formula(display: str):
    "What puts a formula on the page; one that cannot be read ends the build."
    def visit(self, node) -> None:
        tag, said = "div" if display == "block" else "span", node.astext()
        drawn = convert(re.sub(r"\\arg\s*\\(min|max)", r"\\operatorname{arg\1}", said), display=display)
        drawn = re.sub(r"\\([{}_%])", r"\1", drawn)      # what it leaves as it was: braces of a size, underscores in words
        if "\\" in drawn: raise ValueError(f"a formula that cannot be drawn: {said}")
        self.body.append(f'<{tag} class="formula">{drawn}</{tag}>')
        raise SkipNode
    return visit, None

def setup(app) -> dict:
    app.add_html_math_renderer("mathml", formula("inline"), formula("block"))
    app.connect("builder-inited", lambda app: app.config.html_static_path.append(str(Path(app.srcdir)/"drawing")))
    return dict(parallel_read_safe=True, parallel_write_safe=True)

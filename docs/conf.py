"""Sphinx's configuration; ``sphinx-build -W --keep-going -n -b html docs docs/_build`` builds the pages."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).parent.parent
STUDIES = {f"studies/{name}": f"examples/{name}" for name in ("squad", "image_classification")}
sys.path.insert(0, str(ROOT))

from octav_hf import __version__  # noqa: E402

project = "octav-hf"
author = copyright = "the octav-hf authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Types of torch, Transformers and the standard library have no page here, and a build uses no network.
nitpick_ignore_regex = [("py:.*", r"(?!octav_hf\.).*"), ("py:.*", r"octav_hf\..*\.(Model|Rule|Batch)")]

copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"octav-hf {version}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
html_copy_source = False


def mathml(formula: str, as_block: bool) -> str:
    """MathML, in which a bar stands close to what it encloses."""
    return re.sub(r"<mo[^>]*>\|</mo>", '<mo lspace="0" rspace="0">|</mo>', tex2mathml(formula, as_block=as_block))


def inline_math(writer: Any, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers display by themselves: no script from another host."""
    writer.body.append(mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def block_math(writer: Any, node: nodes.math_block) -> None:
    """Write a displayed formula as MathML."""
    writer.body.append(f'<div class="math">{mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def read_study(app: Any, docname: str, source: list[str]) -> None:
    """Make the page of a study from its README, whose links to tables in Markdown have no page here."""
    if folder := STUDIES.get(docname):
        text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"\[([^\]]+)\]\(\S+\.md\)", r"\1", text)
        source[0] = re.sub(r"\]\((?!https:)", f"](../../{folder}/", text)


def setup(app: Any) -> None:
    app.connect("source-read", read_study)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))

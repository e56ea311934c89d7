"""Configuration of Sphinx: ``sphinx-build -W docs site``."""

from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent

project = "lightning_ddst"
release = metadata.version("lightning-ddst")
copyright = "the lightning_ddst authors, Apache License 2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # the anchors that GitHub gives to headings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 90  # longer ones: an argument per line
default_role = "py:obj"  # `Name` in a docstring
nitpicky = False
linkcheck_timeout = 30

html_theme = "furo"
pygments_style = "friendly"
html_title = f"lightning_ddst {release}"
html_static_path = ["static"]
html_css_files = ["formulas.css"]
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"


def _leave_the_site(app: Sphinx, document: nodes.document) -> None:
    """Makes links to what is in the repository, and not in the site, text: folders, and pages outside ``docs``."""
    site = Path(app.srcdir)
    here = Path(app.env.doc2path(app.env.docname)).parent
    for link in list(document.findall(pending_xref)):
        target = link["reftarget"].partition("#")[0]
        # Files outside are copied into the site already; what the README is included for is seen from its folder.
        paths = {(here / target).with_suffix(suffix) for suffix in (".md", Path(target).suffix)} | {ROOT / target}
        outside = [path for path in paths if path.exists() and not path.resolve().is_relative_to(site)]
        if link["reftype"] in ("myst", "doc") and target and outside:
            link.replace_self(link.children)


def _formula(writer: Any, node: nodes.Element, as_block: bool = False) -> None:
    """Writes a formula as MathML, which browsers show without a script from elsewhere."""
    writer.body.append(tex2mathml(node.astext(), as_block))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (_formula, None), (partial(_formula, as_block=True), None))
    app.connect("doctree-read", _leave_the_site)

"""The pages are built without a warning, and nothing in them leads nowhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from pages import PAGES, ROOT

import lightning_ddst
from lightning_ddst import balance, callbacks, data, models

pytest.importorskip("sphinx", reason="pages are built with the extra docs")

COMMAND = "sphinx-build -W docs site"


class DependencyGraph(HTMLParser):
    """Returns the targets of a built page's links, and its own anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors = {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.anchors.add(value or "")
            elif name in ("href", "src") and value:
                self.targets.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, made by the command of the README."""
    assert f"\n{COMMAND}\n" in (ROOT / "README.md").read_text()
    folder = tmp_path_factory.mktemp("site")
    places = {"docs": str(ROOT / "docs"), "site": str(folder)}
    arguments = [places.get(word, word) for word in COMMAND.split()[1:]]
    # In a process of its own: autodoc imports the package anew, with TYPE_CHECKING.
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", *arguments], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    assert done.returncode == 0
    return folder


def test_every_page_is_built(site: Path) -> None:
    for page in PAGES:
        built = "index" if page.name == "README.md" else page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / f"{built}.html").is_file()


def test_no_link_of_the_site_is_dead(site: Path) -> None:
    pages = {path: DependencyGraph(path) for path in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    dead = []
    for page, links in pages.items():
        for target in links.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            path = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            path = path / "index.html" if path.is_dir() else path
            if not path.exists() or (path in pages and unquote(parts.fragment) not in pages[path].anchors):
                dead.append(f"{page.relative_to(site)}: {target}")
    assert not dead


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks/README.md"], ids=lambda page: page.name
)
def test_no_link_of_a_page_is_dead_where_it_lies(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    missing = [
        t
        for t in targets
        if "://" not in t and t.partition("#")[0] and not (page.parent / t.partition("#")[0]).exists()
    ]
    assert not missing


def test_every_picture_is_shown_somewhere() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for picture in (ROOT / "docs/figures").iterdir():
        assert f"figures/{picture.name}" in text


@pytest.mark.parametrize("module", [lightning_ddst, callbacks, models, data], ids=lambda module: module.__name__)
def test_everything_public_is_in_the_reference(module, site: Path) -> None:
    anchors = DependencyGraph(site / "reference.html").anchors
    internal = {"DigitsCNN", "FeatureExtractor", "SmallClassifier", "digits"}
    for name in set(module.__all__) - internal:
        assert any(anchor.split(".")[-1] == name for anchor in anchors), name


def test_every_argument_is_explained(site: Path) -> None:
    page = (site / "reference.html").read_text()
    for name in lightning_ddst.DynamicSparsityCallback.__init__.__annotations__.keys() - {"return"}:
        assert f"<strong>{name}</strong>" in page, name
    assert balance.Balance.__name__ in page

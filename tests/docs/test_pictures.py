"""The pictures of the pages can be made again."""

import runpy

from pages import ROOT

PICTURES = runpy.run_path(str(ROOT / "docs/pictures.py"))


def test_masks_show_what_exploring_and_resizing_do() -> None:
    axes = PICTURES["masks"]().axes
    assert [ax.get_title() for ax in axes] == ["explore: as many pruned as grown", "resize: grow", "resize: prune"]
    assert [ax.get_xlabel() for ax in axes] == [
        f"density 0.25 \N{RIGHTWARDS ARROW} {d}" for d in ("0.25", "0.35", "0.15")
    ]


def test_scores_are_the_last_window_of_a_run() -> None:
    means = {"real": 0.6, "fake": -0.2, "alpha": 0.8, "beta": 0.4, "ratio": 0.5}
    (ax,) = PICTURES["scores"]({f"balance/{name}": [(1, 9.0), (2, value)] for name, value in means.items()}).axes
    assert ax.get_title(loc="left") == "One window of a run: BR = beta / alpha = 0.50"
    assert {text.get_text() for text in ax.texts} >= {"beta = 0.40", "alpha = 0.80", "D(x)\n0.60"}


def test_every_page_of_tensorboard_that_is_shown_is_made() -> None:
    shown = {path.name for path in (ROOT / "docs/figures").glob("tensorboard_*.png")}
    assert shown == {f"tensorboard_{name}.png" for name in PICTURES["TABS"]}

"""The pictures of the pages can be made again."""

import runpy

import numpy as np
import pytest
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


def test_images_are_tiled_row_by_row() -> None:
    images = np.arange(4, dtype=np.float32).reshape(4, 1, 1) * np.ones((1, 2, 2), np.float32)
    tiled = PICTURES["tiled"](images, 2, 3)
    assert tiled.shape == (15, 15)  # 2 + 1 + 2 pixels, three times as large
    assert [tiled[0, 0], tiled[0, -1], tiled[-1, 0], tiled[-1, -1]] == [0, 1, 2, 3]
    assert np.isnan(tiled[6:9]).all()
    assert np.isnan(tiled[:, 6:9]).all()


def test_quality_over_density_has_every_seed_and_the_dense_line() -> None:
    cells = {("DDST", 0.1, 0): 2.0, ("DDST", 0.1, 1): 8.0, ("DDST", 0.3, 0): 3.0}
    cells |= {("DDST, paper's bounds", 0.1, 0): 2.5, ("dense", 1.0, 0): 1.5}
    found = [
        {"setting": "digits", "run": run, "density": density, "seed": seed, "distance": [[1, value]]}
        for (run, density, seed), value in cells.items()
    ]
    (ax,) = PICTURES["densities"](found).axes
    mean, sparse, sparser, papers_mean, papers, dense = ax.get_lines()
    assert list(mean.get_xdata()) == [0.1, 0.3]
    assert list(mean.get_ydata()) == pytest.approx([4.0, 3.0])  # geometric mean of 2 and 8
    assert [list(each.get_ydata()) for each in (sparse, sparser, papers)] == [[2.0, 8.0], [3.0], [2.5]]
    assert list(papers_mean.get_ydata()) == pytest.approx([2.5])
    assert dense.get_ydata()[0] == 1.5


def test_every_page_of_tensorboard_that_is_shown_is_made() -> None:
    shown = {path.name for path in (ROOT / "docs/figures").glob("tensorboard_*.png")}
    assert shown == {f"tensorboard_{name}.png" for name in PICTURES["TABS"]}

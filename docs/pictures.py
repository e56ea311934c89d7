"""Makes the pictures of the pages: ``python docs/pictures.py RUN WORK [--chromium CHROMIUM]``.

RUN is the log folder of a run of `lightning-ddst fit`, such as lightning_logs/version_0; TensorBoard shows the runs
next to it, too. WORK is the folder in which ``benchmarks/grid.py`` trained the studies "densities" and "wide", which
keeps their checkpoints. Figures that need results only are made by ``benchmarks/page.py``.
"""

import argparse
import io
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from lightning_ddst import export, models
from lightning_ddst.data import digits
from lightning_ddst.report import plots, tradeoff
from lightning_ddst.report.results import read_results
from lightning_ddst.report.runs import Series, read_run
from lightning_ddst.sparsity import MaskedNetwork

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from comparisons import Row, distance, geometric_mean, of
from figures import GRAY, for_both_modes
from rows import rows
from studies import SAMPLED

Box: TypeAlias = tuple[int, int, int, int]
Images: TypeAlias = NDArray[np.float32]

FIGURES = Path(__file__).parent / "figures"
TABS: dict[str, tuple[str, str, tuple[int, int], list[Box]]] = {
    # The pages of TensorBoard, of one run or of all, the window, and the parts of it that are worth a look.
    "custom_scalars": ("custom_scalars&_smoothingWeight=0", "run", (1280, 1080), [(0, 0, 1280, 1080)]),
    "text": ("text", "run", (1280, 900), [(0, 0, 1280, 760)]),
    "hparams": ("hparams", "all", (2360, 400), [(466, 128, 1212, 300), (1212, 128, 2360, 300)]),
}
_BLUE, _ORANGE, _GREEN, _INACTIVE = "#0072B2", "#D55E00", "#009E73", "#8888884D"
_ACTIVE = GRAY
_FASHION = "60,000 images"


# ---- samples -------------------------------------------------------------------------------------------


def samples(run: Path, count: int) -> Images:
    """Samples a run's generator, with the weights that evaluation used and always the same noise.

    Args:
        run: A log folder with config.yaml and checkpoints/last.ckpt.
        count: Number of images.

    Returns:
        Gray images ``(count, height, width)`` in [0, 1].
    """
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["generator"]
    generator = getattr(models, config["class_path"].rpartition(".")[2])(**config["init_args"])
    export.load_generator(generator, run / "checkpoints" / "last.ckpt")
    noise = torch.randn(count, generator.latent_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images: Images = generator.eval()(noise)[:, 0].numpy()
    return (images + 1) / 2


def tiled(images: Images, columns: int, scale: int) -> Images:
    """Joins images to rows of `columns`, with a gap of one pixel, every pixel `scale` times as large."""
    padded = np.pad(images, ((0, 0), (0, 1), (0, 1)), constant_values=np.nan)
    _, height, width = padded.shape
    grid = padded.reshape(-1, columns, height, width).swapaxes(1, 2).reshape(-1, columns * width)[:-1, :-1]
    return np.kron(grid, np.ones((scale, scale), np.float32))


def first_look(dense: Images, sparse: Images, found: Sequence[Row]) -> Figure:
    """Draws samples of the dense and of the 10 % generator, and quality over density.

    Args:
        dense: Images of the dense generator.
        sparse: Images of the other one, from the same noise.
        found: Rows of the study "wide".
    """
    figure = _figure(9, 3.1)
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.25])
    for ax, images, title in zip(axes, (dense, sparse), ("dense generator", "10 % of its weights"), strict=False):
        _show(ax, tiled(images, 6, 4))
        ax.set_title(title)
    quality_over_density(axes[2], found, _FASHION, {"DDST auto": "DDST"})
    axes[2].set_title("quality over density")
    return for_both_modes(figure)


def gallery(by_density: dict[float, Images], real: Images, distances: dict[float, float]) -> Figure:
    """Draws samples by density, a row each, below real images.

    Args:
        by_density: Images of every generator.
        real: As many real images.
        distances: Each generator's Frechet distance.
    """
    figure = _figure(9, 0.56 * (1 + len(by_density)) + 0.1)
    axes = figure.subplots(1 + len(by_density), 1)
    labels = ["real images"]
    labels += [f"{_share(density)}\ndistance {distances[density]:.3g}" for density in by_density]
    for ax, images, label in zip(axes, (real, *by_density.values()), labels, strict=True):
        _show(ax, tiled(images, len(images), 4))
        ax.text(-0.015, 0.5, label, transform=ax.transAxes, ha="right", va="center", fontsize=10)
    return for_both_modes(figure)


def densities(found: Sequence[Row]) -> Figure:
    """Draws quality over density on digits, from rows of the study "densities"."""
    figure = _figure(7, 3.2)
    quality_over_density(
        figure.subplots(), found, "digits", {"DDST": "DDST", "DDST, paper's bounds": "DDST, paper's bounds"}
    )
    return for_both_modes(figure)


def quality_over_density(ax: Axes, found: Sequence[Row], setting: str, runs: dict[str, str]) -> None:
    """Draws the Frechet distance over the generator's density: every seed, the mean, and the dense one as a line.

    Args:
        ax: Where to draw.
        found: Rows of a study.
        setting: Its setting.
        runs: Labels of runs, by their names in the rows.
    """
    distances: dict[float, list[float]] = {}
    for (run, label), (color, marker) in zip(runs.items(), ((_BLUE, "o"), (_GREEN, "^")), strict=False):
        known = sorted({row["density"] for row in found if (row["setting"], row["run"]) == (setting, run)})
        cells = [[distance(row) for row in of(found, setting, run, density)] for density in known]
        ax.plot(known, [geometric_mean(cell) for cell in cells], f"{marker}-", color=color, label=label)
        for density, cell in zip(known, cells, strict=True):
            ax.plot([density] * len(cell), cell, ".", color=color, alpha=0.6)
            distances.setdefault(density, []).extend(cell)
    dense = geometric_mean(map(distance, of(found, setting, "dense", 1.0)))
    ax.axhline(dense, color=_ORANGE, linestyle=(0, (4, 2)), label="dense")
    ax.set_xscale("log")
    ax.set_xticks(list(distances), [f"{100 * density:.0f} %" for density in distances])
    ax.minorticks_off()
    highest = max(max(cell) for cell in distances.values())
    if highest > 10 * dense:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        ax.set_ylim(0, 1.08 * highest)
    ax.set_xlabel("density of the generator")
    ax.set_ylabel("Frechet distance (lower is better)")
    ax.legend(frameon=False, loc="best")


def _share(density: float) -> str:
    return "dense" if density == 1 else f"{100 * density:.0f} % of the weights"


def _show(ax: Axes, picture: Images) -> None:
    ax.imshow(np.ma.masked_invalid(picture), cmap="gray", vmin=0, vmax=1, interpolation="none")
    ax.set_axis_off()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# ---- the method ----------------------------------------------------------------------------------------


def masks() -> Figure:
    """Draws a layer's mask at first, after an exploration, and after the discriminator's two kinds of resizing."""
    layer = nn.Linear(20, 10, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
    gradients = {"0.weight": torch.randn(layer.weight.shape, generator=generator)}
    steps = [
        ("explore: as many pruned as grown", lambda network: network.explore(0.3, gradients)),
        ("resize: grow", lambda network: network.resize(0.35, gradients)),
        ("resize: prune", lambda network: network.resize(0.15)),
    ]
    figure = _figure(9, 2.4)
    for ax, (title, change) in zip(figure.subplots(1, 3), steps, strict=True):
        network = MaskedNetwork(nn.Sequential(layer), 0.25, seed=1)
        (before,) = (mask.clone() for mask in network.masks.values())
        change(network)
        (after,) = network.masks.values()
        picture = np.full((*before.shape, 4), to_rgba(_INACTIVE))
        for where, color in ((before & after, _ACTIVE), (before & ~after, _ORANGE), (~before & after, _GREEN)):
            picture[where.numpy()] = to_rgba(color)
        square = np.pad(np.ones((7, 7, 1)), ((0, 2), (0, 2), (0, 0)))  # with a gap
        ax.imshow(np.kron(picture, square), interpolation="none")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(
            f"density {before.float().mean():.2f} \N{RIGHTWARDS ARROW} {after.float().mean():.2f}", fontsize=10
        )
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
    labels = {"active before and after": _ACTIVE, "pruned": _ORANGE, "grown": _GREEN, "inactive": _INACTIVE}
    for label, color in labels.items():
        figure.axes[0].scatter([], [], color=color, marker="s", label=label)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return for_both_modes(figure)


def scores(series: Series) -> Figure:
    """Draws the three mean scores of the run's last window, and the balance ratio between them."""
    real, fake, alpha, beta, ratio = (
        series[f"balance/{name}"][-1][1] for name in ("real", "fake", "alpha", "beta", "ratio")
    )
    figure = _figure(9, 2.1)
    ax = figure.subplots()
    ax.axhline(0, color=GRAY, linewidth=1)
    for x, color, label in (
        (fake, _BLUE, "D(G$_{pre}$(z))"),
        (fake + beta, _BLUE, "D(G$_{post}$(z))"),
        (real, _ORANGE, "D(x)"),
    ):
        ax.plot(x, 0, "o", color=color, markersize=9)
        ax.annotate(
            f"{label}\n{x:.2f}", (x, 0), (0, 9), textcoords="offset points", ha="center", va="bottom", parse_math=True
        )
    for y, end, name in ((-0.35, fake + beta, f"beta = {beta:.2f}"), (-0.75, real, f"alpha = {alpha:.2f}")):
        ax.annotate("", (end, y), (fake, y), arrowprops={"arrowstyle": "->", "color": GRAY, "shrinkA": 0, "shrinkB": 0})
        ax.annotate(
            name, ((fake + end) / 2, y), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=10
        )
    ax.set_title(f"One window of a run: BR = beta / alpha = {ratio:.2f}", fontsize=11, loc="left", fontweight="bold")
    ax.set_xlabel("mean score of the discriminator")
    room = 0.12 * (real - fake)
    ax.set_xlim(fake - room, real + room)
    ax.set_ylim(-0.85, 0.85)
    ax.set_yticks([])
    ax.spines[["left", "right", "top"]].set_visible(False)
    return for_both_modes(figure)


# ---- TensorBoard ---------------------------------------------------------------------------------------


def screenshots(run: Path, chromium: str) -> None:
    """Has a browser take pictures of TensorBoard's pages."""
    for shown, folder in (("run", run), ("all", run.parent)):
        with _tensorboard(folder) as address:
            for name, (tab, of, size, boxes) in TABS.items():
                if of == shown:
                    page = _screenshot(chromium, f"{address}#{tab}", size)
                    _below_each_other(page, boxes).save(FIGURES / f"tensorboard_{name}.png", optimize=True)


@contextmanager
def _tensorboard(folder: Path) -> Iterator[str]:
    """TensorBoard of a folder: its address."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = folder.parents[1]  # the page shows the folder as it is given
    options = ["--logdir", str(folder.relative_to(start)), "--port", str(port), "--load_fast", "false"]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    server = subprocess.Popen(command, cwd=start, stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"http://localhost:{port}/data/runs")
        time.sleep(10)  # until the event files are read
        yield f"http://localhost:{port}/"
    finally:
        server.terminate()
        server.wait()


def _screenshot(chromium: str, address: str, size: tuple[int, int]) -> Image.Image:
    """A page as an image."""
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
        options += " --disable-background-networking --disable-component-update --disable-sync"
        options += f" --user-data-dir={folder}/profile --window-size={size[0]},{size[1]} --virtual-time-budget=30000"
        command = [chromium, *options.split(), f"--screenshot={picture}", address]
        subprocess.run(command, check=True, capture_output=True)
        return Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")


def _below_each_other(page: Image.Image, boxes: list[Box]) -> Image.Image:
    """Parts of a page, in few colours."""
    parts = [page.crop(box) for box in boxes]
    picture = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        picture.paste(part, (0, top))
        top += part.height
    return picture.quantize(64)


def _wait_for(address: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).read()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def drawn(run: Path, work: Path) -> dict[str, Callable[[], Figure]]:
    """Returns what draws each figure, by name.

    Args:
        run: A log folder.
        work: The folder of ``benchmarks/grid.py``.
    """
    series = read_run(run)
    found = rows("densities")

    def look() -> Figure:
        dense, sparse = (
            samples(work / f"{_FASHION.replace(',', '_').replace(' ', '_')}-{name}-0", 36)
            for name in ("dense-1.0", "DDST_auto-0.1")
        )
        return first_look(dense, sparse, rows("wide"))

    def by_density() -> Figure:
        distances = {
            row["density"]: distance(row) for row in found if row["seed"] == 0 and row["run"] in ("dense", "DDST")
        }
        real = digits().tensors[0][:22, 0].numpy() / 2 + 0.5
        return gallery({density: samples(folder, 22) for density, folder in _by_density(work).items()}, real, distances)

    figures = {"first_look": look, "gallery": by_density, "densities": lambda: densities(found), "masks": masks}
    figures["scores"] = lambda: scores(series)
    return figures | {
        f"run_{name}": lambda figure=figure: for_both_modes(figure) for name, figure in plots.figures(series).items()
    }


def _by_density(work: Path) -> dict[float, Path]:
    """Returns the folders of the first seed's runs on digits, by density of the generator."""
    return {density: work / f"digits-{'dense' if density == 1 else 'DDST'}-{density}-0" for density in SAMPLED}


def main() -> None:
    """Writes every picture."""
    parser = argparse.ArgumentParser(description="Makes the pictures of the pages.")
    parser.add_argument("run", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="+", help="names of figures, without TensorBoard's pages")
    parser.add_argument("--chromium", default="chromium")
    given = parser.parse_args()
    for name, draw in drawn(given.run, given.work / "runs").items():
        if not given.only or name in given.only:
            with plots.plot_style():
                (FIGURES / f"{name}.svg").write_bytes(plots.rendered(draw(), "svg"))
    if not given.only or "comparison" in given.only:
        folders = _by_density(given.work / "runs")
        compared = {f"{100 * density:.0f} %": read_results(folders[density]) for density in SAMPLED[:4]}
        tradeoff.save(tradeoff.tradeoff(compared), FIGURES / "comparison.svg")
    if not given.only:
        screenshots(given.run.resolve(), given.chromium)


if __name__ == "__main__":
    main()

"""Makes the pictures of the pages: ``python docs/pictures.py RUN [--chromium CHROMIUM]``.

RUN is a log folder of `lightning-ddst fit`, as lightning_logs/version_0; TensorBoard shows the runs beside it, too.
"""

import argparse
import io
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from lightning_ddst.report import plots
from lightning_ddst.report.runs import Series, read_run
from lightning_ddst.sparsity import MaskedNetwork

Box: TypeAlias = tuple[int, int, int, int]

FIGURES = Path(__file__).parent / "figures"
TABS: dict[str, tuple[str, str, tuple[int, int], list[Box]]] = {
    # The pages of TensorBoard, of one run or of all, the window, and the parts of it that are worth a look.
    "custom_scalars": ("custom_scalars&_smoothingWeight=0", "run", (1280, 1080), [(0, 0, 1280, 1080)]),
    "text": ("text", "run", (1280, 900), [(0, 0, 1280, 760)]),
    "hparams": ("hparams", "all", (2300, 400), [(466, 128, 1255, 300), (1255, 128, 2300, 300)]),
}
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.88"


def masks() -> Figure:
    """A layer's mask at first, after an exploration, and after the discriminator's two kinds of resizing."""
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
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (title, change) in zip(figure.subplots(1, 3), steps, strict=True):
        network = MaskedNetwork(nn.Sequential(layer), 0.25, seed=1)
        (before,) = (mask.clone() for mask in network.masks.values())
        change(network)
        (after,) = network.masks.values()
        picture = np.ones((*before.shape, 3)) * float(_GREY)
        for where, color in ((before & after, "0.35"), (before & ~after, _ORANGE), (~before & after, _GREEN)):
            picture[where.numpy()] = _rgb(color)
        ax.imshow(picture, interpolation="nearest")
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(
            f"density {before.float().mean():.2f} \N{RIGHTWARDS ARROW} {after.float().mean():.2f}", fontsize=9
        )
        ax.set_xticks(np.arange(-0.5, 20), minor=True)
        ax.set_yticks(np.arange(-0.5, 10), minor=True)
        ax.grid(which="minor", color="white", linewidth=1)
        ax.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        for spine in ax.spines.values():
            spine.set_visible(False)
    for color, label in (
        ("0.35", "active before and after"),
        (_ORANGE, "pruned"),
        (_GREEN, "grown"),
        (_GREY, "inactive"),
    ):
        figure.axes[0].scatter([], [], color=color, marker="s", label=label)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def scores(series: Series) -> Figure:
    """The three mean scores of the run's last window, and the balance ratio between them."""
    real, fake, alpha, beta, ratio = (
        series[f"balance/{name}"][-1][1] for name in ("real", "fake", "alpha", "beta", "ratio")
    )
    figure = Figure(figsize=(9, 2.1), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.axhline(0, color="0.6", linewidth=1)
    for x, color, label in (
        (fake, _BLUE, "D(G$_{pre}$(z))"),
        (fake + beta, _BLUE, "D(G$_{post}$(z))"),
        (real, _ORANGE, "D(x)"),
    ):
        ax.plot(x, 0, "o", color=color, markersize=9)
        ax.annotate(
            f"{label}\n{x:.2f}", (x, 0), (0, 9), textcoords="offset points", ha="center", va="bottom", fontsize=10
        )
    for y, end, name in ((-0.35, fake + beta, f"beta = {beta:.2f}"), (-0.75, real, f"alpha = {alpha:.2f}")):
        ax.annotate(
            "", (end, y), (fake, y), arrowprops={"arrowstyle": "->", "color": "0.2", "shrinkA": 0, "shrinkB": 0}
        )
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
    return figure


def _rgb(color: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(color)


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


def main() -> None:
    """Writes every picture."""
    parser = argparse.ArgumentParser(description="Makes the pictures of the pages.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--chromium", default="chromium")
    given = parser.parse_args()
    series = read_run(given.run)
    drawn = {"masks": masks(), "scores": scores(series)}
    drawn |= {f"run_{name}": figure for name, figure in plots.figures(series).items()}
    for name, figure in drawn.items():
        (FIGURES / f"{name}.svg").write_bytes(plots.rendered(figure, "svg"))
    screenshots(given.run.resolve(), given.chromium)


if __name__ == "__main__":
    main()

import math
import xml.etree.ElementTree as ElementTree
from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lightning_ddst.report import plots

STEPS = [10, 20, 30, 40]


def series_of(**values: list[float | None]) -> dict[str, list[tuple[int, float]]]:
    """Points at `STEPS` by name, with __ for / in it; None where there is none."""
    return {
        name.replace("__", "/"): [(step, value) for step, value in zip(STEPS, each, strict=False) if value is not None]
        for name, each in values.items()
    }


BALANCE = series_of(
    balance__ratio=[0.25, None, 0.5, 0.75],
    balance__real_sign=[0.0, 0.5, 0.5, 1.0],
    control__signal=[0.25, None, 0.5, 0.75],
    control__lower=[0.45] * 4,
    control__upper=[0.55] * 4,
    density__generator=[0.1] * 4,
    density__discriminator=[0.1, 0.2, 0.3, 0.3],
)
EXPLORATION = series_of(
    coverage__generator=[0.1, 0.2, 0.3, 0.4],
    coverage__discriminator=[0.1, 0.2, 0.3, 0.3],
    overlap__generator=[1.0, 0.5, 0.75, 1.0],
    overlap__discriminator=[1.0, 0.5, 0.75, 0.75],
)
FLOPS = series_of(flops__training_ratio=[0.1, 0.2, 0.25, 0.3])
LAYERS = {
    "layer_density/generator.layers.0.weight": [0.1, 0.2, 0.3, 0.4],
    "layer_density/generator.layers.3.weight": [0.9, 0.9, 0.8, 0.8],
    "layer_density/discriminator.0.parametrizations.weight.original": [0.5, 0.5, 0.5, 0.5],
    "layer_density/discriminator.score.weight_orig": [1.0, 1.0, 1.0, 0.5],
    "layer_density/discriminator.attention.in_proj_weight": [0.25, 0.25, 0.5, 0.5],
}
DENSITIES = {name: list(zip(STEPS, values, strict=True)) for name, values in LAYERS.items()}
QUALITY = series_of(
    frechet_distance__cnn=[100.0, 20.0, 5.0, 4.0],
    frechet_distance_raw__cnn=[100.0, 30.0, 8.0, 6.0],
    recall__cnn=[0.0, 0.25, 0.5, 0.5],
    kernel_distance__inception=[0.5, 0.25, 0.01, -0.001],
)
ALL = BALANCE | EXPLORATION | FLOPS | DENSITIES | QUALITY


def lines(ax: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of every line by label."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in ax.lines}


def texts(figure: Figure) -> list[str]:
    canvas = ElementTree.fromstring(plots.rendered(figure, "svg"))
    return ["".join(each.itertext()).strip() for each in canvas.iter("{http://www.w3.org/2000/svg}text")]


def beyond_view(ax: Axes) -> set[int]:
    """Labels of ticks that are not drawn."""
    hidden = set()
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low <= tick.get_loc() <= high:
                hidden |= {id(tick.label1), id(tick.label2)}
    return hidden


def overlapping(figure: Figure) -> list[str | tuple[str, str]]:
    """Pairs of texts that share pixels, and texts that are cut off."""
    figure.canvas.draw()
    hidden = {label for ax in figure.axes for label in beyond_view(ax)}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in found if id(text) not in hidden]
    width, height = figure.canvas.get_width_height()
    inside = Bbox([[-1, -1], [width + 1, height + 1]])
    cut_off = [text for text, box in boxes if Bbox.intersection(box, inside).size.tolist() != box.size.tolist()]
    return cut_off + [
        (first, second)
        for (first, one), (second, other) in combinations(boxes, 2)
        if (shared := Bbox.intersection(one, other)) is not None and min(shared.size) > 1
    ]


# ---- all of them ---------------------------------------------------------------------------------------


def test_every_figure_is_drawn_that_there_are_series_for() -> None:
    assert list(plots.figures(ALL)) == ["balance", "layer_densities", "exploration", "flops", "quality"]
    assert list(plots.figures(FLOPS)) == ["flops"]
    assert list(plots.figures(QUALITY | {"loss/generator": [(1, 0.5)]})) == ["quality"]
    assert plots.figures({}) == {}
    assert plots.figures({"balance/ratio": [], "recall/cnn": []}) == {}


def test_every_pair_has_figures_under_its_name() -> None:
    pairs = {f"first.generator/{name}": points for name, points in (BALANCE | FLOPS).items()}
    pairs |= {f"second/{name}": points for name, points in FLOPS.items()}
    figures = plots.figures(pairs | QUALITY)
    assert list(figures) == ["first.generator/balance", "first.generator/flops", "second/flops", "quality"]
    assert "first.generator" in texts(figures["first.generator/balance"])
    assert "second" in texts(figures["second/flops"])
    assert figures["quality"]._suptitle is None


@pytest.mark.parametrize("name", ["balance", "layer_densities", "exploration", "flops", "quality"])
def test_figures_say_what_their_axes_are_and_no_text_overlaps(name: str) -> None:
    long = {key.replace("generator.layers", "generator.synthesis.resolution64.blocks"): p for key, p in ALL.items()}
    pair = {f"pairs.of.networks.first/{key}": points for key, points in long.items() if key not in QUALITY}
    for series in (pair | QUALITY,) if name in ("balance", "flops") else (ALL,):
        (figure,) = (figure for key, figure in plots.figures(series).items() if key.endswith(name))
        assert "generator updates" in texts(figure)
        assert all(ax.get_ylabel() or name == "layer_densities" for ax in figure.axes)
        assert overlapping(figure) == []


def test_settings_outside_neither_count_nor_change() -> None:
    expected = plots.pixels(plots.flops(FLOPS))
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        shown = plots.pixels(plots.flops(FLOPS))
        assert dict(matplotlib.rcParams) == before
    assert np.array_equal(shown, expected)


def test_points_may_come_in_any_order() -> None:
    turned = {name: points[::-1] for name, points in BALANCE.items()}
    for shown, expected in zip(plots.balance(turned).axes, plots.balance(BALANCE).axes, strict=True):
        assert repr(lines(shown)) == repr(lines(expected))


@pytest.mark.parametrize(
    "series",
    [
        {name: [(0, points[0][1])] for name, points in ALL.items()},
        {name: [(0, math.nan), *points[i % 4 :], (50, math.inf)] for i, (name, points) in enumerate(ALL.items())},
    ],
    ids=["one point", "ragged, some not finite"],
)
def test_odd_series_are_drawn(series) -> None:
    figures = plots.figures(series)
    assert list(figures) == ["balance", "layer_densities", "exploration", "flops", "quality"]
    for figure in figures.values():
        figure.draw_without_rendering()


@pytest.mark.parametrize("name", list(ALL))
def test_each_series_alone_is_drawn_or_left_out(name: str) -> None:
    for figure in plots.figures({name: ALL[name]}).values():
        assert figure.axes


# ---- balance -------------------------------------------------------------------------------------------


def test_the_balance_has_gaps_where_it_was_undecided() -> None:
    signal, density = plots.balance(BALANCE).axes
    (shown,) = (points for label, points in lines(signal).items() if label == "balance ratio (BR)")
    assert [step for step, _ in shown] == STEPS
    assert shown[0][1] == 0.25
    assert math.isnan(shown[1][1])
    assert [value for _, value in shown[2:]] == [0.5, 0.75]
    # A line alone would not show its first point.
    (line,) = (line for line in signal.lines if line.get_label() == "balance ratio (BR)")
    assert (line.get_marker(), line.get_markevery()) == ("o", [0])
    assert lines(density) == {role: BALANCE[f"density/{role}"] for role in ("discriminator", "generator")}
    assert signal.get_xlim() == density.get_xlim() == (0, 40)


def test_the_bounds_are_a_band() -> None:
    figure = plots.balance(BALANCE)
    (band,) = figure.axes[0].collections
    vertices = band.get_paths()[0].vertices
    assert (vertices[:, 0].min(), vertices[:, 0].max()) == (10, 40)
    assert set(vertices[:, 1]) == {0.45, 0.55}
    assert {"band, 0.45 to 0.55", "D too weak", "D too strong"} <= set(texts(figure))


def test_bounds_that_move_are_a_band_of_their_own() -> None:
    lower = {"control/lower": [(10, 0.2), (40, 0.3)], "control/upper": [(10, 0.3), (40, 0.45)]}
    figure = plots.balance(BALANCE | lower)
    (band,) = figure.axes[0].collections
    assert set(band.get_paths()[0].vertices[:, 1]) == {0.2, 0.3, 0.45}
    assert "band, 0.3 to 0.45 at the end" in texts(figure)


def test_spikes_leave_the_picture_and_are_marked() -> None:
    steps = range(1, 101)
    ratio = {step: 0.4 + 0.002 * step for step in steps} | {50: 37.5, 70: -12.0, 80: 5.0}
    series = BALANCE | {name: list(ratio.items()) for name in ("balance/ratio", "control/signal")}
    (signal, _) = plots.balance(series).axes
    bottom, top = signal.get_ylim()
    assert -1 < bottom < 0.4
    assert 0.6 < top < 1.5
    shown = lines(signal)
    assert [step for step, _ in shown["up to 37.5"]] == [50, 80]
    assert [step for step, _ in shown["down to -12"]] == [70]
    plain = lines(plots.balance(BALANCE).axes[0])
    assert list(plain) == ["balance ratio (BR)"]


@pytest.mark.parametrize(
    ("signal", "label", "above"),
    [
        (BALANCE["balance/real_sign"], "mean sign of D(real)", "D too strong"),
        ([(10, 3.0), (20, 4.0)], "control signal", None),
    ],
)
def test_another_signal_is_drawn_in_place_of_br(signal, label: str, above: str | None) -> None:
    figure = plots.balance(BALANCE | {"control/signal": signal})
    shown = lines(figure.axes[0])[label]
    assert [(step, value) for step, value in shown if not math.isnan(value)] == signal
    beside = [text.get_text() for text in figure.axes[0].texts]
    assert beside[:1] == ([above] if above else [])


def test_a_ratio_that_nothing_is_resized_by_has_no_band() -> None:
    series = {name: points for name, points in BALANCE.items() if not name.startswith("control/")}
    signal, _ = plots.balance(series).axes
    assert not signal.collections
    assert "balance ratio (BR)" in lines(signal)


# ---- layers --------------------------------------------------------------------------------------------


def test_heat_maps_hold_the_densities_of_layers_from_change_to_change() -> None:
    figure = plots.layer_densities(DENSITIES)
    generator, discriminator, bar = figure.axes
    assert generator.get_title(loc="left") == "Density of layers, generator"
    assert discriminator.get_title(loc="left") == "Density of layers, discriminator"
    assert bar.get_ylabel() == "density"
    assert [label.get_text() for label in generator.get_yticklabels()] == ["layers.0", "layers.3"]
    names = ["0", "score", "attention.in_proj_weight"]
    assert [label.get_text() for label in discriminator.get_yticklabels()] == names
    rows = list(LAYERS.values())
    (mesh,) = generator.collections
    assert np.array_equal(mesh.get_array(), rows[:2])
    assert mesh.get_coordinates()[0, :, 0].tolist() == [10, 20, 30, 40, 50]
    (mesh,) = discriminator.collections
    assert np.array_equal(mesh.get_array(), np.array(rows[2:])[:, [0, 2, 3]])
    assert mesh.get_coordinates()[0, :, 0].tolist() == [10, 30, 40, 50]
    assert isinstance(mesh.norm, PowerNorm)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 1)
    assert [text.get_text() for text in discriminator.texts] == ["0.50", "0.50", "0.50", "last"]
    assert generator.yaxis_inverted()


def test_networks_under_other_names_are_told_apart() -> None:
    named = {
        name.replace("generator", "gan.netG").replace("discriminator", "gan.netD"): points
        for name, points in DENSITIES.items()
    }
    titles = [ax.get_title(loc="left") for ax in plots.layer_densities(named).axes[:2]]
    assert titles == ["Density of layers, generator (gan.netG)", "Density of layers, discriminator (gan.netD)"]


@pytest.mark.parametrize("name", ["$x_", "$x_$", "$x$", "a$b", "x_$", r"\frac{", "%$#", "$$", "_hidden"])
@pytest.mark.parametrize("form", ["png", "svg"])
def test_names_with_signs_of_formulas_are_drawn_as_they_are(name: str, form: str) -> None:
    series = {f"{name}/{key}": points for key, points in (BALANCE | FLOPS).items()}
    series |= {
        f"layer_density/{net}.{name}{i}.weight": [(1, 0.5), (9, 0.4)] for net in ("generator", "D") for i in "ab"
    }
    series |= {f"{key}{name}": points for key, points in QUALITY.items()}
    drawn = plots.figures(series)
    assert {"layer_densities", "quality"} < set(drawn)
    assert len(drawn) > 2
    for figure in drawn.values():
        content = plots.rendered(figure, form)
        if form == "svg":
            assert "<defs" in content.decode()
    labels = [label.get_text() for label in drawn["layer_densities"].axes[0].get_yticklabels()]
    assert labels == [f"{name}a", f"{name}b"]


@pytest.mark.parametrize("layers", [5, 60])
def test_the_names_of_layers_are_legible_and_different(layers: int) -> None:
    deep = "a_backbone_with_a_long_name.stages_of_the_network.{}.a_long_name_for_a_single_convolution"
    series = {f"layer_density/{net}.{deep.format(i)}.weight": [(1, 0.5)] for net in "GD" for i in range(layers)}
    figure = plots.layer_densities(series)
    figure.canvas.draw()
    for ax in figure.axes[:2]:
        names = [label.get_text() for label in ax.get_yticklabels()]
        assert len(set(names)) == len(names) == -(-layers // -(-layers // 48))
        assert max(map(len, names)) <= 36
        boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert all(upper.y0 >= lower.y1 - 2 for upper, lower in pairwise(boxes))
        assert ax.get_window_extent().width > 350


def test_a_dense_pair_has_no_heat_map() -> None:
    assert plots.layer_densities({name: [(step, 1.0) for step in STEPS] for name in LAYERS}) is None


# ---- the others ----------------------------------------------------------------------------------------


def test_exploration_shows_coverage_next_to_density_and_overlap_below() -> None:
    coverage, overlap = plots.exploration(EXPLORATION | BALANCE).axes
    assert [list(zip(*line.get_data(), strict=True)) for line in coverage.lines] == [
        EXPLORATION["coverage/generator"],
        BALANCE["density/generator"],
        EXPLORATION["coverage/discriminator"],
        BALANCE["density/discriminator"],
    ]
    assert lines(overlap) == {role: EXPLORATION[f"overlap/{role}"] for role in ("generator", "discriminator")}
    coverages = {name: points for name, points in EXPLORATION.items() if "coverage" in name}
    assert len(plots.exploration(coverages).axes) == 1


def test_every_metric_has_an_axis_of_its_own() -> None:
    frechet, kernel, recall = plots.quality(QUALITY).axes
    assert lines(frechet) == {
        "averaged weights": QUALITY["frechet_distance/cnn"],
        "raw weights": QUALITY["frechet_distance_raw/cnn"],
    }
    titles = [ax.get_title(loc="left") for ax in (frechet, kernel, recall)]
    assert titles == ["Frechet distance: 4", "Kernel distance: -0.001", "Recall: 0.5"]
    assert frechet.get_ylabel() == "cnn\n(lower is better)"
    assert kernel.get_ylabel() == "inception\n(lower is better)"
    assert recall.get_ylabel() == "cnn\n(higher is better)"
    assert [ax.get_yscale() for ax in (frechet, kernel, recall)] == ["log", "linear", "linear"]


def test_raw_weights_alone_are_named_raw() -> None:
    (ax,) = plots.quality({"precision_raw/cnn": [(0, 0.5)]}).axes
    assert ax.get_title(loc="left") == "Precision, raw weights: 0.5"
    assert list(lines(ax).values()) == [[(0, 0.5)]]


def test_flops_are_shown_relative_to_dense_training() -> None:
    (ax,) = plots.flops(FLOPS).axes
    assert lines(ax)["this run, 30.0%"] == FLOPS["flops/training_ratio"]
    assert {y for _, y in lines(ax)["dense training"]} == {1}


def test_what_was_never_finite_is_drawn_empty() -> None:
    for figure in plots.figures(
        {name: [(step, math.nan) for step, _ in points] for name, points in ALL.items()}
    ).values():
        assert all(np.isfinite(ax.get_ylim()).all() for ax in figure.axes)

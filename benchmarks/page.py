"""Writes docs/results.md, the pages behind it, their figures, and tables of other pages, from benchmarks/results.

    python benchmarks/page.py

The pages' text is in benchmarks/pages, in which {{a name}} stands for a table. Other pages have tables between
<!-- rows: a name --> and <!-- end -->.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev

import figures
from comparisons import (
    Comparison,
    Row,
    distance,
    failed,
    flops,
    interval,
    mean_density,
    of,
    of_run,
    of_widths,
    repeated_densities,
    settled,
    without_measuring,
)
from grid import key
from rows import HERE, rows
from studies import (
    ABLATIONS,
    BAND,
    CHANNEL_RATES,
    CHANNELS,
    CIFAR_SMALL,
    CIFAR_SMALL_RUNS,
    DENSITIES,
    ESTIMATED,
    FASHION,
    FIXED,
    LONGER,
    METHODS,
    SCALED_RUNS,
    SIZES,
    STUDIES,
    WIDE,
    WIDE_ABLATIONS,
    WIDE_CLAIMED,
    WIDE_RUNS,
)

DOCS = HERE.parent / "docs"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown."""
    lines = [list(head), ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def at_end(cell: Sequence[Row]) -> str:
    """The discriminator's density at the end."""
    return f"{fmean(row['discriminator_density'][-1][1] for row in cell):.2f}"


def with_seeds(cell: Sequence[Row]) -> str:
    """Every distance, and whose it is."""
    return ", ".join(f"{distance(row):.1f} (seed {row['seed']})" for row in cell)


# ---- quality -------------------------------------------------------------------------------------------


CONTROLLED = ("DDST auto", "DDST relaxed")
"""Runs that use BR."""
RAMPS = ("ramp", "ramp to 0.5")
"""Runs whose discriminator grows without BR."""


def by_seed(found: Sequence[Row], setting: str, densities: Iterable[float], run: str, other: str) -> Comparison:
    """Compares two kinds of runs in one setting, over densities of the generator together."""
    cells = ([row for density in densities for row in of(found, setting, name, density)] for name in (run, other))
    return Comparison(*cells, by_seed=True)


def opponents(found: Sequence[Row], setting: str, run: str, *densities: float) -> dict[str, Comparison]:
    """Compares a run with the best fixed discriminator, in hindsight, and with the ramps, by their names.

    The best one is of those with which it shares the most seeds; where it shares none, there is none.
    """
    compared = {other: by_seed(found, setting, densities, run, other) for other in (*FIXED, *RAMPS)}
    most = max(compared[other].pairs for other in FIXED)
    fixed = [other for other in FIXED if most and compared[other].pairs == most]
    best = sorted(fixed, key=lambda other: compared[other].ratio)[-1:]
    return {other: compared[other] for other in (*best, *RAMPS) if compared[other].pairs}


def in_columns(cells: Mapping[str, str], separator: str) -> list[str]:
    """Columns of a table: the best fixed discriminator with its name, and the ramps; empty where one is missing."""
    best = [f"{other}{separator}{cell}" for other, cell in cells.items() if other not in RAMPS]
    return [*(best or [""]), *(cells.get(ramp, "") for ramp in RAMPS)]


def claim(study: str) -> str:
    """Compares DDST with the best fixed density and the ramps, cell by cell."""
    found, body = rows(study), []
    settings = dict.fromkeys(cell.setting for cell in STUDIES[study]())
    for setting, density, run in product(settings, sorted({row["density"] for row in found}), CONTROLLED):
        compared = opponents(found, setting, run, density)
        if not compared:
            continue
        ours = of(found, setting, run, density)
        line = [setting, percent(density), run, str(len(ours)), percent(fmean(map(flops, ours)))]
        costs = {other: percent(fmean(map(flops, of(found, setting, other, density)))) for other in compared}
        body.append(line + in_columns({other: f"{costs[other]}; {each}" for other, each in compared.items()}, ", "))
    head = ["data", "generator", "run", "seeds", "FLOPs", "the best fixed one", "the ramp", "the ramp to 0.5"]
    return table(head, body)


STUDIED = (
    ("Fashion-MNIST", "wide", next(iter(WIDE)), WIDE_CLAIMED),
    ("Fashion-MNIST, 300 images", "wide", "300 images", ()),
    ("Fashion-MNIST, 10,000 updates", "wide", LONGER, ()),
    ("CIFAR-10", "cifar10_small", CIFAR_SMALL, (0.1, 0.3)),
)
"""Data with its study and setting, and the densities of the generator that are also compared together, if any."""


def verdicts() -> str:
    """The default compared with the best fixed density and the ramps, on both sets of data."""
    body = []
    for name, study, setting, several in STUDIED:
        found = rows(study)
        alone = [(density,) for density in repeated_densities(found, setting)]
        for densities in filter(None, (*alone, several)):
            compared = opponents(found, setting, "DDST auto", *densities)
            seeds = max(comparison.pairs for comparison in compared.values()) // len(densities)
            line = [name, " and ".join(map(percent, densities)), str(seeds)]
            cells = {other: f"{each}; operations x {each.ratio_of(flops):.2f}" for other, each in compared.items()}
            body.append(line + in_columns(cells, ": "))
    head = ["data", "generator", "seeds", "with the best fixed one", "with the ramp", "with the ramp to 0.5"]
    return table(head, body)


def together(study: str) -> str:
    """DDST compared with every other kind of run, over densities together."""
    _, _, setting, densities = next(studied for studied in STUDIED if studied[1] == study)
    found, body = rows(study), []
    for other in dict.fromkeys([*FIXED, *RAMPS, *(cell.run for cell in STUDIES[study]())]):
        line, number = [], 0
        for run in CONTROLLED:
            comparison = by_seed(found, setting, densities, run, other)
            known = comparison.pairs and run != other
            number = max(number, comparison.pairs // len(densities))
            line += [str(comparison), f"x {comparison.ratio_of(flops):.2f}"] if known else ["", ""]
        if any(line):
            body.append([other, str(number), *line])
    head = [name for run in CONTROLLED for name in (f"{run}: distance", "operations")]
    return table(["compared with", "seeds", *head], body)


BESIDE = (*RAMPS, *CONTROLLED)
"""The runs that every kind of run is compared with."""


def overall(least: float = 0.0) -> str:
    """Kinds of runs beside the ramps and DDST, over all cells that both were trained in, where these are several.

    Args:
        least: Density of the generator below which cells are left out.
    """
    found, body = [row for row in rows("fashion") if row["density"] >= least], []
    for run in METHODS:
        ours = of_run(found, run)
        beside = {other: Comparison(ours, of_run(found, other)) for other in BESIDE}
        ramp = beside["ramp"]
        if ramp.cells < 2:
            continue
        line = [run, f"{ramp.pairs} in {ramp.cells}", f"{sum(map(failed, ours))} of {len(ours)}"]
        line += [f"x {ramp.ratio_of(measure):.2f}" for measure in (flops, without_measuring)]
        line += ["" if other == run else str(comparison) for other, comparison in beside.items()]
        body.append(line)
    head = ["run", "pairs in cells", "failed", "training FLOPs relative to the ramp", "without measuring BR"]
    return table([*head, *(f"distance relative to {name}" for name in BESIDE)], body)


def in_short(study: str, setting: str, runs: Sequence[str]) -> str:
    """Distances of each seed in a setting, and training FLOPs, by density of the generator."""
    found = rows(study)
    densities = repeated_densities(found, setting)
    body = []
    for run in runs:
        line = [run]
        for density in densities:
            cell = of(found, setting, run, density)
            each = ", ".join(f"{distance(row):.1f}" for row in cell)
            line += [each, percent(fmean(map(flops, cell)))] if cell else ["", ""]
        body.append(line)
    dense = of(found, setting, "dense", 1.0)
    each = ", ".join(f"{distance(row):.1f}" for row in dense)
    body.append(["dense", *[each, "100 %"] * len(densities)])
    head = [name for density in densities for name in (f"generator at {percent(density)}: distance", "FLOPs")]
    return table(["method", *head], body)


def again() -> str:
    """Compares runs that were trained again, with another version of PyTorch on another machine."""
    now = {key(row): row for row in (*rows("fashion"), *rows("floors"))}
    pairs = [(row, now[key(row)]) for row in rows("versions") if key(row) in now]
    logs = [math.log(distance(later) / distance(earlier)) for earlier, later in pairs]
    low, high = interval(logs)
    return (
        f"{len(logs)} of these runs were also trained with torch 2.15 on another machine: the present distances are "
        f"x {math.exp(fmean(logs)):.2f} ({low:.2f} to {high:.2f}) in the mean, and a single one differs by a factor of "
        f"{math.exp(median(map(abs, logs))):.2f} in the median, one by {math.exp(max(map(abs, logs))):.1f}"
    )


def quality(study: str, settings: Sequence[str]) -> str:
    """Returns the results of a study by setting and density, and below the table the runs that are missing."""
    found = rows(study)
    wanted = Counter((cell.setting, cell.density, cell.run) for cell in STUDIES[study]())
    runs = ["dense", *METHODS]
    body: list[list[str]] = []
    missing: list[str] = []
    for setting, density in sorted(
        {place[:2] for place in wanted}, key=lambda place: (settings.index(place[0]), place[1])
    ):
        lacking = []
        for run in runs:
            number, cell = wanted[setting, density, run], of(found, setting, run, density)
            if len(cell) < number:
                lacking.append(f"{run} ({number - len(cell)})")
            if not cell:
                continue
            values = [distance(row) for row in cell]
            spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
            body.append(
                [
                    setting,
                    percent(density),
                    run,
                    f"{len(cell)} of {number}",
                    f"{fmean(values):.1f}{spread}",
                    ", ".join(f"{value:.1f}" for value in values),
                    percent(fmean(map(flops, cell))),
                    f"{fmean(map(mean_density, cell)):.2f}",
                    at_end(cell),
                ]
            )
        if lacking:
            missing.append(f"- {setting}, {percent(density)}: {', '.join(lacking)}")
    head = [
        "data",
        "generator",
        "run",
        "seeds",
        "distance",
        "each",
        "training FLOPs",
        "mean `d_D`",
        "`d_D` at the end",
    ]
    left = ["\nNot trained yet (number of seeds):\n", *missing] if missing else []
    return "\n".join([table(head, body), *left])


def changed(study: str, names: Iterable[str], setting: str, unchanged: Sequence[Row]) -> str:
    """DDST changed in one thing, beside DDST."""
    found, density = rows(study), unchanged[0]["density"]
    body = []
    for name, cell in {"nothing": unchanged, **{name: of(found, setting, name, density) for name in names}}.items():
        values = ", ".join(f"{distance(row):.1f}" for row in cell) or "missing"
        cost = percent(fmean(map(flops, cell))) if cell else ""
        beside = "" if name == "nothing" else str(Comparison(cell, unchanged))
        body.append([name, str(len(cell)), values, cost, beside])
    return table(["changed", "seeds", "distance", "training FLOPs", "distance relative to no change"], body)


def ablation() -> str:
    """The ablations of small networks."""
    setting, density = next(iter(FASHION)), DENSITIES[0]
    return changed("ablations", ABLATIONS, setting, of(rows("ablations"), setting, "nothing", density))


def wide_ablation() -> str:
    """The ablations of wide networks, beside the study's own runs of the same seeds."""
    setting, seeds = next(iter(WIDE)), {row["seed"] for row in rows("wide_ablations")}
    unchanged = [row for row in of(rows("wide"), setting, "DDST relaxed", 0.05) if row["seed"] in seeds]
    return changed("wide_ablations", WIDE_ABLATIONS, setting, unchanged)


def trials() -> str:
    """Returns the trials that settings and variants were chosen by, on seeds of their own."""
    body = [
        [row["run"], str(row["seed"]), f"{distance(row):.1f}", percent(row["flops"]), f"`{row['command']}`"]
        for row in rows("trials")
    ]
    return table(["run", "seed", "distance", "training FLOPs", "command"], body)


def floors() -> str:
    """Compares first densities of the discriminator, for very sparse generators."""
    found, body = rows("floors"), []
    for setting, density, run in sorted({(row["setting"], row["density"], row["run"]) for row in found}):
        cell = of(found, setting, run, density)
        body.append([setting, percent(density), run, with_seeds(cell), percent(fmean(map(flops, cell))), at_end(cell)])
    return table(["images", "generator", "run", "distance", "training FLOPs", "`d_D` at the end"], body)


def by_place(study: str) -> tuple[list[str], list[list[str]]]:
    """A study's runs, and what was beside it, by where they were trained: distances and training FLOPs.

    Returns:
        A table's head, and its lines.
    """
    found, wanted = rows(study), STUDIES[study]()
    places = list(dict.fromkeys((cell.setting, cell.density) for cell in wanted))
    body = []
    for run in dict.fromkeys([*(cell.run for cell in wanted), *(row["run"] for row in found)]):
        line = [run]
        for setting, density in places:
            cell = of(found, setting, run, density)
            each = ", ".join(f"{distance(row):.1f}" for row in cell)
            line.append(f"{each}; {percent(fmean(map(flops, cell)))}" if cell else "")
        body.append(line)
    return ["run", *(f"{setting}, {percent(density)}" for setting, density in places)], body


def widths() -> str:
    """Returns distance and BR by the width of the networks, with their active weights."""
    found, (lower, upper), body = of_widths(), BAND, []
    for width, density, run in product(SIZES, (0.05, 0.1), SCALED_RUNS):
        if cell := of(found, f"width {width}", run, density):
            generator, discriminator = SIZES[width]
            windows = [value for row in cell for value in settled(row)]
            body.append(
                [
                    str(width),
                    f"{density * generator:,.0f} ({percent(density)})",
                    run,
                    f"{discriminator * fmean(map(mean_density, cell)):,.0f}",
                    ", ".join(f"{distance(row):.1f}" for row in cell),
                    percent(fmean(map(flops, cell))),
                    f"{fmean(windows):.2f}",
                    percent(fmean(lower <= value <= upper for value in windows)),
                ]
            )
    head = [
        "width",
        "active weights of G",
        "run",
        "of D, in the mean",
        "distance",
        "FLOPs",
        "BR",
        "windows in the band",
    ]
    return table(head, body)


def failures() -> str:
    """Returns how many runs failed, by kind of run and study, and in which cells."""
    found = {study: rows(study) for study in ("wide", "scaling", "fashion", "unbalanced")}
    body = []
    for run in BESIDE:
        counts, places = [], {}
        for study, each in found.items():
            own = of_run(each, run)
            bad = [row for row in own if failed(row)]
            counts.append(f"{len(bad)} of {len(own)}" if own else "")
            places |= dict.fromkeys(f"{row['setting']} at {percent(row['density'])} ({study})" for row in bad)
        body.append([run, *counts, "; ".join(places) or "none"])
    return table(["run", *found, "where"], body)


def rules() -> str:
    """Ways of control, where the right discriminators differ."""
    found = rows("rules")
    ramps = of_run(found, "ramp")
    head, body = by_place("rules")
    for line in body:
        beside = Comparison(of_run(found, line[0]), ramps)
        line += ["", ""] if line[0] == "ramp" or not beside.pairs else [str(beside), f"x {beside.ratio_of(flops):.2f}"]
    return table([*head, "distance relative to the ramp", "FLOPs relative to the ramp"], body)


def balances() -> str:
    """BR by the discriminator's density, over all seeds' windows."""
    (setting, *_), (lower, upper), body = FASHION, BAND, []
    runs = ("RigL, balanced D", "RigL, D explores at a fixed density", "RigL, strong D", "ramp", "DDST relaxed")
    for density in DENSITIES[:2]:
        for run in runs:
            cell = of(rows("fashion"), setting, run, density)
            if not cell:
                continue
            windows = [value for row in cell for value in settled(row)]
            within = fmean(lower <= value <= upper for value in windows)
            turns = fmean(stdev(settled(row)) for row in cell)
            body.append(
                [
                    percent(density),
                    run,
                    str(len(cell)),
                    f"{fmean(map(mean_density, cell)):.2f}",
                    f"{fmean(windows):.2f}",
                    f"{turns:.2f}",
                    percent(within),
                ]
            )
    head = [
        "generator",
        "run",
        "seeds",
        "mean `d_D`",
        "mean BR",
        "its standard deviation in a run",
        "windows in the band",
    ]
    return table(head, body)


def estimators() -> str:
    """BR of the same runs by both estimators: its mean over windows, and its spread from one window to the next."""
    body = []
    (setting, *_), density = FASHION, DENSITIES[0]
    for run in ESTIMATED:
        for name, cell in (
            ("ratio of means", of(rows("fashion"), setting, run, density)),
            ("mean of ratios", of(rows("ablations"), setting, f"{run}, mean of ratios", density)),
        ):
            line = [run, name]
            if not cell or cell[0]["seed"] != 0:
                body.append([*line, "missing", "", "", ""])
                continue
            values = settled(cell[0])
            steps = [abs(one - other) for one, other in zip(values[1:], values, strict=False)]
            numbers = (fmean(values), fmean(steps), min(values), max(values))
            body.append([*line, *(f"{number:.2f}" for number in numbers)])
    return table(["run", "BR as", "mean", "change from window to window", "smallest", "largest"], body)


# ---- whole channels ------------------------------------------------------------------------------------


def channels() -> str:
    """Masks of channels beside masks of weights."""
    found = rows("channels")
    body = []
    for density, run in [(1.0, "dense"), *product((0.1, 0.3), CHANNELS)]:
        cell = [row for row in found if (row["run"], row["density"]) == (run, density)]
        if not cell:
            body.append([percent(density), run, "missing", "", "", ""])
            continue
        values = [distance(row) for row in cell]
        mean = f"{fmean(values):.1f}"
        each = ", ".join(f"{value:.1f}" for value in values)
        body.append([percent(density), run, mean, each, percent(fmean(map(flops, cell))), at_end(cell)])
    return table(["generator", "run", "distance", "each", "training FLOPs", "`d_D` at the end"], body)


def channel_trials() -> str:
    """Distances by the share that an exploration replaces at first."""
    body = []
    for rate in CHANNEL_RATES:
        cell = [row for row in rows("channels") if row["run"] == f"channels, exploring {rate}"]
        body.append([f"{rate:g}", with_seeds(cell) or "missing"])
    return table(["`exploration_rate`", "distance, generator at 30 %"], body)


# ---- cost ----------------------------------------------------------------------------------------------


def short(value: float) -> str:
    """Formats a number with two digits or more."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def on(gpu: bool) -> list[Row]:
    """The rows of mask updates on a GPU, or on a CPU."""
    return [row for row in rows("mask_update") if row["machine"].startswith("CPU") != gpu]


def mask_updates(gpu: bool) -> str:
    found, body = on(gpu), []
    for millions in sorted({row["millions"] for row in found}):
        for row in found:
            if row["millions"] == millions and row["beside"]:
                low, middle, high = row["to_ours"]
                ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
                body.append([f"{millions}", row["what"], short(row["milliseconds"]), ratio, str(row["turns"])])
    return table(["million weights", "what", "ms", "over ours, quartiles", "turns"], body)


def growth_of_mask_updates(gpu: bool) -> str:
    body = []
    for row in on(gpu):
        if not row["beside"] and row["what"].startswith("lightning_ddst"):
            each = row["milliseconds"] / row["millions"]
            body.append(
                [
                    str(row["millions"]),
                    row["what"].partition(", ")[2],
                    short(row["milliseconds"]),
                    short(each),
                    short(row["bandwidth_bound_ms"]),
                    f"{row['mask_bytes_a_weight']:g}",
                ]
            )
    head = ["million weights", "scope", "ms", "ns a weight", "memory's bandwidth alone, ms", "bytes of masks a weight"]
    return table(head, body)


def over_dense(row: Row) -> list[str]:
    """A training step's time over the dense one: the mean, quartiles, the dense one, and of how many updates."""
    low, middle, high = row["quartiles"]
    quartiles = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    return [f"{row['ratio']:.3f}", quartiles, f"{row['dense_ms']:.0f} ms", str(row["updates"])]


def steps() -> str:
    body = [
        [
            str(row["discriminator_steps"]),
            row["what"],
            *over_dense(row),
        ]
        for row in rows("overhead")
    ]
    head = ["D steps a G step", "with", "over dense", "median and quartiles of turns", "dense update", "updates"]
    return table(head, body)


def launches(granularity: str) -> str:
    """Kernels and waits that kinds of updates add to a dense one, of this package by commit and of other code."""
    found = [row for row in rows("launches") if row["granularity"] == granularity]
    columns: dict[str, dict[str, str]] = {}
    for row in found:
        name = f"here, {row['commit']}" if row["who"] == "lightning_ddst" else row["who"]
        share = f" ({row['of_dense']:.1%})" if row["what"].startswith("mean") else ""
        columns.setdefault(name, {})[row["what"]] = f"{row['launches']:g} / {row['waits']:g}{share}"
    kinds = list(dict.fromkeys(row["what"] for row in found))
    ours = sorted(columns, key=lambda name: not name.startswith("here"))
    body = [[kind, *(columns[name].get(kind, "") for name in ours)] for kind in kinds]
    return table(["kernels / waits", *ours], body)


def kinds_of_steps() -> str:
    """Times of kinds of updates over dense ones, one column per setting."""
    found = rows("kinds")
    columns: dict[str, dict[str, str]] = {}
    for row in found:
        setting = f"{row['pair']}, {row['discriminator_steps']} D step{'s' * (row['discriminator_steps'] > 1)}"
        unusual = [row["precision"]] * (row["precision"] != "32-true") + [row["compiled"]] * bool(row["compiled"])
        name = ", ".join([setting, *unusual, row["machine"]])
        low, _, high = row["quartiles"] or (None, None, None)
        spread = "" if low is None else f" ({low:.3f} to {high:.3f})"
        columns.setdefault(name, {})[row["what"]] = f"{row['ratio']:.3f}{spread}"
    kinds = list(dict.fromkeys(row["what"] for row in found))
    body = [[kind, *(column.get(kind, "") for column in columns.values())] for kind in kinds]
    return table(["update", *columns], body)


def exported() -> str:
    body = [
        [
            f"{row['granularity']}s",
            percent(row["density"]),
            f"{row['channels'][0]} of {row['channels'][1]}",
            *(f"{row[f'{name}_bytes'] / 1e6:.2f} MB" for name in ("dense", "compressed", "onnx", "program")),
            f"{row['of_maskable_fp32']:.1%}",
            f"{row['torch_time']:.2f}",
            f"{row['onnx_time']:.2f}",
            ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["linear_times"].items()),
        ]
        for row in rows("exported")
    ]
    head = ["masks of", "generator", "channels left", "dense", "compressed", "ONNX", "program"]
    head += [
        "compressed, of the maskable weights as fp32",
        "time, torch",
        "time, onnxruntime",
        "time, sparse Linear layers",
    ]
    return table(head, body)


def smaller() -> str:
    body = [
        [
            percent(row["density"]),
            str(row["discriminator_steps"]),
            *over_dense(row),
        ]
        for row in rows("smaller")
    ]
    head = [
        "both networks",
        "D steps a G step",
        "over dense",
        "median and quartiles of updates",
        "dense update",
        "updates",
    ]
    return table(head, body)


def origins() -> str:
    """Lists the machines and versions that rows are from."""
    seen: dict[str, int] = {}
    for study in (
        *STUDIES,
        "trials",
        "mask_update",
        "overhead",
        "kinds",
        "launches",
        "exported",
        "smaller",
        "versions",
    ):
        for row in rows(study):
            versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
            origin = f"{study}: {row['machine']}; {versions}"
            seen[origin] = seen.get(origin, 0) + 1
    return "\n".join(f"- {origin} ({count} rows)" for origin, count in seen.items())


TABLES: dict[str, Callable[[], str]] = {
    "claim": lambda: claim("fashion"),
    "wide claim": lambda: claim("wide"),
    "wide": lambda: quality("wide", list(WIDE)),
    "wide in short": lambda: in_short("wide", next(iter(WIDE)), WIDE_RUNS),
    "narrow cifar10 claim": lambda: claim("cifar10_small"),
    "narrow cifar10": lambda: quality("cifar10_small", [CIFAR_SMALL]),
    "narrow cifar10 in short": lambda: in_short("cifar10_small", CIFAR_SMALL, CIFAR_SMALL_RUNS),
    "verdicts": verdicts,
    "wide together": lambda: together("wide"),
    "narrow cifar10 together": lambda: together("cifar10_small"),
    "overall": overall,
    "overall without the sparsest": lambda: overall(sorted(DENSITIES)[1]),
    "again": again,
    "fashion": lambda: quality("fashion", list(FASHION)),
    "cifar10": lambda: quality("cifar10", ["CIFAR-10"]),
    "ablations": ablation,
    "wide ablations": wide_ablation,
    "trials": trials,
    "floors": floors,
    "rates": lambda: table(*by_place("rates")),
    "unbalanced": lambda: table(*by_place("unbalanced")),
    "balances": balances,
    "estimators": estimators,
    "mask updates": lambda: mask_updates(gpu=False),
    "mask updates on a GPU": lambda: mask_updates(gpu=True),
    "growth of mask updates": lambda: growth_of_mask_updates(gpu=False),
    "growth of mask updates on a GPU": lambda: growth_of_mask_updates(gpu=True),
    "steps": steps,
    "launches": lambda: launches("weight"),
    "launches, channels": lambda: launches("channel"),
    "kinds of steps": kinds_of_steps,
    "exported": exported,
    "smaller": smaller,
    "channels": channels,
    "channel trials": channel_trials,
    "origins": origins,
    "rules": rules,
    "controllers": lambda: table(*by_place("controllers")),
    "widths": widths,
    "failures": failures,
}


SUMMARY = "results.md"
WITH_TABLES = ("bounds.md",)
"""Pages of docs that are not made from benchmarks/pages, but have tables from rows."""


def pages() -> dict[Path, str]:
    """Returns every page that holds tables, with its content, by its path."""
    made = {}
    for template in sorted((HERE / "pages").glob("*.md")):
        folder = DOCS if template.name == SUMMARY else DOCS / "results"
        made[folder / template.name] = re.sub(r"{{(.+?)}}", lambda found: TABLES[found[1]](), template.read_text())
    between = re.compile(r"(<!-- rows: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
    for name in WITH_TABLES:
        page = DOCS / name
        made[page] = between.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", page.read_text())
    return made


def main() -> None:
    for path, content in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    figures.write(DOCS / "figures")


if __name__ == "__main__":
    main()

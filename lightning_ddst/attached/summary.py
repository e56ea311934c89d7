"""A sparse run in words: its networks, its plan, and its results so far."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from textwrap import wrap
from typing import TypeAlias

from lightning_ddst.attached.readings import RunReadings
from lightning_ddst.methods import Method, Role, SparseTraining
from lightning_ddst.methods.base import ROLES
from lightning_ddst.sparsity import MaskedNetwork
from lightning_ddst.utils.counts import describe_times
from lightning_ddst.utils.networks import get_parts

Rows: TypeAlias = Sequence[tuple[str, ...]]

_TITLE = "Sparse training of a GAN"
_WIDTH = 80
"""Characters of a line in a terminal."""


@dataclass(frozen=True)
class Summary:
    """A table of texts; ``print`` shows it as text, and a notebook as HTML.

    Attributes:
        title: The line above it.
        blocks: Blocks of rows of two or three cells, the first of which names the row.
    """

    title: str
    blocks: Sequence[Rows]

    def __str__(self) -> str:
        return "\n".join([self.title, *(line for block in self.blocks for line in align(block, _WIDTH))])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Returns the table as HTML, for notebooks."""
        left = 'style="text-align:left"'
        rows = "".join(
            f"<tr><th {left}>{escape(name)}</th>"
            + "".join(f"<td {left}>{escape(cell)}</td>" for cell in cells[:-1])
            + f'<td {left} colspan="{3 - len(cells)}">{escape(cells[-1])}</td></tr>'
            for block in self.blocks
            for name, *cells in block
        )
        return f"<b>{escape(self.title)}</b><table>{rows}</table>"


def align(rows: Rows, width: int | None = None) -> list[str]:
    """Returns rows as lines with aligned cells; the last cell of a row may be longer than its column.

    Args:
        rows: The rows.
        width: Characters after which the last cells are wrapped; None never wraps.
    """
    lines = []
    for row in rows:
        widths = [max(len(each[column]) for each in rows if len(each) > column + 1) for column in range(len(row) - 1)]
        start = "".join(f"{cell:<{length}}  " for cell, length in zip(row, widths, strict=False))
        last = [row[-1]] if width is None else wrap(row[-1], max(width - len(start), 20)) or [""]
        lines += [f"{start}{last[0]}".rstrip(), *(" " * len(start) + more for more in last[1:])]
    return lines


def summarize(run: RunReadings, training: SparseTraining | None) -> Summary:
    """Summarizes a run: its networks once they are masked, its plan once it trains, and its results so far.

    Args:
        run: The run.
        training: Its training; None before it starts.
    """
    start = [*network_rows(run), *(() if training is None else plan_rows(run, training))]
    so_far = [("so far", f"{run.generator_updates:,} generator updates"), *result_rows(run)[1:]]
    return Summary(_TITLE, [start, so_far] if run.generator_updates else [start])


def describe_start(run: RunReadings, training: SparseTraining | None) -> str:
    """Returns the table at the start of a run.

    Args:
        run: The run.
        training: Its training, for the plan; None while the run's length is not known.
    """
    return str(Summary(_TITLE, [[*network_rows(run), *(() if training is None else plan_rows(run, training))]]))


def describe_plan(run: RunReadings, training: SparseTraining) -> str:
    """Returns the plan as lines of text."""
    return "\n".join(align(plan_rows(run, training)))


def describe_results(run: RunReadings) -> str:
    """Returns the table at the end of a run."""
    return str(Summary(f"{_TITLE}: results", [result_rows(run)]))


def network_rows(run: RunReadings) -> list[tuple[str, ...]]:
    """Returns rows about the method and both networks, with a column for each network."""
    networks = run.networks()
    rows: list[tuple[str, ...]] = [("method", run.method)]
    if not networks:
        return [*rows, ("networks", "not masked yet")]
    return [
        *rows,
        ("", *ROLES),
        ("module", *(run.module_name(role) for role in ROLES)),
        ("class", *("+".join(type(part).__name__ for part in get_parts(networks[role].network)) for role in ROLES)),
        ("weight tensors", *(_maskable_tensors(networks[role]) for role in ROLES)),
        ("weights", *(f"{networks[role].total:,} maskable ({networks[role].maskable_share():.1%})" for role in ROLES)),
        ("density", *(_densities(run.settings, role) for role in ROLES)),
    ]


def _maskable_tensors(network: MaskedNetwork) -> str:
    maskable = len(network.weights)
    return f"{maskable} of {maskable + len(network.dense_weights())} maskable"


def _densities(method: Method, role: Role) -> str:
    first, last = method.initial_densities[role], method.final_densities[role]
    if first != last:
        return f"{first:.1%} to {last:.1%}"
    resized = any(update.resizes and role in update.roles for update in method.mask_updates())
    return f"{first:.1%} at the start" if resized else f"{first:.1%}"


def plan_rows(run: RunReadings, training: SparseTraining) -> list[tuple[str, ...]]:
    """Returns rows about the intervals and how often something happens in them."""
    plan = run.plan
    lines = ["length not known" if plan.updates is None else f"{plan.updates:,} generator updates expected"]
    if run.balance is not None and plan.probe_interval is not None:
        lines.append(f"balance ratio (BR) measured {plan.times(plan.probe_interval)}")
    lines += filter(None, (update.describe_plan(plan) for update in training.mask_updates))
    return [("plan" if number == 0 else "", line) for number, line in enumerate(lines)]


def result_rows(run: RunReadings) -> list[tuple[str, ...]]:
    """Returns rows about densities, balance, decisions and operations so far."""
    networks, updates = run.networks(), run.settings.mask_updates()
    rows: list[tuple[str, ...]] = [("method", f"{run.method}, {run.generator_updates:,} generator updates")]
    rows += [(role, f"density {network.density:.4f} ({network.describe()})") for role, network in networks.items()]
    if (balance := run.balance) is not None:
        last = f"{balance.ratio:.3f}" if balance.ratio is not None else f"undecided: {balance.reason}"
        rows.append(("balance ratio, last window", last))
    if actions := [decision.action for _, decision in run.decisions]:
        counts = ", ".join(f"{action} {actions.count(action)}" for action in dict.fromkeys(actions))
        decided = "1 decision" if len(actions) == 1 else f"{len(actions):,} decisions"
        resized = actions.count("grow") + actions.count("prune")
        whose = " and ".join(role for role in ROLES if any(each.resizes and role in each.roles for each in updates))
        rows.append((f"{whose} resized", f"{describe_times(resized)} in {decided} ({counts})"))
    if (ratio := run.flops_ratio) is not None:
        kernels = "dense kernels do the arithmetic all the same"
        if not all(network.units.dense_kernels for network in networks.values()):
            kernels = "inactive channels are left out, where networks are not compiled"
        rows.append(("training FLOPs", f"{ratio:.1%} of dense training ({kernels})"))
    return rows

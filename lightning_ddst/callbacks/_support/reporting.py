"""What explains a run in TensorBoard: a page of charts, what happened in words, hyperparameters with final numbers."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

from lightning.pytorch import LightningModule, Trainer

from lightning_ddst.balance import SIGNALS, Decision
from lightning_ddst.callbacks.quality import SampleQuality
from lightning_ddst.methods import SparseTraining
from lightning_ddst.utils.logging import tensorboards

Layout: TypeAlias = dict[str, dict[str, list[Any]]]

_MOST_ROWS = 40
_NUMBERS = ("balance/ratio", "density/discriminator", "flops/training_ratio")
"""What a run comes to, beside its samples' quality."""
_COMPARED = ("method", "generator_density", "discriminator_density", "granularity", "growth")
"""Arguments that stand beside the numbers; TensorBoard shows five at first."""
_VERBS = {"grow": "grown", "prune": "pruned", "explore": "explored", "hold": "left as it was", "undecided": "undecided"}
_BECAUSE = {"grow": " because it was too weak", "prune": " because it was too strong"}
_BR = (
    "BR, the balance ratio, is the share of the gap between the scores of real and of generated images that one "
    "generator update closes. "
)


def layout(prefixes: Sequence[str], metrics: Sequence[str]) -> Layout:
    """The page of custom scalars.

    Args:
        prefixes: What the names of every pair of networks begin with; "" where there is one.
        metrics: Names that `SampleQuality` logs.

    Returns:
        Charts by title by category, as ``SummaryWriter.add_custom_scalars`` takes them.
    """
    page: Layout = {}
    for prefix in prefixes:
        whose = f", {prefix.rstrip('/')}" if prefix else ""
        # TensorBoard puts the other charts of a category before those with margins.
        page[f"1. Are the networks in balance{whose}?"] = {
            "control signal within its bounds": [
                "Margin",
                [f"{prefix}control/{n}" for n in ("signal", "lower", "upper")],
            ]
        }
        start = f"^{re.escape(prefix)}"
        page[f"2. What follows from it{whose}"] = {
            "density of the discriminator": ["Multiline", [f"{start}density/discriminator$"]],
            "density of the generator": ["Multiline", [f"{start}density/generator$"]],
            "mean scores of real and of generated images": ["Multiline", [f"{start}balance/(real|fake)$"]],
        }
    page |= {"3. Samples": {name: ["Multiline", [f"^{re.escape(name)}$"]] for name in metrics}} if metrics else {}
    page["4. Costs and losses"] = {
        "FLOPs so far over those of dense training": ["Multiline", ["^(.+/)?flops/"]],
        "losses": ["Multiline", ["^loss/"]],
        "weights that were ever active": ["Multiline", ["^(.+/)?coverage/"]],
    }
    return page


def hparams(arguments: Mapping[str, Any]) -> dict[str, float | str]:
    """Of a callback's arguments, those that runs are compared by: the same ones, of the same types, for every run."""
    # TensorBoard's columns are the first run's.
    values = {name: "by default" if arguments[name] is None else str(arguments[name]) for name in _COMPARED}
    return values | {"generator_density": arguments["generator_density"]}


def write_custom_scalars(trainer: Trainer, module: LightningModule, arguments: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the layout, and the run's hyperparameters with the names of its final numbers.

    TensorBoard keeps the first that is written of either: call it before Lightning logs the module's
    hyperparameters, which are among these.

    Args:
        trainer: The Trainer, before training.
        module: Its module.
        arguments: By the prefix of every pair of networks, those that are `compared`.
    """
    writers = tensorboards(trainer) if trainer.is_global_zero else []
    if not writers:
        return
    from torch.utils.tensorboard.summary import hparams  # which other loggers do without

    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    metrics = [name for c in callbacks if isinstance(c, SampleQuality) for name in c.names]
    numbers = [f"{prefix}{name}" for prefix in arguments for name in _NUMBERS]
    settings = dict(module.hparams)
    for prefix, own in arguments.items():
        settings |= {f"{prefix}{name}": value for name, value in own.items()}
    shown = {name: v if isinstance(v, int | float | str) else str(v) for name, v in settings.items() if v is not None}
    for writer in writers:
        writer.add_custom_scalars(layout(list(arguments), metrics))
        for summary in hparams(shown, dict.fromkeys([*metrics, *numbers], 0.0)):
            writer._get_file_writer().add_summary(summary)


def summary_markdown(
    method: str, signal: str | None, training: SparseTraining, start: float, relative: bool = False
) -> str:
    """What happened so far, and why.

    Args:
        method: As in `DynamicSparsityCallback`.
        signal: What the discriminator is resized by, a key of `SIGNALS`; None where it is by nothing.
        training: The run.
        start: The discriminator's density at the start.
        relative: Whether the signal is compared with the highest that it has been, and not with given bounds.

    Returns:
        Markdown: a few sentences, and the decisions, those alike in a row together.
    """
    generator, discriminator = training.generator, training.discriminator
    line = f"- The **generator** has {generator.density:.1%} of its weights"
    if generator.coverage > generator.density:
        line += f", and tries others: {generator.coverage:.1%} were active at some time"
    lines = [f"### After {training.updates:,} generator updates, method {method}", f"{line}."]
    line = f"- The **discriminator** has {discriminator.density:.1%} of its weights, after {start:.1%} at the start"
    actions = [decision.action for _, decision in training.decisions]
    counts = [
        f"{verb} {_times(actions.count(action))}" + (_BECAUSE.get(action, "") if signal and not relative else "")
        for action, verb in _VERBS.items()
        if action in actions
    ]
    lines.append(f"{': '.join([line, *[', '.join(counts)] * bool(counts)])}.")
    if actions:
        update, last = training.decisions[-1]
        lines.append(f"- The last decision, at update {update:,}: **{last.action}**, since {last.reason}.")
    flops = training.flops.total
    if flops.dense:
        lines.append(
            f"- Training took {flops.ratio:.1%} of the operations of dense training, {flops.probes / flops.dense:.1%} "
            "for measuring BR." + (" Dense kernels do all of them the same." if generator.units.dense_kernels else "")
        )
    if signal:
        lines.append(f"- {_meaning(signal, relative)}")
    return "\n".join([*lines, "", *_table(training.decisions)])


def _meaning(signal: str, relative: bool) -> str:
    if relative:
        return (
            f"{_BR}The nearer BR is to the highest that it has been, the more weights the discriminator gets; where BR "
            "has fallen far below, it loses weights."
        )
    label, above = SIGNALS[signal].label, SIGNALS[signal].high_means
    below = "weak" if above == "strong" else "strong"
    does = {"weak": "gets weights", "strong": "loses weights"}
    return (
        f"{_BR if signal == 'balance_ratio' else ''}Where {label} is above its bounds, the discriminator is too "
        f"{above} and {does[above]}; below, it is too {below} and {does[below]}."
    )


def _table(decisions: Sequence[tuple[int, Decision]]) -> list[str]:
    """Decisions, the newest first; those alike in a row are one row."""
    groups = [list(group) for _, group in groupby(decisions, key=lambda each: each[1].action)]
    rows = []
    for group in reversed(groups[-_MOST_ROWS:]):
        (first, _), (last, decision) = group[0], group[-1]
        when = f"{last:,}" if len(group) == 1 else f"{first:,} to {last:,}"
        times = decision.action if len(group) == 1 else f"{decision.action}, {_times(len(group))}"
        rows.append(f"| {when} | {times} | {decision.density:.4g} | {decision.reason} |")
    if not rows:
        return []
    header = ["| generator updates | decided | density then | why (the last time) |", "|---|---|---|---|"]
    left_out = len(groups) - len(rows)
    return [*header, *rows, *([f"\n{left_out} earlier rows are left out."] if left_out > 0 else [])]


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")

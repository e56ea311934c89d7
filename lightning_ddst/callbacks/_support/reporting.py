"""Reports of a run to a Trainer's loggers, and pages of TensorBoard."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_ddst.attached.hooks import AttachedTraining
from lightning_ddst.attached.options import RunOptions
from lightning_ddst.attached.report import RunReport
from lightning_ddst.balance import Decision, RelativeController
from lightning_ddst.callbacks._support.run_length import find_timer
from lightning_ddst.methods import Method, Resize, SparseTraining
from lightning_ddst.sparsity import GROWTH_RULES, LayerFlops
from lightning_ddst.sparsity.growth import GrowthRule
from lightning_ddst.utils.counts import describe_times
from lightning_ddst.utils.logging import (
    log_hyperparameters,
    log_scalars,
    log_text,
    logs_at,
    set_callback_metrics,
    show_progress,
    tensorboards,
)
from lightning_ddst.utils.series import RecordedSeries

Layout: TypeAlias = dict[str, dict[str, list[Any]]]

_MOST_ROWS = 40
UPDATES = "generator_updates"
"""Name of the scalar that is logged at the end of a run."""
_NUMBERS = ("balance/ratio", "density/generator", "density/discriminator", "flops/training_ratio", UPDATES)
"""Final numbers of a run, next to its sample quality."""
_IN_PROGRESS_BAR = {"balance/ratio": "BR", "density/discriminator": "D_density", "density/generator": "G_density"}
_VERBS = {"grow": "grown", "prune": "pruned", "explore": "explored", "hold": "left as it was", "undecided": "undecided"}
_BECAUSE = {"grow": " because it was too weak", "prune": " because it was too strong"}


class TrainerReport(RunReport):
    """A reporter that logs scalars and texts through a Trainer's loggers, its progress bar and `callback_metrics`.

    Args:
        trainer: The Trainer.
        options: The options of the run.
        attached: The training.
        series: Series that record what is logged.
        prefix: Prefix of every logged name; empty if there is only one pair.
        stops: Whether the run ends when training has broken down.
    """

    def __init__(
        self,
        trainer: Trainer,
        options: RunOptions,
        attached: AttachedTraining,
        series: RecordedSeries,
        *,
        prefix: str,
        stops: bool,
    ) -> None:
        super().__init__(options, attached, series, stops=stops)
        self._trainer = trainer
        self._method = options.method
        self._prefix = prefix
        self._refreshed = 0  # the generator update of the values in callback_metrics
        self._warned_of_flops = False

    def line_is_due(self, update: int) -> bool:
        """Returns whether the Trainer logs at this generator update."""
        return logs_at(self._trainer, update)

    def log(self, values: Mapping[str, float], update: int) -> None:
        """Logs scalars to every logger and recorder of the run, and shows the main ones in the progress bar."""
        self._refreshed = update
        self._set_undecided()
        log_scalars(self._trainer, self._named(values), update)
        if "density/generator" in values:  # else not the values of an update
            shown = {title: values.get(name, math.nan) for name, title in _IN_PROGRESS_BAR.items()}
            show_progress(self._trainer, self._named(shown))

    def refresh(self) -> None:
        """Sets the current scalars in ``trainer.callback_metrics``, for callbacks that monitor them."""
        update = self._training.updates
        if update and update != self._refreshed:
            self._refreshed = update
            self._set_undecided()
            set_callback_metrics(self._trainer, self._named(self.scalars()))

    def _set_undecided(self) -> None:
        """Sets the balance ratio to NaN until it is decided for the first time; then the last decided one stays."""
        name = f"{self._prefix}balance/ratio"
        if self._measured and name not in self._trainer.callback_metrics:
            set_callback_metrics(self._trainer, {name: math.nan})

    def _named(self, values: Mapping[str, float]) -> dict[str, float]:
        return {f"{self._prefix}{name}": value for name, value in values.items()}

    def print(self, text: str) -> None:
        """Prints a text above the progress bar."""
        self._trainer.lightning_module.print(f"{self._prefix.replace('/', ': ')}{text}")

    def write(self, name: str, text: str, update: int) -> None:
        """Writes a text to the loggers that take texts."""
        log_text(self._trainer, f"{self._prefix}{name}", text, update)

    def stop(self) -> None:
        """Ends the run after this batch."""
        self._trainer.should_stop = True

    def after_epoch(self) -> None:
        """Writes a summary of the run so far to the loggers."""
        flops = self._training.flops
        unnamed = self._training.updates > 2 and not flops.total.dense and not any(flops.find_uncounted())
        if unnamed and not self._warned_of_flops:
            self._warned_of_flops = True
            rank_zero_warn(
                "training operations are not counted: no matrix product or convolution with a masked weight was seen. "
                "Those inside of a compiled module may be hidden: compile the two networks instead of the whole module."
            )
        words = summary_markdown(self._method, self._training)
        self.write("about/what_happened", words, self._training.updates)

    def after_run(self) -> None:
        """Writes the operations of each layer to the loggers, too."""
        super().after_run()
        if ledger := self._pair.by_full_name(self._training.flops.layers):
            self.write("flops/ledger", _ledger_markdown(ledger), self._training.updates)


def layout(controlled: Mapping[str, bool], metrics: Sequence[str]) -> Layout:
    """Returns the layout of TensorBoard's page of custom scalars.

    Args:
        controlled: Whether a signal controls a density, by the prefix of the names of every pair of networks; "" if
            there is only one pair.
        metrics: Names that `SampleQuality` logs.

    Returns:
        Charts by category and title, as ``SummaryWriter.add_custom_scalars`` takes them.
    """
    page: Layout = {}
    for prefix, has_signal in controlled.items():
        whose = f", {prefix.rstrip('/')}" if prefix else ""
        start = f"^{re.escape(prefix)}"
        # TensorBoard puts the other charts of a category before those with margins.
        band = ["Margin", [f"{prefix}control/{n}" for n in ("signal", "lower", "upper")]]
        page[f"1. Are the networks in balance{whose}?"] = (
            {"control signal within its bounds": band}
            if has_signal
            else {"balance ratio": ["Multiline", [f"{start}balance/ratio$"]]}
        )
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


def hparams(
    trainer: Trainer, options: RunOptions, growth: GrowthRule, changed: Mapping[str, Any]
) -> dict[str, float | str]:
    """Returns the hyperparameters to compare runs by: the same names and types for every run.

    TensorBoard takes its columns from the first run, so a setting that has no column is listed in ``other_settings``.
    It sorts them by name, and shows the first five at first: both densities, granularity, growth and method.

    Args:
        trainer: The Trainer, whose limits are the run's length.
        options: The options of the run.
        growth: The growth rule.
        changed: The arguments that differ from their defaults.
    """
    method = options.method
    controller = next((update.controller for update in method.mask_updates() if isinstance(update, Resize)), None)
    final = method.final_densities
    columns: dict[str, float | str] = {
        "method": method.name,
        "generator_density": final["generator"],
        "discriminator_density": str(method.initial_densities["discriminator"]),
        "granularity": options.masking.granularity,
        "growth": next(name for name, rule in GROWTH_RULES.items() if rule == growth),  # or a copy of it
        "run_length": _length(trainer),
        "seed": torch.initial_seed() if options.seed is None else options.seed,
        "sparsity.bounds": "auto"
        if isinstance(controller, RelativeController)
        else _text(getattr(controller, "bounds", None)),
        "sparsity.delta": _text(getattr(method, "delta", None) or getattr(controller, "delta", None)),
        "sparsity.max_discriminator_density": float(
            getattr(method, "max_discriminator_density", final["discriminator"])
        ),
    }
    shown = {name.removeprefix("sparsity.") for name in columns}
    others = [f"{name}={_text(value)}" for name, value in changed.items() if name not in shown]
    return columns | {"other_settings": ", ".join(others)}


def _text(value: Any) -> str:
    """Returns a setting in words; None, which the method does not have or derives itself, as nothing."""
    if isinstance(value, tuple | list):
        return " to ".join(map(str, value)) if len(value) == 2 else ", ".join(map(str, value))
    return "" if value is None else str(value)


def _length(trainer: Trainer) -> str:
    """Returns the Trainer's limits, such as "5 epochs" or "100,000 steps"."""
    counts = {"epoch": trainer.max_epochs or -1, "step": trainer.max_steps}
    limits = [f"{count:,} {unit}{'s' * (count > 1)}" for unit, count in counts.items() if count > 0]
    if (timer := find_timer(trainer)) is not None and (remaining := timer.time_remaining()) is not None:
        limits.append(f"{timer.time_elapsed() + remaining:,.0f} s")
    return ", ".join(limits)


def write_custom_scalars(
    trainer: Trainer,
    module: LightningModule,
    arguments: Mapping[str, Mapping[str, Any]],
    controlled: Mapping[str, bool],
    metrics: Sequence[str],
) -> None:
    """Writes the layout, and the run's hyperparameters with the names of its final numbers.

    TensorBoard keeps the first layout and the first hyperparameters. Call this before Lightning logs the module's
    hyperparameters, which are included here.

    Args:
        trainer: The Trainer, before training.
        module: Its module.
        arguments: The result of `hparams` for every pair of networks, by the pair's prefix.
        controlled: Whether a signal controls a density of the pair, by the pair's prefix.
        metrics: Names that `SampleQuality` logs.
    """
    settings: dict[str, Any] = {f"{prefix}{name}": v for prefix, own in arguments.items() for name, v in own.items()}
    log_hyperparameters(trainer, settings)
    writers = tensorboards(trainer) if trainer.is_global_zero else []
    if not writers:
        return
    from torch.utils.tensorboard.summary import hparams  # imported here: other loggers work without it

    numbers = [f"{prefix}{name}" for prefix in arguments for name in _NUMBERS]
    settings = dict(module.hparams) | settings
    shown = {name: v if isinstance(v, int | float | str) else str(v) for name, v in settings.items() if v is not None}
    for writer in writers:
        writer.add_custom_scalars(layout(controlled, metrics))
        for summary in hparams(shown, dict.fromkeys([*metrics, *numbers], 0.0)):
            writer._get_file_writer().add_summary(summary)


def summary_markdown(method: Method, training: SparseTraining) -> str:
    """Returns a summary of the run so far, with the reasons of decisions, in Markdown.

    Args:
        method: The method.
        training: The training.
    """
    generator, discriminator = training.network("generator"), training.network("discriminator")
    resizing = [update for update in training.mask_updates if isinstance(update, Resize)]
    judges = any(update.controller.judges for update in resizing)
    line = f"- The **generator** has {generator.density:.1%} of its weights"
    if generator.coverage > generator.density:
        line += f", and tries others: {generator.coverage:.1%} were active at some time"
    lines = [f"### After {training.updates:,} generator updates, method {method.name}", f"{line}."]
    start = method.initial_densities["discriminator"]
    line = f"- The **discriminator** has {discriminator.density:.1%} of its weights, after {start:.1%} at the start"
    actions = [decision.action for _, decision in training.decisions]
    counts = [
        f"{verb} {describe_times(actions.count(action))}" + (_BECAUSE.get(action, "") if judges else "")
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
    lines += [f"- {explanation}" for update in training.mask_updates if (explanation := update.explanation())]
    return "\n".join([*lines, "", *_table(training.decisions)])


def _ledger_markdown(ledger: Mapping[str, LayerFlops]) -> str:
    """Returns the operations of each layer as a Markdown table."""
    rows = [
        "| layer | steps | dense gradients | measuring BR | dense training | share of dense |",
        "|---|---|---|---|---|---|",
    ]
    for name, f in [*ledger.items(), ("**all**", LayerFlops.total(ledger.values()))]:
        cells = [f"{value:.4g}" for value in (f.steps, f.dense_gradients, f.probes, f.dense)]
        rows.append(f"| {name} | {' | '.join(cells)} | {f.ratio:.1%} |")
    return "\n".join(rows)


def _table(decisions: Sequence[tuple[int, Decision]]) -> list[str]:
    """Returns the lines of a table of decisions, newest first; consecutive equal actions share a row."""
    groups = [list(group) for _, group in groupby(decisions, key=lambda each: each[1].action)]
    rows = []
    for group in reversed(groups[-_MOST_ROWS:]):
        (first, _), (last, decision) = group[0], group[-1]
        when = f"{last:,}" if len(group) == 1 else f"{first:,} to {last:,}"
        times = decision.action if len(group) == 1 else f"{decision.action}, {describe_times(len(group))}"
        rows.append(f"| {when} | {times} | {decision.density:.4g} | {decision.reason} |")
    if not rows:
        return []
    header = ["| generator updates | decided | density then | why (the last time) |", "|---|---|---|---|"]
    left_out = len(groups) - len(rows)
    return [*header, *rows, *([f"\n{left_out} earlier rows are left out."] if left_out > 0 else [])]

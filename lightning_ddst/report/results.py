"""Results of a run: the schema of ``results.json``, its writer, and a reader that falls back to the run's logs."""

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_ddst.attached.options import METHOD_ARGUMENTS, UNITS_ARGUMENTS
from lightning_ddst.methods import METHODS
from lightning_ddst.methods.base import ROLES
from lightning_ddst.methods.intervals import Intervals
from lightning_ddst.report.runs import RESULTS_FILE, Series, by_pair, find_run, of_samples, read_run
from lightning_ddst.utils import cache
from lightning_ddst.utils.configurations import read_yaml

SCHEMA = 1
"""Version of the schema; it rises when a field changes its meaning or goes away."""

Status = Literal["finished", "interrupted", "failed", "running", "unknown"]
_DENSITIES = ("generator_density", "discriminator_density")
_DEFAULTS = {"granularity": "weight", "probe_interval": Intervals.probe_interval}
"""Defaults other than None among the settings of a configuration."""
_TRAINER_ARGUMENTS = ("precision", "limit_train_batches", "overfit_batches", "devices", "num_nodes")
"""Arguments of the Trainer that samples depend on; more processes train on more images per update."""
_CALLBACKS = ("GeneratorEMA", "SampleQuality")
"""Callbacks that the measured values depend on."""


@dataclass(frozen=True, kw_only=True)
class NetworkResults:
    """Results of one network. Densities are active over maskable weights, in (0, 1].

    Attributes:
        initial_density: The density at which the method starts.
        final_density: The density at the end.
        mean_density: The mean density over all generator updates; None before the first.
        active_weights: Number of active weights at the end.
        maskable_weights: Number of weights that masks may cover.
    """

    initial_density: float | None = None
    final_density: float | None = None
    mean_density: float | None = None
    active_weights: int | None = None
    maskable_weights: int | None = None


@dataclass(frozen=True, kw_only=True)
class DecisionResults:
    """A decision on a density, with the number of generator updates before it; see `lightning_ddst.balance.Decision`.

    Attributes:
        update: Generator updates before the decision.
        action: "grow", "prune", "explore", "hold" or "undecided".
        density: The target density after it.
        reason: The reason in words.
    """

    update: int
    action: str
    density: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class FlopsResults:
    """Training operations of the maskable weights so far; a multiplication and an addition are two operations.

    Attributes:
        training: Operations of this run, measurements of the balance ratio included.
        measuring: Operations of measuring the balance ratio.
        dense: Operations of the same training when dense, without measuring.
        ratio: `training` over `dense`.
    """

    training: int | None = None
    measuring: int | None = None
    dense: int | None = None
    ratio: float


@dataclass(frozen=True, kw_only=True)
class PairResults:
    """Results of one generator and its discriminator.

    Attributes:
        method: Name of the method.
        settings: Arguments of `DynamicSparsityCallback` that differ from their defaults, and the densities.
        updates: Generator updates so far.
        planned_updates: Length of the run in generator updates, as the Trainer's limits tell it; None without a limit.
        networks: Results by role, "generator" and "discriminator".
        balance_ratio: BR of the last window; None if it was undecided or not measured.
        decisions: All decisions on densities; None if only logs were read.
        flops: Training operations; None if none were counted.
    """

    method: str | None = None
    settings: dict[str, Any]
    updates: int
    planned_updates: int | None = None
    networks: dict[str, NetworkResults]
    balance_ratio: float | None = None
    decisions: list[DecisionResults] | None = None
    flops: FlopsResults | None = None


@dataclass(frozen=True, kw_only=True)
class QualityResults:
    """One metric of `SampleQuality`.

    Attributes:
        metric: Such as "frechet_distance".
        features: Name of the features.
        weights: "average" or "raw" weights of the generator.
        values: Pairs of generator updates and a value, ascending; NaN is null in the file.
        real_halves: The Frechet distance between two halves of the real images; None for other metrics.
    """

    metric: str
    features: str
    weights: Literal["average", "raw"]
    values: list[tuple[int, float]]
    real_halves: float | None = None

    @classmethod
    def of_logged(
        cls, metric: str, features: str, values: Sequence[tuple[int, float]], real_halves: float | None = None
    ) -> "QualityResults":
        """Makes the results of a metric from its logged name, which ends in ``_raw`` for the generator's own weights.

        Args:
            metric: The logged name without the features.
            features: Name of the features.
            values: Pairs of generator updates and a value.
            real_halves: The Frechet distance between two halves of the real images.
        """
        name = metric.removesuffix("_raw")
        return cls(
            metric=name,
            features=features,
            weights="average" if name == metric else "raw",
            values=list(values),
            real_halves=real_halves if name == "frechet_distance" else None,
        )


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """Results of a run, as ``results.json`` in its folder holds them.

    Attributes:
        status: "finished", "interrupted" (Ctrl-C or SIGTERM), "failed" (an error ended it), or "unknown" if only logs
            were read.
        error: The first line of the error that ended the run; None if there was none.
        seed: Seed of torch.
        pairs: Results of every pair of networks by the generator's name in the module; "" if there is only one pair.
        quality: All metrics of the samples.
        versions: Versions of Python and of packages by name.
        command: The process's arguments.
        config: The configuration of ``lightning-ddst fit``, as in ``config.yaml``; None for other programs.
        resumed_from: The checkpoint that the run resumed from.
    """

    status: Status
    error: str | None = None
    seed: int | None = None
    pairs: dict[str, PairResults]
    quality: list[QualityResults]
    versions: dict[str, str] = field(default_factory=dict)
    command: list[str] | None = None
    config: dict[str, Any] | None = None
    resumed_from: str | None = None

    @property
    def pair(self) -> PairResults:
        """The results of the only pair of networks.

        Raises:
            ValueError: If there are several.
        """
        if len(self.pairs) != 1:
            raise ValueError(f"the run has {len(self.pairs)} pairs; choose one of pairs: {', '.join(self.pairs)}.")
        return next(iter(self.pairs.values()))

    def last(self, metric: str, features: str | None = None, weights: str = "average") -> float | None:
        """Returns the last value of a metric.

        Args:
            metric: Such as "frechet_distance".
            features: Name of the features; by default the first ones.
            weights: "average" or "raw".

        Returns:
            The value; None if the metric was not measured.
        """
        for quality in self.quality:
            if (quality.metric, quality.weights) == (metric, weights) and features in (None, quality.features):
                return quality.values[-1][1]
        return None


def write_results(folder: Path, results: RunResults) -> Path:
    """Writes ``results.json`` atomically.

    Args:
        folder: The run's folder; it is made if it does not exist.
        results: The results.

    Returns:
        The file's path.

    Raises:
        OSError: If the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS_FILE
    content = {"schema": SCHEMA, **_finite(asdict(results))}
    with cache.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False, default=str) + "\n", encoding="utf-8")
    return path


def read_results(run: str | Path) -> RunResults:
    """Reads the results of a run.

    Args:
        run: The run's folder, a folder above a single run, or a file ``results.json``. Without that file, event files
            of TensorBoard or else the ``metrics.csv`` of Lightning's CSVLogger are read, with its ``config.yaml``.
            Such results have the status "unknown", and None in the fields that logs do not hold.

    Raises:
        FileNotFoundError: If there is no such folder, or it holds no run.
        ValueError: If the file has another schema, the folder holds several runs, or its logs hold no training.
    """
    path = Path(run)
    if path.is_file():
        return _read_file(path)
    folder = find_run(path)
    if (folder / RESULTS_FILE).is_file():
        return _read_file(folder / RESULTS_FILE)
    return _read_logs(folder)


def _read_file(path: Path) -> RunResults:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise ValueError(f"its schema must be {SCHEMA}")
        results: RunResults = _typed(RunResults, content, "")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not hold the results of a run: {cache.first_line(error)}.") from error
    return results


def _read_logs(folder: Path) -> RunResults:
    series = read_run(folder)
    if not any(step for points in series.values() for step, _ in points):
        raise ValueError(
            f"the logs in {folder} are those of an evaluation, or of a run that ended before it trained: all values "
            "are at 0 generator updates."
        )
    settings = _read_settings(folder)
    pairs = {}
    for name, own in (by_pair(series) or {"": {}}).items():
        last = {key: points[-1][1] for key, points in own.items()}
        ratio = last.get("flops/training_ratio")
        pairs[name] = PairResults(
            method=settings.method,
            settings=settings.arguments,
            updates=max(step for points in (own or series).values() for step, _ in points),
            networks={role: NetworkResults(final_density=last.get(f"density/{role}")) for role in ROLES},
            balance_ratio=last.get("balance/ratio"),
            flops=None if ratio is None else FlopsResults(ratio=ratio),
        )
    return RunResults(
        status="unknown", seed=settings.seed, pairs=pairs, quality=_quality(series), config=settings.config
    )


def _quality(series: Series) -> list[QualityResults]:
    found = []
    for name, points in of_samples(series).items():
        metric, _, features = name.partition("/")
        found.append(QualityResults.of_logged(metric, features, points))
    return found


@dataclass(frozen=True, kw_only=True)
class _Settings:
    method: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    config: dict[str, Any] | None = None


def _find_method(class_path: str) -> tuple[str, dict[str, Any]]:
    """Returns the name of a method, its class's if it is not registered, and the defaults of its arguments."""
    package, _, kind = class_path.rpartition(".")
    for name, method in METHODS.items():
        if method.__name__ == kind and package in (method.__module__, "lightning_ddst.methods"):
            return name, {field.name: field.default for field in fields(method)}
    return kind, {}


def _read_settings(folder: Path) -> _Settings:
    """Reads the settings in ``config.yaml``, or else those that are logged as hyperparameters in ``hparams.yaml``."""
    for name in ("config.yaml", "hparams.yaml"):
        try:
            content = read_yaml(folder / name)
        except (OSError, ValueError):  # not there; or hyperparameters that are Python objects
            continue
        config = content if isinstance(content, dict) else {}
        given = config.get("sparsity", config)
        if not isinstance(given, dict) or "method" not in given:
            continue
        method = given["method"]
        defaults: dict[str, Any] = {}
        if isinstance(method, dict):  # a class with arguments
            given = given | method.get("init_args", {})
            method, defaults = _find_method(str(method.get("class_path")))
        given = {
            str(key).removeprefix("sparsity."): value for key, value in given.items()
        }  # as hyperparameters are named
        # The densities are logged as they were reached; a dense run ignores the given ones.
        intervals = [interval.name for interval in fields(Intervals)]
        listed = [
            each for each in (*METHOD_ARGUMENTS, *UNITS_ARGUMENTS, *intervals, "granularity") if each not in _DENSITIES
        ]
        seed = config.get("seed_everything", config.get("seed"))
        return _Settings(
            method=str(method),
            arguments={
                name: given[name]
                for name in listed
                if given.get(name) not in (None, _DEFAULTS.get(name), defaults.get(name))
            },
            seed=seed if type(seed) is int else None,
            config=config if "sparsity" in config else None,
        )
    return _Settings()


def is_comparable(results: RunResults, reference: RunResults) -> bool:
    """Returns whether two runs differ in nothing but sparsity.

    Both must have one pair of networks of the same sizes, and the same seed, number of generator updates and real
    images, as far as their metrics tell. If both have a configuration, model, data, precision, devices, averages and
    metrics must be the same.

    Args:
        results: The results of a run.
        reference: Those of the run to compare with.
    """
    if len(results.pairs) != 1 or len(reference.pairs) != 1 or results.seed != reference.seed:
        return False
    pair, other = results.pair, reference.pair
    sizes = [[each.networks[role].maskable_weights for role in ROLES] for each in (pair, other)]
    if pair.updates != other.updates or sizes[0] != sizes[1]:
        return False
    if results.config is not None and reference.config is not None:
        return _agree(_training_config(results.config), _training_config(reference.config))
    halves = [{(q.metric, q.features, q.real_halves) for q in each.quality} for each in (results, reference)]
    return bool(halves[0] & halves[1])


def _training_config(config: Mapping[str, Any]) -> list[Any]:
    """Returns the parts of a configuration that samples depend on, without sparsity and the run's length."""
    trainer = config.get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    counted = [each for each in callbacks if str(each.get("class_path")).rpartition(".")[2] in _CALLBACKS]
    parts = [config.get(name) for name in ("seed_everything", "model", "data")]
    return [*parts, *map(trainer.get, _TRAINER_ARGUMENTS), counted]


def _agree(value: Any, other: Any) -> bool:
    """Returns whether two configurations agree in all arguments that both know; versions add and remove some."""
    if isinstance(value, dict) and isinstance(other, dict):
        if value.get("class_path") != other.get("class_path"):
            return False
        return all(_agree(value[name], other[name]) for name in value.keys() & other.keys())
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(_agree, value, other))
    return bool(value == other)


# ---- JSON ----------------------------------------------------------------------------------------------


def _finite(value: Any) -> Any:
    """Replaces numbers that are not finite, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _typed(kind: Any, value: Any, place: str) -> Any:
    """Converts a value of JSON to a type; the error names the value's place."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(kind, type):
        return _made(kind, value, place)
    if origin in (typing.Union, types.UnionType):
        return None if value is None and type(None) in parts else _typed(parts[0], value, place)
    if origin is Literal:
        _check(value in parts, place, value, f"one of {', '.join(parts)}")
        return value
    if origin is dict:
        _check(isinstance(value, dict), place, value, "an object")
        return {key: _typed(parts[1], each, f"{place}.{key}") for key, each in value.items()}
    if origin is list:
        _check(isinstance(value, list), place, value, "a list")
        return [_typed(parts[0], each, f"{place}[{index}]") for index, each in enumerate(value)]
    if origin is tuple:
        _check(isinstance(value, list) and len(value) == len(parts), place, value, f"a list of {len(parts)} values")
        return tuple(
            _typed(part, each, f"{place}[{i}]") for i, (part, each) in enumerate(zip(parts, value, strict=True))
        )
    if kind is float:
        _check(
            value is None or (isinstance(value, int | float) and not isinstance(value, bool)), place, value, "a number"
        )
        return math.nan if value is None else float(value)
    _check(
        isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), place, value, f"a {kind.__name__}"
    )
    return value


def _made(kind: type, value: Any, place: str) -> Any:
    _check(isinstance(value, dict), place, value, "an object")
    hints = typing.get_type_hints(kind)
    given = {}
    for each in fields(kind):
        _check(each.name in value, f"{place}.{each.name}", None, "there")
        given[each.name] = _typed(hints[each.name], value[each.name], f"{place}.{each.name}")
    return kind(**given)


def _check(allowed: bool, place: str, value: Any, form: str) -> None:
    if not allowed:
        raise ValueError(f"{place.removeprefix('.') or 'the file'}={str(value)[:60]} must be {form}")

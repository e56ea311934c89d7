"""Variants to compare with: what each decides or averages, that the studies' commands run, that nothing is patched."""

import ast
import shlex
from collections.abc import Iterator

import pytest
import rows
import torch
import yaml
from commands import TINY
from studies import ABLATIONS, RULES
from torch import nn
from variants import Brake, ExploresInBand, PlainAverage, PlainEMA

from lightning_ddst import DynamicSparsityCallback, GeneratorEMA, cli
from lightning_ddst.balance import Balance, RelativeController


def balanced_at(ratio: float | None) -> Balance:
    """Returns the balance of a window; a ratio of None is undecided."""
    return Balance(ratio, 1.0, ratio or 0.0, 1.0, 0.0, 100, "" if ratio is not None else "alpha is near 0")


def followed(controller: Brake, density: float, ratios: list[float | None]) -> list[tuple[str, float]]:
    """(action, density) of one decision after the other."""
    steps = []
    for ratio in ratios:
        controller.observe(balanced_at(ratio))
        decision = controller.decide(balanced_at(ratio), density)
        density = decision.density
        steps.append((decision.action, density))
    return steps


# ---- one by one ----------------------------------------------------------------------------------------


def test_a_brake_prunes_by_how_far_the_ratio_has_fallen() -> None:
    # The highest of means of two windows: 0.2, 0.4, 0.4, 0.4, 0.4; bounds of 0.5 and 0.75 of it.
    steps = followed(Brake(0.5, 0.75, False, 0.1, 0.25), 0.1, [0.4, 0.4, 0.25, 0.1, None])
    assert steps == [("grow", 0.35), ("grow", 0.6), ("hold", 0.6), ("prune", 0.35), ("undecided", 0.35)]


def test_a_brake_explores_where_it_would_hold() -> None:
    steps = followed(Brake(0.5, 0.75, True, 0.1, 0.25), 0.9, [0.4, 0.4, 0.25, 0.4])
    assert steps == [("grow", 1.0), ("explore", 1.0), ("explore", 1.0), ("explore", 1.0)]


def test_a_brake_waits_for_a_ratio_above_0() -> None:
    assert followed(Brake(0.5, 0.75, True, 0.1), 0.3, [None, -0.2, 0.0]) == [("undecided", 0.3)] * 3


def test_a_brake_resumes() -> None:
    ratios = [0.4, 0.5, 0.45, 0.2, 0.3]
    first, second = Brake(0.6, 0.9, True, 0.1), Brake(0.6, 0.9, True, 0.1)
    expected = followed(Brake(0.6, 0.9, True, 0.1), 0.3, ratios)
    begun = followed(first, 0.3, ratios[:2])
    second.load_state_dict(first.state_dict())
    assert begun + followed(second, begun[-1][1], ratios[2:]) == expected
    assert second.readings(balanced_at(0.3)) == pytest.approx(
        {"control/signal": 0.3, "control/lower": 0.6 * 0.475, "control/upper": 0.9 * 0.475}
    )


@pytest.mark.parametrize(
    ("ratio", "density", "limits", "action"),
    [
        (0.5, 0.3, False, "explore"),
        (0.9, 0.3, False, "grow"),
        (0.9, 1.0, False, "hold"),
        (0.9, 1.0, True, "explore"),
        (0.1, 0.1, False, "hold"),
        (0.1, 0.1, True, "explore"),
        (None, 0.3, True, "undecided"),
    ],
)
def test_it_explores_in_the_band(ratio: float | None, density: float, limits: bool, action: str) -> None:
    decision = ExploresInBand(min_density=0.1, limits=limits).decide(balanced_at(ratio), density)
    assert decision.action == action
    assert ("the discriminator explores" in decision.reason) == (action == "explore")


def test_a_plain_average_of_a_grown_weight_begins_at_0() -> None:
    network = nn.Linear(2, 1)
    average = PlainAverage(network, 0.75)
    found = []
    for grown, kept in ((0.0, 3.0), (4.0, 3.0), (4.0, 0.0)):
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[grown, kept]]))
        average.update()
        found.append(average.values()["weight"].tolist()[0])
    # Means over all updates: of 0 and 4, then of 0, 4 and 4; what was pruned is 0.
    assert found == [pytest.approx(each) for each in ([0, 3], [2, 3], [8 / 3, 0])]


# ---- by command ----------------------------------------------------------------------------------------


def run(tmp_path, monkeypatch, options: str) -> cli.SparseGANCLI:
    """Trains the small configuration of tests for 20 generator updates."""
    (tmp_path / "tiny.yaml").write_text(TINY.replace("interval: 10", "interval: 4") + "  logger: false\n")
    monkeypatch.chdir(tmp_path)
    return cli.make_cli(["fit", "--config", str(tmp_path / "tiny.yaml"), *shlex.split(options)])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("brake, 0.6 to 0.75", Brake),
        ("DDST that explores", ExploresInBand),
        ("DDST auto, even at 0.6", RelativeController),
    ],
)
def test_a_rule_of_control_trains(name, kind, tmp_path, monkeypatch) -> None:
    with pytest.warns(UserWarning, match=r"does not take generator_density=0\.1"):
        made = run(tmp_path, monkeypatch, RULES[name].format(density=0.3))
    (sparsity,) = (each for each in made.trainer.callbacks if isinstance(each, DynamicSparsityCallback))
    assert type(sparsity.settings.controller) is kind
    assert sparsity.settings.generator_density == 0.3
    assert [update for update, _ in sparsity.decisions] == [4, 8, 12, 16, 20]
    assert min(decision.density for _, decision in sparsity.decisions) >= 0.3
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())["sparsity"]["method"]
    assert recorded["init_args"]["controller"]["class_path"].endswith(kind.__name__)


def test_optimizer_state_is_kept(tmp_path, monkeypatch) -> None:
    made = run(tmp_path, monkeypatch, ABLATIONS["optimizer state kept"])
    (sparsity,) = (each for each in made.trainer.callbacks if isinstance(each, DynamicSparsityCallback))
    masks = {name.removeprefix("generator."): mask for name, mask in sparsity.masks("generator").items()}
    optimizer = made.trainer.optimizers[0]
    parameters = dict(made.model.generator.named_parameters())
    assert any(optimizer.state[parameters[name]]["exp_avg_sq"][~mask].any() for name, mask in masks.items())


def test_a_plain_average_trains_in_the_place_of_the_other(tmp_path, monkeypatch) -> None:
    made = run(tmp_path, monkeypatch, "--trainer.callbacks+ variants.PlainEMA --trainer.callbacks.decay 0.9")
    (ema,) = (each for each in made.trainer.callbacks if isinstance(each, GeneratorEMA))
    assert type(ema) is PlainEMA
    live = made.model.generator.state_dict()
    (sparsity,) = (each for each in made.trainer.callbacks if isinstance(each, DynamicSparsityCallback))
    for name, mask in sparsity.masks("generator").items():
        average = ema.averages()[name.removeprefix("generator.")]
        assert not average[~mask].any()
        assert not torch.equal(average, live[name.removeprefix("generator.")])


def test_weights_stay_channels_last_and_masked(tmp_path, monkeypatch) -> None:
    made = run(tmp_path, monkeypatch, "--trainer.callbacks+ variants.ChannelsLast --trainer.precision bf16-mixed")
    (sparsity,) = (each for each in made.trainer.callbacks if isinstance(each, DynamicSparsityCallback))
    assert [update for update, _ in sparsity.decisions] == [4, 8, 12, 16, 20]
    parameters = dict(made.model.named_parameters())
    for network in ("generator", "discriminator"):
        for name, mask in sparsity.masks(network).items():
            weight = parameters[name]
            assert not weight[~mask].any()
            assert weight.dim() != 4 or weight.is_contiguous(memory_format=torch.channels_last)


def test_the_study_of_the_average_changes_nothing_else() -> None:
    def callbacks(name: str) -> list[dict[str, object]]:
        return yaml.safe_load((rows.HERE / name).read_text())["trainer"]["callbacks"]

    assert f"--config benchmarks/{(rows.HERE / 'plain_average.yaml').name}" == ABLATIONS["plain average"]
    (mask_aware, *others), (plain, *same) = callbacks("fashion.yaml"), callbacks("plain_average.yaml")
    assert others == same
    assert plain == mask_aware | {"class_path": "variants.PlainEMA"}


# ---- without patching ----------------------------------------------------------------------------------

NOT_OURS = {"os._exit", "torch._dynamo", "scheduler._rigl_step"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def root(node: ast.AST) -> str:
    """The name that an expression like ``name.attribute[0].other`` begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def own(kind: ast.ClassDef) -> set[str]:
    """The attributes that a class defines itself."""
    functions = {node.name for node in ast.walk(kind) if isinstance(node, ast.FunctionDef)}
    names = {node.id for node in ast.walk(kind) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = (node for node in ast.walk(kind) if isinstance(node, ast.Attribute))
    return functions | names | {each.attr for each in attributes if isinstance(each.ctx, ast.Store)}


def reaches_into_the_package(source: str) -> Iterator[str]:
    """Expressions that assign to something of the package, or that use something private of it."""
    tree = ast.parse(source)
    ours: set[str] = set()
    of_self: dict[ast.AST, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_ddst"):
            ours |= {alias.asname or alias.name for alias in node.names}
            yield from (f"import {alias.name}" for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Import):
            found = (alias for alias in node.names if alias.name.startswith("lightning_ddst"))
            ours |= {alias.asname or "lightning_ddst" for alias in found}
        elif isinstance(node, ast.ClassDef):
            of_self |= dict.fromkeys(ast.walk(node), own(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and root(node.func) in ("setattr", "delattr") and root(node.args[0]) in ours:
            yield ast.unparse(node)
        if isinstance(node, ast.Attribute):
            assigned = isinstance(node.ctx, ast.Store | ast.Del) and root(node) in ours
            defined = root(node) in ("self", "cls") and node.attr in of_self.get(node, ())
            private = is_private(node.attr) and not defined and ast.unparse(node) not in NOT_OURS
            if assigned or private:
                yield ast.unparse(node)


@pytest.mark.parametrize("path", sorted(rows.HERE.glob("*.py")), ids=lambda path: path.stem)
def test_no_benchmark_patches_the_package_or_uses_what_is_private_of_it(path) -> None:
    assert list(reaches_into_the_package(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from lightning_ddst.balance import DensityController as D\nD.decide = None", ["D.decide"]),
        ("from lightning_ddst.balance import controller\ncontroller.LIMIT += 1", ["controller.LIMIT"]),
        ("import lightning_ddst.balance\ndel lightning_ddst.balance.SIGNALS", ["lightning_ddst.balance.SIGNALS"]),
        ("from lightning_ddst import cli\nsetattr(cli, 'main', None)", ["setattr(cli, 'main', None)"]),
        ("from lightning_ddst.report.plots import _styled", ["import _styled"]),
        ("def update(average):\n    return average._ages", ["average._ages"]),
        ("class C(D):\n    def f(self):\n        return self._ages", ["self._ages"]),
        ("class C(D):\n    def f(self):\n        self._mine = 1\n        return self._mine", []),
        ("import os\nfrom lightning_ddst import cli\nos._exit(1)\nmade = cli.main()\nmade.x = 1", []),
    ],
)
def test_patching_would_be_seen(source: str, found: list[str]) -> None:
    assert list(reaches_into_the_package(source)) == found

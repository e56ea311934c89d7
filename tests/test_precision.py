"""Other precisions than 32 bits: masks hold, BR is measured, skipped steps do not count, growth sees no scale."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Adam
from toys import ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback, growth_rule
from lightning_ddst.sparsity import GROWTH_RULES, Layer

UPDATES = 30
INTERVAL, EXPLORE_INTERVAL = 5, 4


GROWN: list[Tensor] = []
"""The gradients that the growth rules below saw since training started, one per layer and change."""


@pytest.fixture(autouse=True, scope="module")
def _growth_rules() -> Iterator[None]:
    """The package's rules that grow by gradients, which also keep what they see."""
    before = dict(GROWTH_RULES)
    for name, kind in (("seen_gradient", "latest"), ("seen_momentum", "average")):

        @growth_rule(name, gradient=kind, magnitude=True)
        def by_seen(layer: Layer) -> Tensor:
            GROWN.append(layer.gradient.clone())
            return layer.gradient

    yield
    GROWTH_RULES.clear()
    GROWTH_RULES.update(before)


def plugin(**scaler: Any) -> MixedPrecision:
    """Autocast to fp16 on the CPU, where Lightning's own "16-mixed" is bf16."""
    return MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", **scaler))


class ScaledOnly(MixedPrecision):
    """A scaled loss in 32 bits: with powers of 2 as scales, every result is that of training without."""

    def __init__(self, **scaler: Any) -> None:
        super().__init__("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", **scaler))

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast("cpu", torch.float16, enabled=False, cache_enabled=False)


PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "64-true": lambda: {"precision": "64-true"},
    "fp16": lambda: {"plugins": [plugin(init_scale=2.0**10)]},
    "fp16, scale grows": lambda: {"plugins": [plugin(init_scale=2.0**4, growth_interval=3)]},
    "fp16, overflows": lambda: {"plugins": [plugin(init_scale=2.0**30, growth_interval=3)]},
}
EVERY = pytest.mark.parametrize("precision", PRECISIONS)
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["adam", "fused"])


class GAN(ToyGAN):
    def __init__(self, fused: bool = False, lr: float = 1e-2, clears_to_none: bool = True) -> None:
        super().__init__()
        self.options = {"lr": lr, "fused": fused, "betas": (0.5, 0.9)}
        self.clears_to_none = clears_to_none

    def configure_optimizers(self) -> list[Adam]:
        optimizers = [Adam(network.parameters(), **self.options) for network in self.networks()]
        if not self.clears_to_none:
            for optimizer in optimizers:
                clear = optimizer.zero_grad
                optimizer.zero_grad = lambda clear=clear: clear(set_to_none=False)
        return optimizers


def ddst(**arguments: Any) -> DynamicSparsityCallback:
    """The discriminator grows at every decision, and the generator explores in between."""
    defaults = {
        "bounds": (0.0, 1e-9),
        "interval": INTERVAL,
        "explore_interval": EXPLORE_INTERVAL,
        "probe_interval": 1,
        "growth": "seen_gradient",
    }
    return DynamicSparsityCallback(0.3, **defaults | arguments)


@dataclass
class Watch(Callback):
    """Records a training from outside the callback."""

    sparsity: DynamicSparsityCallback
    wrong: list[str] = field(default_factory=list)
    updated: list[bool] = field(default_factory=list)
    """For every batch, whether the generator's weights changed where they were active before and after."""
    counted: list[int] = field(default_factory=list)
    balances: list[tuple[float, float]] = field(default_factory=list)
    masks: list[dict[str, Tensor]] = field(default_factory=list)
    grown: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """The dense gradients that masks grew by, by the weight's name."""
    steps: int = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.scales: list[float] = []
        for optimizer in trainer.optimizers:  # after the hooks of the callback
            optimizer.register_step_post_hook(lambda stepped, *_: self._look(pl_module, stepped))
        GROWN.clear()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        names = {parameter.shape: name for name, parameter in pl_module.named_parameters() if parameter.dim() > 1}
        for gradient in GROWN:
            self.grown[names[gradient.shape]].append(gradient)

    def _look(self, gan: ToyGAN, optimizer: Any) -> None:
        self.steps += 1
        parameters = dict(gan.named_parameters())
        for role, network in self.sparsity.networks().items():
            masks = self.sparsity.masks(role)
            counts = {network.active, sum(int(m.sum()) for m in masks.values()), round(network.target * network.total)}
            if len(counts) > 1:
                self.wrong.append(f"{role}: {counts} active weights")
            for name, mask in masks.items():
                weight = parameters[name]
                state = optimizer.state.get(weight, {}).values()
                zeros = {"weight": weight, "grad": weight.grad}
                zeros |= {f"state {i}": value for i, value in enumerate(state) if value.shape == weight.shape}
                for what, value in zeros.items():
                    if value is not None and value[~mask].any():
                        self.wrong.append(f"step {self.steps}: {what} of {name} is not 0 where it is inactive")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._before = pl_module.generator[0].bias.detach().clone()  # not masked: only the optimizer changes it

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.updated.append(not torch.equal(pl_module.generator[0].bias, self._before))
        self.counted.append(self.sparsity.generator_updates)
        if self.sparsity.balance.samples:
            self.balances.append((self.sparsity.balance.alpha, self.sparsity.balance.beta))
        both = self.sparsity.masks("generator") | self.sparsity.masks("discriminator")
        self.masks.append({name: mask.clone() for name, mask in both.items()})
        if self._scaler is not None:
            self.scales.append(self._scaler.get_scale())

    def changed(self, prefix: str) -> list[int]:
        """The batches, counted from 1, in which a network's masks changed; the first cannot be seen."""
        return [
            number
            for number, (old, new) in enumerate(zip(self.masks, self.masks[1:], strict=False), start=2)
            if any(not torch.equal(old[name], new[name]) for name in old if name.startswith(prefix))
        ]


def trained(
    settings: dict[str, Any],
    gan: ToyGAN | None = None,
    setup: Callable[[ToyGAN], None] | None = None,
    epochs: int = UPDATES // 10,
    **arguments: Any,
) -> tuple[ToyGAN, Watch]:
    made = gan or GAN()
    seed_everything(0, verbose=False)
    made.load_state_dict(ToyGAN().state_dict())
    if setup is not None:
        setup(made)
    sparsity = ddst(**arguments)
    watch = Watch(sparsity)
    seed_everything(1, verbose=False)
    toy_trainer(sparsity, watch, epochs=epochs, **settings).fit(made, toy_data())
    return made, watch


@cache
def in_32_bits(growth: str = "seen_gradient", lr: float = 1e-2, **arguments: Any) -> tuple[ToyGAN, Watch]:
    return trained({}, GAN(lr=lr), growth=growth, **arguments)


# ---- masks and BR -------------------------------------------------------------------------------------------


@FUSED
@EVERY
def test_masks_hold_and_the_balance_ratio_is_measured(precision: str, fused: bool) -> None:
    gan, watch = trained(PRECISIONS[precision](), GAN(fused))
    sparsity = watch.sparsity

    assert watch.wrong == []
    assert watch.steps >= UPDATES
    assert sparsity.generator_updates == sparsity.measurements == sum(watch.updated) >= 10
    assert len(watch.balances) >= sparsity.generator_updates
    assert all(math.isfinite(part) for parts in watch.balances for part in parts)
    assert sparsity.balance_ratio is not None
    assert math.isfinite(sparsity.balance_ratio)
    # One that is due where the discriminator's step was skipped comes an update later.
    due = [update // INTERVAL for update, _ in sparsity.decisions]
    assert due == list(range(1, len(due) + 1))
    assert len(due) >= sparsity.generator_updates // INTERVAL - 1
    assert "grow" in {decision.action for _, decision in sparsity.decisions}
    # An exploration at the very end of the run replaces nothing: the rate has fallen to 0.
    explorations = sparsity.generator_updates // EXPLORE_INTERVAL
    assert len(watch.changed("generator")) in (explorations - 1, explorations)
    dtypes = {"bf16-true": torch.bfloat16, "64-true": torch.float64}
    assert {p.dtype for p in gan.parameters()} == {dtypes.get(precision, torch.float32)}
    assert all(p.isfinite().all() for p in gan.parameters())


@FUSED
@EVERY
def test_measuring_changes_nothing(precision: str, fused: bool) -> None:
    states = []
    measuring = DynamicSparsityCallback(0.3, method="dense", probe_interval=1)
    for callbacks in ([], [measuring]):
        seed_everything(0, verbose=False)
        gan = GAN(fused)
        toy_trainer(*callbacks, epochs=2, **PRECISIONS[precision]()).fit(gan, toy_data())
        states.append(gan.state_dict())

    assert measuring.measurements == measuring.generator_updates > 5
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# ---- steps that are skipped ---------------------------------------------------------------------------------


@pytest.mark.parametrize("clears_to_none", [True, False], ids=["none", "zeros"])
@FUSED
def test_skipped_steps_are_not_counted(fused: bool, clears_to_none: bool) -> None:
    _, watch = trained(PRECISIONS["fp16, overflows"](), GAN(fused, clears_to_none=clears_to_none))

    assert 5 < sum(watch.updated) < UPDATES - 5
    assert not all(watch.updated[5:])  # at first, and later where the scale grew too much
    assert watch.counted == [sum(watch.updated[: i + 1]) for i in range(UPDATES)]
    assert watch.sparsity.measurements == sum(watch.updated)
    assert (watch.steps > sum(watch.updated) * 2) == fused  # a fused optimizer's hooks run in any case


def test_fused_optimizers_are_trained_like_others() -> None:
    others, fused = (trained(PRECISIONS["fp16, overflows"](), GAN(kind, lr=1e-5))[1] for kind in (False, True))

    assert others.scales == fused.scales
    assert others.updated == fused.updated
    assert others.counted == fused.counted
    for role in ("generator", "discriminator"):
        assert others.changed(role) == fused.changed(role)


# ---- growth sees no scale -----------------------------------------------------------------------------------


GROWTH = pytest.mark.parametrize("growth", ["seen_gradient", "seen_momentum"])
WEIGHTS = {
    *("generator.0.weight", "generator.3.weight"),
    *(f"discriminator.{i}.parametrizations.weight.original" for i in (0, 3)),
}
SCALERS = pytest.mark.parametrize(
    "scaler",
    [{"init_scale": 2.0**12}, {"init_scale": 2.0**3, "growth_interval": 2}],
    ids=["scale stays", "scale grows"],
)


@GROWTH
@SCALERS
@FUSED
def test_dense_gradients_are_those_of_32_bits(scaler: dict[str, Any], growth: str, fused: bool) -> None:
    # At so small a rate the weights stay alike until the first change of each mask, and the discriminator does not
    # clearly tell real from fake: BR may be undecided.
    weak = {"signal": "real_sign", "bounds": (1.5, 2.0)}  # the sign is below in any case
    _, expected = in_32_bits(growth, lr=1e-6, **weak)
    _, watch = trained({"plugins": [plugin(**scaler)]}, GAN(fused, lr=1e-6), epochs=1, growth=growth, **weak)

    assert ("growth_interval" in scaler) == (len(set(watch.scales)) > 1)
    assert watch.counted[:INTERVAL] == expected.counted[:INTERVAL]
    assert watch.grown.keys() == expected.grown.keys() == WEIGHTS
    for name in WEIGHTS:
        found, gradient = watch.grown[name][0], expected.grown[name][0]
        assert gradient.abs().max() > 1e-4
        # As a whole: single entries move more where rounding takes a unit across its threshold.
        assert (found - gradient).norm() < 0.1 * gradient.norm()


@GROWTH
@SCALERS
def test_a_scaled_loss_changes_nothing(scaler: dict[str, Any], growth: str) -> None:
    plain, expected = in_32_bits(growth)
    gan, watch = trained({"plugins": [ScaledOnly(**scaler)]}, growth=growth)

    assert ("growth_interval" in scaler) == (len(set(watch.scales)) > 1)
    assert watch.grown.keys() == expected.grown.keys() == WEIGHTS
    for name in WEIGHTS:
        interval = EXPLORE_INTERVAL if name.startswith("generator") else INTERVAL
        assert len(expected.grown[name]) == len(watch.grown[name]) == UPDATES // interval
        assert all(map(torch.equal, watch.grown[name], expected.grown[name]))
    same(plain, gan, expected, watch)


def test_a_scaler_that_is_off_changes_nothing() -> None:
    plain, expected = in_32_bits()
    gan, watch = trained({"plugins": [ScaledOnly(enabled=False)]})

    same(plain, gan, expected, watch)


def test_without_mixed_precision_growth_sees_the_gradients_of_the_backward_pass() -> None:
    plain, expected = in_32_bits()
    arrived: dict[str, list[Tensor]] = {f"generator.{i}.weight": [] for i in (0, 3)}

    def setup(gan: ToyGAN) -> None:
        for name, gradients in arrived.items():
            gan.get_parameter(name).register_hook(lambda gradient, kept=gradients: kept.append(gradient.clone()))

    gan, watch = trained({"precision": "32-true"}, setup=setup)

    same(plain, gan, expected, watch)
    for name, gradients in arrived.items():
        assert len(gradients) == UPDATES  # in one backward pass per update
        every_fourth = gradients[EXPLORE_INTERVAL - 1 :: EXPLORE_INTERVAL]
        assert len(watch.grown[name]) == len(every_fourth)
        assert all(map(torch.equal, watch.grown[name], every_fourth))
        # A copy: parameter.grad is masked.
        assert all(gradient.count_nonzero() > gradient.numel() / 2 for gradient in watch.grown[name])


def same(gan: ToyGAN, other: ToyGAN, watch: Watch, others: Watch) -> None:
    """All of two trainings, bit for bit."""
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in gan.state_dict().items())
    assert watch.balances == others.balances
    assert watch.sparsity.decisions == others.sparsity.decisions
    for old, new in zip(watch.masks, others.masks, strict=True):
        assert all(torch.equal(mask, new[name]) for name, mask in old.items())


# ---- gradients that are not finite --------------------------------------------------------------------------


def spoiled(role: str, weight: str, value: float, updates: set[int]) -> Callable[[ToyGAN], None]:
    """Has one inactive weight's gradient overflow in updates, counted from 1; the step is made all the same."""

    def setup(gan: ToyGAN) -> None:
        parameter, seen = dict(getattr(gan, role).named_parameters())[weight], [0]

        def spoil(gradient: Tensor) -> Tensor:
            seen[0] += 1
            update = (seen[0] + 1) // 2 if role == "discriminator" else seen[0]
            if update in updates:
                gradient = gradient.clone()
                gradient.view(-1)[int((parameter == 0).flatten().int().argmax())] = value
            return gradient

        parameter.register_hook(spoil)

    return setup


@pytest.mark.parametrize(
    ("precision", "value"),
    [("32-true", math.nan), ("bf16-mixed", math.inf), ("64-true", -math.inf), ("fp16", math.inf)],
)
def test_a_change_of_the_generator_waits_for_finite_gradients(precision: str, value: float) -> None:
    settings = PRECISIONS.get(precision, dict)()
    with pytest.warns(UserWarning, match="generator's mask is postponed: at generator update 4"):
        _, watch = trained(settings, setup=spoiled("generator", "0.weight", value, {4, 5, 12}))

    assert watch.wrong == []
    assert watch.updated == [True] * UPDATES
    assert watch.changed("generator") == [6, 8, 13, 16, 20, 24, 28]
    for name in ("generator.0.weight", "generator.3.weight"):
        assert len(watch.grown[name]) == 7
        assert all(gradient.isfinite().all() for gradient in watch.grown[name])


@pytest.mark.parametrize(("precision", "value"), [("32-true", math.inf), ("fp16", math.nan)])
def test_a_change_of_the_discriminator_waits_for_finite_gradients(precision: str, value: float) -> None:
    settings = PRECISIONS.get(precision, dict)()
    weight = "0.parametrizations.weight.original"
    with pytest.warns(UserWarning, match="discriminator's mask is postponed: at generator update 5"):
        _, watch = trained(settings, setup=spoiled("discriminator", weight, value, {5, 6}))

    assert watch.wrong == []
    assert watch.updated == [True] * UPDATES
    assert [update for update, _ in watch.sparsity.decisions] == [7, 10, 15, 20, 25, 30]
    assert watch.changed("discriminator") == [7, 10, 15, 20, 25, 30]


def test_an_average_of_gradients_recovers_from_one_that_is_not_finite() -> None:
    setup = spoiled("generator", "0.weight", math.inf, {2, 8})
    with pytest.warns(UserWarning, match="generator's mask is postponed: at generator update 8"):
        # At a constant rate: annealed, the exploration at 28 prunes a single weight, which may grow again.
        _, watch = trained(PRECISIONS["fp16"](), setup=setup, growth="seen_momentum", schedule="constant")

    assert watch.wrong == []
    assert watch.changed("generator") == [4, 9, 12, 16, 20, 24, 28]
    for name in ("generator.0.weight", "generator.3.weight"):
        assert len(watch.grown[name]) == 7
        assert all(gradient.isfinite().all() for gradient in watch.grown[name])


@FUSED
def test_an_overflow_at_the_change_delays_it_by_an_update(fused: bool, recwarn: Any) -> None:
    # Batch 4 overflows in an active weight, too: no step, and the change comes with the fourth update, in batch 5.
    def setup(gan: ToyGAN) -> None:
        seen = [0]

        def spoil(gradient: Tensor) -> Tensor:
            seen[0] += 1
            return torch.full_like(gradient, math.inf) if seen[0] == 4 else gradient

        gan.generator[0].weight.register_hook(spoil)

    _, watch = trained(PRECISIONS["fp16"](), GAN(fused), setup=setup)

    assert watch.updated == [True] * 3 + [False] + [True] * (UPDATES - 4)
    assert watch.changed("generator") == [5, 9, 13, 17, 21, 25]  # at 29, the run's end, the rate is 0
    assert not [warning for warning in recwarn if "postponed" in str(warning.message)]  # the gradients were finite

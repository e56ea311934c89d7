"""Networks that torch.compile compiled: masks hold, BR is measured, and a change of masks compiles nothing again."""

import shutil
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import (
    clear_compilation_metrics,
    counters,
    get_compilation_metrics,
    set_compilation_metrics_limit,
)
from torch._inductor import config as inductor
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.models import SNGANDiscriminator

pytestmark = pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch 2.6")

EPOCHS, UPDATES = 3, 30
INTERVAL, EXPLORE_INTERVAL = 6, 5
SETTLED = 4
"""Updates before the first change of a mask."""


class Network(nn.Sequential):
    """With a forward pass of its own: compiling one of torch's own classes in place does nothing in torch 2.8."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SmallGAN(ToyGAN):
    """One of everything that a compiler could stumble over; few layers, for it to be quick."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = Network(nn.Linear(LATENT, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, PIXELS))
        self.discriminator = Network(spectral_norm(nn.Linear(PIXELS, 32)), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))


class BareGAN(ToyGAN):
    """Compiled in a second or two."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(LATENT, PIXELS)
        self.discriminator = nn.Sequential(nn.Linear(PIXELS, 4), nn.Dropout(0.1), nn.Linear(4, 1))


# ---- the ways to compile ----------------------------------------------------------------------------------


def as_it_is(gan: ToyGAN, **_: Any) -> None:
    """Not compiled."""


def in_place(gan: ToyGAN, **options: Any) -> None:
    gan.generator.compile(**options)
    gan.discriminator.compile(**options)


def wrapped(gan: ToyGAN, **options: Any) -> None:
    gan.generator = torch.compile(gan.generator, **options)
    gan.discriminator = torch.compile(gan.discriminator, **options)


def module_in_place(gan: ToyGAN, **options: Any) -> None:
    """Compiles ``module(x)`` alone, which training does not call."""
    gan.compile(**options)


NETWORKS = pytest.mark.parametrize("compiled", [in_place, wrapped])


# ---- what is watched ---------------------------------------------------------------------------------------


@dataclass
class Watch(Callback):
    """Looks at the weights after every step of either optimizer, and counts graphs after every batch."""

    sparsity: DynamicSparsityCallback | None = None
    steps: int = 0
    wrong: list[str] = field(default_factory=list)
    graphs: list[tuple[int, int]] = field(default_factory=list)
    masks: list[dict[str, Tensor]] = field(default_factory=list)
    balances: list[tuple[float, float]] = field(default_factory=list)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:  # after the hooks of the callback
            optimizer.register_step_post_hook(lambda *_: self._look(pl_module))

    def _look(self, gan: ToyGAN) -> None:
        self.steps += 1
        if self.sparsity is None:
            return
        parameters = dict(gan.named_parameters())
        for role, network in self.sparsity.networks().items():
            masks = self.sparsity.masks(role)
            if not network.active == sum(int(mask.sum()) for mask in masks.values()) == asked(network):
                self.wrong.append(f"step {self.steps}: {role} has {network.active} active weights")
            for name, mask in masks.items():
                if parameters[name][~mask].any():
                    self.wrong.append(f"step {self.steps}: {name} is not 0 where it is inactive")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.graphs.append((counters["stats"]["unique_graphs"], counters["frames"]["total"]))
        if self.sparsity is not None:
            both = self.sparsity.masks("generator") | self.sparsity.masks("discriminator")
            self.masks.append({name: mask.clone() for name, mask in both.items()})
            balance = self.sparsity.balance
            self.balances.append((balance.alpha, balance.beta))

    @property
    def changes(self) -> int:
        """Batches in which a mask changed."""
        pairs = zip(self.masks, self.masks[1:], strict=False)
        return sum(any(not torch.equal(old[name], new[name]) for name in old) for old, new in pairs)


def asked(network: Any) -> int:
    return round(network.target * network.total)


@dataclass
class Run:
    gan: ToyGAN
    sparsity: DynamicSparsityCallback
    watch: Watch
    entries: int
    """The most graphs of one function."""


def trained(compiled: Any, backend: str = "aot_eager", gan: type[ToyGAN] = SmallGAN) -> Run:
    torch._dynamo.reset()
    counters.clear()
    seed_everything(0, verbose=False)
    made = gan()
    compiled(made, backend=backend)
    sparsity = ddst()
    watch = Watch(sparsity)
    clear_compilation_metrics()
    set_compilation_metrics_limit(1000)  # by default only the last 64 are kept
    # At the limit nothing is compiled any more, and a count of graphs would say that all is well.
    # The settings' names are torch 2.6's, which later ones know as well.
    with dynamo.patch(cache_size_limit=64, accumulated_cache_size_limit=512, fail_on_cache_limit_hit=True):
        toy_trainer(sparsity, watch, epochs=EPOCHS).fit(made, toy_data())
    places = [str(m.compile_id).strip("[]").split("/") for m in get_compilation_metrics() if m.compile_id]
    return Run(made, sparsity, watch, 1 + max((int(place[1].split("_")[0]) for place in places), default=-1))


def ddst() -> DynamicSparsityCallback:
    """The discriminator grows at every decision, and the generator explores in between."""
    return DynamicSparsityCallback(
        0.3,
        bounds=(0.0, 1e-9),
        delta=0.1,
        interval=INTERVAL,
        explore_interval=EXPLORE_INTERVAL,
        probe_interval=1,
    )


once = cache(trained)


# ---- compiled networks -------------------------------------------------------------------------------------


@NETWORKS
def test_masks_hold_after_every_step(compiled: Any) -> None:
    run = once(compiled)

    assert run.watch.graphs[-1][0] > 0, "nothing was compiled"
    assert run.watch.steps == 2 * UPDATES
    assert run.watch.wrong == []
    assert [decision.action for _, decision in run.sparsity.decisions] == ["grow"] * (UPDATES // INTERVAL)
    assert run.sparsity.discriminator_density == pytest.approx(0.3 + 0.1 * (UPDATES // INTERVAL), abs=1e-3)
    assert run.sparsity.generator_density == pytest.approx(0.3, abs=1e-3)


@NETWORKS
def test_balance_ratio_is_measured_at_every_generator_update(compiled: Any) -> None:
    run = once(compiled)

    assert run.sparsity.generator_updates == run.sparsity.measurements == UPDATES
    assert run.sparsity.balance.samples == INTERVAL
    expected = once(as_it_is).watch.balances
    assert len(expected) == UPDATES
    for found, wanted in zip(run.watch.balances, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)


@NETWORKS
def test_changes_of_masks_compile_nothing_again(compiled: Any) -> None:
    watch = once(compiled).watch

    assert watch.changes == UPDATES // INTERVAL + UPDATES // EXPLORE_INTERVAL - 1  # both at once in update 30
    assert all(torch.equal(mask, watch.masks[0][name]) for name, mask in watch.masks[SETTLED - 1].items())
    assert watch.graphs[SETTLED - 1 :] == [watch.graphs[SETTLED - 1]] * (UPDATES - SETTLED + 1)


def test_the_count_shows_what_is_compiled_again() -> None:
    torch._dynamo.reset()
    counters.clear()
    gan, watch = BareGAN(), Watch()
    wrapped(gan, backend="aot_eager")

    toy_trainer(watch).fit(gan, DataLoader(toy_data().dataset, batch_size=9))  # 8 batches of 9 and one of 8

    assert watch.graphs[SETTLED - 1] == watch.graphs[7]
    assert watch.graphs[8] > watch.graphs[7]


@NETWORKS
def test_masks_have_the_names_of_the_parameters(compiled: Any) -> None:
    gan, sparsity = once(compiled).gan, once(compiled).sparsity
    prefix = "_orig_mod." if compiled is wrapped else ""
    parameters = dict(gan.named_parameters())
    masks = sparsity.masks("generator") | sparsity.masks("discriminator")

    assert list(masks) == [
        f"generator.{prefix}0.weight",
        f"generator.{prefix}3.weight",
        f"discriminator.{prefix}0.parametrizations.weight.original",
        f"discriminator.{prefix}3.weight",
    ]
    assert all(parameters[name].shape == mask.shape for name, mask in masks.items())
    never = SmallGAN()
    as_made = {"in_place": in_place, "wrapped": wrapped}[compiled.__name__]
    as_made(never, backend="eager")
    assert list(gan.state_dict()) == list(never.state_dict())


@pytest.mark.parametrize("compiled", [pytest.param(in_place, marks=pytest.mark.long), wrapped])
def test_measuring_leaves_no_trace_in_compiled_networks(compiled: Any) -> None:
    weights = []
    for callbacks in ([], [DynamicSparsityCallback(0.3, method="dense", probe_interval=1)]):
        torch._dynamo.reset()
        seed_everything(0, verbose=False)
        gan = BareGAN()
        compiled(gan, backend="eager")
        toy_trainer(*callbacks).fit(gan, toy_data())
        weights.append(gan.state_dict())

    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert callbacks[0].measurements == 10


@NETWORKS
def test_operations_are_those_of_networks_that_are_not_compiled(compiled: Any) -> None:
    found, expected = once(compiled).sparsity.flops_ledger, once(as_it_is).sparsity.flops_ledger

    for flops, wanted in zip(found.values(), expected.values(), strict=True):
        assert replace(flops, probes=0) == replace(wanted, probes=0)
        assert flops.probes >= wanted.probes > 0  # which takes nothing over from compiled steps


@NETWORKS
def test_counting_ends_even_where_training_does(compiled: Any) -> None:
    gan = BareGAN()
    compiled(gan, backend="eager")
    sparsity = DynamicSparsityCallback(0.3)

    class Fails(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            if sparsity.generator_updates == 1:  # the update in which operations are counted
                raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        toy_trainer(sparsity, Fails()).fit(gan, toy_data())

    assert torch._dynamo.eval_frame._stance.stance == "default"


@NETWORKS
def test_no_function_is_compiled_more_often_than_torch_allows(compiled: Any) -> None:
    assert 0 < once(compiled).entries <= 8  # recompile_limit, over both networks


# ---- the whole module ---------------------------------------------------------------------------------------


def test_module_compiled_in_place_trains_as_it_is() -> None:
    run, expected = trained(module_in_place, gan=ToyGAN), trained(as_it_is, gan=ToyGAN)

    assert run.watch.wrong == []
    assert run.watch.balances == expected.watch.balances
    state = expected.gan.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in run.gan.state_dict().items())


@pytest.mark.long  # tens of seconds: every line of a training step is compiled
def test_compiled_module() -> None:
    torch._dynamo.reset()
    seed_everything(0, verbose=False)
    sparsity, gan = ddst(), SmallGAN()
    watch = Watch(sparsity)

    toy_trainer(sparsity, watch, epochs=2).fit(torch.compile(gan, backend="aot_eager"), toy_data())

    assert watch.steps == 40
    assert watch.wrong == []
    assert sparsity.generator_updates == sparsity.measurements == 20
    assert watch.changes > 4


# ---- the compiler that is torch's default -------------------------------------------------------------------


@pytest.mark.long  # half a minute: C++ is compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    with inductor.patch(fallback_random=True):  # dropout draws what it draws without inductor
        run = trained(wrapped, "inductor")

    assert run.watch.wrong == []
    assert run.sparsity.measurements == UPDATES
    assert run.watch.graphs[SETTLED - 1] == run.watch.graphs[-1]
    for found, wanted in zip(run.watch.balances[:5], once(as_it_is).watch.balances[:5], strict=True):
        assert found == pytest.approx(wanted, rel=1e-2, abs=1e-4)


@pytest.mark.long  # half a minute: C++ is compiled
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_papers_discriminator_is_called_twice_before_a_backward_pass() -> None:
    torch._dynamo.reset()
    discriminator = SNGANDiscriminator(width=32)
    discriminator.compile()
    for _ in range(2):
        real, fake = torch.randn(2, 2, 3, 32, 32)
        (discriminator(real).mean() - discriminator(fake).mean()).backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())

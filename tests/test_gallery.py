"""The gallery's GANs: exact masks, BR as worked out by hand, operations as torch counts them, exact resuming."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.data import ResumableLoader

BATCHES, EPOCHS = 6, 3
DENSITY = 0.3
PAGE = Path(__file__).parent.parent / "docs" / "gallery.md"


@dataclass(frozen=True)
class Family:
    """One GAN of the gallery.

    `generator` is the module whose call makes the images, `real` and `fake` are the mean scores for the batch and what
    the generator was called with, past every hook; `maskable` are the weights of both networks that have masks, and all
    parameters of two and more dimensions but norms; `measured` are the updates at which BR is.
    """

    path: str
    name: str
    generator: str
    real: Callable[[Any, Any, tuple[Tensor, ...]], Tensor]
    fake: Callable[[Any, Any, tuple[Tensor, ...]], Tensor]
    maskable: tuple[tuple[int, int], tuple[int, int]]
    measured: int = BATCHES * EPOCHS
    decides: bool = True
    whole: dict[str, Any] = field(default_factory=dict)
    """Arguments by which every weight that computes is masked."""

    @property
    def gan(self) -> type:
        return getattr(import_module(self.path), self.name)

    def trainer(self, *callbacks: Any, **settings: Any) -> Any:
        package = pytorch_lightning if issubclass(self.gan, pytorch_lightning.LightningModule) else lightning.pytorch
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return package.Trainer(callbacks=list(callbacks), max_epochs=EPOCHS, accelerator="cpu", **quiet, **settings)

    def sparsity(self, **settings: Any) -> DynamicSparsityCallback:
        return DynamicSparsityCallback(DENSITY, **(self.gan.ARGUMENTS | settings))


def mean(scores: list[Tensor]) -> Tensor:
    return torch.stack([score.mean() for score in scores]).mean()


def of_vocoder(kind: int) -> Callable[..., Tensor]:
    def score(gan: Any, batch: Any, called: tuple[Tensor, ...]) -> Tensor:
        fake = gan.generator.forward(*called)
        return mean([mean(part.forward(batch[1], fake)[kind]) for part in (gan.mpd, gan.msd)])

    return score


def of_scales(gan: Any, source: Tensor, image: Tensor) -> Tensor:
    return mean([maps[-1] for maps in gan.discriminator.forward(source, image)])


def of_first(gan: Any, batch: Any, called: tuple[Tensor, ...]) -> Tensor:
    return gan.discriminator.forward(batch[0]).mean()


def of_generated(gan: Any, batch: Any, called: tuple[Tensor, ...]) -> Tensor:
    return gan.discriminator.forward(gan.generator.forward(*called)).mean()


FAMILIES = [
    Family("vocoder", "Vocoder", "generator", of_vocoder(0), of_vocoder(1), ((2292, 2292), (816, 816)), decides=False),
    Family(
        "stylegan2",
        "StyleGAN2",
        "G",
        lambda gan, batch, called: gan.D.forward(batch[0]).mean(),
        lambda gan, batch, called: gan.D.forward(gan.G.forward(*called)).mean(),
        ((5512, 5768), (3752, 4008)),
        whole={"masked_parameters": {"D.score.weight": (0, 1)}},
    ),
    Family(
        "super_resolution",
        "SuperResolution",
        "net_g",
        lambda gan, batch, called: gan.net_d.forward(batch["high"]).mean(),
        lambda gan, batch, called: gan.net_d.forward(gan.net_g.forward(*called)).mean(),
        ((7056, 7056), (2496, 2496)),
        measured=BATCHES * (EPOCHS - 1),
    ),
    Family(
        "vqgan",
        "VQGAN",
        "",
        of_first,
        lambda gan, batch, called: gan.discriminator.forward(gan.forward(*called)[0]).mean(),
        ((5648, 5648), (2704, 2704)),
        measured=BATCHES * EPOCHS - 8,
    ),
    Family(
        "pix2pix_hd",
        "Pix2PixHD",
        "generator",
        lambda gan, batch, called: of_scales(gan, batch["source"], batch["target"]),
        lambda gan, batch, called: of_scales(gan, batch["source"], gan.generator.forward(*called)),
        ((4384, 4384), (3616, 3616)),
    ),
    Family("time_series", "TimeSeriesGAN", "generator", of_first, of_generated, ((3360, 3360), (1760, 1760))),
    Family("r3gan", "R3GAN", "generator", of_first, of_generated, ((1752, 1944), (1824, 1888))),
    Family("attention", "AttentionGAN", "generator", of_first, of_generated, ((6208, 6464), (1632, 1888))),
]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.path)


def effective(gan: nn.Module, name: str) -> Tensor:
    """The weight that a layer computes with."""
    layer, found, _ = name.partition(".parametrizations.")
    return gan.get_submodule(layer).weight if found else gan.get_parameter(name)


class AtSteps(Callback):
    """Looks at masks after every step of every optimizer, and works BR out by hand around those of the generator's."""

    def __init__(self, family: Family, sparsity: DynamicSparsityCallback) -> None:
        self.family, self.sparsity = family, sparsity
        self.steps = 0
        self.by_hand: list[tuple[float, float, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.check_masks(pl_module))
        pl_module.get_submodule(self.family.generator).register_forward_pre_hook(self.keep_call)
        trainer.optimizers[0].register_step_pre_hook(lambda *_: self.score(pl_module))
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.score(pl_module))
        self.scores: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    def keep_call(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # of the training step
            self.call, self.random_state = args, torch.get_rng_state()

    def score(self, gan: Any) -> None:
        """Scores real images and fakes before an update, and fakes after it."""
        for function in (self.family.fake,) if self.scores else (self.family.real, self.family.fake):
            with torch.no_grad(), torch.random.fork_rng(devices=()):
                torch.set_rng_state(self.random_state)
                self.scores.append(function(gan, self.batch, self.call).item())
        if len(self.scores) == 3:
            self.by_hand.append(tuple(self.scores))
            self.scores = []

    def check_masks(self, gan: nn.Module) -> None:
        self.steps += 1
        for role in ("generator", "discriminator"):
            masks = self.sparsity.masks(role)
            total = sum(mask.numel() for mask in masks.values())
            assert sum(int(mask.sum()) for mask in masks.values()) == round(DENSITY * total)
            for name, mask in masks.items():
                weight = effective(gan, name)
                assert weight.isfinite().all()
                assert not weight[~mask].any()


@each_family
def test_masks_are_exact_and_the_balance_ratio_is_that_worked_out_by_hand(family: Family, recwarn: Any) -> None:
    seed_everything(0, verbose=False)
    gan = family.gan()
    sparsity = family.sparsity(method="static", interval=1000, probe_interval=1)
    look = AtSteps(family, sparsity)
    family.trainer(sparsity, look).fit(gan, gan.data())

    assert sparsity.generator_updates == len(look.by_hand) == BATCHES * EPOCHS
    assert sparsity.measurements == sparsity.balance.samples == family.measured
    real, old, new = torch.tensor(look.by_hand[-family.measured :]).double().mean(0).tolist()
    assert sparsity.balance.real == pytest.approx(real, abs=1e-6)
    assert sparsity.balance.fake == pytest.approx(old, abs=1e-6)
    assert sparsity.balance.beta == pytest.approx(new - old, abs=1e-6)
    assert sparsity.balance_ratio == (pytest.approx((new - old) / (real - old), rel=1e-3) if family.decides else None)

    counts = []
    for role, network in sparsity.networks().items():
        norms = ("original0",)
        parameters = [p for n, p in network.network.named_parameters() if p.dim() > 1 and not n.endswith(norms)]
        counts.append((sum(mask.numel() for mask in sparsity.masks(role).values()), sum(p.numel() for p in parameters)))
    assert tuple(counts) == family.maskable
    assert not [each for each in recwarn if "lightning_ddst" in each.filename]


class Counted(Callback):
    """Operations that torch's counter counts up to the last update of the generator."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter = counter

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self.read)

    def read(self, *_: Any) -> None:
        self.counts = dict(self.counter.get_flop_counts()["Global"])


class Untracked(nullcontext):
    """Replaces the counter's tracker of modules, which autograd.grad on an input of a module breaks."""

    parents: ClassVar = {"Global"}


def count_conv_backward(
    grad: Any, x: Any, weight: Any, sizes: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, *rest: Any,
    out_shape: Any = None, **_: Any,
) -> int:  # fmt: skip
    """The forward pass again for every gradient of the input and of the weight; torch's own is wrong with groups."""
    return conv_flop_count(list(x), list(weight), list(grad), transposed) * sum(rest[2][:2])


@each_family
def test_operations_are_those_that_torchs_counter_counts(family: Family) -> None:
    aten = torch.ops.aten
    with torch.backends.mkldnn.flags(enabled=family.path != "time_series"):  # whose recurrent layers it cannot count
        seed_everything(0, verbose=False)
        sparsity = family.sparsity(method="static", probe_interval=None, **family.whole)
        family.trainer(sparsity).fit(family.gan(), family.gan.data())

        seed_everything(0, verbose=False)
        backward = {aten.convolution_backward: count_conv_backward}
        with FlopCounterMode(display=False, custom_mapping=backward) as counter:
            pass
        counter.mod_tracker = Untracked()
        counted = Counted(counter)
        with counter:
            family.trainer(counted).fit(family.gan(), family.gan.data())
    others = {aten.bmm}  # of mel bands, and of attention scores
    expected = sum(number for name, number in counted.counts.items() if name not in others)
    assert sum(layer.dense for layer in sparsity.flops_ledger.values()) == expected
    for name, layer in sparsity.flops_ledger.items():
        mask = (sparsity.masks("generator") | sparsity.masks("discriminator"))[name]
        assert layer.steps * mask.numel() == layer.dense * int(mask.sum()) > 0


class Saving(Callback):
    """Saves a checkpoint in the middle of an epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == BATCHES + 3:
            trainer.save_checkpoint(self.path)


@each_family
def test_runs_resume_bit_for_bit(family: Family, tmp_path: Path) -> None:
    def fit(*callbacks: Any, ckpt_path: Path | None = None) -> tuple[DynamicSparsityCallback, Any]:
        seed_everything(0, verbose=False)
        gan = family.gan()
        settings = {"interval": 3, "explore_interval": 2, "probe_interval": 1, "bounds": (0.01, 0.02), "seed": 0}
        sparsity = family.sparsity(**settings)
        data = ResumableLoader(gan.data().dataset, batch_size=4, batches=BATCHES)
        family.trainer(sparsity, *callbacks).fit(gan, data, ckpt_path=ckpt_path)
        return sparsity, gan

    whole, expected = fit(Saving(tmp_path / "middle.ckpt"))
    sparsity, gan = fit(ckpt_path=tmp_path / "middle.ckpt")
    assert sparsity.generator_updates == whole.generator_updates == BATCHES * EPOCHS
    assert sparsity.decisions == whole.decisions
    assert sparsity.balance == whole.balance
    assert sparsity.flops_ledger == whole.flops_ledger
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in gan.state_dict().items())
    for role, density in (("generator", DENSITY), ("discriminator", whole.decisions[-1][1].density)):
        masks = sparsity.masks(role)
        assert all(torch.equal(mask, whole.masks(role)[name]) for name, mask in masks.items())
        assert sum(int(mask.sum()) for mask in masks.values()) == round(
            density * sum(m.numel() for m in masks.values())
        )
        for name, mask in masks.items():
            assert effective(gan, name).isfinite().all()
            assert not effective(gan, name)[~mask].any()


@each_family
def test_the_page_lists_arguments_and_shares(family: Family) -> None:
    (row,) = [line for line in PAGE.read_text().splitlines() if f"gallery/{family.path}.py)" in line and line[0] == "|"]
    *_, arguments, shares, _ = (cell.strip() for cell in row.split("|"))
    listed = [f"`{name}={json.dumps(value)}`" for name, value in family.gan.ARGUMENTS.items()]
    assert arguments == (", ".join(listed) or "none")
    assert shares == ", ".join(f"{100 * masked / total:.1f} %" for masked, total in family.maskable)

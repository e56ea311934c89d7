"""Cases that two processes train together; started by torchrun, results go to files that tests read.

torchrun --standalone --nproc-per-node 2 tests/two_processes.py FOLDER
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning_package  # noqa: F401  # which replaces lightning.pytorch if asked to
import torch
from crashes import assert_resumed_alike
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from test_loop import FabricLoop
from test_resume import METHODS, SETTINGS, images, resumable, small_gan
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset
from toys import LATENT, PIXELS, ToyGAN, for_method, toy_data

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA, SampleQuality
from lightning_ddst.data import ResumableLoader
from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.sparsity.sharding import full_tensor

FSDP2 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
"""Whether it works on CPUs."""
STRATEGY = "ddp_find_unused_parameters_true"


class NoisyToyGAN(ToyGAN):
    """Every process draws noise of its own."""

    def on_train_start(self) -> None:
        torch.manual_seed(self.global_rank)


class EveryUpdate(Callback):
    """After every batch: masks, decisions, BR, and whether inactive weights, gradients and state are 0."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        (sparsity,) = (c for c in trainer.callbacks if isinstance(c, DynamicSparsityCallback))
        active, clean = [], True
        for network in sparsity.networks().values():
            active.append(network.active == sum(int(mask.sum()) for mask in network.masks.values()))
            for name, mask in network.masks.items():
                parameter = network.parameters[name]
                state = [own["exp_avg"] for o in trainer.optimizers if (own := o.state.get(parameter))]
                tensors = [parameter.detach(), *state, *([] if parameter.grad is None else [parameter.grad])]
                clean &= all(not full_tensor(tensor)[~mask].any() for tensor in tensors)
                clean &= bool(full_tensor(parameter.detach())[mask].any())
        checksums = tuple(network.checksum for network in sparsity.networks().values())
        updates, decisions = sparsity.generator_updates, sparsity.decisions[-1:]
        self.seen.append((updates, checksums, decisions, sparsity.balance, active, clean))


def train(gan: LightningModule, data: Any, *callbacks: Callback, strategy: str = STRATEGY, **settings: Any) -> Trainer:
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False} | settings
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(gan, data)
    return trainer


def weights(gan: LightningModule) -> dict[str, torch.Tensor]:
    return {name: full_tensor(value).clone() for name, value in gan.state_dict().items()}


def methods(folder: Path, **sparsity: Any) -> Any:
    # Each process has a seed of its own: masks and weights are the first one's all the same.
    seed_everything(RANK, verbose=False)
    gan, every = NoisyToyGAN(), EveryUpdate()
    settings = {"bounds": (0.2, 0.3), "interval": 5, "explore_interval": 4, "delta": 0.1} | sparsity
    settings = for_method(**{"method": "ddst"} | settings)
    train(gan, toy_data(20), DynamicSparsityCallback(0.3, **settings), GeneratorEMA(0.9), every)
    return {"weights": weights(gan), "seen": every.seen}


# ---- the same as in one process ---------------------------------------------------------------------


class ExactGAN(ToyGAN):
    """A GAN in double precision, without batch statistics, dropout or noise other than the batch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(LATENT, 32), nn.Tanh(), nn.Linear(32, PIXELS))
        self.discriminator = nn.Sequential(nn.Linear(PIXELS, 32), nn.Tanh(), nn.Linear(32, 1))
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator_optimizer, discriminator_optimizer = self.optimizers()
        real, z = batch
        fake = self.generator(z).detach()
        loss = (1 - self.discriminator(real)).square().mean() + (1 + self.discriminator(fake)).square().mean()
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()
        loss = (1 - self.discriminator(self.generator(z))).square().mean()
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()


class NormedGAN(ExactGAN):
    """Its layers have weight norm."""

    def __init__(self) -> None:
        super().__init__()
        for network in self.networks():
            network[0], network[2] = weight_norm(network[0]), weight_norm(network[2])


class ShardedGAN(ExactGAN):
    """Its parameters are split over processes (FSDP2)."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard  # torch 2.6

        for network in self.networks():
            if not hasattr(network, "reshard"):
                fully_shard(network, mesh=self.device_mesh["data_parallel"])


def sharded(growth: str) -> Any:
    seed_everything(0, verbose=False)
    changes, updates, average = ChangesOfMasks(), EveryUpdate(), GeneratorEMA(0.9)
    sparsity = DynamicSparsityCallback(
        0.3, bounds=(0.2, 0.3), interval=5, explore_interval=4, delta=0.1, growth=growth, seed=2
    )
    gan = ShardedGAN()
    strategy = ModelParallelStrategy(2, 1)
    train(gan, exact_data(2), sparsity, average, updates, changes, max_epochs=1, strategy=strategy)
    average_of_all = average.averages()
    return {"masks": changes.masks, "seen": updates.seen, "weights": weights(gan), "average": average_of_all}


class ChangesOfMasks(Callback):
    def __init__(self) -> None:
        self.masks: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        (sparsity,) = (c for c in trainer.callbacks if isinstance(c, DynamicSparsityCallback))
        masks = {
            name: mask.clone() for role in ("generator", "discriminator") for name, mask in sparsity.masks(role).items()
        }
        if not self.masks or any(not torch.equal(mask, self.masks[-1][name]) for name, mask in masks.items()):
            self.masks.append(masks)


def exact_data(processes: int) -> ResumableLoader:
    real = toy_data(8).dataset.tensors[0].double()
    z = torch.randn(len(real), LATENT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return ResumableLoader(TensorDataset(real, z), batch_size=8 // processes, batches=16, seed=3)


class ShardedNormedGAN(NormedGAN):
    configure_model = ShardedGAN.configure_model


def exact(
    processes: int, growth: str, make: type[ExactGAN] = ExactGAN, callbacks: Sequence[Callback] = ()
) -> list[dict[str, torch.Tensor]]:
    seed_everything(0, verbose=False)
    changes = ChangesOfMasks()
    sparsity = DynamicSparsityCallback(
        0.3, bounds=(0.2, 0.3), interval=5, explore_interval=4, delta=0.1, growth=growth, seed=2
    )
    gan = make()
    if processes == 2:
        train(gan, exact_data(2), sparsity, changes, *callbacks, max_epochs=1)
    else:
        Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[sparsity, changes, *callbacks],
        ).fit(gan, exact_data(1))
    return changes.masks


# ---- more -------------------------------------------------------------------------------------------


def gan_module(folder: Path, strategy: str) -> Any:
    seed_everything(0, verbose=False)
    gan = GANModule(
        SmallGenerator(image_size=8, channels=1, width=4, latent_dim=4),
        SmallDiscriminator(image_size=8, channels=1, width=4),
    )
    noise = []
    gan.generator.register_forward_hook(lambda module, args, output: noise.append(args[0].detach().clone()))
    every = EveryUpdate()
    sparsity = DynamicSparsityCallback(0.3, interval=5, explore_interval=4, seed=1)
    train(gan, ResumableLoader(images(), 8, 10), sparsity, every, strategy=strategy)
    return {"weights": weights(gan), "seen": every.seen, "noise": noise[0]}


class Tampering(Callback):
    """One process's mask is changed by something else."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        (sparsity,) = (c for c in trainer.callbacks if isinstance(c, DynamicSparsityCallback))
        if sparsity.generator_updates == 2 and trainer.global_rank == 1:
            mask = sparsity.networks()["generator"].masks["0.weight"]
            mask.view(-1)[0] = ~mask.view(-1)[0]


def error_of(function: Any) -> str:
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def accumulated(folder: Path) -> Any:
    """Gradients of three batches add up, reduced each time; growth goes by all of them."""
    from test_resume import AccumulatingGAN

    seed_everything(0, verbose=False)
    gan, every = AccumulatingGAN(), EveryUpdate()
    train(gan, toy_data(18), DynamicSparsityCallback(0.3, interval=2, explore_interval=1, bounds=(0.2, 0.3)), every)
    return {"weights": weights(gan), "seen": every.seen}


def crash(folder: Path, method: str, kill: int, every: int) -> Any:
    assert_resumed_alike(
        small_gan,
        resumable,
        folder,
        every=every * 3,  # Lightning counts 3 steps in 2 batches
        kill=kill,
        devices=2,
        strategy="ddp",
        **SETTINGS | METHODS[method],
    )
    return True


def crash_sharded(folder: Path) -> Any:
    settings = SETTINGS | {"explore_interval": 3, "bounds": (0.2, 0.3), "growth": "momentum"}

    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(2, 1)

    assert_resumed_alike(
        ShardedGAN, lambda: exact_data(2), folder, every=10, kill=22, epochs=2, devices=2, strategy=strategy, **settings
    )
    return True


class NoisyFabricLoop(FabricLoop):
    """Every process draws noise of its own."""

    def step(self, real: torch.Tensor) -> None:
        if self.sparse.generator_updates == 0:
            torch.manual_seed(RANK)
        super().step(real)
        networks = self.sparse.networks()
        active = [each.active == sum(int(mask.sum()) for mask in each.masks.values()) for each in networks.values()]
        clean = not any(each.written() for each in networks.values())
        checksums = tuple(each.checksum for each in networks.values())
        decisions = self.sparse.decisions[-1:]
        self.seen.append((self.sparse.generator_updates, checksums, decisions, self.sparse.balance, active, clean))


def fabric(folder: Path) -> Any:
    loop = NoisyFabricLoop(
        Fabric(accelerator="cpu", devices=2, strategy="ddp"),
        generator_density=0.3,
        bounds=(0.2, 0.3),
        interval=5,
        explore_interval=4,
        delta=0.1,
        seed=RANK,
    )
    loop.seen = []
    loop.train()
    networks = {"generator": loop.generator, "discriminator": loop.discriminator}
    values = {f"{role}.{n}": v.clone() for role, net in networks.items() for n, v in net.state_dict().items()}
    return {"weights": values, "seen": loop.seen}


def distance(folder: Path) -> Any:
    seed_everything(0, verbose=False)
    gan = small_gan()
    features = nn.Flatten()
    features.num_features = 64
    frechet = SampleQuality(features, "pixels")
    loader = DataLoader(images(), batch_size=5)
    trainer = train(gan, resumable(), frechet, max_epochs=1, strategy="ddp", limit_train_batches=2)
    trainer.validate(gan, loader, verbose=False)
    return frechet.history["frechet_distance"]


CASES = {
    **{f"methods {method}": lambda folder, s=settings: methods(folder, **s) for method, settings in METHODS.items()},
    "methods random": lambda folder: methods(folder, growth="random"),
    "methods momentum": lambda folder: methods(folder, growth="momentum"),
    "exact gradient": lambda folder: exact(2, "gradient"),
    "exact momentum": lambda folder: exact(2, "momentum"),
    "exact weight norm": lambda folder: exact(2, "momentum", NormedGAN),
    "GANModule ddp": lambda folder: gan_module(folder, "ddp"),
    "accumulated": accumulated,
    "fabric": fabric,
    "tampering": lambda folder: error_of(
        lambda: train(ToyGAN(), toy_data(), DynamicSparsityCallback(0.3, explore_interval=5), Tampering())
    ),
    "plain ddp": lambda folder: error_of(
        lambda: train(ToyGAN(), toy_data(), DynamicSparsityCallback(0.3), strategy="ddp")
    ),
    "distance": distance,
    "crash strict": lambda folder: crash(folder, "strict", 21, 5),
    "crash sdst": lambda folder: crash(folder, "sdst", 25, 4),
    "crash channels": lambda folder: crash(folder, "channels", 21, 5),
}
if FSDP2:
    CASES |= {
        "sharded gradient": lambda folder: sharded("gradient"),
        "sharded momentum": lambda folder: sharded("momentum"),
        "crash sharded": crash_sharded,
        "sharded weight norm": lambda folder: error_of(
            lambda: train(
                ShardedNormedGAN(), toy_data(), DynamicSparsityCallback(0.3), strategy=ModelParallelStrategy(2, 1)
            )
        ),
        "tensor parallel": lambda folder: error_of(
            lambda: train(ShardedGAN(), toy_data(), DynamicSparsityCallback(0.3), strategy=ModelParallelStrategy(1, 2))
        ),
    }
LONG_CASES = {
    f"crash {method} {kill} {every}": lambda folder, m=method, k=kill, e=every: crash(folder, m, k, e)
    for method in METHODS
    for kill, every in ((20, 3), (21, 5), (28, 4), (29, 7), (25, 6), (18, 8))
}

RANK = int(os.environ.get("RANK", 0))


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in names:
        own = folder / name.replace(" ", "_")
        own.mkdir(exist_ok=True)
        try:
            result = (CASES | LONG_CASES)[name](own)
        except BaseException:
            result = traceback.format_exc()
            torch.save(result, own / f"{RANK}.pt")
            raise
        torch.save(result, own / f"{RANK}.pt")
    # gloo's threads may hold the last reference to a tensor; one that drops it after Python's end aborts the process.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CASES))

"""GANs as people write them, which know nothing of the package and compute BR's scores by hand in their training step.

The networks keep no state, so a score by hand is `forward` without gradients; hooks do not see it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset
from toys import toy_trainer

from lightning_ddst import DynamicSparsityCallback

BATCH, LATENT, CLASSES = 4, 6, 3
BATCHES = 6
IMAGE = (1, 4, 4)
DENSITY = 0.3


# ---- networks --------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """Generates tensors of a shape from noise, and labels if there are classes."""

    def __init__(self, shape: tuple[int, ...] = IMAGE, classes: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, LATENT) if classes else None
        self.layers = nn.Sequential(
            nn.Linear(LATENT, 24), nn.ReLU(), nn.Linear(24, torch.Size(shape).numel()), nn.Unflatten(1, shape)
        )

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(z if self.embedding is None else z + self.embedding(labels))


class Translator(nn.Module):
    """Generates an image from an image."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Discriminator(nn.Module):
    def __init__(self, shape: tuple[int, ...] = IMAGE, classes: int = 0) -> None:
        super().__init__()
        size = torch.Size(shape).numel()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(size, 24), nn.LeakyReLU(0.2))
        self.score = nn.Linear(24, 1)
        self.embedding = nn.Embedding(classes, 24) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        features = self.features(x)
        score = self.score(features)
        return score if self.embedding is None else score + (self.embedding(labels) * features).sum(1, keepdim=True)


# ---- what every GAN here does -----------------------------------------------------------------------------


class GAN(LightningModule):
    """Knows nothing of the package; computes BR's scores by hand at every update of its generator."""

    arguments: ClassVar[dict[str, Any]] = {}
    """Arguments that the callback needs for this GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.by_hand: list[list[float]] = []
        self.make_networks()

    def make_networks(self) -> None:
        self.generator, self.discriminator = Generator(), Discriminator()

    def configure_optimizers(self) -> Any:
        return [adam(self.generator), adam(self.discriminator)]

    @contextmanager
    def worked_out(self, real: Callable[[], Tensor], fake: Callable[[], Tensor]) -> Iterator[None]:
        """Around an update of the generator: `real` and `fake` give scores, past every hook."""
        with torch.no_grad():
            scores = [real().mean().item(), fake().mean().item()]
        yield
        with torch.no_grad():
            self.by_hand.append([*scores, fake().mean().item()])

    def step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def noise(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), LATENT)

    def unconditional(self, x: Tensor, z: Tensor) -> Any:
        """The scores of a GAN without conditions."""
        score = self.discriminator.forward
        return self.worked_out(lambda: score(x), lambda: score(self.generator.forward(z)))

    def discriminator_loss(self, x: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-self.discriminator(x)).mean() + F.softplus(self.discriminator(fake)).mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        return F.softplus(-self.discriminator(fake)).mean()


def adam(network: nn.Module) -> Adam:
    return Adam(network.parameters(), 0.01, betas=(0.5, 0.9))


class Images(Dataset[Any]):
    def __init__(self, item: Callable[[Tensor, Tensor], Any], shape: tuple[int, ...]) -> None:
        rng = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCH * BATCHES, *shape, generator=rng) + 1
        self.item = item

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.item(self.images[i], torch.tensor(i % CLASSES))


def fitted(pattern: type[GAN], callback: DynamicSparsityCallback | None, seed: int = 0) -> GAN:
    seed_everything(seed, verbose=False)
    gan = pattern()
    data = Images(getattr(pattern, "item", lambda x, label: (x, label)), getattr(pattern, "shape", IMAGE))
    callbacks = [] if callback is None else [callback, Exact(callback)]
    toy_trainer(*callbacks).fit(gan, DataLoader(data, batch_size=BATCH))
    return gan


class Exact(Callback):
    """Looks after every step of every optimizer whether as many weights are active as should be, and the others 0."""

    def __init__(self, sparsity: DynamicSparsityCallback) -> None:
        self.sparsity = sparsity
        self.steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(lambda *_: self.look(pl_module))

    def look(self, module: LightningModule) -> None:
        self.steps += 1
        parameters = dict(module.named_parameters())
        for role, density in (("generator", DENSITY), ("discriminator", DENSITY)):
            masks = self.sparsity.masks(role)
            total = sum(mask.numel() for mask in masks.values())
            assert sum(int(mask.sum()) for mask in masks.values()) == round(density * total)
            assert not any(parameters[name][~mask].any() for name, mask in masks.items())


def static(pattern: type[GAN], **arguments: Any) -> DynamicSparsityCallback:
    settings = {"method": "static", "probe_interval": 1, "interval": 1000} | pattern.arguments | arguments
    return DynamicSparsityCallback(DENSITY, **settings)

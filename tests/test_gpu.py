"""Training on a GPU: updates do not wait for it, masks hold in every precision, and runs resume exactly."""

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from crashes import assert_resumed_alike
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset
from toys import toy_trainer

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA
from lightning_ddst.data import ResumableLoader
from lightning_ddst.models import SmallDiscriminator, SmallGenerator
from lightning_ddst.sparsity import MaskedNetwork

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

INTERVAL = 10
PRECISIONS = pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])


def small_gan() -> GANModule:
    generator = SmallGenerator(image_size=8, channels=1, width=4, latent_dim=4)
    return GANModule(generator, SmallDiscriminator(image_size=8, channels=1, width=4), discriminator_steps=2)


def images() -> TensorDataset:
    return TensorDataset(torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1)


def ddst(**settings: Any) -> DynamicSparsityCallback:
    """The discriminator grows at every decision."""
    every = {"interval": INTERVAL, "explore_interval": INTERVAL, "probe_interval": 2}
    return DynamicSparsityCallback(0.3, bounds=(0.0, 1e-9), **every | settings)


class Waits(Callback):
    """Notes what waits for the GPU in batches after which no mask changes, nor did before them."""

    def __init__(self) -> None:
        self.batches = 0
        self.waits: list[str] = []
        self._recorded: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if 1 <= pl_module.generator_updates % INTERVAL < INTERVAL - 1 and pl_module.generator_updates > INTERVAL:
            self._recorded = warnings.catch_warnings(record=True)
            self._seen = self._recorded.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, *args: Any) -> None:
        if self._recorded is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._recorded.__exit__(None, None, None)
            self._recorded = None
            self.batches += 1
            self.waits += [f"{w.filename}:{w.lineno}" for w in self._seen if "called a synchronizing" in str(w.message)]


def waits(*callbacks: Callback, **settings: Any) -> Waits:
    """Returns the results of 40 generator updates."""
    seed_everything(0, verbose=False)
    counted = Waits()
    trainer = toy_trainer(counted, *callbacks, epochs=10, accelerator="gpu", log_every_n_steps=1000, **settings)
    trainer.fit(small_gan(), DataLoader(images(), batch_size=8))
    assert counted.batches >= 2 * 3 * (INTERVAL - 2)
    return counted


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_updates_wait_for_the_gpu_no_more_than_dense_ones(precision):
    sparsity = ddst()
    sparse = waits(sparsity, GeneratorEMA(0.9), precision=precision)
    assert sparsity.measurements == 20
    assert len(sparsity.decisions) == 4
    dense = waits(precision=precision)
    assert (sparse.batches, sparse.waits) == (dense.batches, dense.waits)


def test_waiting_is_noticed():
    class Waiting(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            float(torch.ones((), device="cuda"))

    waiting, dense = waits(Waiting()), waits()
    assert len(waiting.waits) == waiting.batches + len(dense.waits)


class Holds(Callback):
    """Looks at the masks and weights after every batch."""

    def __init__(self, sparsity: DynamicSparsityCallback) -> None:
        self._sparsity = sparsity
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1
        for network in self._sparsity.networks().values():
            assert sum(int(mask.sum()) for mask in network.masks.values()) == network.active
            for name, parameter in network.parameters.items():
                assert parameter.is_cuda
                assert network.masks[name].is_cuda
                assert not parameter[~network.masks[name]].any()
                assert parameter.isfinite().all()


@PRECISIONS
def test_masks_hold(precision):
    seed_everything(0, verbose=False)
    sparsity = ddst(probe_interval=1)
    holds = Holds(sparsity)
    trainer = toy_trainer(sparsity, holds, epochs=10, accelerator="gpu", precision=precision)
    trainer.fit(small_gan(), DataLoader(images(), batch_size=8))
    assert holds.batches == 80
    assert sparsity.measurements == sparsity.generator_updates
    assert sparsity.generator_updates >= 30  # fp16 may skip a few
    assert sparsity.discriminator_density > 0.3


@pytest.fixture
def _deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("kill", [21, 29])
def test_a_killed_run_resumes_as_if_uninterrupted(tmp_path, kill):
    def data() -> ResumableLoader:
        return ResumableLoader(images(), batch_size=8, batches=12)

    settings = {"generator_density": 0.3, "bounds": (0.01, 0.02), "probe_interval": 1, "seed": 1}
    callback = assert_resumed_alike(
        small_gan, data, tmp_path, every=15, kill=kill, accelerator="gpu", interval=7, explore_interval=5, **settings
    )
    assert callback.generator_updates == 24


def test_mask_updates_choose_what_they_choose_on_a_cpu():
    torch.manual_seed(0)
    shapes = (700, 900, 300)  # more than is worked on at once on a CPU

    def network(device: str) -> MaskedNetwork:
        torch.manual_seed(1)
        layers = [torch.nn.Linear(n_in, n_out) for n_in, n_out in pairwise(shapes)]
        return MaskedNetwork(torch.nn.Sequential(*layers).to(device), 0.2, seed=0)

    cpu, gpu = network("cpu"), network("cuda")
    gradients = {name: torch.randn_like(parameter) for name, parameter in cpu.parameters.items()}
    for sparse in (cpu, gpu):
        own = {name: gradient.to(sparse.parameters[name].device) for name, gradient in gradients.items()}
        sparse.explore(0.3, own)
        sparse.resize(0.4, own)
        sparse.resize(0.1)
    for name, mask in cpu.masks.items():
        assert torch.equal(mask, gpu.masks[name].cpu())
    assert cpu.coverage == gpu.coverage


def test_the_last_checkpoint_can_be_loaded_after_a_fit(tmp_path):
    sparsity = ddst(probe_interval=1)
    trainer = toy_trainer(sparsity, accelerator="gpu")
    gan, data = small_gan(), DataLoader(images(), batch_size=8)
    trainer.fit(gan, data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.validate(gan, data, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    updates = sparsity.generator_updates
    toy_trainer(sparsity, accelerator="gpu", epochs=2).fit(gan, data)
    assert sparsity.generator_updates == 3 * updates

"""Trains a GAN of the gallery for a few updates, with the arguments that its file gives."""

from typing import Any

from lightning.pytorch import Trainer, seed_everything

from lightning_ddst import DynamicSparsityCallback


def train(gan: type, trainer_class: Any = Trainer) -> None:
    """Trains a new GAN on its own made-up data, at a density of 0.3, and prints what was measured."""
    seed_everything(0, verbose=False)
    module = gan()
    sparsity = DynamicSparsityCallback(generator_density=0.3, interval=4, explore_interval=2, **gan.ARGUMENTS)
    settings = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = trainer_class(callbacks=[sparsity], enable_progress_bar=False, enable_model_summary=False, **settings)
    trainer.fit(module, gan.data())

    ratio = sparsity.balance_ratio
    print(
        f"{gan.__name__}: generator {sparsity.generator_density:.3f}, "
        f"discriminator {sparsity.discriminator_density:.3f}, "
        f"balance ratio {'undecided' if ratio is None else f'{ratio:.3f}'}, "
        f"operations {sparsity.flops_ratio:.2f} of dense training"
    )

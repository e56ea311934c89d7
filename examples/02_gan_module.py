"""`GANModule` in Python: an own generator and discriminator, a loss, and what shows how it went.

python examples/02_gan_module.py
"""

from lightning.pytorch import Trainer, seed_everything

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA, RunSummary, SampleQuality
from lightning_ddst.data import DigitsDataModule
from lightning_ddst.models import SmallDiscriminator, SmallGenerator, trained_digits_cnn


def main() -> None:
    seed_everything(0)
    gan = GANModule(
        generator=SmallGenerator(width=8, num_classes=10),
        discriminator=SmallDiscriminator(width=8, num_classes=10),
        loss="non-saturating",
        num_classes=10,  # batches are images and labels
        discriminator_steps=2,
    )
    trainer = Trainer(
        max_epochs=2,
        num_sanity_val_steps=-1,  # measure before training, too
        callbacks=[
            GeneratorEMA(decay=0.98),
            DynamicSparsityCallback(generator_density=0.2, max_discriminator_density=0.5),  # the strict setting
            SampleQuality(trained_digits_cnn(), name="digits_cnn"),
            RunSummary(),
        ],
    )
    trainer.fit(gan, DigitsDataModule(batch_size=32, batches_per_epoch=200))


if __name__ == "__main__":
    main()

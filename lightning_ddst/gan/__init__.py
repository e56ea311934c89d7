"""GANs to start from: the LightningModule, its losses and augmentation."""

from lightning_ddst.gan.module import GANModule

__all__ = ["GANModule"]

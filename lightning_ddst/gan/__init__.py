"""A LightningModule for GANs, its losses and augmentations."""

from lightning_ddst.gan.module import GANModule

__all__ = ["GANModule"]

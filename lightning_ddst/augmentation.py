"""The former import path of `lightning_ddst.gan.augmentation`."""

from lightning_ddst.gan.augmentation import *  # noqa: F403

"""The former import path of `lightning_ddst.gan.losses`."""

from lightning_ddst.gan.losses import *  # noqa: F403

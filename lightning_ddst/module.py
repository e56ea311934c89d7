"""The former import path of `lightning_ddst.gan.module`."""

from lightning_ddst.gan.module import *  # noqa: F403

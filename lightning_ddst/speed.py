"""The former import path of `lightning_ddst.export.benchmark`."""

from lightning_ddst.export.benchmark import *  # noqa: F403

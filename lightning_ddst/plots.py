"""The former import path of `lightning_ddst.report.plots`."""

from lightning_ddst.report.plots import *  # noqa: F403

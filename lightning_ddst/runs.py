"""The former import path of `lightning_ddst.report.runs`."""

from lightning_ddst.report.runs import *  # noqa: F403

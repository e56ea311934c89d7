"""Public path of `lightning_ddst.report.runs` (logged series) and `lightning_ddst.report.results` (results)."""

from lightning_ddst.report.results import *  # noqa: F403
from lightning_ddst.report.runs import *  # noqa: F403

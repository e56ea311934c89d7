"""Data modules, and a loader that resumes."""

from lightning_ddst.data.digits import DigitsDataModule, digits
from lightning_ddst.data.resumable import ResumableLoader

__all__ = ["DigitsDataModule", "ResumableLoader", "digits"]

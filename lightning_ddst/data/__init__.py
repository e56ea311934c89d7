"""Data modules."""

from lightning_ddst.data.digits import DigitsDataModule, digits

__all__ = ["DigitsDataModule", "digits"]

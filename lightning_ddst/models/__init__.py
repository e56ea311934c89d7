"""Networks."""

from lightning_ddst.models.digits_cnn import DigitsCNN, trained_digits_cnn
from lightning_ddst.models.small import SmallDiscriminator, SmallGenerator

__all__ = ["DigitsCNN", "SmallDiscriminator", "SmallGenerator", "trained_digits_cnn"]

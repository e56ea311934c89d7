"""scikit-learn's handwritten digits."""

from functools import cache

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_ddst.data.resumable import ResumableLoader
from lightning_ddst.utils import distributed
from lightning_ddst.utils.validation import check_count


@cache
def digits() -> TensorDataset:
    """Returns 1,797 handwritten digits (UCI, Alpaydin and Kaynak 1998).

    Returns:
        Images, float32 ``(1797, 1, 8, 8)`` in [-1, 1], and labels, int64 ``(1797,)`` from 0 to 9.
    """
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    return TensorDataset(images, torch.tensor(bunch.target, dtype=torch.int64))


class DigitsDataModule(LightningDataModule):
    """Handwritten digits, 8x8 and gray, without a download.

    Training uses all 1,797 images. Validation, test and prediction give the same images in order, for
    comparison with samples.

    Args:
        batch_size: Images per batch in each process; a smaller last batch is dropped.
        batches_per_epoch: Length of an epoch, which may be more than one pass over the images; by
            default one pass.

    Raises:
        ValueError: If an argument is not a positive integer, or an epoch would have no batch.
    """

    image_size = 8
    """Height and width."""

    channels = 1
    """Gray."""

    def __init__(self, batch_size: int = 64, batches_per_epoch: int | None = None) -> None:
        super().__init__()
        check_count("batch_size", batch_size)
        if batches_per_epoch is not None:
            check_count("batches_per_epoch", batches_per_epoch)
        elif batch_size > len(digits()):
            raise ValueError(f"batch_size={batch_size} must not be above the number of images, {len(digits())}.")
        self.batch_size = batch_size
        self.batches_per_epoch = batches_per_epoch

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Makes a loader of shuffled images and labels that resumes in the middle of an epoch."""
        one_pass = len(digits()) // (self.batch_size * distributed.get_world_size())
        return ResumableLoader(digits(), self.batch_size, self.batches_per_epoch or one_pass)

    def val_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        """Makes a loader of every image once, in order."""
        rng = torch.Generator()  # the default would draw from training's random state
        return DataLoader(digits(), batch_size=256, generator=rng)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader

"""STL-10."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset
from torchvision.datasets import STL10

from lightning_ddst.data.images import ImageDataModule
from lightning_ddst.utils.validation import check_choice

TrainSplit = Literal["unlabeled", "train+unlabeled", "train"]


class STL10DataModule(ImageDataModule):
    """100,000 colour images without labels, and 5,000 and 8,000 in 10 classes (Coates et al. 2011).

    Reads the original files from torchvision's folder ``root/stl10_binary``. The MD5 check takes some seconds.
    The images, 96x96, are held in memory: 2.8 GB for the unlabeled split. Each is resized when it is read, so
    `num_workers` helps.

    Args:
        root: Folder of the files.
        image_size: Height and width; most GANs are trained at 48.
        channels: 3, or 1 for gray.
        horizontal_flips: As in `ImageDataModule`, but True by default.
        split: The split to train on, also used by ``reference="train"``: "unlabeled", "train+unlabeled" or
            "train". Images without a label get the label -1.
        **settings: Further arguments of `ImageDataModule`; ``reference="test"`` uses the 8,000 images.
    """

    home = "https://cs.stanford.edu/~acoates/stl10"
    downloads = True

    def __init__(
        self,
        root: str | Path,
        image_size: int = 48,
        channels: int = 3,
        horizontal_flips: bool = True,
        split: TrainSplit = "unlabeled",
        **settings: Any,
    ) -> None:
        super().__init__(root, image_size, channels, horizontal_flips=horizontal_flips, **settings)
        check_choice("split", split, ("unlabeled", "train+unlabeled", "train"))
        self.split = split

    @classmethod
    def sources(cls, arguments: Mapping[str, Any]) -> Sequence[tuple[str, Sequence[Path]]]:
        """Returns the folder of the original files."""
        return [("root", [Path(arguments["root"]).expanduser() / STL10.base_folder])]

    def prepare_data(self) -> None:
        """Downloads missing files if `download` is True."""
        if self.download:
            STL10(self.root, "test", download=True)

    def make_dataset(self, train: bool) -> Dataset[Any]:
        """Reads the images and labels of a split."""
        folder = self.root / STL10.base_folder
        if not folder.is_dir():
            raise self.missing(folder, "the original binary files there")
        try:
            dataset: Dataset[Any] = STL10(self.root, self.split if train else "test")
        except RuntimeError as error:
            raise self.not_original(folder) from error
        return dataset

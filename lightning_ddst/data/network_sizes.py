"""Fits the networks of a configuration to the images of its data module."""

import pydoc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule

from lightning_ddst.data.images import ImageDataModule

_SIZES = ("image_size", "channels")


@dataclass(frozen=True)
class NetworkSizes:
    """Sizes of a configuration's networks.

    Attributes:
        filled: The values that were filled in, by name: `image_size`, `channels`.
        misfits: Values that were given and differ from the data's, in words.
    """

    filled: Mapping[str, int]
    misfits: Sequence[str]

    def check(self) -> None:
        """Raises ValueError if a network was given another size or other channels than the data."""
        if self.misfits:
            raise ValueError(
                f"{self.misfits[0]}: give both the same, or leave the network's out, as --config images does for a "
                "folder of images."
            )


def fit_networks(config: Namespace, given: Namespace) -> NetworkSizes:
    """Gives the networks the size and channels of the data's images, where their configuration gives none.

    Args:
        config: A configuration with the entries `data` and `model`, which has arguments `generator` and
            `discriminator`; it is changed. The data module's own size and channels are filled in as well.
        given: The part of it that files or options gave, without defaults.

    Raises:
        ValueError: For data that cannot be read to find out its size.
        OSError: For data that cannot be read.
    """
    filled, misfits = {}, []
    for name, size in _data_sizes(config.data).items():
        if config.data.init_args.get(name, size) is None:
            config.data.init_args[name] = filled[name] = size
        for role in ("generator", "discriminator"):
            network, key = config.model.init_args.get(role), f"model.init_args.{role}.init_args.{name}"
            if not isinstance(network, Namespace) or name not in network.get("init_args", {}):
                continue
            if (own := given.get(key)) is None:
                network.init_args[name] = filled[name] = size
            elif own != size:
                kind = config.data.class_path.rpartition(".")[2]
                misfits.append(f"--{key}={own} does not fit the images of {kind}, whose {name} is {size}")
    return NetworkSizes(filled, misfits)


def _data_sizes(data: Namespace) -> dict[str, int]:
    kind: Any = pydoc.locate(data.class_path)
    if isinstance(kind, type) and issubclass(kind, ImageDataModule):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(LightningDataModule, "data")
        made = parser.instantiate_classes(parser.parse_object({"data": data.as_dict()})).data
    else:
        made = kind  # its constructor may do anything
    found = {name: getattr(made, name, None) for name in _SIZES}
    return {name: size for name, size in found.items() if isinstance(size, int)}

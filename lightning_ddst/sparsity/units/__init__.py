"""The units of masks: one file for each granularity.

To add one, decorate a subclass of `Units`:

    @UNITS.register("block")
    class BlockUnits(Units): ...

and pass its name as ``granularity``, in Python or in YAML.
"""

import re

from lightning_ddst.sparsity.units.base import INITIAL, UNITS, Initial, Units
from lightning_ddst.sparsity.units.channel import ChannelUnits
from lightning_ddst.sparsity.units.n_m import NMUnits, n_m
from lightning_ddst.sparsity.units.weight import SCOPES, Scope, WeightUnits
from lightning_ddst.utils.suggestions import did_you_mean

__all__ = [
    "INITIAL",
    "SCOPES",
    "UNITS",
    "ChannelUnits",
    "Initial",
    "NMUnits",
    "Scope",
    "Units",
    "WeightUnits",
    "find_units",
    "n_m",
]


def find_units(granularity: str) -> type[Units]:
    """Returns the class of units of a granularity.

    Args:
        granularity: A key of `UNITS`, or a pattern N:M such as "2:4".

    Raises:
        ValueError: If there are no such units.
    """
    if granularity not in UNITS and (pattern := re.fullmatch(r"(\d+):(\d+)", str(granularity))):
        return n_m(*map(int, pattern.groups()))
    if granularity not in UNITS:
        raise ValueError(
            f"granularity={granularity!r} is unknown; allowed are {', '.join(UNITS)}, and patterns N:M such as 2:4."
            f"{did_you_mean(granularity, UNITS)}"
        )
    return UNITS[granularity]

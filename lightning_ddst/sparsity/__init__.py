"""Masks of one network: allocation, pruning and growth, schedules, enforcement. Needs only torch.

Only `masked` changes masks, by `explore` and `resize`. `units` defines the unit of masks: single weights, N of M
weights, or whole channels. `growth` holds the growth rules, `dense_gradients` keeps the gradients that they need, and
`enforcement` keeps inactive weights at 0.
"""

from lightning_ddst.sparsity.allocation import DISTRIBUTIONS, allocate
from lightning_ddst.sparsity.channels.groups import Channels
from lightning_ddst.sparsity.channels.slim import compact
from lightning_ddst.sparsity.channels.structured_forward import StructuredForward
from lightning_ddst.sparsity.channels.tracing import trace_channels
from lightning_ddst.sparsity.enforcement import MaskEnforcer
from lightning_ddst.sparsity.flops import LayerFlops, TrainingFlops
from lightning_ddst.sparsity.growth import GROWTH_RULES, Layer, growth_rule
from lightning_ddst.sparsity.maskable import MASKABLE_LAYERS, MaskableWeight, maskable_weights
from lightning_ddst.sparsity.masked import MaskedNetwork
from lightning_ddst.sparsity.optimizers import find_optimizers, get_parameters, has_updated
from lightning_ddst.sparsity.paper_flops import published_flops, published_training_flops
from lightning_ddst.sparsity.schedules import SCHEDULES, exploration_rate
from lightning_ddst.sparsity.selection import largest, select
from lightning_ddst.sparsity.units import UNITS, Units, find_units

__all__ = [
    "DISTRIBUTIONS",
    "GROWTH_RULES",
    "MASKABLE_LAYERS",
    "SCHEDULES",
    "UNITS",
    "Channels",
    "Layer",
    "LayerFlops",
    "MaskEnforcer",
    "MaskableWeight",
    "MaskedNetwork",
    "StructuredForward",
    "TrainingFlops",
    "Units",
    "allocate",
    "compact",
    "exploration_rate",
    "find_optimizers",
    "find_units",
    "get_parameters",
    "growth_rule",
    "has_updated",
    "largest",
    "maskable_weights",
    "published_flops",
    "published_training_flops",
    "select",
    "trace_channels",
]

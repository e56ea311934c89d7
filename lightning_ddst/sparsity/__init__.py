"""Masks of one network: allocation, pruning and growing, schedules, enforcement. Needs torch only.

A mask changes in `network` alone, one of whole channels in `channel_network`: `explore` and `resize`. What grows is
scored in `growth`, and `enforcement` keeps the rest at 0.
"""

from lightning_ddst.sparsity.allocation import DISTRIBUTIONS, allocate
from lightning_ddst.sparsity.channel_network import ChannelNetwork
from lightning_ddst.sparsity.channels import Channels
from lightning_ddst.sparsity.compact import compact
from lightning_ddst.sparsity.enforcement import Enforcement, made_update, updating
from lightning_ddst.sparsity.flops import LayerFlops, TrainingFlops
from lightning_ddst.sparsity.growth import GROWTH_RULES, Layer, growth_rule
from lightning_ddst.sparsity.maskable import MASKABLE_LAYERS, MaskableWeight, maskable_weights
from lightning_ddst.sparsity.masked import MaskedNetwork
from lightning_ddst.sparsity.narrow import Narrowing
from lightning_ddst.sparsity.network import SparseNetwork
from lightning_ddst.sparsity.pruning import InitialWeights, MagnitudePruning
from lightning_ddst.sparsity.published import published_flops, published_training_flops
from lightning_ddst.sparsity.schedules import SCHEDULES, exploration_rate
from lightning_ddst.sparsity.selection import largest, select
from lightning_ddst.sparsity.tracing import trace_channels

__all__ = [
    "DISTRIBUTIONS",
    "GROWTH_RULES",
    "MASKABLE_LAYERS",
    "SCHEDULES",
    "ChannelNetwork",
    "Channels",
    "Enforcement",
    "InitialWeights",
    "Layer",
    "LayerFlops",
    "MagnitudePruning",
    "MaskableWeight",
    "MaskedNetwork",
    "Narrowing",
    "SparseNetwork",
    "TrainingFlops",
    "allocate",
    "compact",
    "exploration_rate",
    "growth_rule",
    "largest",
    "made_update",
    "maskable_weights",
    "published_flops",
    "published_training_flops",
    "select",
    "trace_channels",
    "updating",
]

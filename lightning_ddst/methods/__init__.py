"""Methods of sparse training, one file each, and the training that applies them.

A method is a frozen dataclass that returns its mask updates (`base`); `training` applies them. To add a method, write
a file with a class and register the class with `training_method` (docs/extending.md).
"""

from lightning_ddst.methods.base import METHODS, MaskUpdate, Method, Role, make_method, training_method
from lightning_ddst.methods.ddst import DDA, DDST, ResizeByBalance
from lightning_ddst.methods.intervals import Intervals, Plan
from lightning_ddst.methods.pruning import IMP, InitialWeights, MagnitudePruning, PostHoc, PruneByMagnitude
from lightning_ddst.methods.ramp import Ramp, Resize
from lightning_ddst.methods.sdst import SDST, DropFractionSchedule, Explore
from lightning_ddst.methods.static import Dense, Static
from lightning_ddst.methods.training import SparseTraining

__all__ = [
    "DDA",
    "DDST",
    "IMP",
    "METHODS",
    "SDST",
    "Dense",
    "DropFractionSchedule",
    "Explore",
    "InitialWeights",
    "Intervals",
    "MagnitudePruning",
    "MaskUpdate",
    "Method",
    "Plan",
    "PostHoc",
    "PruneByMagnitude",
    "Ramp",
    "Resize",
    "ResizeByBalance",
    "Role",
    "SparseTraining",
    "Static",
    "make_method",
    "training_method",
]

"""Methods of sparse training, one file each."""

from lightning_ddst.methods.pruning import InitialWeights, MagnitudePruning
from lightning_ddst.methods.training import DropFractionSchedule, Plan, SparseTraining

__all__ = ["DropFractionSchedule", "InitialWeights", "MagnitudePruning", "Plan", "SparseTraining"]

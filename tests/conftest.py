"""One thread: the networks of the tests are so small that two threads mostly wait for each other; and no deadlines."""

import os

import lightning_package  # noqa: F401  # which replaces lightning.pytorch if asked to
import torch
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

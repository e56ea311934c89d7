"""One thread: networks of tests are so small that two threads mostly wait for each other; no deadlines; fixed seeds."""

import os
import random

import lightning_package  # noqa: F401  # which replaces lightning.pytorch if asked to
import numpy as np
import pytest
import torch
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
torch.set_num_threads(1)

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers in every run, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # transforms of users draw from it
    torch.manual_seed(0)

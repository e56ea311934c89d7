import pytest
import torch

from lightning_ddst.sparsity.bitpack import pack_bits
from lightning_ddst.sparsity.coverage import Coverage

pytestmark = pytest.mark.usefixtures("every_device")


def masks(first, second, sizes=(70, 64)):
    """Two masks of these sizes whose named entries are active."""
    made = {name: torch.zeros(size, dtype=torch.bool) for name, size in zip("ab", sizes, strict=True)}
    made["a"][first] = True
    made["b"][second] = True
    return made


def test_every_weight_that_was_ever_active_counts_once():
    coverage = Coverage(masks([], []))
    assert coverage.count() == 0
    coverage.add(masks([0, 69], [63]))
    assert coverage.count() == 3
    coverage.add(masks([0, 1], [62, 63]))
    assert coverage.count() == 5


def test_bits_are_those_of_the_union_of_the_masks():
    coverage = Coverage(masks([], []))
    coverage.add(masks([0, 69], [63]))
    coverage.add(masks([5], []))
    union = masks([0, 5, 69], [63])
    assert coverage.bits.keys() == {"a", "b"}
    assert all(torch.equal(bits, pack_bits(union[name])) for name, bits in coverage.bits.items())


def test_loaded_bits_replace_those_before_and_masks_without_saved_bits_start_with_none():
    coverage = Coverage(masks([], []))
    coverage.add(masks([3, 4, 5], [6]))
    coverage.load({"a": pack_bits(masks([1], [])["a"])})
    assert coverage.count() == 1

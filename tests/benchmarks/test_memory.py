"""Bytes of masks and of mask updates."""

import pytest
import torch
from mask_update import memory
from memory import NewTensors

CPU = torch.device("cpu")


def test_what_is_held_and_what_was_needed_for_a_moment():
    kept = []
    with NewTensors(CPU) as new:
        x = torch.ones(100)
        kept.append(x.add(1).view(10, 10).t())  # a view holds its storage
        x.mul_(2)
        del x
        torch.zeros(50, dtype=torch.int8).sum()  # a sum of 8 bytes
    assert new.held == 400
    assert new.peak == 800


def test_masks_hold_a_byte_and_a_bit_a_weight_and_an_update_needs_at_most_16_bytes_more():
    held, peak = memory(1, CPU)
    assert held == pytest.approx(1.125, abs=0.001)
    assert 4 < peak <= 16

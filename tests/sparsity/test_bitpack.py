import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_ddst.sparsity.bitpack import count_bits, pack_bits


def test_eight_entries_are_a_byte():
    assert sorted(pack_bits(torch.tensor([True] + [False] * 7)).tolist())[:7] == [0] * 7
    assert pack_bits(torch.ones(3, 8, dtype=torch.bool)).tolist() == [255] * 3 + [0] * 5
    assert pack_bits(torch.ones(65, dtype=torch.bool)).numel() == 16


@given(st.lists(st.booleans(), max_size=200), st.lists(st.booleans(), max_size=200))
def test_bits_of_a_union_are_the_union_of_bits(first, second):
    length = min(len(first), len(second))
    one, other = (torch.tensor(values[:length], dtype=torch.bool) for values in (first, second))
    union = pack_bits(one) | pack_bits(other)
    assert torch.equal(union, pack_bits(one | other))
    assert count_bits(union) == int((one | other).sum())


def test_a_mask_that_is_not_contiguous():
    mask = (torch.arange(24).view(4, 6) % 5 == 0).T
    assert torch.equal(pack_bits(mask), pack_bits(mask.contiguous()))


def test_masks_that_are_packed_and_counted_in_several_pieces():
    mask = torch.zeros(5_000_003, dtype=torch.bool)  # 9.5 pieces to pack, 1.2 to count
    mask[::7] = True
    bits = pack_bits(mask)
    assert count_bits(bits) == 714_287
    pieces = [pack_bits(part) for part in mask[:5_000_000].view(50, 100_000)]  # whole words each, but for their filling
    assert count_bits(torch.cat(pieces)) == 714_286
    assert torch.equal(bits[: 64 * 12_500 // 8], pack_bits(mask[: 64 * 12_500]))
    assert torch.equal(bits[64 * 12_500 // 8 :], pack_bits(mask[64 * 12_500 :]))

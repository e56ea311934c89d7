from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ddst.utils.together import clone_together, copy_together, is_plain, lerp_together


class Operations(TorchDispatchMode):
    """Counts the operations that write a result."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) not in ("empty_like", "detach"):
            self.counts[name] += 1
        return function(*args, **kwargs or {})


def mixed():
    """Two kinds of two tensors each, of several shapes and strides."""
    transposed = torch.arange(6.0).reshape(2, 3).t()
    return [torch.tensor(1.5), torch.arange(3), transposed, torch.tensor([[7, 8]])]


def test_copies_are_equal_keep_their_strides_and_share_no_memory():
    sources = [nn.Parameter(torch.ones(2)), *mixed()]
    copies = clone_together(sources)
    for copy, source in zip(copies, sources, strict=True):
        assert torch.equal(copy, source)
        assert (copy.dtype, copy.stride()) == (source.dtype, source.stride())
        assert copy.data_ptr() != source.data_ptr()
        assert not copy.requires_grad


def test_one_operation_copies_all_tensors_of_one_dtype():
    sources, targets = mixed(), [torch.zeros_like(each) for each in mixed()]
    with Operations() as copied:
        copy_together(targets, sources)
    assert copied.counts == {"_foreach_copy_": 2}
    with Operations() as cloned:
        clone_together(sources)
    assert cloned.counts == {"_foreach_copy_": 2}
    assert all(map(torch.equal, targets, sources))


def test_copying_converts_dtypes():
    targets = [torch.zeros(2, dtype=torch.float64), torch.zeros(1), torch.zeros(1)]
    copy_together(targets, [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4])])
    assert [target.tolist() for target in targets] == [[1, 2], [3], [4]]


def test_nothing_is_copied_and_interpolated_without_tensors():
    assert clone_together([]) == []
    copy_together([], [])
    lerp_together([], [], 0.5)


def test_interpolation_is_a_share_of_the_way():
    targets = [torch.tensor([0.0, 4.0]), torch.tensor(8.0), torch.tensor([2.0], dtype=torch.float64)]
    sources = [torch.tensor([4.0, 8.0]), torch.tensor(0.0), torch.ones(1, dtype=torch.float64)]
    with Operations() as done:
        lerp_together(targets, sources, 0.25)
    assert [target.tolist() for target in targets] == [[1, 5], 6, [1.75]]
    assert done.counts == {"_foreach_lerp_": 1, "lerp_": 1}


@pytest.mark.parametrize("sparse", [False, True])
def test_tensors_of_other_kinds_are_copied_alone(sparse: bool):
    class Other(torch.Tensor):
        pass

    other = torch.eye(2).to_sparse() if sparse else torch.eye(2).as_subclass(Other)
    assert not is_plain(other)
    copies = clone_together([torch.ones(1), other, torch.zeros(1)])
    assert [type(copy) for copy in copies] == [torch.Tensor, type(other), torch.Tensor]
    assert copies[1].to_dense().tolist() == [[1, 0], [0, 1]]
    sources = [torch.zeros(1), other, torch.ones(1)]
    with Operations() as done:
        copy_together(copies, sources)
    assert done.counts["_foreach_copy_"] == 1
    assert copies[2].item() == 1

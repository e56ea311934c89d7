import pytest
from torch import nn

from lightning_ddst.sparsity.layer_patterns import matches


class Mine(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("generator.blocks.1.conv", True),
        ("generator.*", True),
        ("*.conv", True),
        ("*blocks.[0-3]*", True),
        ("Mine", True),
        ("Conv2d", True),  # a class it inherits from
        ("generator.blocks", False),  # a name is matched as a whole
        ("conv", False),
        ("*.CONV", False),
        ("Linear", False),
        ("mine", False),
    ],
)
def test_names_with_wildcards_and_names_of_classes(pattern, matched):
    assert matches(pattern, "generator.blocks.1.conv", Mine(1, 1, 1)) == matched

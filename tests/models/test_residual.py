import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ddst.models.residual import DownBlock, UpBlock, down_blocks, initialize, normalize


def test_an_up_block_doubles_both_branches() -> None:
    block, maps = UpBlock(3, 5).eval(), torch.randn(2, 3, 4, 6)
    doubled = maps.repeat_interleave(2, 2).repeat_interleave(2, 3)
    hidden = block.conv1(F.relu(doubled) / (1 + 1e-5) ** 0.5)  # the running statistics are 0 and 1, eps 1e-5
    expected = block.conv2(F.relu(hidden) / (1 + 1e-5) ** 0.5) + block.shortcut(doubled)
    torch.testing.assert_close(block(maps), expected)


def test_the_norm_of_an_up_block_is_given_its_condition() -> None:
    class Times(nn.Module):
        def forward(self, maps: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            return maps * factor

    block, maps = UpBlock(3, 5, norm=lambda n: Times()), torch.randn(2, 3, 4, 4)
    assert not torch.allclose(block(maps, torch.tensor(1.0)), block(maps, torch.tensor(2.0)))


@pytest.mark.parametrize("first", [False, True])
def test_a_down_block_halves_both_branches(first: bool) -> None:
    block, maps = DownBlock(3, 5, first=first), torch.randn(2, 3, 4, 6)
    hidden = block.conv2(F.relu(block.conv1(maps if first else F.relu(maps))))
    expected = F.avg_pool2d(hidden + block.shortcut(maps), 2)  # pooling and a 1x1 convolution commute
    torch.testing.assert_close(block(maps), expected)


def test_the_shortcut_of_a_block_that_changes_no_shape_is_its_input_before_the_relu() -> None:
    block, maps = DownBlock(3, 3, down=False), torch.randn(2, 3, 4, 4)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    before = maps.clone()
    assert torch.equal(block(maps), before)
    assert torch.equal(maps, before)
    assert isinstance(DownBlock(3, 4, down=False).shortcut, nn.Conv2d)


def test_down_blocks_follow_their_widths() -> None:
    blocks = down_blocks(1, [2, 2, 4], 2)
    assert [block.first for block in blocks] == [True, False, False]
    assert [block.conv1.in_channels for block in blocks] == [1, 2, 2]
    assert nn.Sequential(*blocks)(torch.randn(3, 1, 8, 12)).shape == (3, 4, 2, 3)


def test_initialize_reaches_weights_and_zeroes_biases() -> None:
    network = nn.Sequential(
        nn.Linear(2, 3), nn.Conv2d(2, 3, 1, bias=False), nn.ConvTranspose2d(2, 3, 1), nn.Embedding(2, 3), UpBlock(2, 2)
    )
    initialize(network, nn.init.ones_)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, torch.full_like(parameter, not name.endswith("bias"))), name


def test_normalize_takes_the_given_kinds_only() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Conv2d(2, 3, 1)), nn.Embedding(2, 3))
    normalize(network, nn.Linear, nn.Conv2d)
    names = [name for name, parameter in network.named_parameters() if parameter.dim() > 1]
    assert names == ["0.parametrizations.weight.original", "1.0.parametrizations.weight.original", "2.weight"]

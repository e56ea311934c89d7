import pytest
import torch
from torch import nn

from lightning_ddst.metrics.generator_inputs import GeneratorInputs
from lightning_ddst.utils import distributed

CPU = torch.device("cpu")


class Doubling(nn.Module):
    """Returns images of its noise, doubled in evaluation."""

    def forward(self, noise: torch.Tensor, more: dict | None = None) -> torch.Tensor:
        return noise if self.training else 2 * noise


def recorded(generator: nn.Module, *noises: torch.Tensor, wanted: int | None = None) -> GeneratorInputs:
    inputs = GeneratorInputs(wanted)
    handles = inputs.attach(generator)
    inputs.recording = True
    for noise in noises:
        generator(noise)
    for handle in handles:
        handle.remove()
    return inputs


def values(images) -> list[list[float]]:
    return [batch[:, 0].tolist() for batch in images]


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)[:, None]


def test_different_calls_are_repeated_in_evaluation_mode() -> None:
    generator = Doubling()
    changed = column(3, 4)
    inputs = recorded(generator, column(1, 2), changed, column(1, 2), column(5))
    changed.zero_()
    assert inputs.images == inputs.complete() == 5
    assert values(inputs.repeat(generator, 5, 0, CPU)) == [[2, 4], [6, 8], [10]]
    assert values(inputs.repeat(generator, 3, 0, CPU)) == [[2, 4], [6]]
    assert inputs.shape(generator, CPU) == (1,)
    assert generator.training


def test_recording_ends_when_enough_are_there() -> None:
    generator = Doubling()
    inputs = recorded(generator, column(1, 2), column(3, 4), column(5, 6), wanted=3)
    assert inputs.complete() == 4
    inputs.recording = False
    assert recorded(generator).complete() == 0


def test_by_default_not_more_than_64_megabytes_are_kept() -> None:
    half = torch.zeros(1, 2**23)  # 32 MB
    noises = [half + number for number in range(3)]
    assert recorded(Doubling(), *noises).images == 2
    assert recorded(Doubling(), *noises, wanted=3).images == 3


def test_processes_share_all_inputs(monkeypatch) -> None:
    generator = Doubling()
    first = recorded(generator, column(1, 2), column(3, 4))
    second = recorded(generator, column(5, 6))
    states = [each.state_dict()["processes"][0] for each in (first, second)]
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda value: states)
    made = []
    for rank, inputs in enumerate((first, second)):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        assert inputs.complete() == 6
        made.append(values(inputs.repeat(generator, 5, 0, CPU)))
    assert made == [[[2, 4], [6]], [[10, 12]]]


@pytest.mark.parametrize("complete", [False, True])
def test_a_state_loads_safely_and_restores_the_inputs(complete: bool, tmp_path) -> None:
    generator = Doubling()
    inputs = recorded(generator, column(1, 2), column(3))
    if complete:
        inputs.complete()
    torch.save(inputs.state_dict(), tmp_path / "state.pt")
    again = recorded(generator)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    handles = again.attach(generator)
    again.recording = True
    for noise in (column(3), column(9)):
        generator(noise)
    for handle in handles:
        handle.remove()
    assert again.complete() == (3 if complete else 4)
    assert values(again.repeat(generator, 3, 0, CPU)) == [[2, 4], [6]]


def test_inputs_of_any_nesting(tmp_path) -> None:
    generator = Doubling()
    inputs = GeneratorInputs()
    inputs.attach(generator)
    inputs.recording = True
    generator(column(1), more={"styles": [column(2), None], "mix": ("a", 0.5)})
    generator(column(1), more={"styles": [column(3), None], "mix": ("a", 0.5)})
    generator(column(1), more={"styles": [column(3), None], "mix": ("a", 0.5)})
    assert inputs.images == 2
    with pytest.raises(TypeError, match="a call of the generator with a object"):
        generator(column(1), more={"styles": object()})

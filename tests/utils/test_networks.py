import pytest
from torch import nn

from lightning_ddst.utils.networks import USUAL_NAMES, find_network


def holding(**networks: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, network in networks.items():
        setattr(module, name, network)
    return module


def test_usual_names_are_found() -> None:
    assert {role: len(names) for role, names in USUAL_NAMES.items()} == {"generator": 5, "discriminator": 6}
    for role, names in USUAL_NAMES.items():
        for name in names:
            network = nn.Linear(1, 1)
            assert find_network(holding(other=nn.Linear(1, 1), **{name: network}), role, None) is network


def test_the_first_of_the_usual_names_wins() -> None:
    for role, names in USUAL_NAMES.items():
        networks = {name: nn.Linear(1, 1) for name in reversed(names)}
        assert find_network(holding(**networks), role, None) is networks[names[0]]


def test_something_else_under_a_usual_name_is_passed_over() -> None:
    network = nn.Linear(1, 1)
    module = holding(G=network)
    module.generator = "a name"
    assert find_network(module, "generator", None) is network


def test_a_given_name_reaches_into_submodules() -> None:
    network = nn.Linear(1, 1)
    module = holding(model=nn.Sequential(nn.Identity(), holding(inner=network)), generator=nn.Linear(1, 1))
    assert find_network(module, "generator", "model.1.inner") is network
    assert find_network(module, "discriminator", "model.1.inner") is network


@pytest.mark.parametrize("name", ["net", "generator.net", "weight", "generator.weight", "generator..", "0"])
def test_a_name_that_is_no_submodule_is_rejected_with_what_exists(name: str) -> None:
    module = holding(generator=nn.Linear(1, 1), extra=nn.Identity())
    with pytest.raises(ValueError, match=f"discriminator='{name}' .*Module; it has generator, ext"):
        find_network(module, "discriminator", name)


def test_where_nothing_is_found_the_error_names_the_names_tried_and_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no discriminator .*in Module .*discriminator, c"):
        find_network(holding(generator=nn.Linear(1, 1)), "discriminator", None)
    with pytest.raises(ValueError, match=r'pass its dotted name, generator="...". It has maker, judge\.'):
        find_network(holding(maker=nn.Linear(1, 1), judge=nn.Linear(1, 1)), "generator", None)
    with pytest.raises(ValueError, match=r"It has no submodules\."):
        find_network(nn.Module(), "generator", None)

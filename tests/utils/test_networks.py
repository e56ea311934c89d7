import pytest
import torch
from torch import nn

from lightning_ddst.utils.networks import (
    USUAL_NAMES,
    draw_samples,
    find_network,
    get_parts,
    is_same_network,
    name_in,
    prefix_in,
)


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


def test_usual_names_are_found_in_submodules_too() -> None:
    network = nn.Linear(1, 1)
    module = holding(extra=nn.Identity(), model=holding(net_g=network, D=nn.Linear(1, 1)))
    assert find_network(module, "generator", None) is network
    module.generator = nn.Linear(1, 1)  # those of the module itself come first
    assert find_network(module, "generator", None) is module.generator


def test_usual_names_are_found_at_any_depth_the_outermost_first() -> None:
    inner, outer = nn.Linear(1, 1), nn.Linear(1, 1)
    module = holding(model=holding(net=holding(generator=inner)))
    assert find_network(module, "generator", None) is inner
    module.model.G = outer
    assert find_network(module, "generator", None) is outer


def test_usual_names_in_several_submodules_are_listed() -> None:
    network = nn.Linear(1, 1)
    module = holding(model=holding(G=network), average=holding(generator=nn.Linear(1, 1)))
    with pytest.raises(ValueError, match=r'generator: model\.G, average\.generator; .*generator="model\.G"'):
        find_network(module, "generator", None)
    same = holding(model=holding(G=network), average=holding(generator=network))
    assert find_network(same, "generator", None) is network


def test_several_parts_are_one_network_with_the_names_of_the_module() -> None:
    encoder, decoder = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2))
    model = holding(encoder=encoder, other=nn.Linear(5, 5))
    module = holding(model=model, decoder=decoder)
    network = find_network(module, "generator", ["decoder", "model.encoder"])
    assert get_parts(network) == (decoder, encoder)
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == {
        "decoder.0.weight": (2, 3),
        "decoder.0.bias": (2,),
        "model.encoder.weight": (3, 2),
        "model.encoder.bias": (3,),
    }
    assert (name_in(module, network), prefix_in(module, network)) == ("decoder+model.encoder", "")
    assert prefix_in(module, encoder) == name_in(module, encoder) == "model.encoder"
    again = find_network(module, "generator", ("decoder", "model.encoder"))
    assert is_same_network(network, again)
    assert not is_same_network(network, find_network(module, "generator", ["model.encoder", "model.other"]))
    assert find_network(module, "generator", ["decoder"]) is decoder
    with pytest.raises(NotImplementedError):
        network(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mpd", "mpd"], "'mpd' holds 'mpd'"),
        (["mpd", "mpd.0"], "'mpd' holds 'mpd.0'"),
        (["mpd.0", "mpd"], "'mpd' holds 'mpd.0'"),
        (["mpd", "msd"], "discriminator='msd' is not a submodule"),
        ([], "must name at least one"),
    ],
)
def test_parts_that_overlap_or_do_not_exist_are_rejected(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_network(holding(mpd=nn.Sequential(nn.Linear(1, 1))), "discriminator", names)


class Sampled(nn.Module):
    def __init__(self, returned: object) -> None:
        super().__init__()
        self.returned = returned

    def sample(self, n: int, rng: torch.Generator) -> object:
        return self.returned


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ((torch.ones(4, 1), None), TypeError, r"Sampled\.sample\(4, rng=\.\.\.\) must .* returned tuple"),
        (torch.ones(4, 1).numpy(), TypeError, "returned ndarray"),
        (torch.ones(3, 1), ValueError, r"must return a tensor of 4 images, and returned one of shape \(3, 1\)"),
        (torch.ones(()), ValueError, r"of shape \(\)"),
    ],
)
def test_samples_must_be_as_many_images(returned: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw_samples(Sampled(returned), 4, torch.Generator())


def test_samples_are_drawn_with_the_generator() -> None:
    images = torch.ones(4, 1)
    assert draw_samples(Sampled(images), 4, torch.Generator()) is images

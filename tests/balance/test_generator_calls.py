"""Which call made a tensor, for generators of one module and of several parts."""

import copy

import pytest
import torch
from torch import nn

from lightning_ddst.balance.generator_calls import GeneratorCalls
from lightning_ddst.utils.networks import SeveralParts


class Model(nn.Module):
    """An encoder and a decoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.decoder(self.encoder(x).tanh()), "more"


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Model()

    def forward(self, x):
        return {"images": self.model(x)[0]}


def recorded(module, *names):
    calls = GeneratorCalls(SeveralParts(module, "generator", names) if names else module, lambda: True)
    calls.attach()
    return calls


def parts_of(outer):
    return recorded(outer, "model.encoder", "model.decoder")


X = torch.ones(1, 2)


def test_a_generator_of_one_module_is_its_last_call():
    generator = nn.Linear(2, 2)
    calls = recorded(generator)
    first, last = generator(X), generator(2 * X)
    assert calls.find_source(first) is calls.calls[0]
    assert calls.find_source(3 * last) is calls.calls[1]
    assert calls.calls[1].network is generator
    assert calls.calls[1].inputs == {}
    assert calls.find_source(X) is None


def detached(fake):
    return fake.detach().requires_grad_()


@pytest.mark.parametrize("change", [detached, lambda fake: detached(fake).view(-1), lambda fake: 2 * detached(fake)])
def test_a_detached_copy_is_not_the_generators_although_it_shares_memory(change):
    generator = nn.Linear(2, 2)
    calls = recorded(generator)
    assert calls.find_source(change(generator(X))) is None
    assert not calls.incomplete


def test_a_view_that_was_written_to_is_the_generators():
    generator = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)))
    calls = recorded(generator)
    fake = generator(X)
    fake.mul_(0.5)
    assert calls.find_source(fake) is calls.calls[0]


def test_the_innermost_module_that_holds_the_parts_is_called_again():
    outer = Outer()
    calls = parts_of(outer)
    fake = outer(X)["images"]
    assert [made.network for made in calls.calls] == [outer.model.encoder, outer.model.decoder, outer.model, outer]
    assert [made.inputs for made in calls.calls] == [{}, None, {}, {}]
    assert calls.find_source(fake).network is outer.model
    assert not calls.incomplete


def test_a_module_that_changes_the_images_is_called_again_itself():
    class Scaled(Outer):
        def forward(self, x):
            return 2 * super().forward(x)["images"]

    outer = Scaled()
    calls = parts_of(outer)
    assert calls.find_source(outer(X)).network is outer


def test_parts_in_a_chain_are_called_one_after_the_other():
    outer = Outer()
    calls = parts_of(outer)
    encoder, decoder = outer.model.encoder, outer.model.decoder
    made = calls.find_source(decoder(input=encoder(X)))
    assert made.network is decoder
    assert [*made.inputs] == ["input"]
    assert made.inputs["input"].network is encoder
    assert calls.find_source(decoder(torch.ones(1, 3))).inputs == {}  # the decoder alone


@pytest.mark.parametrize("between", [torch.tanh, lambda code: code.mul_(2), lambda code: code[:, [0, 1, 2]]])
def test_a_chain_with_something_between_is_incomplete(between):
    outer = Outer()
    calls = parts_of(outer)
    fake = outer.model.decoder(between(outer.model.encoder(X)))
    assert calls.find_source(fake) is None
    assert calls.incomplete


def test_a_part_that_gets_another_parts_output_in_a_list_is_incomplete():
    class OfList(nn.Linear):
        def forward(self, codes):
            return super().forward(codes[0])

    outer = Outer()
    outer.model.decoder = OfList(3, 2)
    calls = parts_of(outer)
    assert calls.find_source(outer.model.decoder([outer.model.encoder(X)])) is None
    assert calls.incomplete


def test_a_call_that_fails_is_forgotten():
    outer = Outer()
    calls = parts_of(outer)
    with pytest.raises(RuntimeError, match="shape"):
        outer(torch.ones(1, 5))
    assert calls.find_source(outer(X)["images"]).network is outer.model


def test_a_copied_network_records_nothing():
    outer = Outer()
    calls = parts_of(outer)
    copied = copy.deepcopy(outer)
    copied(X)
    assert not calls.calls

"""The recorded calls of a GAN with two pixels: D(x) = x w' on G(z) = z A'."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_ddst.balance.calls import Adversarial, Call, Generated, get_weights_version, walk_graph
from lightning_ddst.balance.recorder import CallRecorder
from lightning_ddst.balance.scores import ScoreReader

NOISE, PIXELS = 3, 2


class Generator(nn.Linear):
    def __init__(self):
        super().__init__(NOISE, PIXELS)


class Discriminator(nn.Linear):
    def __init__(self, inputs=PIXELS):
        super().__init__(inputs, 1)


def recorded(generator=None, discriminator=None, **options):
    generator, discriminator = generator or Generator(), discriminator or Discriminator()
    recorder = CallRecorder(generator, discriminator, ScoreReader(**options))
    recorder.attach()
    recorder.recording = True
    return generator, discriminator, recorder


# ---- calls -------------------------------------------------------------------------------------------------


def test_a_calls_tensors_have_positions_and_names():
    x, y = torch.zeros(1), torch.ones(1)
    call = Call((x, "text"), {"y": y, "scale": 2})
    assert call.tensors() == [(0, x), ("y", y)]
    assert call.tensor_at("y") is y
    assert call.tensor_at(1) is None
    assert call.tensor_at("z") is None
    assert call.replaced({1: "other", "y": x}) == Call((x, "other"), {"y": x, "scale": 2})


def test_copies_of_a_call_are_detached_and_keep_their_values_or_not():
    x = torch.zeros(2, requires_grad=True)
    call = Call((x,), {})
    before, kept, shared = call.versions(), call.cloned(), call.detached()
    with torch.no_grad():
        x += 1
    assert call.versions() == [before[0] + 1]
    assert kept.args[0].tolist() == [0, 0]
    assert shared.args[0].tolist() == [1, 1]
    assert not kept.args[0].requires_grad
    assert not shared.args[0].requires_grad


# ---- what is recorded --------------------------------------------------------------------------------------


def test_the_step_of_the_generator_is_recorded_with_what_it_was_made_from():
    generator, discriminator, recorder = recorded()
    z = torch.randn(4, NOISE)
    fake = generator(z)
    scores = discriminator(fake)
    step = recorder.find_generator_step()
    assert recorder.scored[-1] is step
    assert recorder.generated[-1] is step.made
    assert torch.equal(step.made.call.args[0], z)
    assert torch.equal(step.made.fake, fake)
    assert step.argument.data_ptr() == fake.data_ptr()
    assert (step.place, step.as_it_is) == (0, True)
    assert step.score == scores.mean()
    assert not step.score.requires_grad
    assert step.version == get_weights_version(discriminator)
    assert step.made.version == get_weights_version(generator)


@pytest.mark.parametrize(
    ("change", "as_it_is"),
    [
        (lambda fake: fake, True),
        (lambda fake: 2 * fake, False),
        (lambda fake: fake.mul_(2), False),
        (lambda fake: fake[:1], False),
        (lambda fake: torch.cat([torch.zeros(2, PIXELS), fake]), False),
    ],
    ids=["itself", "augmented", "in place", "a part", "joined"],
)
def test_fakes_are_followed_to_the_discriminator(change, as_it_is):
    generator, discriminator, recorder = recorded()
    other = generator(torch.randn(4, NOISE))
    fake = generator(torch.randn(4, NOISE))
    discriminator(change(fake))
    step = recorder.find_generator_step()
    assert step.made is recorder.generated[1]
    assert step.made.fake.data_ptr() != other.data_ptr()
    assert step.as_it_is == as_it_is


def test_calls_without_gradients_to_the_generator_are_only_scored():
    generator, discriminator, recorder = recorded()
    with torch.no_grad():
        discriminator(generator(torch.randn(4, NOISE)))
    assert not recorder.generated
    fake = generator(torch.randn(4, NOISE))
    discriminator(fake.detach())
    discriminator(torch.randn(4, PIXELS, requires_grad=True))  # for a penalty
    assert [type(call) is Generated for call in recorder.generated] == [True]
    assert not any(isinstance(scored, Adversarial) for scored in recorder.scored)
    assert len(recorder.scored) == 3


class WritesIntoItsArgument(Discriminator):
    def forward(self, x):
        return super().forward(x.mul_(2))


def test_arguments_are_those_before_the_call_where_it_writes_into_them():
    _, discriminator, recorder = recorded(discriminator=WritesIntoItsArgument())
    x = torch.ones(1, PIXELS)
    discriminator(x)
    assert x.tolist() == [[2, 2]]
    assert recorder.scored[0].call.args[0].tolist() == [[1, 1]]


def test_arguments_share_memory_with_those_of_training_otherwise():
    _, discriminator, recorder = recorded()
    x = torch.ones(1, PIXELS)
    discriminator(x)
    assert recorder.scored[0].call.args[0].data_ptr() == x.data_ptr()


def test_many_discriminator_steps_before_an_update_do_not_pile_up():
    # As where the discriminator is trained alone for a while.
    _, discriminator, recorder = recorded()
    alive = []
    for _ in range(100):
        real = torch.randn(8, PIXELS)
        discriminator(real)
        alive.append(weakref.ref(real.untyped_storage()))
    del real
    assert len(recorder.scored) == sum(storage() is not None for storage in alive) == 16


def test_nothing_is_recorded_while_not_recording():
    generator, discriminator, recorder = recorded()
    recorder.recording = False
    z, real = torch.randn(4, NOISE), torch.randn(4, PIXELS)
    noise, images = weakref.ref(z.untyped_storage()), weakref.ref(real.untyped_storage())
    discriminator(generator(z))
    discriminator(real)
    del z, real
    assert noise() is None
    assert images() is None
    assert not recorder.generated
    assert not recorder.scored


def test_nothing_is_recorded_in_a_pause_which_ends_with_an_error_too():
    generator, discriminator, recorder = recorded()

    def call_and_fail():
        with recorder.paused():
            discriminator(generator(torch.randn(4, NOISE)))
            raise KeyError

    with pytest.raises(KeyError):
        call_and_fail()
    assert not recorder.generated
    assert not recorder.scored
    discriminator(generator(torch.randn(4, NOISE)))
    assert recorder.find_generator_step()


def test_cleared_it_holds_nothing():
    generator, discriminator, recorder = recorded()
    z = torch.randn(4, NOISE)
    noise = weakref.ref(z.untyped_storage())
    discriminator(generator(z))
    recorder.clear()
    del z
    assert noise() is None
    assert not recorder.generated
    assert not recorder.scored


# ---- what is missing ---------------------------------------------------------------------------------------


def unseen_by_forward(generator, discriminator):
    discriminator(generator.forward(torch.randn(4, NOISE)))


def unseen_without_gradients(generator, discriminator):
    with torch.no_grad():
        discriminator(generator(torch.randn(4, NOISE)))


@pytest.mark.parametrize("step", [unseen_by_forward, unseen_without_gradients, lambda *_: None])
def test_the_error_names_a_generator_that_was_not_called(step):
    generator, discriminator, recorder = recorded()
    step(generator, discriminator)
    with pytest.raises(RuntimeError, match=r"no call of the generator \(Generator\).*balance_scores"):
        recorder.find_generator_step()


@pytest.mark.parametrize(
    "step",
    [
        lambda generator, discriminator: generator(torch.randn(4, NOISE)),
        lambda generator, discriminator: discriminator.forward(generator(torch.randn(4, NOISE))),
        lambda generator, discriminator: F.linear(generator(torch.randn(4, NOISE)), discriminator.weight),
    ],
    ids=["not called", "forward", "by its weights"],
)
def test_the_error_names_a_discriminator_that_scored_no_image(step):
    generator, discriminator, recorder = recorded()
    step(generator, discriminator)
    with pytest.raises(RuntimeError, match=r"discriminator \(Discriminator\).*\(4, 2\); .* on nothing"):
        recorder.find_generator_step()


def test_the_error_names_a_discriminator_that_was_called_on_something_else():
    generator, discriminator, recorder = recorded(discriminator=Discriminator(PIXELS + 3))
    discriminator(F.pad(generator(torch.randn(4, NOISE)), (0, 3)))
    with pytest.raises(RuntimeError) as caught:
        recorder.find_generator_step()
    assert str(caught.value) == (
        "the balance ratio cannot be measured: the discriminator (Discriminator) was not called, with gradients "
        "flowing back, on what the generator returned, of shape (4, 2); it was called on (4, 5). Alternatively, "
        "give the module a method `balance_scores(self, batch)` that returns the discriminator's scores "
        "of real and of generated images (docs/attach.md)."
    )


class OfBoth(Discriminator):
    def forward(self, real, fake):
        return super().forward(real), super().forward(fake)


def test_a_score_that_does_not_depend_on_the_fake_is_rejected():
    generator, discriminator, _ = recorded(discriminator=OfBoth())
    with pytest.raises(RuntimeError, match=r'2 floating-point tensors.*`discriminator_output="0"`.*; it returns 0 \(4'):
        discriminator(torch.randn(4, PIXELS), generator(torch.randn(4, NOISE)))
    generator, discriminator, _ = recorded(discriminator=OfBoth(), place=0)
    with pytest.raises(RuntimeError, match=r"`discriminator_output=\.\.\.`; it returns 0 \(4"):
        discriminator(torch.randn(4, PIXELS), generator(torch.randn(4, NOISE)))
    generator, discriminator, recorder = recorded(discriminator=OfBoth(), place=1)
    _, scores = discriminator(torch.randn(4, PIXELS), generator(torch.randn(4, NOISE)))
    step = recorder.find_generator_step()
    assert (step.place, step.score) == (1, scores.mean())


def test_the_error_names_what_returns_no_tensor():
    class Silent(Discriminator):
        def forward(self, x):
            return "nothing"

    generator, discriminator, _ = recorded(discriminator=Silent())
    with pytest.raises(RuntimeError, match="no tensor of floating-point numbers in what the discriminator returns"):
        discriminator(generator(torch.randn(4, NOISE)))


# ---- copies, and leaving -----------------------------------------------------------------------------------


def test_a_copied_network_records_nothing_and_copies_no_other():
    generator, discriminator, recorder = recorded()
    copies = {}
    copied = copy.deepcopy(generator, copies)
    assert id(generator.weight) in copies
    assert id(discriminator) not in copies
    assert id(discriminator.weight) not in copies
    copied(torch.randn(4, NOISE))
    assert not recorder.generated


def hooks(module):
    return [
        name
        for name, value in vars(module).items()
        if name.endswith(("_hooks", "_with_kwargs")) and isinstance(value, dict) and value
    ]


def test_removing_leaves_no_hooks_but_the_networks_own():
    generator, discriminator, recorder = recorded()
    assert hooks(generator)
    assert hooks(discriminator)
    seen = []
    handle = generator.register_forward_hook(lambda *_: seen.append("called"))
    for _ in range(2):  # twice does no harm
        recorder.remove()
    discriminator(generator(torch.randn(4, NOISE)))
    assert seen == ["called"]
    assert not recorder.generated
    assert not recorder.scored
    handle.remove()
    assert hooks(generator) == hooks(discriminator) == []


# ---- graph, versions and scores ----------------------------------------------------------------------------


def test_a_graph_is_walked_once_and_from_near_to_far():
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    z = y + y.exp()
    nodes = list(walk_graph(z))
    assert nodes[0] is z.grad_fn
    assert [type(node).__name__ for node in nodes] == ["AddBackward0", "MulBackward0", "ExpBackward0", "AccumulateGrad"]
    assert list(walk_graph(torch.ones(2))) == []


def test_the_version_of_weights_grows_with_every_change():
    network = nn.Linear(2, 2)
    before = get_weights_version(network)
    with torch.no_grad():
        network.weight.mul_(2)
        network.bias.add_(1)
    assert get_weights_version(network) == before + 2

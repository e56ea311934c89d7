import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from lightning_ddst import models
from lightning_ddst.gan.losses import LOSSES
from lightning_ddst.sparsity import LayerFlops, MaskedNetwork, TrainingFlops, maskable_weights
from lightning_ddst.sparsity.op_counter import OpCounter


def weights_of(network):
    return {weight.name: weight.parameter for weight in maskable_weights(network)}


def count(network, run):
    """The operations of what `run` does, if the network is dense, and those that were spent on gradients of weights."""
    workload = OpCounter(weights_of(network))
    with workload.counted():
        run()
    sizes = {weight.name: weight.parameter.numel() for weight in maskable_weights(network)}
    return tuple(
        sum(2 * uses * sizes[name] for name, uses in counts.items())
        for counts in (workload.uses, workload.gradient_uses)
    )


# Layer, input, and the multiplications of one forward pass:
CASES = {
    # 5 rows, 3 * 2 weights
    "linear": (nn.Linear(3, 2), (5, 3), 5 * 6),
    # 5 * 7 rows
    "linear on sequences": (nn.Linear(3, 2), (5, 7, 3), 5 * 7 * 6),
    # 6 * 4 * 3 * 3 weights at 2 images' (8+2-3)//2+1 = 4 by 4 outputs
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), 2 * 16 * 216),
    # half as many weights
    "grouped conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 8, 8), 2 * 16 * 108),
    "depthwise conv": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 8, 8), 2 * 36 * 36),
    "image without batch": (nn.Conv2d(4, 6, 3), (4, 8, 8), 36 * 216),
    # 4 * 6 * 4 * 4 weights, each used at each of the 5 * 5 inputs
    "transposed conv": (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (2, 4, 5, 5), 2 * 25 * 384),
    "grouped transposed conv": (nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2), (2, 4, 5, 5), 2 * 25 * 192),
    # 6 * 4 * 3 weights at 10-3+1 outputs; 4 * 6 * 3 weights at 10 inputs; 6 * 4 * 27 weights at 2 * 2 * 2 outputs
    "conv 1d": (nn.Conv1d(4, 6, 3), (2, 4, 10), 2 * 8 * 72),
    "transposed conv 1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 10), 2 * 10 * 72),
    "conv 3d": (nn.Conv3d(4, 6, 3), (2, 4, 4, 4, 4), 2 * 8 * 648),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_counts_two_operations_a_multiplication(name):
    layer, shape, multiplications = CASES[name]
    assert count(layer, lambda: layer(torch.zeros(shape))) == (2 * multiplications, 0)


@pytest.mark.parametrize("name", CASES)
def test_without_gradients_forward_counts_the_same(name):
    layer, shape, multiplications = CASES[name]
    with torch.no_grad():
        assert count(layer, lambda: layer(torch.zeros(shape))) == (2 * multiplications, 0)


@pytest.mark.parametrize("name", CASES)
def test_backward_counts_as_much_again_for_the_weights_and_again_for_the_inputs(name):
    layer, shape, multiplications = CASES[name]

    def run(input_trains):
        layer(torch.zeros(shape, requires_grad=input_trains)).sum().backward()

    assert count(layer, lambda: run(False)) == (4 * multiplications, 2 * multiplications)
    assert count(layer, lambda: run(True)) == (6 * multiplications, 2 * multiplications)


@pytest.mark.parametrize("name", CASES)
def test_backward_through_frozen_weights_counts_the_inputs_only(name):
    layer, shape, multiplications = CASES[name]
    layer.requires_grad_(False)
    try:
        result = count(layer, lambda: layer(torch.zeros(shape, requires_grad=True)).sum().backward())
    finally:
        layer.requires_grad_(True)
    assert result == (4 * multiplications, 0)


def test_a_pass_whose_result_is_detached_counts_forward_only():
    layer = nn.Linear(3, 2)
    head = nn.Linear(2, 1)
    network = nn.ModuleList([layer, head])
    # Forward 5 * 6 and 5 * 2; backward stops at the detached tensor: 5 * 2 for the head's weight.
    assert count(network, lambda: head(layer(torch.zeros(5, 3)).detach()).sum().backward()) == (2 * 50, 2 * 10)


def test_a_whole_network_with_activations_in_place_norms_and_spectral_norm():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),  # 108 weights at 36 outputs
        nn.LeakyReLU(0.2, inplace=True),
        parametrizations.spectral_norm(nn.Conv2d(4, 2, 3)),  # 72 weights at 16 outputs
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.utils.spectral_norm(nn.Linear(32, 1)),  # 32 weights
    )
    first, second, third = 2 * 36 * 108, 2 * 16 * 72, 2 * 32  # a batch of 2
    # The images need no gradient: the first layer is passed twice, the others three times.
    expected = 2 * (2 * first + 3 * second + 3 * third), 2 * (first + second + third)
    assert count(network, lambda: network(torch.randn(2, 3, 6, 6)).sum().backward()) == expected


def test_a_layer_called_twice_counts_twice():
    layer = nn.Linear(3, 3)
    # The second call's input needs a gradient: 2 + 3 times 5 * 9 multiplications.
    assert count(layer, lambda: layer(layer(torch.zeros(5, 3))).sum().backward()) == (2 * 5 * 45, 2 * 2 * 45)


def test_a_weight_shared_by_two_layers_counts_in_both():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    assert count(network, lambda: network(torch.zeros(5, 3))) == (2 * 2 * 45, 0)


def test_an_input_given_by_name_counts_like_any_other():
    layer = nn.Linear(3, 2)
    assert count(layer, lambda: layer(input=torch.zeros(5, 3)).sum().backward()) == (4 * 30, 2 * 30)
    transposed = nn.ConvTranspose2d(4, 6, 4)
    assert count(transposed, lambda: transposed(input=torch.zeros(2, 4, 5, 5))) == (2 * 2 * 25 * 384, 0)


def test_only_what_happens_inside_counts_and_no_hook_is_left():
    layer = nn.Linear(3, 2)
    workload = OpCounter(weights_of(layer))
    layer(torch.zeros(5, 3))
    with workload.counted():
        layer(torch.zeros(5, 3))
    layer(torch.zeros(5, 3))
    with pytest.raises(RuntimeError), workload.counted():
        layer(torch.zeros(5, 4))
    assert workload.uses == {"weight": 5}
    assert not layer._forward_hooks


# ---- a whole training --------------------------------------------------------------------------------

BATCH = 10


def is_observed():
    """Whether torch's operations are shown to a counter."""
    return bool(_get_current_dispatch_mode_stack())


class Training:
    """Updates of two layers, by hand.

    The generator has 8 weights, 4 of them active; the discriminator 4, 2 of them active. In one update

    - the generator runs forward twice and backward once (its noise needs no gradient): 3 * 10 uses;
    - the discriminator runs forward on real and fake images for its own update, and backward for its weight; then
      forward and backward for its weight and its input, for the generator's: 3 * 10 + 2 * 10 + 2 * 10 uses, 30 of
      them for gradients of the weight.

    A measurement runs the generator forward twice and the discriminator three times.
    """

    GENERATOR_USES = 30
    DISCRIMINATOR_USES = 70
    UPDATE = 2 * (4 * GENERATOR_USES + 2 * DISCRIMINATOR_USES)  # 520
    DENSE = 2 * (8 * GENERATOR_USES + 4 * DISCRIMINATOR_USES)  # 1040
    PROBE = 2 * (4 * 20 + 2 * 30)  # 280
    DISCRIMINATOR_GRADIENTS = 2 * 2 * 30  # of its 2 inactive weights: 120
    GENERATOR_GRADIENTS = 2 * 4 * 10  # of its 4 inactive weights: 80

    def __init__(self):
        self.generator, self.discriminator = nn.Linear(2, 4), nn.Linear(4, 1)
        self.networks = [MaskedNetwork(net, 0.5, growth="random") for net in (self.generator, self.discriminator)]
        self.flops = TrainingFlops(self.networks)

    def update(self, *, probed=False, needed=(False, False)):
        noise, real = torch.randn(BATCH, 2), torch.randn(BATCH, 4)
        fake = self.generator(noise).detach()
        (self.discriminator(real).mean() - self.discriminator(fake).mean()).backward()
        loss = self.discriminator(self.generator(noise)).mean()
        loss.backward()
        if probed:
            with self.flops.probing(), torch.no_grad():
                self.discriminator(real)
                self.discriminator(self.generator(noise))
            with self.flops.probing(), torch.no_grad():
                self.discriminator(self.generator(noise))
        self.flops.updated(probed=probed, dense_gradients=needed)

    def hooks(self):
        networks = (self.generator, self.discriminator)
        return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in networks)


def test_the_ratio_is_unknown_before_the_second_update_and_then_that_of_active_weights():
    training = Training()
    assert training.flops.total.dense == 0
    training.update()
    assert training.flops.total.dense == 0
    training.update()
    assert (training.flops.total.sparse, training.flops.total.dense) == (2 * 520, 2 * 1040)
    assert training.flops.total.ratio == 0.5
    for _ in range(3):
        training.update()
    assert (training.flops.total.sparse, training.flops.total.dense) == (5 * 520, 5 * 1040)
    assert not is_observed()


@pytest.mark.parametrize("probed", [(), (1,), (2,), (3,), (1, 2), (2, 4), (3, 5), (1, 2, 3, 4, 5)])
def test_measurements_are_added_to_the_sparse_training_only(probed):
    training = Training()
    for update in range(1, 6):
        training.update(probed=update in probed)
    assert training.flops.total.sparse == 5 * 520 + len(probed) * 280
    assert training.flops.total.dense == 5 * 1040
    assert training.flops.total.ratio == (2600 + 280 * len(probed)) / 5200
    assert not is_observed()


@pytest.mark.parametrize("when", [(2,), (3, 5), (4,), (1,), (1, 2, 3, 4, 5)])
def test_dense_gradients_add_those_of_inactive_weights(when):
    training = Training()
    for update in range(1, 6):
        training.update(needed=(False, update in when))
    assert training.flops.total.sparse == 5 * 520 + len(when) * 120
    assert training.flops.total.dense == 5 * 1040


def test_dense_gradients_of_each_network_count_for_themselves():
    training = Training()
    for update in range(1, 6):
        training.update(needed=(update == 3, update == 4))
    assert training.flops.total.sparse == 5 * 520 + 80 + 120


def test_updates_count_with_the_masks_that_they_had():
    training = Training()
    for _ in range(3):
        training.update()
    training.networks[1].resize(1.0)
    for _ in range(2):
        training.update(probed=True)
    # With 4 active weights in the discriminator an update takes 2 * (4 * 30 + 4 * 70) = 800, a measurement 400.
    assert training.flops.total.sparse == 3 * 520 + 2 * 800 + 2 * 400
    assert training.flops.total.dense == 5 * 1040


def test_the_first_update_counts_with_its_own_masks_too():
    training = Training()
    training.update()
    training.networks[1].resize(1.0)
    training.update()
    assert training.flops.total.sparse == 520 + 800
    assert training.flops.total.dense == 2 * 1040


def test_dense_training_has_ratio_one():
    training = Training()
    for network in training.networks:
        network.resize(1.0)
    for _ in range(3):
        training.update(needed=(True, True))
    assert training.flops.total.sparse == training.flops.total.dense == 3 * 1040
    assert training.flops.total.ratio == 1.0


def test_stopping_leaves_no_hook():
    training = Training()
    training.update()
    assert training.hooks() == 4
    assert is_observed()
    training.flops.stop()
    assert training.hooks() == 0
    assert not is_observed()
    training.flops.stop()


def test_a_measurement_that_failed_leaves_no_observer():
    training = Training()
    with pytest.raises(ZeroDivisionError), training.flops.probing():
        raise ZeroDivisionError
    assert not is_observed()


@pytest.mark.parametrize("saved_after", [0, 1, 2, 3])
@pytest.mark.parametrize("probed", [(), (1,), (2, 4), (1, 2, 3, 4, 5)])
def test_a_resumed_training_counts_like_one_that_was_not_interrupted(saved_after, probed):
    training = Training()
    for update in range(1, saved_after + 1):
        training.update(probed=update in probed, needed=(False, update == 2))
    file = io.BytesIO()
    torch.save(training.flops.state_dict(), file)
    file.seek(0)
    resumed = Training()
    resumed.flops.load_state_dict(torch.load(file, weights_only=True))
    for update in range(saved_after + 1, 6):
        resumed.update(probed=update in probed, needed=(False, update == 4))
    added = (saved_after >= 2) + 1  # dense gradients
    assert resumed.flops.total.sparse == 5 * 520 + len(probed) * 280 + added * 120
    assert resumed.flops.total.dense == 5 * 1040


def test_reading_the_saved_counts_back_gives_the_same_state():
    training = Training()
    for _ in range(3):
        training.update(probed=True)
    state = training.flops.state_dict()
    resumed = Training()
    resumed.flops.load_state_dict(state)
    assert resumed.flops.state_dict() == state
    assert resumed.flops.total.ratio == training.flops.total.ratio


# ---- changing workloads ------------------------------------------------------------------------------


class Steps(Training):
    """Steps of two optimizers; uses of 8 weights of the generator and 4 of the discriminator, of which half are active.

    On a batch of 10, the discriminator's step takes 10 uses of the generator, 2 * 20 of its own weights. Its penalty
    takes 10 uses more for each of: forward, the gradient at the images, that gradient's derivative for the weight. The
    generator's step takes 20 uses of its own weights and 20 of the discriminator's, or none without it.
    """

    def __init__(self):
        super().__init__()
        self.flops.stop()
        self.optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (self.generator, self.discriminator)]
        self.flops = TrainingFlops(self.networks, self.optimizers)

    def step_discriminator(self, size=BATCH, *, penalty=False):
        real = torch.randn(size, 4, requires_grad=penalty)
        with torch.no_grad():
            fake = self.generator(torch.randn(size, 2))
        loss = self.discriminator(fake).mean() - self.discriminator(real.detach()).mean()
        if penalty:
            (gradient,) = torch.autograd.grad(self.discriminator(real).sum(), real, create_graph=True)
            loss = loss + gradient.square().sum()
        loss.backward()
        self.optimizers[1].step()

    def step_generator(self, *, adversarial=True):
        self.discriminator.requires_grad_(False)
        fake = self.generator(torch.randn(BATCH, 2))
        (self.discriminator(fake).mean() if adversarial else fake.square().mean()).backward()
        self.discriminator.requires_grad_(True)
        self.optimizers[0].step()
        self.flops.updated(probed=False, dense_gradients=(False, False))

    def expect(self, generator_uses, discriminator_uses):
        active = [sum(network.layer_counts.values()) for network in self.networks]
        assert active == [4, 2]
        assert self.flops.total.steps == 2 * (4 * generator_uses + 2 * discriminator_uses)
        assert self.flops.total.dense == 2 * (8 * generator_uses + 4 * discriminator_uses)
        assert self.flops.total.ratio == 0.5


def test_steps_of_both_networks():
    training = Steps()
    for _ in range(5):
        training.step_discriminator()
        training.step_generator()
    training.expect(5 * (10 + 20), 5 * (40 + 20))
    assert not is_observed()


def test_a_penalty_at_every_fourth_update():
    training = Steps()
    for update in range(16):
        training.step_discriminator(penalty=update % 4 == 0)
        training.step_generator()
    training.expect(16 * (10 + 20), 16 * (40 + 20) + 4 * 30)
    assert not is_observed()


def test_a_penalty_whose_period_is_longer_than_the_wait_for_it():
    training = Steps()
    observed = []
    for update in range(200):
        training.step_discriminator(penalty=update % 60 == 50)
        training.step_generator()
        observed.append(is_observed())
    training.expect(200 * (10 + 20), 200 * (40 + 20) + 3 * 30)  # measured at the third time, as predicted
    assert sum(observed) == 1 + 32 + 1


def test_a_warm_up_of_the_generator():
    training = Steps()
    for _ in range(6):
        training.step_generator(adversarial=False)
    training.expect(6 * 20, 0)
    assert training.flops.find_uncounted() == [[], []]  # the discriminator was not called yet
    for _ in range(5):
        training.step_discriminator()
        training.step_generator()
    training.expect(6 * 20 + 5 * (10 + 20), 5 * (40 + 20))


def test_a_warm_up_of_the_discriminator_and_changing_numbers_of_its_steps():
    training = Steps()
    for steps in (20, 2, 1, 5, 3):
        for _ in range(steps):
            training.step_discriminator()
        training.step_generator()
    training.expect(31 * 10 + 5 * 20, 31 * 40 + 5 * 20)


def test_short_batches():
    training = Steps()
    for size in (10, 10, 4, 10, 10, 4):
        training.step_discriminator(size)
        training.step_generator()
    training.expect(4 * 10 + 2 * 4 + 6 * 20, 4 * 40 + 2 * 16 + 6 * 20)


def test_a_workload_that_is_not_measured_counts_like_the_nearest_size():
    training = Steps()
    for size in (10, 10, 10, 9):
        training.step_discriminator(size)
        training.step_generator()
    training.expect(4 * (10 + 20), 4 * (40 + 20))


def test_more_sizes_than_are_measured_are_one_warning():
    training = Steps()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for size in range(1, 61):
            training.step_discriminator(size)
            training.step_generator()
    assert len([each for each in caught if "estimated" in str(each.message)]) == 1
    # One workload is the generator's. The discriminator's with 1 image came before measuring and counts like that with
    # 2; those with 32 and more count like that with 31.
    images = 2 + sum(range(2, 32)) + 29 * 31
    training.expect(images + 60 * 20, 4 * images + 60 * 20)


def test_masks_that_change_between_workloads():
    training = Steps()
    for _ in range(3):
        training.step_discriminator()
        training.step_generator()
    training.networks[1].resize(1.0)
    for _ in range(2):
        training.step_discriminator()
        training.step_generator()
    assert training.flops.total.steps == 2 * (4 * 5 * 30 + 2 * 3 * 60 + 4 * 2 * 60)


@pytest.mark.parametrize("saved_after", range(9))
def test_a_resumed_training_of_changing_workloads_counts_like_one_that_was_not_interrupted(saved_after):
    training = Steps()
    for update in range(12):
        if update == saved_after:
            file = io.BytesIO()
            torch.save(training.flops.state_dict(), file)
            file.seek(0)
            training = Steps()
            training.flops.load_state_dict(torch.load(file, weights_only=True))
        training.step_discriminator(penalty=update % 4 == 0)
        training.step_generator()
    training.expect(12 * (10 + 20), 12 * (40 + 20) + 3 * 30)


@pytest.mark.parametrize("saved_after", range(4))
def test_a_training_that_resumes_between_two_passes_of_one_step(saved_after):
    def reload(training):
        file = io.BytesIO()
        torch.save(training.flops.state_dict(), file)
        file.seek(0)
        training.flops.stop()
        resumed = Steps()
        resumed.flops.load_state_dict(torch.load(file, weights_only=True))
        return resumed

    training = Steps()
    for update in range(2):
        for part in range(2):
            training.generator(torch.randn(BATCH, 2)).square().mean().backward()
            if 2 * update + part == saved_after:
                training = reload(training)
        training.optimizers[0].step()
        training.flops.updated(probed=False, dense_gradients=(False, False))
    training.expect(2 * 40, 0)


def test_evaluations_are_not_counted():
    training = Steps()
    for _ in range(4):
        training.flops.pause()
        training.discriminator(training.generator(torch.randn(7, 2)))
        assert not is_observed()
        training.flops.resume()
        training.step_discriminator()
        training.step_generator()
    training.expect(4 * (10 + 20), 4 * (40 + 20))


def test_parts_of_a_network_are_seen_too():
    generator = nn.ModuleList([nn.Linear(2, 4), nn.Linear(4, 4)])
    flops = TrainingFlops([MaskedNetwork(generator, 0.5), MaskedNetwork(nn.Linear(4, 1), 0.5)])
    for update in range(8):
        h = generator[0](torch.randn(BATCH, 2))
        (generator[1](h) if update % 4 == 3 else h).sum().backward()
        flops.updated(probed=False, dense_gradients=(False, False))
    # The first part forward and for its weight; the second one's weight and input too.
    assert flops.layers[0]["0.weight"].dense == 8 * 2 * 8 * 2 * BATCH
    assert flops.layers[0]["1.weight"].dense == 2 * 2 * 16 * 3 * BATCH


def test_weights_without_operations_are_named_once_their_network_ran():
    generator = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 4))
    generator.forward = lambda z: generator[0](z) + generator[1].weight.sum()
    flops = TrainingFlops([MaskedNetwork(generator, 0.5), MaskedNetwork(nn.Linear(4, 1), 0.5)])
    for _ in range(2):
        assert flops.find_uncounted() == [[], []]
        generator(torch.randn(BATCH, 2)).sum().backward()
        flops.updated(probed=False, dense_gradients=(False, False))
    assert flops.find_uncounted() == [["1.weight"], []]


# ---- the ledger --------------------------------------------------------------------------------------


def test_the_ledger_by_hand():
    training = Training()
    for number in range(1, 6):
        training.update(probed=number in (2, 4), needed=(False, number == 3))
    of_generator, of_discriminator = training.flops.layers
    assert of_generator == {"weight": LayerFlops(steps=5 * 240, dense_gradients=0, probes=2 * 160, dense=5 * 480)}
    assert of_discriminator == {"weight": LayerFlops(steps=5 * 280, dense_gradients=120, probes=2 * 120, dense=5 * 560)}
    assert of_discriminator["weight"].sparse == 1_400 + 120 + 240
    assert of_discriminator["weight"].ratio == 1_760 / 2_800
    assert training.flops.total.sparse == 1_520 + 1_760


def test_the_ledger_is_empty_until_a_step_was_measured():
    training = Training()
    training.update()
    assert training.flops.layers == [{}, {}]


def test_densities_averaged_over_updates():
    training = Training()
    assert all(math.isnan(layers["weight"]) for layers in training.flops.mean_densities)
    for _ in range(3):
        training.update()
    training.networks[1].resize(1.0)
    for _ in range(2):
        training.update()
    assert training.flops.mean_densities == [{"weight": 0.5}, {"weight": pytest.approx(0.7)}]


@pytest.mark.parametrize(
    ("generator", "discriminator", "size", "labelled"),
    [
        (models.SmallGenerator(16, 3, 4), models.SmallDiscriminator(16, 3, 4), 16, False),
        (models.SNGANGenerator(32, width=8), models.SNGANDiscriminator(32, width=4), 32, False),
        (models.DCGANGenerator(32, width=4), models.DCGANDiscriminator(32, width=4), 32, False),
        pytest.param(
            *(models.BigGANGenerator(32, width=2), models.BigGANDiscriminator(32, width=2), 32, True),
            marks=pytest.mark.skipif(torch.__version__ < "2.5", reason="torch's own counter fails on it"),
        ),
    ],
)
def test_dense_training_counts_what_torchs_counter_counts(generator, discriminator, size, labelled):
    flops = TrainingFlops([MaskedNetwork(generator, 1.0), MaskedNetwork(discriminator, 1.0)])
    labels = (torch.tensor([0, 1]),) if labelled else ()

    def update():
        real, z = torch.randn(2, 3, size, size), torch.randn(2, generator.latent_dim)
        with torch.no_grad():
            fake = generator(z, *labels)
        LOSSES["hinge"].discriminator(discriminator(real, *labels), discriminator(fake, *labels)).backward()
        discriminator.requires_grad_(False)
        LOSSES["hinge"].generator(discriminator(generator(z, *labels), *labels)).backward()
        discriminator.requires_grad_(True)

    update()
    flops.updated(probed=False, dense_gradients=(False, False))
    with FlopCounterMode(display=False) as counter:
        update()
    flops.updated(probed=False, dense_gradients=(False, False))
    assert flops.total.sparse == flops.total.dense == 2 * counter.get_total_flops()

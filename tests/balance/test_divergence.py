import warnings

import pytest
import torch
from torch import nn
from toys import ToyGAN, toy_data, toy_trainer

from lightning_ddst import DynamicSparsityCallback
from lightning_ddst.balance.divergence import Divergence
from lightning_ddst.balance.ratio import Balance, BalanceWindow

DEFINED = Balance(0.5, 1.0, 0.5, 1.0, 0.0, 8, "")
UNDEFINED = Balance(None, -0.1, 0.2, 0.0, 0.1, 8, "alpha = -0.1 +- 0.3")


def divergence():
    networks = {"generator": nn.Linear(2, 3), "discriminator": nn.Linear(3, 1)}
    return Divergence(networks), networks


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("role", ["generator", "discriminator"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_not_finite_are_reported_once(value, role, name):
    watch, networks = divergence()
    assert watch.finite(10)
    networks[role].get_parameter(name).data.view(-1)[-1] = value
    assert not watch.finite(15)
    assert not watch.finite(20)
    ((update, message),) = watch.reports
    assert update == 15
    assert message == (
        f"weights of the {role} are not finite: after generator update 10 a loss or a gradient was NaN or infinite. "
        "Masks stay as they are."
    )


def test_ten_windows_in_a_row_without_a_ratio_are_reported_once():
    watch, _ = divergence()
    for update in range(9):
        watch.look_at(UNDEFINED, update)
    watch.look_at(DEFINED, 9)
    for update in range(10, 40):
        watch.look_at(UNDEFINED, update)
    ((update, message),) = watch.reports
    assert update == 19
    assert "undefined for 10 windows in a row (alpha = -0.1 +- 0.3)" in message


@pytest.mark.parametrize(
    ("scores", "constant"),
    [
        ([[3.0, 3.0, 3.0], [-2.0, -2.0, -2.0]], True),
        ([[3.0, 3.0, 3.0], [-2.0, -2.0, -2.001]], False),
        ([[3.0, 3.0, 3.0], [-2.0, -2.001, -2.0]], False),
        ([[0.0, 0.0, 0.0]], True),
        ([], False),
    ],
)
def test_constant_scores_are_reported_once(scores, constant):
    window = BalanceWindow(4)
    for measurement in scores:
        window.add(torch.tensor([*measurement, 1.0]))
    assert window.read().scores_are_constant is constant
    watch, _ = divergence()
    for update in (5, 10):
        watch.look_at(window.read(), update)
    assert [update for update, _ in watch.reports] == ([5] if constant else [])
    assert all("gives everything the same score" in message for _, message in watch.reports)


def test_what_was_reported_is_not_reported_again_after_resuming():
    watch, networks = divergence()
    networks["generator"].weight.data.fill_(float("nan"))
    watch.finite(3)
    again = Divergence(networks)
    again.load_state_dict(watch.state_dict())
    assert not again.finite(4)
    assert again.reports == watch.reports


# ---- in training ------------------------------------------------------------------------------------


class BreaksDown(ToyGAN):
    """The generator's loss is NaN from its 8th update on."""

    updates = 0

    def manual_backward(self, loss, *args, **kwargs):
        self.updates += 0.5
        super().manual_backward(loss * float("nan") if self.updates == 8 else loss, *args, **kwargs)


def run(gan, **settings):
    callback = DynamicSparsityCallback(0.3, interval=5, explore_interval=5, seed=0, **settings)
    trainer = toy_trainer(callback, epochs=3, log_every_n_steps=100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(gan, toy_data())
    return callback, [str(w.message) for w in caught if "at generator update" in str(w.message)]


def test_a_run_whose_loss_was_nan_warns_once_and_keeps_the_masks():
    callback, said = run(BreaksDown())
    assert callback.generator_updates == 30
    (message,) = [text for text in said if "weights" in text]
    assert message.startswith("at generator update 10: weights of the generator")
    assert "after generator update 5 " in message
    assert callback.masks("generator")["generator.0.weight"].sum() > 0
    assert [update for update, _ in callback.decisions] == [5]


def test_a_run_whose_loss_was_nan_stops_where_asked():
    callback, said = run(BreaksDown(), stop_on_divergence=True)
    assert callback.generator_updates == 10
    assert said[-1].endswith("The run stops.")


def test_a_constant_discriminator_is_reported():
    gan = ToyGAN()
    gan.discriminator[3].parametrizations["weight"].original.requires_grad_(False).zero_()
    gan.discriminator[3] = nn.Linear(32, 1)
    gan.discriminator[3].weight.data.zero_()
    gan.discriminator[3].weight.register_hook(torch.zeros_like)
    callback, said = run(gan, method="sdst")
    assert [text for text in said if "gives everything the same score" in text]
    assert callback.generator_updates == 30


def test_a_run_that_goes_well_reports_nothing():
    _, said = run(ToyGAN())
    assert said == []

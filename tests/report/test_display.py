import pytest
import torch
from toys import ToyGAN, toy_data, trained

from lightning_ddst import DynamicSparsityCallback, sparsify
from lightning_ddst.methods import DDST


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (DynamicSparsityCallback(0.1), "DynamicSparsityCallback(generator_density=0.1)"),
        (
            DynamicSparsityCallback(0.1, bounds="auto", method="ddst", dense_layers=["Linear"], verbose=True),
            "DynamicSparsityCallback(generator_density=0.1, bounds='auto', dense_layers=['Linear'], verbose=True)",
        ),
    ],
)
def test_a_callback_shows_the_arguments_that_differ(callback, expected):
    assert repr(callback) == expected


def test_a_callback_shows_its_method_object():
    method = DDST(generator_density=0.1)
    assert repr(DynamicSparsityCallback(method=method)) == f"DynamicSparsityCallback(method={method!r})"


def test_a_notebook_shows_arguments_and_summary():
    html = DynamicSparsityCallback(0.1, bounds="auto")._repr_html_()
    assert "DynamicSparsityCallback(generator_density=0.1, bounds=&#x27;auto&#x27;)" in html
    assert "not masked yet" in html


def test_the_figure_shows_signal_band_and_densities():
    sparsity = DynamicSparsityCallback(0.25, interval=5, probe_interval=1, bounds=(0.0, 1e-9))
    with pytest.raises(RuntimeError, match="nothing was logged yet"):
        sparsity.plot()
    trained(sparsity, epochs=2, log_every_n_steps=2)
    signal, density = sparsity.plot().axes
    (line,) = [line for line in density.lines if line.get_label() == "discriminator"]
    logged = [5, *(update for update in range(2, 21, 2) if update != 5), 15]
    assert list(line.get_xdata()) == sorted(logged)
    assert line.get_ydata()[-1] == sparsity.discriminator_density
    assert signal.get_title(loc="left") == "Balance"
    assert [collection.get_label() for collection in signal.collections] == ["band, 0 to 1e-09"]


def test_a_second_fit_continues_the_figure_and_another_module_begins_anew():
    sparsity = DynamicSparsityCallback(0.25, interval=5, probe_interval=1)

    def drawn(gan, epochs):
        trained(sparsity, gan=gan, epochs=epochs)
        return [int(update) for update in sparsity.plot().axes[-1].lines[0].get_xdata()]

    gan = ToyGAN()
    assert drawn(gan, 1) == [5, 10]
    assert drawn(gan, 1) == [5, 10, 15, 20]
    assert drawn(ToyGAN(), 1) == [5, 10]


def test_a_loop_shows_the_same(capsys):
    torch.manual_seed(0)
    gan = ToyGAN()
    optimizers = gan.configure_optimizers()
    sparse = sparsify(
        *gan.networks(), optimizers, generator_density=0.25, interval=5, probe_interval=1, length=10, verbose=True
    )
    assert repr(sparse) == "SparseLoop(length=10, generator_density=0.25, interval=5, probe_interval=1, verbose=True)"
    gan.optimizers, gan.manual_backward = lambda: optimizers, lambda loss: loss.backward()
    with sparse:
        for batch in toy_data():
            with sparse.step(batch):
                gan.training_step(batch, 0)
    rows = [row for block in sparse.summary().blocks for row in block]
    assert ("plan", "10 generator updates expected") in rows
    assert ("so far", "10 generator updates") in rows
    assert len(sparse.plot().axes) == 2
    (first, one), (second, other) = sparse.decisions
    assert (first, second) == (5, 10)
    assert capsys.readouterr().out.splitlines() == [
        f"update 5: {one.action} {'to' if one.action in ('grow', 'prune') else 'at'} {one.density:.1%}, since "
        f"{one.reason}",
        f"update 10: {other.action} {'to' if other.action in ('grow', 'prune') else 'at'} {other.density:.1%}, since "
        f"{other.reason}",
    ]

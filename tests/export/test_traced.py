"""Generators that return several tensors, computed weights, and generators that torch cannot export."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from architectures import ModulatedGenerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from lightning_ddst import export
from lightning_ddst.sparsity import MaskedNetwork, compact

Z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
SAVES = {"onnx": export.save_onnx, "program": export.save_program}


@dataclass
class Generated:
    image: Tensor
    latent: Tensor


RETURNS = {
    "tuple": (lambda image, z: (image, z), 0),
    "list": (lambda image, z: [z, [image]], "1.0"),
    "dict": (lambda image, z: {"latent": z, "image": image}, "image"),
    "dataclass": (lambda image, z: Generated(image, z), "image"),
    "one": (lambda image, z: (image, None), None),
    "tensor": (lambda image, z: image, None),
}


class Returns(nn.Module):
    def __init__(self, returned):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.returned = returned

    def forward(self, z, noise, /):
        return self.returned(self.last((self.first(z) + noise).relu()), z)

    def image(self, z, noise):
        return self.last((self.first(z) + noise).relu())


@pytest.fixture(params=SAVES)
def run(request, tmp_path):
    """Writes a generator to the only file of a folder, and calls it with other arguments."""
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "generator.pt2"

    def written(generator, example, inputs, **options):
        SAVES[request.param](generator, path, *example, **options)
        assert list(tmp_path.iterdir()) == [path]
        if request.param == "program":
            returned = torch.export.load(path).module()(*inputs)
        else:
            session = onnxruntime.InferenceSession(path)
            fed = {known.name: value.numpy() for known, value in zip(session.get_inputs(), inputs, strict=True)}
            (returned,) = map(torch.from_numpy, session.run(None, fed))
        return returned

    return written


@pytest.mark.parametrize("kind", RETURNS)
def test_the_file_holds_the_images_alone(kind, tmp_path):
    torch.manual_seed(0)
    returned, output = RETURNS[kind]
    network = Returns(returned)
    inputs = torch.randn(5, 4), torch.randn(5, 8)  # another batch
    export.save_program(network, tmp_path / "file.pt2", Z, torch.zeros(3, 8), output=output)
    images = torch.export.load(tmp_path / "file.pt2").module()(*inputs)
    torch.testing.assert_close(images, network.image(*inputs))


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        ("dict", None, "output=None: Returns returns 2 tensors, .* output='latent'. .*latent .3, 4. .*, image .3, 2. "),
        ("dict", "mask", "output='mask' is no tensor that Returns returns; it returns latent .3, 4. "),
        ("list", 1, "output=1 is no tensor that Returns returns; it returns 0 .3, 4. .*, 1.0 .3, 2. "),
    ],
)
def test_several_tensors_are_listed(save, kind, output, message, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=message) as raised:
        SAVES[save](Returns(RETURNS[kind][0]), tmp_path / "file", Z, torch.zeros(3, 8), output=output)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_a_smaller_generator_that_returns_a_dict(run):
    torch.manual_seed(0)
    network, inputs = Returns(RETURNS["dict"][0]), (Z, torch.zeros(3, 8)[:, :1])
    sparse = MaskedNetwork(network, 0.5, granularity="channel", inputs=inputs)
    small, left, _ = compact(network, *inputs)
    assert left == sum(sparse.units.now) == small.first.out_features == 4
    torch.testing.assert_close(run(small, inputs, inputs, output="image"), network.image(*inputs))


# ---- computed weights ----------------------------------------------------------------------------------


@pytest.fixture(params=[weight_norm, hooked_weight_norm], ids=["new", "old"])
def normed(request, recwarn):
    """A generator under weight norm in use, whose v is 0 where the mask is."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.ConvTranspose1d(2, 3, 4, 2), nn.Conv1d(3, 2, 3)
    )
    masks = {}
    for i in (0, 2, 3):
        masks[i] = torch.rand(network[i].weight.shape) < 0.5
        request.param(network[i])
        for parameter in network[i].parameters():
            if parameter.shape == masks[i].shape:
                parameter.data *= masks[i]
    network(Z).sum().backward()
    return network, masks


def test_weight_norm_is_folded_in(normed, run, tmp_path):
    network, masks = normed
    expected = network(Z).detach()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    torch.testing.assert_close(run(network, (Z[:2],), (Z,)), expected)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)), nn.ConvTranspose1d(2, 3, 4, 2), nn.Conv1d(3, 2, 3))
    export.save_dense(network, tmp_path / "dense")
    export.save_compressed(network, tmp_path / "compressed")
    for held in (load_file(tmp_path / "dense"), export.load_compressed(tmp_path / "compressed")):
        plain.load_state_dict(held)
        torch.testing.assert_close(plain(Z), expected)
        for i, mask in masks.items():
            assert torch.equal(held[f"{i}.weight"] != 0, mask)
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_modulated_weights_are_written_as_they_are(run, tmp_path):
    torch.manual_seed(0)
    network = ModulatedGenerator()
    mask = torch.rand(5, 6, 3, 3) < 0.3
    network.conv.weight.data *= mask
    with pytest.warns(UserWarning, match=r"ModulatedGenerator depends on the batch size, .* batches of 3 only"):
        images = run(network, (Z,), (Z.flip(0),), output="image")
    torch.testing.assert_close(images, network(Z.flip(0))["image"])
    export.save_compressed(network, tmp_path / "compressed")
    held = export.load_compressed(tmp_path / "compressed")
    assert torch.equal(held["conv.weight"], network.conv.weight)
    assert torch.equal(held["conv.weight"] != 0, mask)


# ---- generators that cannot be exported ----------------------------------------------------------------


class Eigenvalues(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvalsh(x[:, :, None] * x[:, None, :])


class Branches(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


class Random(nn.Module):
    def forward(self, x):
        return x + torch.randn(len(x), 4)


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("it has\nfailed")


BRANCH = "Branches '1': its code depends on the values of a tensor, as in `if x.sum() > 0`"


UNKNOWN = "ONNX has no operator for torch's _linalg_eigh, which Eigenvalues '1' uses"
RANDOM = "its images are random in evaluation mode, so they cannot be compared. Pass the noise as an argument"


@pytest.mark.parametrize(
    ("save", "part", "message", "output"),
    [
        ("onnx", Eigenvalues, f"for ONNX: {UNKNOWN}", "image"),
        pytest.param(
            *("onnx", Branches, f"for ONNX: {BRANCH}", None),
            marks=pytest.mark.skipif(torch.__version__ < "2.9", reason="the exporter gives another reason"),
        ),
        ("program", Branches, f"as a program: {BRANCH}", None),
        ("program", Branches, f"as a program: {BRANCH}", "image"),
        ("onnx", Random, f"for ONNX: {RANDOM}", None),
    ],
)
def test_the_reason_is_one_sentence_and_no_file_is_left(save, part, message, output, tmp_path):
    pytest.importorskip("onnxruntime")
    network = nn.Sequential(nn.Linear(4, 4), part())
    if output:
        network.forward = partial(in_dict, network)
    (tmp_path / "file").write_text("before")
    with pytest.raises(ValueError, match=r"^Sequential cannot be written") as raised:
        SAVES[save](network, tmp_path / "file", Z, output=output)
    assert str(raised.value) == f"Sequential cannot be written {message}."
    assert (raised.value.__cause__ is None) == (part is Random)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "before"


def in_dict(network, z):
    return {"image": network[1](network[0](z)), "z": z}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_generator_that_fails_on_its_example_is_rejected(save, tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=r"^Fails cannot be called with its example inputs: it has$") as raised:
        save(Fails(), tmp_path / "file", Z)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert not list(tmp_path.iterdir())


def test_arguments_that_are_no_tensors_are_constants(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")

    class Scaled(nn.Linear):
        def forward(self, factor, z, truncation):
            return super().forward(z) * factor * truncation

    network = Scaled(4, 2)
    export.save_onnx(network, tmp_path / "file", 3, Z, torch.tensor(0.5))
    session = onnxruntime.InferenceSession(tmp_path / "file")
    assert [known.name for known in session.get_inputs()] == ["z", "truncation"]
    (images,) = session.run(None, {"z": Z[:1].numpy(), "truncation": torch.tensor(0.1).numpy()})
    torch.testing.assert_close(torch.from_numpy(images), network(3, Z[:1], 0.1).detach())


def test_parts_of_a_generator_are_loaded_one_by_one(tmp_path):
    with pytest.raises(
        ValueError, match=r"name=\['encoder', 'decoder'\] must be one name: load the parts .* one by one"
    ):
        export.load_generator(nn.Linear(2, 2), tmp_path / "end.ckpt", ["encoder", "decoder"])

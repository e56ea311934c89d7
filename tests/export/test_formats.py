"""The generator out of a checkpoint: as in the run's evaluation, and without this package."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from toys import LATENT, PIXELS, ToyGAN, toy_data, toy_trainer, trained

from lightning_ddst import DynamicSparsityCallback, GANModule, GeneratorEMA, export
from lightning_ddst.models import SNGANGenerator
from lightning_ddst.sparsity import MaskedNetwork, compact

NOISE = torch.randn(20, LATENT, generator=torch.Generator().manual_seed(3))


class Evaluated(Callback):
    """Keeps what the generator gives in evaluation."""

    def on_validation_epoch_end(self, trainer, pl_module):
        generator, _ = pl_module.networks()
        self.images = generator.eval()(NOISE)


class ValidatedToy(ToyGAN):
    def validation_step(self, batch, batch_idx):
        pass


def generator():
    """`ToyGAN`'s, with other weights."""
    return nn.Sequential(nn.Linear(LATENT, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, PIXELS)).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint, the images of evaluation, and those of the generator's own weights."""
    folder = tmp_path_factory.mktemp("run")
    gan, evaluated = ValidatedToy(), Evaluated()
    trainer = toy_trainer(
        DynamicSparsityCallback(0.25, interval=5), GeneratorEMA(0.9), evaluated, epochs=3, folder=folder
    )
    trainer.fit(gan, toy_data(), toy_data(1))
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt", evaluated.images, gan.generator.eval()(NOISE)


def test_the_average_is_what_evaluation_has(run):
    checkpoint, averaged, own = run
    network = generator()
    export.load_generator(network, checkpoint)
    assert torch.equal(network(NOISE), averaged)
    export.load_generator(network, checkpoint, weights="raw")
    assert torch.equal(network(NOISE), own)
    assert not torch.equal(averaged, own)


def test_a_run_without_an_average_has_its_own_weights(tmp_path):
    gan = trained(DynamicSparsityCallback(0.25), folder=tmp_path)
    gan.trainer.save_checkpoint(tmp_path / "end.ckpt")
    network = generator()
    export.load_generator(network, tmp_path / "end.ckpt")
    assert torch.equal(network(NOISE), gan.generator.eval()(NOISE))


@pytest.mark.parametrize("kind", [GeneratorEMA, type("OwnAverage", (GeneratorEMA,), {})])
@pytest.mark.parametrize("weights_only", [False, True])
def test_the_average_is_in_full_and_in_weights_only_checkpoints(kind, weights_only, tmp_path):
    ema = kind(0.9)
    gan = trained(DynamicSparsityCallback(0.25), ema, folder=tmp_path)
    gan.trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=weights_only)
    network = generator()
    export.load_generator(network, tmp_path / "end.ckpt")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in ema.averages().items())
    export.load_generator(network, tmp_path / "end.ckpt", weights="raw")
    own = gan.generator.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items())
    assert not torch.equal(ema.averages()["0.weight"], own["0.weight"])


def test_a_checkpoint_without_an_average_is_rejected_unless_the_run_had_none(tmp_path):
    gan = trained(folder=tmp_path)
    gan.trainer.save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    network = generator()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r'end\.ckpt .*holds no average of GeneratorEMA: weights="raw" .* own weights'):
        export.load_generator(network, tmp_path / "end.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    export.load_generator(network, tmp_path / "end.ckpt", weights="raw")
    assert torch.equal(network(NOISE), gan.generator.eval()(NOISE))


class ToyOfParts(ToyGAN):
    """The generator's two halves are its parts; both are held by a submodule."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"encoder": self.generator[:3], "decoder": self.generator[3:]})
        del self.generator

    def networks(self):
        return lambda z: self.model["decoder"](self.model["encoder"](z)), self.discriminator

    def configure_optimizers(self):
        return [torch.optim.Adam(network.parameters(), lr=1e-2) for network in (self.model, self.discriminator)]


def test_parts_of_a_generator_are_loaded_one_by_one(tmp_path):
    parts = ["model.encoder", "model.decoder"]
    ema = GeneratorEMA(0.9, generator=parts)
    gan = trained(DynamicSparsityCallback(0.25, generator=parts), ema, gan=ToyOfParts(), folder=tmp_path)
    gan.trainer.save_checkpoint(tmp_path / "end.ckpt")
    encoder, decoder = generator()[:3], generator()[3:]
    for name, part in zip(parts, (encoder, decoder), strict=True):
        export.load_generator(part, tmp_path / "end.ckpt", name)
        averages = {key.removeprefix(f"{name}."): value for key, value in ema.averages().items() if name in key}
        assert len(averages) == len(part.state_dict()) - (part is encoder)  # no average of the count of batches
        assert all(torch.equal(part.state_dict()[key], value) for key, value in averages.items())
        export.load_generator(part, tmp_path / "end.ckpt", name, weights="raw")
        own = gan.get_submodule(name).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in part.state_dict().items())
    with pytest.raises(
        ValueError, match=r"no generator is in the checkpoint under generator, .*; it has discr.*, model"
    ):
        export.load_generator(generator(), tmp_path / "end.ckpt")


def test_a_generator_is_found_in_a_submodule(tmp_path):
    class Nested(ToyGAN):
        def __init__(self):
            super().__init__()
            self.model = nn.ModuleDict({"net_g": self.generator})
            del self.generator

        def networks(self):
            return self.model["net_g"], self.discriminator

    ema = GeneratorEMA(0.9)
    gan = trained(DynamicSparsityCallback(0.25), ema, gan=Nested(), folder=tmp_path)
    gan.trainer.save_checkpoint(tmp_path / "end.ckpt")
    network = generator()
    export.load_generator(network, tmp_path / "end.ckpt")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in ema.averages().items())


def test_the_average_of_lightnings_own_callback_is_told_apart(tmp_path):
    averaged, own = ({"G.weight": torch.full((2, 3), value), "G.bias": torch.zeros(2)} for value in (1.0, 2.0))
    content = {"state_dict": averaged, "current_model_state": own, "averaging_state": {}, "callbacks": {}}
    torch.save(content, tmp_path / "end.ckpt")
    network = nn.Linear(3, 2)
    for weights, value in (("average", 1.0), ("raw", 2.0)):
        export.load_generator(network, tmp_path / "end.ckpt", weights=weights)
        assert network.weight.eq(value).all()


def test_the_average_of_another_generator_is_not_used(tmp_path):
    class Two(ToyGAN):
        def __init__(self):
            super().__init__()
            self.other = generator()

    gan = trained(GeneratorEMA(0.9, generator="generator"), gan=Two(), folder=tmp_path)
    gan.trainer.save_checkpoint(tmp_path / "named.ckpt")
    gan = trained(GeneratorEMA(0.9), gan=Two(), folder=tmp_path)
    gan.trainer.save_checkpoint(tmp_path / "unnamed.ckpt", weights_only=True)
    for checkpoint in ("named.ckpt", "unnamed.ckpt"):
        with pytest.raises(ValueError, match=r"has averages of GeneratorEMA.*, and none of 'other': weights=\"raw\""):
            export.load_generator(generator(), tmp_path / checkpoint, name="other")


def test_spectral_vectors_are_those_of_the_average(tmp_path):
    class Normalised(ValidatedToy):
        def __init__(self):
            super().__init__()
            self.generator = normalised()

    def normalised():
        return nn.Sequential(spectral_norm(nn.Linear(LATENT, 32)), nn.ReLU(), spectral_norm(nn.Linear(32, PIXELS)))

    gan, evaluated = Normalised(), Evaluated()
    trainer = toy_trainer(DynamicSparsityCallback(0.25), GeneratorEMA(0.9), evaluated, folder=tmp_path)
    trainer.fit(gan, toy_data(), toy_data(1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    network = normalised().eval()
    export.load_generator(network, tmp_path / "end.ckpt")
    assert torch.equal(network(NOISE), evaluated.images)


WITHOUT = """
import json, math, sys
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

{decoder}

network = nn.Sequential(nn.Linear({latent}, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, {pixels})).eval()
noise = torch.load("noise.pt")
images = []
small = {{name: torch.from_numpy(value) for name, value in decoded("small.safetensors").items()}}
for state in (load_file("dense.safetensors"), small):
    network.load_state_dict(state)
    images.append(network(noise).detach())
torch.save(images, "images.pt")
assert not any(name.startswith("lightning") for name in sys.modules)
"""


def decoder():
    """The one that the documentation has."""
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    return text.split("```python\n# decoder\n")[1].split("```")[0]


def test_both_files_give_the_runs_images_in_a_script_without_this_package(run, tmp_path):
    checkpoint, averaged, _ = run
    network = generator()
    export.load_generator(network, checkpoint)
    export.save_dense(network, tmp_path / "dense.safetensors")
    export.save_compressed(network, tmp_path / "small.safetensors")
    torch.save(NOISE, tmp_path / "noise.pt")
    script = WITHOUT.format(latent=LATENT, pixels=PIXELS, decoder=decoder())
    (tmp_path / "script.py").write_text(script)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)
    for images in torch.load(tmp_path / "images.pt"):
        assert torch.equal(images, averaged)


def test_a_compressed_file_loads_back_bit_for_bit(run, tmp_path):
    checkpoint, *_ = run
    network = generator()
    export.load_generator(network, checkpoint)
    with torch.no_grad():
        network[0].weight[0, :3] = torch.tensor([-0.0, float("nan"), 1e-45])  # none of which is a zero
    export.save_compressed(network, tmp_path / "small.safetensors")
    loaded = export.load_compressed(tmp_path / "small.safetensors")
    state = network.state_dict()
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert loaded[name].numpy().tobytes() == value.numpy().tobytes()


def test_the_format_by_hand(tmp_path):
    network = nn.Linear(5, 2, bias=False)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0, 1.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, -2.0]]))
    export.save_compressed(network, tmp_path / "small.safetensors")
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        metadata = file.metadata()
        assert len(metadata.pop("digest")) == 32
        assert metadata == {"format": "lightning_ddst.bitmask.1", "shapes": json.dumps({"weight": [2, 5]})}
        assert file.get_tensor("weight.bits").tolist() == [0b01000000, 0b01000000]
        assert file.get_tensor("weight.values").tolist() == [1.5, -2.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype, tmp_path):
    network = nn.Linear(40, 10).to(dtype)
    MaskedNetwork(network, 0.1)
    export.save_compressed(network, tmp_path / "small.safetensors")
    loaded = export.load_compressed(tmp_path / "small.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def test_sngan_at_ten_percent_is_within_15_percent_of_its_maskable_weights(tmp_path):
    network = SNGANGenerator(32)
    sparse = MaskedNetwork(network, 0.1)
    export.save_compressed(network, tmp_path / "small.safetensors")
    size = (tmp_path / "small.safetensors").stat().st_size
    assert size / (4 * sparse.total) < 0.15


def test_tied_weights_are_held_twice(tmp_path):
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    network[1].weight = network[0].weight
    export.save_dense(network, tmp_path / "dense.safetensors")
    export.save_compressed(network, tmp_path / "small.safetensors")
    for state in (load_file(tmp_path / "dense.safetensors"), export.load_compressed(tmp_path / "small.safetensors")):
        assert state.keys() == network.state_dict().keys()
        assert torch.equal(state["0.weight"], network[0].weight)
        assert torch.equal(state["1.weight"], network[0].weight)


def test_what_is_dense_is_held_as_it_is(tmp_path):
    network = nn.Linear(5, 2)
    export.save_compressed(network, tmp_path / "small.safetensors")
    assert load_file(tmp_path / "small.safetensors").keys() == {"weight", "bias"}


def test_onnx_gives_the_same_images(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    network = generator().train()
    assert export.save_onnx(network, tmp_path / "generator.onnx", NOISE[:4]) < 1e-5
    assert network.training
    session = onnxruntime.InferenceSession(tmp_path / "generator.onnx")
    (images,) = session.run(None, {session.get_inputs()[0].name: NOISE.numpy()})  # another batch
    assert torch.allclose(torch.from_numpy(images), network.eval()(NOISE), atol=1e-5)


class Unclear(nn.Module):
    def forward(self, z):
        return z if float(z.sum()) > 0 else -z


@pytest.mark.parametrize(
    ("save", "kind"), [(export.save_onnx, "for ONNX"), (export.save_program, "as a program")], ids=["onnx", "program"]
)
def test_a_generator_that_cannot_be_exported_is_rejected(tmp_path, save, kind):
    pytest.importorskip("onnxruntime")
    (tmp_path / "generator").write_text("before")
    with pytest.raises(ValueError, match=rf"^Unclear cannot be written {kind}: "):
        save(Unclear(), tmp_path / "generator", NOISE)
    assert [path.name for path in tmp_path.iterdir()] == ["generator"]
    assert (tmp_path / "generator").read_text() == "before"


# ---- smaller layers ------------------------------------------------------------------------------------

PROGRAM = """
import sys
import torch

torch.save(torch.export.load("generator.pt2").module()(torch.load("noise.pt")).detach(), "images.pt")
assert not any(name.startswith("lightning") for name in sys.modules)
"""


def test_a_smaller_program_gives_the_runs_images_in_a_script_without_this_package(tmp_path):
    gan, evaluated = ValidatedToy(), Evaluated()
    sparsity = DynamicSparsityCallback(0.3, granularity="channel", interval=5)
    trainer = toy_trainer(sparsity, GeneratorEMA(0.9), evaluated, epochs=3, folder=tmp_path)
    trainer.fit(gan, toy_data(), toy_data(1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    network = generator()
    export.load_generator(network, tmp_path / "end.ckpt")
    assert torch.equal(network(NOISE), evaluated.images)
    small, left, channels = compact(network, NOISE)
    assert (left, channels) == (10, 32)
    export.save_program(small, tmp_path / "generator.pt2", NOISE[:4])
    torch.save(NOISE, tmp_path / "noise.pt")
    (tmp_path / "script.py").write_text(PROGRAM)
    subprocess.run([sys.executable, "script.py"], cwd=tmp_path, check=True)
    images = torch.load(tmp_path / "images.pt")
    torch.testing.assert_close(images, evaluated.images, rtol=1e-4, atol=1e-5)
    weights = torch.export.load(tmp_path / "generator.pt2").state_dict
    assert sum(value.numel() for value in weights.values() if value.dim() > 1) == 10 * (LATENT + PIXELS)


# ---- what is refused -----------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_there_or_damaged(run, tmp_path):
    checkpoint, *_ = run
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none\.ckpt"):
        export.load_generator(generator(), tmp_path / "none.ckpt")
    content = checkpoint.read_bytes()
    for damaged in (b"", b"something else", content[: len(content) // 2]):
        (tmp_path / "half.ckpt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"half\.ckpt is damaged, or not a checkpoint: "):
            export.load_generator(generator(), tmp_path / "half.ckpt")
    torch.save({"weights": 1}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt is not a checkpoint .*state_dict"):
        export.load_generator(generator(), tmp_path / "other.ckpt")


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("place", ["state_dict", "callbacks", "hyper_parameters"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_executes_nothing(run, place, zipped, tmp_path):
    checkpoint, *_ = run
    content = torch.load(checkpoint, weights_only=True) | {place: Payload(tmp_path / "called")}
    torch.save(content, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped)
    network = generator()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=r"evil\.ckpt is damaged, or not a checkpoint: ") as error:
        export.load_generator(network, tmp_path / "evil.ckpt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "called").exists()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_loading_into_another_generator_fails_and_changes_nothing(run):
    checkpoint, *_ = run
    wider = nn.Sequential(nn.Linear(LATENT, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, PIXELS))
    before = {name: value.clone() for name, value in wider.state_dict().items()}
    with pytest.raises(ValueError, match=r"Sequential: '0.bias' is \(32,\) there, and \(64,\)"):
        export.load_generator(wider, checkpoint)
    assert all(torch.equal(value, before[name]) for name, value in wider.state_dict().items())
    with pytest.raises(ValueError, match=r"'0.bias' is \(32,\) there, and missing here"):
        export.load_generator(nn.Sequential(nn.ReLU()), checkpoint)
    with pytest.raises(ValueError, match=r"no generator .*maker; it has discriminator, generator"):
        export.load_generator(generator(), checkpoint, name="maker")
    with pytest.raises(ValueError, match="weights='best' is unknown; allowed are average, raw"):
        export.load_generator(generator(), checkpoint, weights="best")


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for save in (export.save_dense, export.save_compressed):
        with pytest.raises(OSError, match=r"nothing can be written to .*file"):
            save(generator(), tmp_path / "file" / "generator.safetensors")


def test_files_of_another_format(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        export.load_compressed(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="is damaged, or not a safetensors file"):
        export.load_compressed(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has the format None, not 'lightning_ddst\.bitmask\.1'"):
        export.load_compressed(tmp_path / "plain")


BITS = torch.tensor([0b01000000, 0b01000000], dtype=torch.uint8)
VALUES = torch.tensor([1.5, -2.0])
PARTS = {"weight.bits": BITS, "weight.values": VALUES}


def written(path, parts, shapes='{"weight": [2, 5]}', **metadata):
    """A compressed file by hand, as an earlier version without a digest wrote it."""
    save_file(parts, path, {"format": export.FORMAT, "shapes": shapes} | metadata)
    return path


def test_a_file_without_a_digest_is_read(tmp_path):
    loaded = export.load_compressed(written(tmp_path / "old", PARTS | {"bias": VALUES + 0}))
    assert loaded["weight"].tolist() == [[0, 1.5, 0, 0, 0], [0, 0, 0, 0, -2.0]]
    assert loaded["bias"].tolist() == [1.5, -2.0]
    with pytest.raises(ValueError, match=r"old is damaged: its contents do not match their digest\.$"):
        export.load_compressed(written(tmp_path / "old", PARTS, digest="0" * 32))


@pytest.mark.parametrize(
    ("parts", "shapes", "message"),
    [
        (PARTS | {"weight.values": VALUES[:1]}, None, r"'weight.values' has the shape \(1,\) and must hold 2 values"),
        (PARTS | {"weight.values": torch.ones(3)}, None, r"shape \(3,\) and must hold 2 values, none 0"),
        (PARTS | {"weight.values": torch.ones(1, 2)}, None, r"shape \(1, 2\) and must hold 2 values"),
        (PARTS | {"weight.values": torch.tensor([1.5, 0.0])}, None, "must hold 2 values, none 0"),
        (PARTS | {"weight.bits": BITS[:1].clone()}, None, r"torch.uint8 \(1,\) and must be torch.uint8 \(2,\)"),
        (PARTS | {"weight.bits": BITS.float()}, None, r"torch.float32 \(2,\) and must be torch.uint8 \(2,\)"),
        (PARTS | {"weight.bits": BITS + 1}, None, "'weight.bits' has bits after its 10 entries"),
        (PARTS, '{"weight": [2, 50]}', r"and must be torch.uint8 \(13,\) for the shape \[2, 50\]"),
        (PARTS, '{"weight": [4000000000, 4000000000, 4000000000]}', "'weight.bits' is"),
        (PARTS, '{"weight": [-2, -5]}', r"the shape \[-2, -5\] of 'weight' must be a list of sizes"),
        (PARTS, '{"weight": 10}', "the shape 10 of 'weight' must be"),
        (PARTS, '{"bias": [2]}', "of 'bias' it must hold 'bias.bits' and 'bias.values', and no other"),
        (PARTS | {"weight": VALUES + 0}, None, "of 'weight' it must hold .* and no other tensor"),
        ({"weight.bits": BITS}, None, "of 'weight' it must hold"),
        (PARTS, "[2, 5]", r"shapes=\[2, 5\] must be a JSON object"),
        (PARTS, "{", "Expecting property name"),
    ],
)
def test_a_compressed_file_whose_parts_do_not_fit_is_rejected(parts, shapes, message, tmp_path):
    path = written(tmp_path / "file", parts, **({} if shapes is None else {"shapes": shapes}))
    with pytest.raises(ValueError, match=rf"^.*file is damaged: .*{message}") as error:
        export.load_compressed(path)
    assert "\n" not in str(error.value)


def flipped(content, seed, count=200):
    """Copies of a file with one flipped bit each."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged, bit = bytearray(content), rng.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) and value.dtype == second[name].dtype for name, value in first.items()
    )


def test_no_flipped_bit_gives_other_weights(tmp_path):
    network = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 4))
    MaskedNetwork(network, 0.2)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save({"state_dict": {f"G.{name}": value for name, value in state.items()}}, tmp_path / "run.ckpt")
    export.save_compressed(network, tmp_path / "small.safetensors")
    for path in (tmp_path / "run.ckpt", tmp_path / "small.safetensors"):
        reasons = []
        for damaged in flipped(path.read_bytes(), seed=1):
            path.write_bytes(damaged)
            try:
                if path.suffix == ".ckpt":
                    export.load_generator(network, path, "G", weights="raw")
                    loaded = network.state_dict()
                else:
                    loaded = export.load_compressed(path)
            except ValueError as error:
                reasons.append(str(error))
            else:  # a bit that holds nothing
                assert equal(loaded, state)
        assert len(reasons) > 100
        assert not any("\n" in reason for reason in reasons)


def test_a_gan_modules_generator(tmp_path):
    gan = GANModule(generator(), nn.Linear(PIXELS, 1), latent_dim=LATENT)
    trainer = toy_trainer(DynamicSparsityCallback(0.25), GeneratorEMA(0.9), folder=tmp_path)
    trainer.fit(gan, toy_data())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    network = generator()
    export.load_generator(network, tmp_path / "end.ckpt", name="generator", weights="raw")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in gan.generator.state_dict().items())

"""Runs the commands of README and docs/start.md in an empty folder, with the installed package (.ci/newcomer)."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from pages import ROOT, blocks, commands

ELSEWHERE = ("sphinx-build", "pytest")
READ = ("README.md", "docs/start.md")
PORT = 6123


def run(line: str) -> str:
    """Runs a command of the environment that this is run in, and gives what it prints."""
    print(f"$ {line}", flush=True)
    start = time.monotonic()
    words = line.split()
    found = Path(sys.executable).with_name(words[0])
    done = subprocess.run([found, *words[1:]], capture_output=True, text=True)
    lines = [line.rsplit("\r")[-1] for line in done.stdout.splitlines()]  # progress bars return to where they began
    print("\n".join(line for line in lines if line.strip() and "it/s" not in line))
    print(f"({time.monotonic() - start:.0f} s)\n", flush=True)
    if done.returncode:
        sys.exit(f"{line} failed:\n{done.stderr[-5000:]}")
    return done.stdout


def look(line: str) -> None:
    """Starts TensorBoard, and looks whether it shows the run."""
    print(f"$ {line}", flush=True)
    words = line.split()
    server = subprocess.Popen([Path(sys.executable).with_name(words[0]), *words[1:], "--port", str(PORT)])
    try:
        deadline = time.monotonic() + 120
        runs = ""
        while "version_0" not in runs:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"TensorBoard ended, or shows no run after two minutes, but {runs!r}.")
            time.sleep(1)
            try:
                runs = urllib.request.urlopen(f"http://localhost:{PORT}/data/runs", timeout=5).read().decode()
            except (urllib.error.URLError, OSError):
                continue
        print(runs, flush=True)
    finally:
        server.terminate()
        server.wait()


def load() -> None:
    """Loads what was exported as the page says: with safetensors and NumPy, and with onnxruntime."""
    import numpy as np
    import onnxruntime
    import torch
    from safetensors.torch import load_file

    from lightning_ddst.models import SmallGenerator

    names: dict = {}
    exec(next(b.text for b in blocks("python") if b.page == "docs/export.md" and "def decoded" in b.text), names)
    folder = Path("lightning_logs/version_0/export")
    dense = load_file(folder / "generator.safetensors")
    decoded = names["decoded"](folder / "generator.compressed.safetensors")
    assert decoded.keys() == dense.keys()
    assert all(np.array_equal(decoded[name], tensor.numpy()) for name, tensor in dense.items())
    generator = SmallGenerator(image_size=8, channels=1, width=16, latent_dim=64).eval()
    generator.load_state_dict(dense)
    noise = torch.randn(3, 64)
    session = onnxruntime.InferenceSession(str(folder / "generator.onnx"))
    (images,) = session.run(None, {session.get_inputs()[0].name: noise.numpy()})
    assert np.abs(images - generator(noise).detach().numpy()).max() < 1e-3
    print("the exported generator loads, and onnxruntime makes the same images", flush=True)


def main() -> None:
    """Runs everything for users on the two pages, in their order."""
    import lightning_ddst

    print(lightning_ddst.__file__, lightning_ddst.__version__, flush=True)
    assert ROOT not in Path(lightning_ddst.__file__).parents, "this is the clone, not what was installed"
    assert not list(Path.cwd().iterdir()), "the folder is not empty"
    run("lightning-ddst --version")
    for block in blocks("bash"):
        if block.page not in READ or block.note == "test command" or block.note.startswith("parsed only"):
            continue
        for line in commands(block):
            if block.note == "main job":  # what it does after installing
                run(line.split("&& .venv/bin/")[-1])
            elif line.startswith("tensorboard"):
                look(line)
            elif not line.startswith(ELSEWHERE):
                if "my.yaml" in line:
                    Path("my.yaml").write_text(run("lightning-ddst fit --print_config"))
                run(line)
    assert len(list(Path("lightning_logs/version_0/plots").iterdir())) == 10
    export = next(line for b in blocks("bash") if b.page == "docs/export.md" for line in commands(b))
    run(export)
    load()
    run(f"python {ROOT / 'examples' / '01_add_ddst_to_your_gan.py'}")  # a GAN of one's own
    print("a newcomer came through", flush=True)


if __name__ == "__main__":
    main()

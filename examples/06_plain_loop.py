"""A plain PyTorch loop: two wrapped lines, checkpoints, and a run that resumes exactly.

python examples/06_plain_loop.py                # trains, and saves last.pt after every epoch
python examples/06_plain_loop.py --resume       # continues from last.pt
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

from lightning_ddst import random_states, set_random_states, sparsify
from lightning_ddst.data import digits

EPOCHS, LATENT = 5, 16
CHECKPOINT = Path("last.pt")


def make_generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(LATENT, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.Tanh(),
        nn.Unflatten(1, (1, 8, 8)),
    )


def make_discriminator() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), spectral_norm(nn.Linear(64, 128)), nn.LeakyReLU(0.1), spectral_norm(nn.Linear(128, 1))
    )


def log(values: dict[str, float], update: int) -> None:
    print(f"update {update}: discriminator at {values['density/discriminator']:.2f}", end="")
    print(f", BR {values['balance/ratio']:.3f}" if "balance/ratio" in values else "")


def main(resume: bool = False) -> None:
    torch.manual_seed(0)
    generator, discriminator = make_generator(), make_discriminator()
    opt_g = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    opt_d = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    loader = DataLoader(digits(), batch_size=32, shuffle=True, drop_last=True)

    sparse = sparsify(
        generator,
        discriminator,
        optimizers=[opt_g, opt_d],
        generator_density=0.2,
        bounds="auto",
        length=EPOCHS * len(loader),  # generator updates
        ema_decay=0.999,
        log=log,
        log_every=200,
    )
    saved = {"generator": generator, "discriminator": discriminator, "opt_g": opt_g, "opt_d": opt_d, "sparse": sparse}
    first_epoch = 0
    if resume:
        checkpoint = torch.load(CHECKPOINT, weights_only=True)
        for name, each in saved.items():
            each.load_state_dict(checkpoint[name])
        first_epoch = checkpoint["epoch"] + 1
        set_random_states(checkpoint["random"])  # last, just before the loop

    def train_discriminator(real: Tensor) -> None:
        fake = generator(torch.randn(len(real), LATENT)).detach()
        loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()

    def train_generator(real: Tensor) -> None:
        loss = -discriminator(generator(torch.randn(len(real), LATENT))).mean()
        opt_g.zero_grad()
        loss.backward()
        opt_g.step()

    for epoch in range(first_epoch, EPOCHS):
        for real, _ in loader:
            with sparse.step(real):
                train_discriminator(real)
                train_generator(real)
        states = {name: each.state_dict() for name, each in saved.items()}
        torch.save(states | {"epoch": epoch, "random": random_states()}, CHECKPOINT)

    with sparse.averaged(), torch.no_grad():
        samples = generator.eval()(torch.randn(64, LATENT))
    print(f"{len(samples)} samples of {tuple(samples.shape[1:])}")
    print(f"generator {sparse.generator_density:.3f}, discriminator {sparse.discriminator_density:.3f}")


if __name__ == "__main__":
    main(resume="--resume" in sys.argv)

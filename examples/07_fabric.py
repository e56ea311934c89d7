"""Lightning Fabric: a loop of your own with Fabric's devices, precision, loggers and checkpoints.

python examples/07_fabric.py
"""

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader

from lightning_ddst import sparsify
from lightning_ddst.data import digits

EPOCHS, LATENT = 5, 16


def main() -> None:
    fabric = Fabric(accelerator="auto", devices=1, loggers=CSVLogger("fabric_logs"))
    fabric.launch()
    fabric.seed_everything(0)

    generator = nn.Sequential(
        nn.Linear(LATENT, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.Tanh(),
        nn.Unflatten(1, (1, 8, 8)),
    )
    discriminator = nn.Sequential(
        nn.Flatten(), spectral_norm(nn.Linear(64, 128)), nn.LeakyReLU(0.1), spectral_norm(nn.Linear(128, 1))
    )
    generator, opt_g = fabric.setup(generator, torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9)))
    discriminator, opt_d = fabric.setup(
        discriminator, torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    )
    loader = fabric.setup_dataloaders(DataLoader(digits(), batch_size=32, shuffle=True, drop_last=True))

    sparse = sparsify(
        generator,
        discriminator,
        optimizers=[opt_g, opt_d],
        generator_density=0.2,
        bounds="auto",
        length=EPOCHS * len(loader),  # generator updates
        log=fabric.log_dict,
    )
    for _ in range(EPOCHS):
        for real, _ in loader:
            with sparse.step(real):
                fake = generator(torch.randn(len(real), LATENT, device=fabric.device)).detach()
                loss = F.relu(1 - discriminator(real)).mean() + F.relu(1 + discriminator(fake)).mean()
                opt_d.zero_grad()
                fabric.backward(loss)
                opt_d.step()

                loss = -discriminator(generator(torch.randn(len(real), LATENT, device=fabric.device))).mean()
                opt_g.zero_grad()
                fabric.backward(loss)
                opt_g.step()
    state = {"generator": generator, "discriminator": discriminator, "opt_g": opt_g, "opt_d": opt_d, "sparse": sparse}
    fabric.save("last.ckpt", state)
    fabric.logger.finalize("success")

    for update, decision in sparse.decisions[-5:]:
        fabric.print(f"generator update {update}: {decision.action}, {decision.reason}")
    fabric.print(f"generator {sparse.generator_density:.3f}, discriminator {sparse.discriminator_density:.3f}")


if __name__ == "__main__":
    main()

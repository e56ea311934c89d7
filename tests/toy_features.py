"""Features of toy vectors, and the Frechet distance on them by hand."""

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from toys import PIXELS, toy_data


class ToyFeatures(nn.Module):
    """Six fixed features of a vector; those of training mode would be others."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(PIXELS, 6, generator=torch.Generator().manual_seed(0)) / 4
        self.weight = nn.Parameter(weight)
        self.dropout = nn.Dropout(0.5)
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return self.dropout(torch.tanh(images.flatten(1) @ self.weight))


def by_hand(first: Tensor, second: Tensor) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two sets of images."""
    extract = ToyFeatures().eval()
    first, second = (extract(images).detach().double().numpy() for images in (first, second))
    squared = np.square(first.mean(0) - second.mean(0)).sum()
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    return squared + np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)


def real_images() -> Tensor:
    return toy_data().dataset.tensors[0]  # 80 of them

"""SPAM, the frequency-balancing token mixer: features times a context of balanced views."""

import torch
from torch import Tensor, nn

from .pooling import SpectralPoolingGate


class SPAM(nn.Module):
    """Spectral pooling aggregation modulation.

    f = conv₇ₓ₁(conv₁ₓ₇(P x)),  context = Σᵢ Gᵢ(fᵢ),  y = Q (f ⊙ context)    [SPANet]

    fᵢ are consecutive channels, one group for each λ in `low_weights`, in the sizes of `torch.chunk`; Gᵢ is a
    `SpectralPoolingGate`. P and Q are 1×1 convolutions, the two others depth-wise.

    Shapes: (B, C, h, w) -> the same. Keywords: `shape`, `released`, `learned` of the filters.
    Raises: ValueError where the channels do not give every gate one, for an even kernel, and as the filters do.
    """

    def __init__(
        self,
        width: int,
        radius: float = 2,
        low_weights: tuple[float, ...] = (0.7, 0.8, 0.9),
        kernel: int = 7,
        **options,
    ):
        super().__init__()
        if not low_weights:
            raise ValueError("low_weights is empty: without a gate there is no context. Give at least one λ.")
        self.shares = [len(part) for part in torch.arange(width).chunk(len(low_weights))]
        if len(self.shares) < len(low_weights):
            raise ValueError(
                f"{width} channels, cut into equal parts, make {len(self.shares)} group(s) for {len(low_weights)} "
                "gates; the gates left over would never act. Use fewer gates or more channels."
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel={kernel} has no middle: maps would shift and change size. Use an odd kernel.")
        self.project_in = nn.Conv2d(width, width, 1)
        self.along_rows = nn.Conv2d(width, width, (1, kernel), padding=(0, kernel // 2), groups=width)
        self.along_columns = nn.Conv2d(width, width, (kernel, 1), padding=(kernel // 2, 0), groups=width)
        self.gates = nn.ModuleList(
            SpectralPoolingGate(share, width, radius, low_weight, **options)
            for share, low_weight in zip(self.shares, low_weights)
        )
        self.project_out = nn.Conv2d(width, width, 1)

    def features(self, x_BChw: Tensor) -> Tensor:
        """What is modulated: (B, C, h, w) -> the same."""
        return self.along_columns(self.along_rows(self.project_in(x_BChw)))

    def context(self, features_BChw: Tensor) -> Tensor:
        """What modulates: the sum of all gates, (B, C, h, w) -> the same."""
        parts = features_BChw.split(self.shares, dim=1)
        return sum(gate(part) for gate, part in zip(self.gates, parts))

    def forward(self, x_BChw: Tensor) -> Tensor:
        features_BChw = self.features(x_BChw)
        return self.project_out(features_BChw * self.context(features_BChw))

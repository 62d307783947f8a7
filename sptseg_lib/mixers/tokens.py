"""Token mixers to compare SPAM with; each takes and gives maps (B, C, h, w)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend, join_heads, split_heads
from ..spectral.hilo import FrequencyAttention
from ..spectral.prompt import SpectralPrompt


class Pooling(nn.Module):
    """PoolFormer's mixer: the mean of 3 × 3 neighbours, less the token itself; nothing is learned."""

    def forward(self, x_BChw: Tensor) -> Tensor:
        return F.avg_pool2d(x_BChw, 3, stride=1, padding=1, count_include_pad=False) - x_BChw


class SeparableConvolution(nn.Sequential):
    """ConvFormer's mixer: widen, depth-wise convolution, narrow."""

    def __init__(self, width: int, kernel: int = 7, expansion: int = 2):
        inner = expansion * width
        super().__init__(
            nn.Conv2d(width, inner, 1),
            nn.GELU(),
            nn.Conv2d(inner, inner, kernel, padding=kernel // 2, groups=inner),
            nn.Conv2d(inner, width, 1),
        )


class SelfAttention(nn.Module):
    """Attention of every position to every other. Raises: ValueError where the heads do not divide the width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads do not share out a width of {width}; choose a divisor of {width}.")
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_BChw: Tensor) -> Tensor:
        qkv_BNC = self.qkv(x_BChw.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        mixed_BNC = join_heads(attend(*(split_heads(part, self.heads) for part in qkv_BNC)))
        return self.project(mixed_BNC).transpose(1, 2).unflatten(2, x_BChw.shape[-2:])


class HiLo(nn.Module):
    """LITv2's attention: some heads inside windows, the others towards window means.

    `low_share` is LITv2's α, cut off to whole heads. Raises: ValueError as `FrequencyAttention`, and for a share
    outside [0, 1].
    """

    def __init__(self, width: int, heads: int, low_share: float = 0.5, window: int = 2):
        super().__init__()
        if not 0 <= low_share <= 1:
            raise ValueError(f"low_share={low_share} is no share of the heads; give a number from 0 to 1.")
        self.frequencies = FrequencyAttention(width, heads, heads - int(heads * low_share), window)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return self.frequencies(x_BChw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GlobalFilter(nn.Module):
    """GFNet's and SpectFormer's gate: F⁻¹(F(x) ⊙ w), a learned filter as large as the grid.

    A `SpectralPrompt` whose gate is 1; on other grids than its own it keeps its convolution kernel.
    """

    def __init__(self, grid: tuple[int, int], width: int, std: float = 0.02):
        super().__init__()
        self.prompt = SpectralPrompt(grid, width, std)

    def forward(self, x_BChw: Tensor) -> Tensor:
        ones_BC = torch.ones_like(x_BChw[:, :, 0, 0])
        return self.prompt(x_BChw.permute(0, 2, 3, 1), ones_BC).permute(0, 3, 1, 2).to(x_BChw.dtype)

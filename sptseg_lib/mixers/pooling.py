"""Spectral pooling: low and high frequencies of a map, balanced by one weight."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Shape = Literal["circle", "rectangle"]


def bin_distance(grid: tuple[int, int], shape: Shape = "circle", centre: tuple[int, int] | None = None) -> Tensor:
    """Distance from zero frequency in bins, with zero frequency in the middle: (h, w).

    Euclidean for a circle, the larger of the two axes for a rectangle. `centre` defaults to (h // 2, w // 2).
    """
    middle_h, middle_w = centre or (grid[0] // 2, grid[1] // 2)
    # On the CPU whatever the default device: masks are small, and the meta device could not be asked for a maximum.
    down = torch.arange(grid[0], device="cpu")[:, None] - middle_h
    right = torch.arange(grid[1], device="cpu")[None] - middle_w
    return torch.hypot(down.float(), right.float()) if shape == "circle" else torch.maximum(down.abs(), right.abs())


def check_balance(radius: float, low_weight: float, shape: str) -> None:
    """Raises ValueError for a radius that is no positive number, a weight outside [0, 1] or an unknown shape."""
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(
            f"radius={radius} leaves no low frequencies to weigh, not even the mean; give a positive number of bins."
        )
    if not 0 <= low_weight <= 1:
        raise ValueError(
            f"low_weight={low_weight} is outside [0, 1]: λ and 1 − λ would differ in sign and the two bands would be "
            "subtracted, not balanced. Give a share."
        )
    if shape not in ("circle", "rectangle"):
        raise ValueError(f"shape={shape!r} is neither 'circle' nor 'rectangle'; no region would be low. Use one.")


def pooling_mask(
    grid: tuple[int, int], radius: float, low_weight: float, shape: Shape = "circle", released: bool = False
) -> Tensor:
    """λ on low frequencies and 1 − λ on all others, zero frequency in the middle: (h, w) float32.

    Low is what lies at most `radius` bins from zero frequency. `released` brings the released code's
    two quirks: ⅓ exactly on the circle, and a centre of (w // 2, h // 2), which is only right for h = w.
    Raises: ValueError as `check_balance`, and for a radius that leaves no high frequency on this grid.
    """
    check_balance(radius, low_weight, shape)
    distance_hw = bin_distance(grid, shape, (grid[1] // 2, grid[0] // 2) if released else None)
    if distance_hw.max() <= radius:
        raise ValueError(
            f"radius={radius} reaches beyond a grid of {grid[0]}×{grid[1]}: every frequency would be low and the "
            f"filter would only scale by {low_weight}. Choose a radius below {float(distance_hw.max()):.4g}, or larger "
            "maps."
        )
    mask_hw = torch.where(distance_hw <= radius, low_weight, 1 - low_weight)
    return mask_hw.masked_fill(distance_hw == radius, 1 / 3) if released else mask_hw


def filter_map(x_BChw: Tensor, mask_hw: Tensor) -> Tensor:
    """Re F⁻¹(F(x) ⊙ mask) with zero frequency in the mask's middle: (..., h, w), (h, w) -> (..., h, w).

    The real part of a filtered real signal is the signal filtered by the mask's even part, so that half a
    spectrum does. FFTs on a CPU know no half precision: such maps pass in float32 and come back as they were.
    """
    mask_hw = torch.fft.ifftshift(mask_hw)
    even_hw = (mask_hw + mask_hw.flip(0, 1).roll((1, 1), (0, 1))) / 2
    grid = x_BChw.shape[-2:]
    spectrum = torch.fft.rfft2(x_BChw.to(torch.promote_types(x_BChw.dtype, torch.float32)), norm="ortho")
    filtered = spectrum * even_hw[:, : grid[1] // 2 + 1].to(spectrum.device)
    return torch.fft.irfft2(filtered, s=grid, norm="ortho").to(x_BChw.dtype)


class SpectralPoolingFilter(nn.Module):
    """Balance low against high frequencies: x̃ = F⁻¹(F(x) ⊙ m), m = λ inside the radius, 1 − λ outside    [SPANet].

    Shapes: (B, C, h, w) -> the same, any size, a new one at each call; half precision is computed in float32.
    `learned` makes λ and the radius parameters: the edge is then soft, sigmoid((r + ½ − distance) / ¼).
    Raises: ValueError as `pooling_mask`; with `learned` also for λ = 0 or 1, from where no gradient leads back.
    """

    def __init__(
        self,
        radius: float,
        low_weight: float,
        shape: Shape = "circle",
        released: bool = False,
        learned: bool = False,
    ):
        super().__init__()
        check_balance(radius, low_weight, shape)
        self.shape, self.released, self.learned = shape, released, learned
        if not learned:
            self._radius, self._low_weight = float(radius), float(low_weight)
            return
        if low_weight in (0, 1) or released:
            raise ValueError(
                f"low_weight={low_weight} with released={released} cannot be learned: λ is the sigmoid of a parameter, "
                "never 0 or 1, and the released mask has a hard edge. Start inside (0, 1) with released=False."
            )
        self.logit = nn.Parameter(torch.tensor(float(low_weight)).logit())
        self.log_radius = nn.Parameter(torch.tensor(float(radius)).log())

    @property
    def low_weight(self) -> float:
        """λ, as it is now."""
        return float(self.logit.detach().sigmoid()) if self.learned else self._low_weight

    @property
    def radius(self) -> float:
        """The radius in bins, as it is now."""
        return float(self.log_radius.detach().exp()) if self.learned else self._radius

    def mask(self, grid: tuple[int, int]) -> Tensor:
        """The mask with zero frequency in the middle: (h, w)."""
        if not self.learned:
            return pooling_mask(grid, self._radius, self._low_weight, self.shape, self.released)
        distance_hw = bin_distance(grid, self.shape).to(self.logit.device)
        inside_hw = torch.sigmoid((self.log_radius.exp() + 0.5 - distance_hw) / 0.25)
        low = self.logit.sigmoid()
        return inside_hw * low + (1 - inside_hw) * (1 - low)

    def forward(self, x_BChw: Tensor) -> Tensor:
        return filter_map(x_BChw, self.mask(tuple(x_BChw.shape[-2:])))


class SpectralPoolingGate(nn.Module):
    """A balanced view of some channels, spread over all: 1×1 convolution of the pooled map    [SPANet].

    Shapes: (B, c, h, w) -> (B, C, h, w). Keywords and errors: as `SpectralPoolingFilter`.
    """

    def __init__(self, channels: int, width: int, radius: float, low_weight: float, **options):
        super().__init__()
        self.filter = SpectralPoolingFilter(radius, low_weight, **options)
        self.mix = nn.Conv2d(channels, width, 1)

    def forward(self, x_Bchw: Tensor) -> Tensor:
        return self.mix(self.filter(x_Bchw))

"""Frequency bands: masks over a spectrum, and how much of a signal lies in each."""

import torch
from torch import Tensor


def radial_frequency(grid: tuple[int, int]) -> Tensor:
    """Distance from zero frequency in cycles per sample: (h, w), in `fft2` order, 0 to √½."""
    return torch.hypot(torch.fft.fftfreq(grid[0])[:, None], torch.fft.fftfreq(grid[1])[None, :])


def band_mask(grid: tuple[int, int], low: float, high: float) -> Tensor:
    """1 where low <= radial frequency < high (cycles per sample), else 0: (h, w) float, `fft2` order."""
    radius_hw = radial_frequency(grid)
    return ((radius_hw >= low) & (radius_hw < high)).float()


def keep_band(x_hwC: Tensor, low: float, high: float) -> Tensor:
    """Remove all frequencies outside [low, high): real (..., h, w, C) -> the same shape."""
    mask_hw1 = band_mask(tuple(x_hwC.shape[-3:-1]), low, high).to(x_hwC.device)[..., None]
    return torch.fft.ifft2(torch.fft.fft2(x_hwC, dim=(-3, -2)) * mask_hw1, dim=(-3, -2)).real


def radial_energy(x_hwC: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Share of a signal's energy by radial frequency.

    Shapes: real (..., h, w, C) -> centres of the bins (bins,) in cycles per sample, and shares
    (..., bins) that sum to 1 by Parseval's theorem. The mean is removed first.
    """
    x_hwC = x_hwC - x_hwC.mean(dim=(-3, -2), keepdim=True)
    energy_hw = torch.fft.fft2(x_hwC.float(), dim=(-3, -2)).abs().square().sum(-1)
    top = 0.5 * 2**0.5
    radius_hw = radial_frequency(tuple(energy_hw.shape[-2:])).to(x_hwC.device)
    at_P = (radius_hw / top * bins).long().clamp(max=bins - 1).flatten()
    total = torch.zeros(*energy_hw.shape[:-2], bins, device=x_hwC.device)
    total.index_add_(-1, at_P, energy_hw.flatten(-2))
    centres = (torch.arange(bins) + 0.5) * top / bins
    return centres, total / total.sum(-1, keepdim=True).clamp(min=1e-12)

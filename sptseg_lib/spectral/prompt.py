"""Spectral prompts: an image prompts itself with its own filtered spectrum."""

import torch
from torch import Tensor, nn


def filter_on_grid(weight_hfD: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Carry a filter from one patch grid to another: complex (h, f, D) -> complex (h', f', D).

    A product of spectra is a circular convolution, so the filter *is* a kernel. The kernel keeps
    its patches: it is padded with zeros on a larger grid and cut around its centre on a smaller one.
    """
    (h, w), (new_h, new_w) = grid, new_grid
    if grid == new_grid:
        return weight_hfD
    kernel_hwD = torch.fft.irfft2(weight_hfD, s=grid, dim=(0, 1))
    kept_h, kept_w = min(h, new_h), min(w, new_w)
    # Centre the kernel's origin, take the middle, and put the origin back into the corner.
    top, left = h // 2 - kept_h // 2, w // 2 - kept_w // 2
    middle = kernel_hwD.roll((h // 2, w // 2), (0, 1))[top : top + kept_h, left : left + kept_w]
    padded = middle.new_zeros(new_h, new_w, middle.shape[-1])
    padded[:kept_h, :kept_w] = middle
    return torch.fft.rfft2(padded.roll((-(kept_h // 2), -(kept_w // 2)), (0, 1)), dim=(0, 1))


class SpectralPrompt(nn.Module):
    """Prompt an image with its own filtered spectrum.

    S = F⁻¹(F(H ⊙ g) ⊙ w_f)    [SPT-SEG, eq. 1]

    Shapes: patches (B, h, w, D), class token (B, D) -> (B, h, w, D), float32.
    The weight is held as real pairs (h, w//2 + 1, D, 2), drawn from N(0, 0.02²); other grids
    than its own get the same convolution kernel (see `filter_on_grid`).
    Raises: ValueError when the patches are not as wide as the filter.
    """

    def __init__(self, grid: tuple[int, int], width: int, std: float = 0.02):
        super().__init__()
        self.grid = tuple(grid)
        self.weight_hfD2 = nn.Parameter(torch.randn(grid[0], grid[1] // 2 + 1, width, 2) * std)

    def forward(self, patches_BhwD: Tensor, cls_BD: Tensor) -> Tensor:
        # A model may be stored in half precision, of which FFTs know little, or channels_last, which reorders a weight.
        at_least_float = torch.promote_types(self.weight_hfD2.dtype, torch.float32)
        weight_hfD = torch.view_as_complex(self.weight_hfD2.to(at_least_float).contiguous())
        if patches_BhwD.shape[-1] != weight_hfD.shape[-1]:
            raise ValueError(
                f"Patches are {patches_BhwD.shape[-1]} wide and the spectral filter {weight_hfD.shape[-1]}; they could "
                "not be multiplied. Build the prompt with the encoder's width."
            )
        grid = tuple(patches_BhwD.shape[1:3])
        weight_hfD = filter_on_grid(weight_hfD, self.grid, grid)
        # FFTs know no bfloat16.
        gated_BhwD = patches_BhwD.float() * cls_BD.float()[:, None, None, :]
        spectrum_BhfD = torch.fft.rfft2(gated_BhwD, dim=(1, 2), norm="ortho")
        # s= keeps odd widths: f alone cannot tell a width of 4 from one of 5.
        return torch.fft.irfft2(spectrum_BhfD * weight_hfD, s=grid, dim=(1, 2), norm="ortho")

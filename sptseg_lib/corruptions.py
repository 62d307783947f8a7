"""Corruptions of test pictures, each in five severities: 0 leaves a picture untouched, 4 is the worst.

What is drawn at random depends on (seed, picture, corruption) alone: a picture is spoilt alike for every method, in
any batch. Noise of three kinds has the same energy at the same severity and differs in where its frequencies lie.
"""

from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from .scenes.counter import uniform
from .settings import one_of
from .spectral.bands import radial_frequency

RADIUS = 1 / 16  # cycles per pixel between low and high: half a cycle a patch of 8, the finest that patches resolve
CELLS = 8  # cells along a side that occlusion covers or leaves
_NOISE, _WHERE, _WITH = 0xC0DE0, 0xC0DE1, 0xC0DE2  # streams of random numbers of their own, apart from the scenes'


class Corrupted(NamedTuple):
    """image_B3HW in [0, 1]; covered_BHW, bool: pixels that an occluder hides, none for other corruptions."""

    image_B3HW: Tensor
    covered_BHW: Tensor


def white_noise(index_B: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """Normal numbers of mean 0 and deviation 1: (B,) -> (B, 3, H, W)."""
    H, W = size
    u_BS = uniform(seed ^ _NOISE, index_B, 3 * H * W).double()
    return torch.special.ndtri(u_BS + 2.0**-25).float().view(-1, 3, H, W)  # u is a multiple of 2⁻²⁴ below 1


def band_noise(index_B: Tensor, size: tuple[int, int], seed: int, high: bool, radius: float = RADIUS) -> Tensor:
    """White noise without its frequencies below (or, for low noise, from) a radius on: (B,) -> (B, 3, H, W).

    Scaled to a mean square of 1 in every picture, whichever side of the radius is kept; the mean of each channel,
    zero frequency, is 0 on both sides. radius: cycles per pixel.
    Raises: ValueError where a picture has no frequency on that side.
    """
    radius_hf = radial_frequency(size)[:, : size[1] // 2 + 1].to(index_B.device)
    kept_hf = (radius_hf >= radius) if high else (radius_hf < radius)
    kept_hf[0, 0] = False
    if not kept_hf.any():
        raise ValueError(
            f"Pictures of {size[0]}×{size[1]} pixels have no frequency {'from' if high else 'below'} {radius:g} cycles "
            "a pixel. There would be nothing to add; use larger pictures."
        )
    spectrum_B3hf = torch.fft.rfft2(white_noise(index_B, size, seed)) * kept_hf
    noise_B3HW = torch.fft.irfft2(spectrum_B3hf, s=size)
    return noise_B3HW / noise_B3HW.square().mean((1, 2, 3), keepdim=True).sqrt()


def covered_pixels(index_B: Tensor, size: tuple[int, int], share: float, seed: int) -> Tensor:
    """Pixels under blocks: a share of the 8 × 8 cells of each picture, drawn at random: (B,) -> (B, H, W) bool."""
    chance_BS = uniform(seed ^ _WHERE, index_B, CELLS * CELLS)
    covered_Bhw = (chance_BS.argsort(1).argsort(1) < round(share * CELLS * CELLS)).view(-1, CELLS, CELLS)
    row, column = (torch.arange(side, device=index_B.device) * CELLS // side for side in size)
    return covered_Bhw[:, row][:, :, column]


def _occlude(image_B3HW: Tensor, share: float, index_B: Tensor, seed: int) -> Tensor:
    """Blocks of coloured noise: plain ones would be pictures of squares, and square is a class."""
    covered_BHW = covered_pixels(index_B, image_B3HW.shape[-2:], share, seed)
    fill_B3HW = uniform(seed ^ _WITH, index_B, image_B3HW[0].numel()).view(image_B3HW.shape)
    return torch.where(covered_BHW[:, None], fill_B3HW, image_B3HW)


def _blur(image_B3HW: Tensor, sigma: float, index_B: Tensor, seed: int) -> Tensor:
    reach = min(round(3 * sigma), min(image_B3HW.shape[-2:]) - 1)  # the border is mirrored, once
    return tv.gaussian_blur(image_B3HW, [2 * reach + 1] * 2, [sigma] * 2)


def _jpeg(image_B3HW: Tensor, quality: float, index_B: Tensor, seed: int) -> Tensor:
    """Through Pillow, a picture at a time: torchvision's own codec is being retired."""
    restored = []
    for pixels_HW3 in (image_B3HW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = BytesIO()
        Image.fromarray(pixels_HW3).save(file, "JPEG", quality=int(quality))
        restored.append(tv.pil_to_tensor(Image.open(file)))
    return torch.stack(restored).to(image_B3HW.device).float() / 255


def _add(noise: Callable[[Tensor, tuple[int, int], int], Tensor]):
    def added(image_B3HW: Tensor, deviation: float, index_B: Tensor, seed: int) -> Tensor:
        return image_B3HW + deviation * noise(index_B, tuple(image_B3HW.shape[-2:]), seed)

    return added


class Corruption(NamedTuple):
    """How much a severity from 0 on means, in which unit, and what is done to pictures [0, 1] at such a level."""

    unit: str
    levels: tuple[float, ...]
    apply: Callable[[Tensor, float, Tensor, int], Tensor]  # images, level, indices, seed


_DEVIATIONS = (0.0, 0.05, 0.1, 0.2, 0.3)
CORRUPTIONS = {
    "occlusion": Corruption("share of the area covered", (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2), _occlude),
    "blur": Corruption("σ of the Gaussian (pixels)", (0.0, 0.75, 1.5, 2.5, 4.0), _blur),
    "jpeg": Corruption("JPEG quality", (100, 50, 25, 10, 5), _jpeg),
    "contrast": Corruption(
        "contrast left", (1.0, 0.6, 0.4, 0.2, 0.1), lambda image_B3HW, left, *_: tv.adjust_contrast(image_B3HW, left)
    ),
    "noise": Corruption("deviation of white noise", _DEVIATIONS, _add(white_noise)),
    "low frequency": Corruption(
        "deviation of low noise", _DEVIATIONS, _add(lambda *where: band_noise(*where, high=False))
    ),
    "high frequency": Corruption(
        "deviation of high noise", _DEVIATIONS, _add(lambda *where: band_noise(*where, high=True))
    ),
}
SEVERITIES = range(5)


def corrupt(image_B3HW: Tensor, name: str, severity: int, index_B: Tensor, seed: int = 0) -> Corrupted:
    """Spoil pictures in one way: (B, 3, H, W) in [0, 1] -> the same, and which pixels are hidden.

    name: one of CORRUPTIONS. severity: 0 gives the pictures back as they are. index_B: which pictures these are, (B,).
    Raises: ValueError for an unknown corruption or severity, for values outside [0, 1], or where there is not one
    index a picture.
    """
    corruption = CORRUPTIONS[one_of("corruption", name, CORRUPTIONS)]
    if severity not in SEVERITIES:
        raise ValueError(
            f"Severity {severity!r} is not defined, so nothing was done; choose one from 0 (untouched) to "
            f"{SEVERITIES[-1]} (worst)."
        )
    if image_B3HW.ndim != 4 or image_B3HW.shape[1] != 3 or len(index_B) != len(image_B3HW):
        raise ValueError(
            f"Images of shape {tuple(image_B3HW.shape)} with {len(index_B)} indices are not (B, 3, H, W) with B of "
            "them. Pictures would be spoilt by the numbers of others; give one index an image."
        )
    low, top = (float(value) for value in image_B3HW.aminmax())
    if not (0 <= low and top <= 1):  # also where they are not numbers
        raise ValueError(
            f"Images with values from {low:g} to {top:g} are not in [0, 1]. A severity would mean something else; "
            "divide bytes by 255, and corrupt before normalising."
        )
    none_BHW = torch.zeros_like(image_B3HW[:, 0], dtype=torch.bool)
    if severity == 0:
        return Corrupted(image_B3HW, none_BHW)
    level = corruption.levels[severity]
    spoilt_B3HW = corruption.apply(image_B3HW, level, index_B, seed).clamp(0, 1)
    if name == "occlusion":
        return Corrupted(spoilt_B3HW, covered_pixels(index_B, image_B3HW.shape[-2:], level, seed))
    return Corrupted(spoilt_B3HW, none_BHW)

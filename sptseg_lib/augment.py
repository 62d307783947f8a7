"""The recipe's augmentation, on a photograph and its mask together: scale, crop, flip, colour.

Transforms of torchvision's v2 kind: pictures are PIL images, masks `tv_tensors.Mask` of uint8 train ids.
A crop is resampled straight from the source picture, so that nothing outside of it is ever resized.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IGNORE = 255
MEAN_COLOUR = (124, 116, 104)  # ImageNet's mean pixel: what the recipe pads with, once pixels are normalised


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


class ScaledCrop(v2.Transform):
    """Scale by U(0.5, 2) around the training size, then cut a square of it in which no class has too much.

    At factor 1 the shorter side is `size` pixels, or the longer one 4 · size where that is smaller. A crop
    is drawn again, up to ten times, while one class fills more than `most` of its labelled pixels or is
    alone in it. A picture that is smaller stays so.
    """

    def __init__(self, size: int, factors: tuple[float, float] = (0.5, 2.0), most: float = 0.75, again: int = 10):
        super().__init__()
        self.size, self.factors, self.most, self.again = size, factors, most, again

    def make_params(self, flat_inputs: list) -> dict:
        image = next(x for x in flat_inputs if isinstance(x, Image.Image))
        mask = next((x.numpy() for x in flat_inputs if isinstance(x, tv_tensors.Mask)), None)
        W, H = image.size
        goal = self.size * _uniform(*self.factors)
        scale = min(goal / min(W, H), 4 * goal / max(W, H))
        scaled = torch.tensor([max(1, round(H * scale)), max(1, round(W * scale))])
        extent = scaled.clamp(max=self.size)  # rows, columns
        per_pixel = torch.tensor([H, W]) / scaled  # source pixels
        for _ in range(1 + self.again):
            first = (torch.rand(2) * (scaled - extent + 1)).long()
            rows, columns = (
                ((first[i] + torch.arange(extent[i]) + 0.5) * per_pixel[i]).long().clamp(max=(H, W)[i] - 1)
                for i in (0, 1)
            )
            if mask is None or self._is_mixed(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]):
                break
        top, left = (first * per_pixel).tolist()
        bottom, right = torch.minimum((first + extent) * per_pixel, torch.tensor([H, W])).tolist()
        return {"box": (left, top, right, bottom), "rows": rows, "columns": columns, "scale": scale}

    def _is_mixed(self, labels: np.ndarray) -> bool:
        counts = np.bincount(labels.ravel(), minlength=256)[:IGNORE]
        return (counts > 0).sum() > 1 and counts.max() <= self.most * counts.sum()

    def transform(self, inpt, params: dict):
        if isinstance(inpt, tv_tensors.Mask):
            cut = inpt.as_subclass(Tensor)[params["rows"]].index_select(1, params["columns"])
            return tv_tensors.Mask(cut)
        extent = len(params["columns"]), len(params["rows"])
        return inpt.resize(extent, Image.Resampling.BILINEAR, box=params["box"])


class PadTo(v2.Transform):
    """Pad to a square at the right and below, with MEAN_COLOUR and 255."""

    _transformed_types = (Image.Image, tv_tensors.Mask)

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def transform(self, inpt, params: dict):
        height, width = F.get_size(inpt)
        fill = IGNORE if isinstance(inpt, tv_tensors.Mask) else list(MEAN_COLOUR)
        return F.pad(inpt, [0, 0, self.size - width, self.size - height], fill=fill)


class PhotometricDistortion(v2.Transform):
    """Brightness ±32 of 255, contrast and saturation × U(0.5, 1.5), hue ± a tenth of the circle; each half the time.

    Contrast comes before saturation and hue or after them, by chance. Values are cut off to 0-255 after each step.
    """

    _transformed_types = (Image.Image,)

    def make_params(self, flat_inputs: list) -> dict:
        brightness, contrast, late, saturation, hue = (torch.rand(5) < 0.5).tolist()
        return {
            "brightness": _uniform(-32, 32) if brightness else 0.0,
            "contrast": _uniform(0.5, 1.5) if contrast else 1.0,
            "late": late,
            "saturation": _uniform(0.5, 1.5) if saturation else 1.0,
            "hue": round(_uniform(-25.6, 25.6)) if hue else 0,
        }

    def transform(self, inpt: Image.Image, params: dict) -> Image.Image:
        levels = np.arange(256)
        table = (levels + params["brightness"]).clip(0, 255).astype(int)
        contrast = (levels * params["contrast"]).clip(0, 255).astype(int)
        if not params["late"]:
            table = contrast[table]
        image = _look_up(inpt, table, table, table)
        if params["saturation"] != 1 or params["hue"]:
            saturation = (levels * params["saturation"]).clip(0, 255).astype(int)
            image = _look_up(image.convert("HSV"), (levels + params["hue"]) % 256, saturation, levels).convert("RGB")
        return _look_up(image, contrast, contrast, contrast) if params["late"] else image


def _look_up(image: Image.Image, *tables: np.ndarray) -> Image.Image:
    """Replace each level of each channel by its entry in that channel's table of 256."""
    if all((table == np.arange(256)).all() for table in tables):
        return image
    return image.point(np.concatenate(tables).tolist())


def recipe(size: int) -> v2.Transform:
    """ZegCLIP's training augmentation, which SPT-SEG follows: (PIL image, Mask) -> the same, size × size."""
    return v2.Compose([ScaledCrop(size), v2.RandomHorizontalFlip(), PhotometricDistortion(), PadTo(size)])


def augment(transform: v2.Transform, image: Image.Image, mask_HW: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Apply a transform, its chance fixed by `seed` alone: image (3, H, W) float in [0, 1], mask (H, W) uint8.

    The caller's random numbers are left as they were.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        image, mask_HW = transform(image, tv_tensors.Mask(mask_HW))
    pixels_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels_3HW.to(torch.float32, memory_format=torch.contiguous_format).div_(255), mask_HW.as_subclass(Tensor)

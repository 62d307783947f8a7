"""One object an image: the sign of the Fiedler vector, as a mask and as a box."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor
from torchvision.ops import box_iou

# Neighbours within an image, none between images: components of a whole batch in one call.
_WITHIN = np.stack([np.zeros((3, 3)), ndimage.generate_binary_structure(2, 1), np.zeros((3, 3))]).astype(bool)


class Located(NamedTuple):
    """mask_Bhw, y₁ > 0 on the patch grid; box_B4, (left, top, right, bottom) in pixels, of its largest component."""

    mask_Bhw: Tensor
    box_B4: Tensor


def _components(mask_BHW: Tensor) -> tuple[np.ndarray, int]:
    return ndimage.label(mask_BHW.cpu().numpy().astype(bool), structure=_WITHIN)


def largest_component(mask_BHW: Tensor) -> Tensor:
    """The largest part of each mask whose pixels touch by their sides: (B, H, W) bool -> the same."""
    part_BHW, parts = _components(mask_BHW)
    if not parts:
        return mask_BHW.bool()
    size = np.bincount(part_BHW.ravel(), minlength=parts + 1)
    size[0] = 0
    size_BHW = size[part_BHW]
    # Of two parts of one size, the first.
    top_B = size_BHW.reshape(len(part_BHW), -1).argmax(1)
    chosen_B = part_BHW.reshape(len(part_BHW), -1)[np.arange(len(top_B)), top_B]
    return torch.from_numpy((part_BHW == chosen_B[:, None, None]) & (part_BHW > 0)).to(mask_BHW.device)


def mask_boxes(mask_BHW: Tensor, scale: int = 1) -> Tensor:
    """Boxes around masks, (left, top, right, bottom) in pixels of `scale`: (B, H, W) -> (B, 4); zeros if empty."""

    def span(any_BL: Tensor) -> tuple[Tensor, Tensor]:
        line = any_BL.float()
        return line.argmax(1), any_BL.shape[1] - line.flip(1).argmax(1)

    left, right = span(mask_BHW.any(1))
    top, bottom = span(mask_BHW.any(2))
    box_B4 = torch.stack([left, top, right, bottom], dim=1) * scale
    return torch.where(mask_BHW.flatten(1).any(1)[:, None], box_B4, 0).float()


def localise(vectors_BkN: Tensor, grid: tuple[int, int], patch: int) -> Located:
    """The object where the second eigenvector is positive    [Deep Spectral Methods, 3.2]

    Shapes: eigenvectors (B, k, N), k >= 2, of a grid of h × w patches of `patch` pixels.
    A vector without a sign (all zero, as of a graph with one patch) gives an empty mask and a box of zeros.
    """
    if vectors_BkN.shape[1] < 2 or vectors_BkN.shape[2] != grid[0] * grid[1]:
        raise ValueError(
            f"Eigenvectors {tuple(vectors_BkN.shape[1:])} do not fit a grid of {grid}: the Fiedler vector is the "
            "second of at least two, with one entry a patch."
        )
    mask_Bhw = (vectors_BkN[:, 1] > 0).unflatten(1, grid)
    return Located(mask_Bhw, mask_boxes(largest_component(mask_Bhw), patch))


def object_masks(vectors_BkN: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Single-object masks on pixels: the patches where the Fiedler vector is positive: -> (B, H, W) bool.

    The mask is enlarged, not the vector: its values on a small object are far larger than those around it, and a vector
    interpolated bilinearly turns positive well outside the object. Outlines are the CRF's work.
    """
    positive_B1hw = (vectors_BkN[:, 1] > 0).unflatten(1, grid)[:, None]
    return F.interpolate(positive_B1hw.float(), size=size, mode="nearest")[:, 0] > 0


def true_boxes(label_BHW: Tensor, classes: range) -> list[Tensor]:
    """Boxes of the connected parts of the classes that count as objects: (B, H, W) ids -> B tensors (T, 4).

    Two things of one class that touch are one part: a label map cannot tell them apart. Parts under 0.2 % of the
    picture are left out.
    """
    least = 0.002 * label_BHW[0].numel()
    boxes = [[] for _ in label_BHW]
    for k in classes:
        part_BHW, parts = _components(label_BHW == k)
        sizes = np.bincount(part_BHW.ravel(), minlength=parts + 1)
        for part, place in enumerate(ndimage.find_objects(part_BHW), start=1):
            if sizes[part] >= least:
                image, rows, columns = place
                boxes[image.start].append([columns.start, rows.start, columns.stop, rows.stop])
    return [torch.tensor(own, dtype=torch.float32).view(-1, 4) for own in boxes]


def corloc(box_B4: Tensor, truth: list[Tensor], least: float = 0.5) -> float:
    """Share of images whose box has an IoU of at least `least` with one of its true boxes.

    truth: B tensors (T, 4). Images without an object do not count. Raises: ValueError where none has one.
    """
    hits = [bool((box_iou(box[None], own) >= least).any()) for box, own in zip(box_B4.cpu().float(), truth) if len(own)]
    if not hits:
        raise ValueError(
            f"None of the {len(truth)} image(s) has a true box: CorLoc is not defined; give images with one."
        )
    return sum(hits) / len(hits)


def mask_iou(predicted_BHW: Tensor, truth_BHW: Tensor) -> Tensor:
    """Intersection over union of two masks an image: (B, H, W) bool twice -> (B,); 1 where both are empty."""
    both_B = (predicted_BHW & truth_BHW).flatten(1).sum(1)
    either_B = (predicted_BHW | truth_BHW).flatten(1).sum(1)
    return torch.where(either_B > 0, both_B / either_B.clamp(min=1), 1.0)

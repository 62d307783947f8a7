"""Soft segments: eigenvectors at the resolution of pixels, and mattes drawn from coarse masks.

PyMatting compiles itself on first import (half a minute), so it is imported only where it is called.
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .affinity import pixel_affinity
from .eigen import Eigen, laplacian_eigenvectors


def soft_segments(
    feature_BhwC: Tensor, image_B3HW: Tensor, count: int = 5, colour_weight: float = 10.0, **solver
) -> Eigen:
    """Eigenvectors of colours and features together, one entry a pixel    [Deep Spectral Methods, matting]

    Shapes: features (B, h, w, C), image (B, 3, H, W) in [0, 1] -> vectors (B, count, H·W). The affinity of patches is
    carried to pixels (`pixel_affinity`) and weighted so that the two terms keep the balance λ that they have on
    patches: a patch's edges are shared by its pixels, so their weight grows with the number of pixels a patch.
    solver: further arguments of `laplacian_eigenvectors`.
    """
    pixels_a_patch = image_B3HW[0, 0].numel() / (feature_BhwC.shape[1] * feature_BhwC.shape[2])
    return laplacian_eigenvectors(
        pixel_affinity(feature_BhwC, image_B3HW, colour_weight * pixels_a_patch), count, **solver
    )


def soft_memberships(vectors_BkN: Tensor, segment_BN: Tensor, sharpness: float = 8.0) -> Tensor:
    """How much of each pixel belongs to each segment: (B, k, N), ids (B, N) -> (B, S, N), summing to 1.

    A softmax of the distances, in eigenvector space, to the segments' means; sharpness in units of their spread.
    """
    S = int(segment_BN.max()) + 1
    point_BkN = vectors_BkN[:, 1:] / vectors_BkN[:, 1:].std(-1, keepdim=True).clamp(min=1e-12)
    own_BSN = torch.nn.functional.one_hot(segment_BN, S).transpose(1, 2).to(point_BkN)
    mean_BSk = own_BSN @ point_BkN.transpose(1, 2) / own_BSN.sum(-1, keepdim=True).clamp(min=1)
    distance_BSN = torch.cdist(mean_BSk, point_BkN.transpose(1, 2)).square()
    empty_BS1 = own_BSN.sum(-1, keepdim=True) == 0
    return (-sharpness * distance_BSN / point_BkN.shape[1]).masked_fill(empty_BS1, -torch.inf).softmax(1)


def trimap(mask_HW: Tensor, unsure: int) -> np.ndarray:
    """1 where a mask surely holds, 0 where it surely does not, 0.5 in a band of `unsure` pixels on either side.

    Raises: ValueError where nothing sure is left on one side: matting would have nothing to start from.
    """
    mask = mask_HW.cpu().numpy().astype(bool)
    inside = ndimage.binary_erosion(mask, iterations=unsure, border_value=1)
    outside = ndimage.binary_erosion(~mask, iterations=unsure, border_value=1)
    if not inside.any() or not outside.any():
        raise ValueError(
            f"A band of {unsure} pixels leaves no sure {'foreground' if outside.any() else 'background'} of this mask "
            f"({mask.mean():.1%} of the picture); use a narrower band or another mask."
        )
    return np.where(inside, 1.0, np.where(outside, 0.0, 0.5))


def matte(image_3HW: Tensor, mask_HW: Tensor, unsure: int = 8) -> tuple[Tensor, Tensor]:
    """Closed-form matting of a coarse mask: image (3, H, W) in [0, 1], mask (H, W) bool -> α (H, W), front (3, H, W).

    unsure: half-width, in pixels, of the band around the outline where α is found; a patch's side is a good choice.
    """
    from pymatting import estimate_alpha_cf, estimate_foreground_ml

    pixels = image_3HW.permute(1, 2, 0).cpu().double().numpy()
    alpha_HW = estimate_alpha_cf(pixels, trimap(mask_HW, unsure))
    foreground = estimate_foreground_ml(pixels, alpha_HW)
    return torch.from_numpy(alpha_HW).float(), torch.from_numpy(foreground).float().permute(2, 0, 1)

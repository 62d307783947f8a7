"""Dense CRF refinement: coarse masks take the outlines of the image's colours.

Energy: −log p of each pixel's label, and for each pair of pixels with different labels
    10 · exp(−|place|²/2·80² − |colour|²/2·13²) + 3 · exp(−|place|²/2·3²),
places in pixels, colours from 0 to 255 (the released settings), minimised by five mean-field steps.
"""

import importlib.util
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

Method = Literal["auto", "pydensecrf", "cells"]


class CrfSettings(NamedTuple):
    bilateral_weight: float = 10.0
    bilateral_place: float = 80.0  # pixels
    bilateral_colour: float = 13.0  # of 255
    spatial_weight: float = 3.0
    spatial_place: float = 3.0  # pixels
    iterations: int = 5
    confidence: float = 0.7  # probability of the coarse label; the rest is shared among the others


RELEASED = CrfSettings()


def refine(label_BHW: Tensor, image_B3HW: Tensor, settings: CrfSettings = RELEASED, method: Method = "auto") -> Tensor:
    """Refine label maps with a dense CRF: (B, H, W) int64 from 0, image (B, 3, H, W) in [0, 1] -> (B, H, W).

    method: "pydensecrf" is the well-known library (optional: `pip install pydensecrf2`); "cells" needs none: the
    bilateral kernel is evaluated between the cells of a grid over place and colour instead of between pixels; "auto"
    takes the library where it is installed. A label that would disappear altogether keeps its coarse pixels.
    Raises: ImportError when pydensecrf is asked for and missing; ValueError where labels and image differ in size.
    """
    if label_BHW.shape != (len(image_B3HW), *image_B3HW.shape[-2:]):
        raise ValueError(
            f"Labels {tuple(label_BHW.shape)} and images {tuple(image_B3HW.shape)} differ in size. Outlines would be "
            "drawn in the wrong place; interpolate the labels to the image first."
        )
    installed = importlib.util.find_spec("pydensecrf") is not None
    if method == "pydensecrf" and not installed:
        raise ImportError(
            "pydensecrf is not installed, so this CRF cannot run. `pip install pydensecrf2` builds it (30 s of C++), "
            "or use method='cells', which needs nothing."
        )
    solve = _with_library if installed and method != "cells" else _with_cells
    labels = int(label_BHW.max()) + 1
    if labels == 1:
        return label_BHW.clone()
    other = (1 - settings.confidence) / (labels - 1)
    refined = []
    for label_HW, image_3HW in zip(label_BHW, image_B3HW):
        sure_KHW = F.one_hot(label_HW, labels).permute(2, 0, 1).float()
        p_KHW = sure_KHW * (settings.confidence - other) + other
        new_HW = solve(p_KHW, image_3HW, settings).to(label_HW)
        for gone in sorted(set(label_HW.unique().tolist()) - set(new_HW.unique().tolist())):
            new_HW = torch.where(label_HW == gone, gone, new_HW)
        refined.append(new_HW)
    return torch.stack(refined)


def _with_library(p_KHW: Tensor, image_3HW: Tensor, settings: CrfSettings) -> Tensor:
    import pydensecrf.densecrf as dcrf

    K, H, W = p_KHW.shape
    crf = dcrf.DenseCRF2D(W, H, K)
    crf.setUnaryEnergy(np.ascontiguousarray(-p_KHW.flatten(1).cpu().log().numpy()))
    colours = np.ascontiguousarray((image_3HW.permute(1, 2, 0).cpu() * 255).round().byte().numpy())
    crf.addPairwiseGaussian(sxy=settings.spatial_place, compat=settings.spatial_weight)
    crf.addPairwiseBilateral(
        sxy=settings.bilateral_place, srgb=settings.bilateral_colour, rgbim=colours, compat=settings.bilateral_weight
    )
    return torch.from_numpy(np.array(crf.inference(settings.iterations))).argmax(0).view(H, W)


def _with_cells(p_KHW: Tensor, image_3HW: Tensor, settings: CrfSettings, most: int = 2048) -> Tensor:
    """Mean field with K ≈ S Kc Sᵀ: S gives each pixel its cell, Kc is the kernel between the cells' means."""
    K, H, W = p_KHW.shape
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    place_P2 = torch.stack([y, x], dim=-1).flatten(0, 1).to(image_3HW) / settings.bilateral_place
    colour_P3 = image_3HW.flatten(1).T.float() * 255 / settings.bilateral_colour
    point_P5 = torch.cat([place_P2, colour_P3], dim=1)  # in units of the kernel's widths
    width = 0.5
    while True:
        place_P5 = (point_P5 / width).floor().long()
        place_P5 = place_P5 - place_P5.amin(0)
        # One number a cell: rows as such take eight times as long to compare.
        step_5 = F.pad((place_P5.amax(0)[:-1] + 1).cumprod(0), (1, 0), value=1)
        cell_P = torch.unique((place_P5 * step_5).sum(1), return_inverse=True)[1]
        cells = int(cell_P.max()) + 1
        if cells <= most:
            break
        width *= 1.25  # noisy pictures fill more cells than a kernel matrix should have
    size_G = torch.bincount(cell_P, minlength=cells).float()
    mean_G5 = torch.zeros(cells, 5).index_add_(0, cell_P, point_P5) / size_G[:, None]
    kernel_GG = torch.cdist(mean_G5, mean_G5).square_().mul_(-0.5).exp_()
    root_G = (kernel_GG @ size_G).rsqrt()  # symmetric normalisation: each pixel's weights sum to about 1

    def bilateral(q_KP: Tensor) -> Tensor:
        in_cells_GK = torch.zeros(cells, K).index_add_(0, cell_P, q_KP.T)
        return ((root_G[:, None] * (kernel_GG @ (root_G[:, None] * in_cells_GK)))[cell_P]).T

    def spatial(q_KP: Tensor) -> Tensor:
        kernel = min(2 * round(3 * settings.spatial_place) + 1, 2 * min(H, W) - 1)
        return gaussian_blur(q_KP.view(K, H, W), [kernel, kernel], [settings.spatial_place] * 2).flatten(1)

    unary_KP = p_KHW.flatten(1).log()
    q_KP = unary_KP.softmax(0)
    for _ in range(settings.iterations):
        message = settings.bilateral_weight * bilateral(q_KP) + settings.spatial_weight * spatial(q_KP)
        q_KP = (unary_KP + message).softmax(0)
    return q_KP.argmax(0).view(H, W)

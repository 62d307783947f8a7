"""Which patches belong together: by their features, by their colours, or both."""

import os
from typing import Literal

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

from .operators import Affinity, DenseAffinity, FeatureAffinity, LiftedAffinity, SparseAffinity, SumAffinity

# Two graphs: nearest in colour and place, and nearest in colour almost alone, (neighbours, weight of the place).
NEIGHBOURS = ((20, 2.0), (10, 0.1))
Storage = Literal["auto", "dense", "matrix-free"]


def _check_finite(x: Tensor, what: str) -> None:
    if not x.isfinite().all():
        raise ValueError(
            f"{int((~x.isfinite()).sum())} of {x.numel()} {what} are NaN or infinite. Every eigenvector would be NaN; "
            "find out where they come from before cutting the graph."
        )


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on a device, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def feature_affinity(feature_BhwC: Tensor, clipped: bool = True, storage: Storage = "auto") -> Affinity:
    """W = f fᵀ of unit features, negative entries set to 0 unless `clipped` is off.

    Shapes: (B, h, w, C) of any length -> an Affinity with N = h·w nodes. The released code divides by the largest
    entry, which for unit features is the diagonal's 1. storage: "dense" holds N² numbers an image, "matrix-free"
    none of them; "auto" is dense where that takes at most a quarter of the free memory.
    Raises: ValueError for NaN; MemoryError where a dense W cannot fit.
    """
    _check_finite(feature_BhwC, "feature values")
    f_BNC = F.normalize(feature_BhwC.flatten(1, 2), dim=-1)
    B, N, C = f_BNC.shape
    size, free = B * N * N * f_BNC.element_size(), free_memory(f_BNC.device)
    if storage == "dense" and size > free:
        raise MemoryError(
            f"A dense affinity of {B} graph(s) with {N:,} nodes takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} "
            "GiB are free. Use storage='matrix-free', fewer patches or fewer images at once."
        )
    if storage == "matrix-free" or (storage == "auto" and (size > free / 4 or (not clipped and C < N / 4))):
        return FeatureAffinity(f_BNC, clipped)
    w_BNN = f_BNC @ f_BNC.transpose(1, 2)
    return DenseAffinity(w_BNN.relu_() if clipped else w_BNN)


def colour_affinity(image_B3hw: Tensor, neighbours: tuple[tuple[int, float], ...] = NEIGHBOURS) -> SparseAffinity:
    """W_knn: nearest neighbours over (r, g, b, ω·x, ω·y), every edge counted in both directions with weight 1.

    Shapes: image (B, 3, h, w) in [0, 1], one pixel a node -> B graphs of N = h·w nodes; x and y run from 0 to 1.
    Each node is a neighbour of its own, as in KNN matting. A graph with fewer nodes than k takes all of them.
    Raises: ValueError for NaN.
    """
    _check_finite(image_B3hw, "pixel values")
    B, _, h, w = image_B3hw.shape
    N = h * w
    colour_BN3 = image_B3hw.flatten(2).transpose(1, 2).cpu().double()
    x_N, y_N = torch.linspace(0, 1, w).repeat(h), torch.linspace(0, 1, h).repeat_interleave(w)
    place_BN2 = torch.stack([x_N, y_N], dim=-1).double().expand(B, N, 2)
    rows, columns = [], []
    for k, weight in neighbours:
        k = min(k, N)
        point_BN5 = torch.cat([colour_BN3, weight * place_BN2], dim=-1).numpy()
        near = list(range(1, k + 1))  # a list keeps the axis of a single neighbour
        # A tree an image: one for the batch, with a coordinate that keeps images apart, takes 1.4 times as long.
        nearest = [cKDTree(own).query(own, near, workers=torch.get_num_threads())[1] for own in point_BN5]
        rows.append(np.repeat(np.arange(B * N), k))
        columns.append((np.stack(nearest) + N * np.arange(B)[:, None, None]).ravel())
    i, j = np.concatenate(rows + columns), np.concatenate(columns + rows)
    ones = np.ones(len(i), dtype=np.float32)
    matrix = scipy.sparse.coo_array((ones, (i, j)), shape=(B * N, B * N)).tocsr()
    return SparseAffinity(matrix, (B, N), image_B3hw.new_zeros((), dtype=torch.float32))


def combine(features: Affinity, colours: SparseAffinity | None, colour_weight: float) -> Affinity:
    """W = W_feat + λ W_knn; raises ValueError where the two graphs differ or λ is negative."""
    if colour_weight < 0:
        raise ValueError(f"colour_weight={colour_weight} would push like colours apart; use 0 or more.")
    if colours is None or colour_weight == 0:
        return features
    if features.shape != colours.shape:
        raise ValueError(
            f"The features have {features.shape} (images, nodes) and the colours {colours.shape}. Edges would join "
            "other patches than those meant; resize the image to one pixel a node."
        )
    return SumAffinity(features, colours, colour_weight)


def image_affinity(
    feature_BhwC: Tensor,
    image_B3HW: Tensor | None = None,
    colour_weight: float = 0.0,
    clipped: bool = True,
    storage: Storage = "auto",
) -> Affinity:
    """The whole affinity of images: features, and the colours of the image averaged over each patch.

    Shapes: features (B, h, w, C), image (B, 3, H, W) of any size in [0, 1].
    Raises: ValueError as `feature_affinity`, or where colours are weighted and no image is given.
    """
    features = feature_affinity(feature_BhwC, clipped, storage)
    if not colour_weight:
        return features
    if image_B3HW is None:
        raise ValueError(f"colour_weight={colour_weight} needs the image and none was given; pass it or use 0.")
    small_B3hw = F.interpolate(image_B3HW.float(), size=feature_BhwC.shape[1:3], mode="area")
    return combine(features, colour_affinity(small_B3hw), colour_weight)


def pixel_affinity(feature_BhwC: Tensor, image_B3HW: Tensor, colour_weight: float) -> Affinity:
    """W of all pixels: the clipped affinity of the patches, carried to pixels bilinearly, and the pixels' own colours.

    W = U max(f fᵀ, 0) Uᵀ + λ W_knn; U interpolates. f fᵀ itself could not be stored, nor could its clipped part be
    made anew for each product in reasonable time. CPU only.
    Shapes: features (B, h, w, C), image (B, 3, H, W) in [0, 1] -> B graphs of H·W nodes.
    """
    B, h, w, _ = feature_BhwC.shape
    rows, columns = (_stretch(new, old) for new, old in zip(image_B3HW.shape[-2:], (h, w)))
    up = scipy.sparse.block_diag([scipy.sparse.kron(rows, columns)] * B, format="csr").astype(np.float32)
    lifted = LiftedAffinity(feature_affinity(feature_BhwC.float()), scipy.sparse.csr_array(up))
    return combine(lifted, colour_affinity(image_B3HW) if colour_weight else None, colour_weight)


def _stretch(new: int, old: int) -> scipy.sparse.csr_array:
    """Bilinear interpolation of one axis as a matrix, cell centres kept in place: (new, old)."""
    at = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    left = np.floor(at).astype(int).clip(max=max(old - 2, 0))
    right = np.minimum(left + 1, old - 1)
    share = at - left
    i = np.arange(new)
    return scipy.sparse.csr_array(
        (np.concatenate([1 - share, share]), (np.concatenate([i, i]), np.concatenate([left, right]))), shape=(new, old)
    )

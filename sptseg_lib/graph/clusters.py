"""From segments to classes: all segments of a data set embedded, clustered, and the clusters named for scoring."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from .features import Featurizer
from .objects import mask_boxes
from .regions import background_segment, segment_masks


class Segments(NamedTuple):
    """R segments of a data set: their image_R, their id_R within it, and their unit features feature_RE."""

    image_R: Tensor
    id_R: Tensor
    feature_RE: Tensor


def embed_segments(
    featurizer: Featurizer,
    image_B3HW: Tensor,
    segment_Bhw: Tensor,
    background: bool = True,
    erode: int = 2,
    dilate: int = 5,
    crop: int | None = None,
    batch: int = 64,
) -> Segments:
    """Crop the box of each segment from its image, and describe the crop by its class token.

    Shapes: images (B, 3, H, W) in [0, 1], segments (B, h, w) as `segment` gives them. With `background`, the segment
    that touches the border most is left out. erode, dilate: how many patches the mask loses and then gains before its
    box is taken (released: 2 and 5, for grids of about 30 patches; use 0 and 1 for 16); where erosion leaves nothing
    the mask is kept. crop: side of the crops in pixels; None: that of the images, cut to whole patches.
    Raises: ValueError where no segment is left.
    """
    B, _, H, W = image_B3HW.shape
    mask_BShw = segment_masks(segment_Bhw)
    if background:
        mask_BShw[torch.arange(B), background_segment(segment_Bhw)] = False
    image_R, id_R = mask_BShw.flatten(2).any(2).nonzero(as_tuple=True)
    if not len(image_R):
        raise ValueError(
            f"The {B} image(s) have no segment besides the background: there is nothing to cluster. "
            "Ask for more segments."
        )
    box_R4 = mask_boxes(_opened(mask_BShw[image_R, id_R], erode, dilate))
    scale_2 = torch.tensor([W / segment_Bhw.shape[2], H / segment_Bhw.shape[1]])
    box_R4 = (box_R4.view(-1, 2, 2) * scale_2).round().long().view(-1, 4)
    side = crop or min(H, W) // featurizer.patch * featurizer.patch
    crops = [
        F.interpolate(image_B3HW[b : b + 1, :, top:bottom, left:right], (side, side), mode="bilinear", antialias=True)
        for b, (left, top, right, bottom) in zip(image_R.tolist(), box_R4.tolist())
    ]
    feature = [featurizer.describe(torch.cat(crops[i : i + batch])) for i in range(0, len(crops), batch)]
    return Segments(image_R, id_R, torch.cat(feature))


def _opened(mask_Rhw: Tensor, erode: int, dilate: int) -> Tensor:
    within = ndimage.generate_binary_structure(2, 1)[None]
    mask = mask_Rhw.numpy()
    if erode:
        eroded = ndimage.binary_erosion(mask, within, iterations=erode)
        mask = eroded | (mask & ~eroded.any((1, 2), keepdims=True))
    if dilate:
        mask = ndimage.binary_dilation(mask, within, iterations=dilate)
    return torch.from_numpy(mask)


def cluster_segments(feature_RE: Tensor, classes: int, components: int = 32, seed: int = 0) -> Tensor:
    """PCA, then k-means: unit features (R, E) -> clusters (R,) from 0 to classes − 1.

    Raises: ValueError for fewer segments than classes.
    """
    R, E = feature_RE.shape
    if not 1 <= classes <= R:
        raise ValueError(
            f"{R} segment(s) cannot form {classes} clusters, some of which would be empty; use "
            "more images or fewer classes."
        )
    short_RC = PCA(min(components, R, E), random_state=seed).fit_transform(feature_RE.cpu().numpy())
    return torch.from_numpy(KMeans(classes, n_init=10, random_state=seed).fit(short_RC).labels_).long()


def paint(segment_Bhw: Tensor, segments: Segments, cluster_R: Tensor) -> Tensor:
    """Pseudo labels: 0 for the background, 1 + cluster for the segments: -> (B, h, w) int64."""
    table_BS = torch.zeros(len(segment_Bhw), int(segment_Bhw.max()) + 1, dtype=torch.int64)
    table_BS[segments.image_R, segments.id_R] = cluster_R + 1
    return table_BS.gather(1, segment_Bhw.flatten(1)).view_as(segment_Bhw)


def match_clusters(confusion_KK: Tensor, fixed: tuple[int, ...] = ()) -> Tensor:
    """The one-to-one naming of clusters by classes with the highest mean IoU (Hungarian method).

    confusion_KK: pixels by true class (rows) and cluster (columns). fixed: ids that name themselves, as 0 for a
    background that both share. Returns class_K: cluster j is called class_K[j].
    """
    hit = confusion_KK.double()
    either = hit.sum(1, keepdim=True) + hit.sum(0, keepdim=True) - hit
    iou = hit / either.clamp(min=1)
    free = [k for k in range(len(iou)) if k not in fixed]
    row, column = linear_sum_assignment(iou[free][:, free].numpy(), maximize=True)
    class_K = torch.arange(len(iou))
    class_K[torch.tensor(free)[column]] = torch.tensor(free)[row]
    return class_K

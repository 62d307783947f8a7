"""Several segments an image: k-means on its first eigenvectors."""

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor


def eigengap(values_Bk: Tensor, most: int | None = None) -> Tensor:
    """How many segments an image has: the number of small eigenvalues before the largest gap, at least 2: (B,).

    A graph of s separate parts has s eigenvalues 0; nearly separate parts leave a gap after the s-th.
    Raises: ValueError for fewer than three eigenvalues.
    """
    if values_Bk.shape[1] < 3:
        raise ValueError(f"{values_Bk.shape[1]} eigenvalue(s) leave no gaps to compare; ask for at least 3.")
    gap_Bk = values_Bk.diff(dim=1)[:, 1 : None if most is None else most]  # after 2, 3, ... eigenvalues
    return gap_Bk.argmax(1) + 2


def segment(
    vectors_BkN: Tensor,
    grid: tuple[int, int],
    count: int | Tensor,
    seed: int = 0,
    eigenvectors: int | None = None,
    unit_rows: bool = False,
) -> Tensor:
    """Segments by k-means on the eigenvectors after the constant one: (B, k, N) -> (B, h, w) int64, ids from 0.

    count: segments, one number for all images or one each (as `eigengap` gives); eigenvectors: how many to use after
    the constant one. None: one fewer than segments, since nearly separate parts show in as many small eigenvalues as
    there are parts; further vectors cut within them. Each vector is scaled to a mean square of 1 first.
    unit_rows: give each patch's entries, the constant 1 among them, unit length (Ng, Jordan and Weiss): then a patch
    with a huge entry is near one with a large entry, and small objects are not cut into pieces.
    An image whose vectors hold fewer distinct points (to 0.001) than `count` gets as many segments as there are points.
    Raises: ValueError where no eigenvector is left, or count is outside 1 to N.
    """
    B, k, N = vectors_BkN.shape
    count_B = torch.as_tensor(count).expand(B).tolist()
    if k < 2 or N != grid[0] * grid[1] or not all(1 <= c <= N for c in count_B):
        raise ValueError(
            f"{count_B} segments of a {grid} grid cannot come from eigenvectors {tuple(vectors_BkN.shape)}: k-means "
            "needs at least one vector besides the constant one, one entry a patch, and 1 to N segments."
        )
    scaled_BkN = vectors_BkN[:, 1:].cpu().double()
    scaled_BkN = scaled_BkN / scaled_BkN.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    labels = []
    for scaled_kN, own in zip(scaled_BkN, count_B):
        point_Nk = scaled_kN[: eigenvectors or max(1, own - 1)].T
        if unit_rows:
            point_Nk = F.normalize(F.pad(point_Nk, (1, 0), value=1.0), dim=1)
        distinct = len(torch.unique(point_Nk.round(decimals=3), dim=0))
        means = KMeans(min(own, distinct), n_init=4, random_state=seed).fit(point_Nk.numpy())
        labels.append(torch.from_numpy(means.labels_).long())
    return torch.stack(labels).unflatten(1, grid)


def background_segment(segment_Bhw: Tensor) -> Tensor:
    """Which segment of each image touches the border most: (B, h, w) -> (B,)."""
    top, bottom, left, right = (
        segment_Bhw[:, 0],
        segment_Bhw[:, -1],
        segment_Bhw[:, 1:-1, 0],
        segment_Bhw[:, 1:-1, -1],
    )
    border_BP = torch.cat([top, bottom, left, right], dim=1)
    return F.one_hot(border_BP, int(segment_Bhw.max()) + 1).sum(1).argmax(1)


def segment_masks(segment_Bhw: Tensor) -> Tensor:
    """One mask a segment: (B, h, w) ids -> (B, S, h, w) bool, S the largest number of segments of an image.

    These are class-agnostic proposals; masks of segments that an image does not have are empty.
    """
    return F.one_hot(segment_Bhw, int(segment_Bhw.max()) + 1).permute(0, 3, 1, 2).bool()

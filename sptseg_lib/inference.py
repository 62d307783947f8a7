"""From mask logits to label maps: sliding windows, the seen-class shift, argmax."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side, in pixels; the last one ends at the border, none beyond it."""
    if length <= window:
        return [0]
    return [*range(0, length - window, stride), length - window]


@torch.inference_mode()
def class_probabilities(
    score: Callable[[Tensor], Tensor], image_B3HW: Tensor, window: int, patch: int, stride: int = 0
) -> Tensor:
    """Class probabilities of images of any size: (B, 3, H, W) -> (B, K, H, W).

    score: maps (B, 3, h', w') to probabilities (B, K, ·, ·) on any grid; windows overlap (stride
    pixels apart, 0: five sixths of a window) and their probabilities are averaged. Sides shorter
    than a window are used whole, padded by their own border to a multiple of the patch.
    Raises: ValueError for an image smaller than a patch.
    """
    height, width = image_B3HW.shape[-2:]
    if min(height, width) < patch:
        raise ValueError(
            f"An image of {height}×{width} pixels is smaller than one {patch}×{patch} patch. "
            "There would be nothing to classify; enlarge it first."
        )
    stride = stride or max(1, window * 5 // 6)
    if stride > window:
        raise ValueError(
            f"A stride of {stride} pixels leaves gaps between windows of {window}. Pixels there would get no "
            f"class; choose at most {window}."
        )
    rows, columns = window_starts(height, window, stride), window_starts(width, window, stride)
    total, weight = None, image_B3HW.new_zeros(1, 1, height, width)
    for top in rows:
        for left in columns:
            piece = image_B3HW[..., top : top + window, left : left + window]
            h, w = piece.shape[-2:]
            padded = F.pad(piece, (0, -w % patch, 0, -h % patch), mode="replicate")
            probability = F.interpolate(score(padded), size=padded.shape[-2:], mode="bilinear")[..., :h, :w]
            if len(rows) == len(columns) == 1:
                return probability
            if total is None:
                total = probability.new_zeros(*probability.shape[:2], height, width)
            total[..., top : top + window, left : left + window] += probability
            weight[..., top : top + window, left : left + window] += 1
    return total / weight


def label_maps(probability_BKHW: Tensor, seen_ids: tuple[int, ...], gammas: list[float]) -> Tensor:
    """Label maps for each seen-class shift: (B, K, H, W), G shifts -> (G, B, H, W) int64.

    argmax over classes of p − γ·[seen]. The best seen and the best unseen class are found once;
    a shift only decides between the two.
    """
    classes = probability_BKHW.shape[1]
    seen_K = torch.zeros(classes, dtype=torch.bool, device=probability_BKHW.device)
    seen_K[list(seen_ids)] = True
    best = {}
    for is_seen in (True, False):
        ids = (seen_K == is_seen).nonzero().flatten()
        if len(ids):
            top_BHW, at_BHW = probability_BKHW[:, ids].max(1)
            best[is_seen] = top_BHW, ids[at_BHW]
    if len(best) == 1:
        return next(iter(best.values()))[1].expand(len(gammas), -1, -1, -1)
    (p_seen, id_seen), (p_unseen, id_unseen) = best[True], best[False]
    shift_G111 = torch.tensor(gammas, device=p_seen.device).view(-1, 1, 1, 1)
    return torch.where(p_seen - shift_G111 >= p_unseen, id_seen, id_unseen)

"""From mask logits to label maps: sliding windows, the seen-class shift, argmax."""

from collections.abc import Callable
from typing import NamedTuple

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


class Best(NamedTuple):
    """The best seen and the best unseen class of every pixel, probabilities and ids; −∞ where there is none."""

    seen_BHW: Tensor
    seen_id_BHW: Tensor
    unseen_BHW: Tensor
    unseen_id_BHW: Tensor


def best_classes(probability_BKHW: Tensor, seen_K: Tensor) -> Best:
    """What decides about every label, whatever the shift: probabilities (B, K, H, W), seen (K,) bool."""
    best = []
    for ids in (seen_K.nonzero().flatten(), (~seen_K).nonzero().flatten()):
        if len(ids):
            top_BHW, at_BHW = probability_BKHW[:, ids].max(1)
            best += [top_BHW, ids[at_BHW]]
        else:
            none_BHW = torch.full_like(probability_BKHW[:, 0], -torch.inf)
            best += [none_BHW, torch.zeros_like(none_BHW, dtype=torch.int64)]
    return Best(*best)


def shift_seen(best: Best, gammas: list[float]) -> Tensor:
    """Label maps for each seen-class shift, argmax over classes of p − γ·[seen]: G shifts -> (G, B, H, W) int64."""
    shift_G111 = torch.tensor(gammas, device=best.seen_BHW.device).view(-1, 1, 1, 1)
    return torch.where(best.seen_BHW - shift_G111 >= best.unseen_BHW, best.seen_id_BHW, best.unseen_id_BHW)


def scaled_probabilities(
    score: Callable[[Tensor], Tensor], image_B3HW: Tensor, window: int, patch: int, stride: int = 0, short_side: int = 0
) -> Tensor:
    """`class_probabilities` of the image resized, and back at its own size: (B, 3, H, W) -> (B, K, H, W).

    The shorter side becomes `short_side` pixels, or the longer one four times as many where that is smaller;
    0 leaves the image as it is.
    """
    size = image_B3HW.shape[-2:]
    if short_side:
        scale = min(short_side / min(size), 4 * short_side / max(size))
        scaled = [max(1, round(side * scale)) for side in size]
        image_B3HW = F.interpolate(image_B3HW, size=scaled, mode="bilinear", antialias=True)
    probability_BKHW = class_probabilities(score, image_B3HW, window, patch, stride)
    if probability_BKHW.shape[-2:] == size:
        return probability_BKHW
    return F.interpolate(probability_BKHW, size=size, mode="bilinear")


def label_maps(probability_BKHW: Tensor, seen_ids: tuple[int, ...], gammas: list[float]) -> Tensor:
    """Label maps for each seen-class shift: (B, K, H, W), G shifts -> (G, B, H, W) int64.

    argmax over classes of p − γ·[seen]. The best seen and the best unseen class are found once;
    a shift only decides between the two.
    """
    seen_K = torch.zeros(probability_BKHW.shape[1], dtype=torch.bool, device=probability_BKHW.device)
    seen_K[list(seen_ids)] = True
    return shift_seen(best_classes(probability_BKHW, seen_K), gammas)

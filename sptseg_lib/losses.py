"""Losses on mask logits: focal, structural similarity and dice, without loops over classes or images."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

IGNORE = 255
PIXELS_AT_ONCE = 2**22  # of all planes together; beyond a few megabytes a larger piece is no faster


def one_hot_masks(label_BHW: Tensor, classes: int) -> Tensor:
    """(B, H, W) train ids -> (B, K, H, W) float; ignored pixels (255) belong to no class.

    Raises: ValueError for labels that are neither a class nor 255.
    """
    label_BHW = label_BHW.long()
    counted = label_BHW != IGNORE
    low, top = (int(x) for x in label_BHW.where(counted, torch.zeros_like(label_BHW)).aminmax())
    if low < 0 or top >= classes:
        top = low if low < 0 else top
        raise ValueError(
            f"A mask holds label {top}, but there are {classes} classes (0 to {classes - 1}). Its pixels would be "
            "learned as another class; map the labels to train ids first."
        )
    hot_BHWK = F.one_hot(label_BHW.where(counted, torch.full_like(label_BHW, classes)), classes + 1)
    return hot_BHWK[..., :classes].permute(0, 3, 1, 2).float()


class _InPieces(torch.autograd.Function):
    """Σ over pieces of planes, each with its gradient taken at once, so that only one piece's graph is ever held."""

    @staticmethod
    def forward(ctx, sum_of: Callable, x_PHW: Tensor, *others: Tensor) -> Tensor:
        planes = max(1, PIXELS_AT_ONCE // max(1, x_PHW[0].numel()))
        gradient = torch.empty_like(x_PHW) if ctx.needs_input_grad[1] else None
        total = x_PHW.new_zeros(())
        for start in range(0, len(x_PHW), planes):
            piece, *rest = (t[start : start + planes] for t in (x_PHW.detach(), *others))
            with torch.set_grad_enabled(gradient is not None):
                value = sum_of(piece.requires_grad_(gradient is not None), *rest)
            if gradient is not None:
                gradient[start : start + planes] = torch.autograd.grad(value, piece)[0]
            total += value.detach()
        ctx.gradient, ctx.others = gradient, len(others)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return None, ctx.gradient * upstream, *[None] * ctx.others


def sum_in_pieces(sum_of: Callable[..., Tensor], x_BKHW: Tensor, *others_BKHW: Tensor) -> Tensor:
    """sum_of(x, *others) over all planes, differentiable with respect to x: (B, K, H, W) each -> scalar.

    sum_of takes (P, H, W) tensors and adds up over planes; it is called on a few planes at a time. A loss keeps
    a dozen full-size masks for its gradient; this way it keeps one.
    """
    return _InPieces.apply(sum_of, x_BKHW.flatten(0, 1), *(t.expand_as(x_BKHW).flatten(0, 1) for t in others_BKHW))


def focal_loss(
    logits_BKHW: Tensor, target_BKHW: Tensor, counted_B1HW: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss: mean over counted pixels, summed over masks, divided by (image, present class) pairs."""
    pixels_B111 = counted_B1HW.sum(dim=(2, 3), keepdim=True).clamp(min=1)

    def focal(logits_PHW: Tensor, target_PHW: Tensor, weight_PHW: Tensor) -> Tensor:
        return (sigmoid_focal_loss(logits_PHW, target_PHW, alpha=alpha, gamma=gamma) * weight_PHW).sum()

    total = sum_in_pieces(focal, logits_BKHW, target_BKHW, counted_B1HW / pixels_B111)
    return total / target_BKHW.flatten(2).any(-1).sum().clamp(min=1)


def _band(length: int, weight_S: Tensor) -> Tensor:
    """The matrix of a centred convolution along `length` samples, zeros beyond the border."""
    reach = len(weight_S) // 2
    at = torch.arange(length, device=weight_S.device)
    offset = at[None, :] - at[:, None] + reach
    return torch.where((offset >= 0) & (offset < len(weight_S)), weight_S[offset.clamp(0, len(weight_S) - 1)], 0.0)


def gaussian_blur(x_BHW: Tensor, window: int, sigma: float, tile: int = 128) -> Tensor:
    """Mean in a Gaussian window around each pixel, zeros beyond the border: (B, H, W) -> (B, H, W).

    Columns and rows are blurred by products with a banded matrix, in tiles that overlap by the
    window: on a CPU a tenth of the time of one-channel convolutions and their gradient.
    """
    offset = torch.arange(window, device=x_BHW.device, dtype=x_BHW.dtype) - (window - 1) / 2
    weight_S = torch.exp(-(offset**2) / (2 * sigma**2))
    weight_S, reach = weight_S / weight_S.sum(), window // 2
    H, W = x_BHW.shape[-2:]
    rows = []
    for top in range(0, H, tile):
        low, high = max(0, top - reach), min(H, top + tile + reach)
        band = _band(high - low, weight_S)[top - low : min(H, top + tile) - low]
        rows.append(band @ x_BHW[:, low:high])
    x_BHW = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
    columns = []
    for left in range(0, W, tile):
        low, high = max(0, left - reach), min(W, left + tile + reach)
        band = _band(high - low, weight_S)[:, left - low : min(W, left + tile) - low]
        columns.append(x_BHW[..., low:high] @ band)
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=2)


def ssim_loss(mask_BKHW: Tensor, target_BKHW: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """1 − SSIM of predicted and true masks, each class a channel, in Gaussian windows.

    SSIM = (2 μx μy + C1)(2 σxy + C2) / ((μx² + μy² + C1)(σx² + σy² + C2)), C1 = 0.01², C2 = 0.03²
    [Wang, Simoncelli and Bovik 2003]; the border is padded with zeros, as released. True masks are
    0 or 1, so y² = y.
    """
    c1, c2 = 0.01**2, 0.03**2

    def similarity(x: Tensor, y: Tensor) -> Tensor:
        # Most classes are not in most pictures: where y is 0 everywhere, so are its mean and its covariance.
        found = y.flatten(1).any(1)
        there, absent = found.nonzero().flatten(), (~found).nonzero().flatten()
        x_there, y_there = x.index_select(0, there), y.index_select(0, there)
        mean_x, mean_xx = gaussian_blur(torch.cat([x, x * x]), window, sigma).chunk(2)
        mean_xy, mean_y = gaussian_blur(torch.cat([x_there * y_there, y_there]), window, sigma).chunk(2)
        below = (mean_x**2 + c1) * (mean_xx - mean_x**2 + c2)
        of_absent = (c1 * c2 / below.index_select(0, absent)).sum()
        mean_x, mean_xx = mean_x.index_select(0, there), mean_xx.index_select(0, there)
        above = (2 * mean_x * mean_y + c1) * (2 * (mean_xy - mean_x * mean_y) + c2)
        below = (mean_x**2 + mean_y**2 + c1) * (mean_xx - mean_x**2 + mean_y - mean_y**2 + c2)
        return of_absent + (above / below).sum()

    return 1 - sum_in_pieces(similarity, mask_BKHW, target_BKHW) / mask_BKHW.numel()


def dice_loss(logits_BKHW: Tensor, target_BKHW: Tensor, counted_B1HW: Tensor, smooth: float = 1.0) -> Tensor:
    """1 − (2 Σ p t + 1) / (Σ p + Σ t + 1) a mask, summed, divided by (image, present class) pairs."""
    p_BKP = (logits_BKHW.sigmoid() * counted_B1HW).flatten(2)
    t_BKP = target_BKHW.flatten(2)
    dice_BK = 1 - (2 * (p_BKP * t_BKP).sum(-1) + smooth) / (p_BKP.sum(-1) + t_BKP.sum(-1) + smooth)
    return dice_BK.sum() / t_BKP.any(-1).sum().clamp(min=1)


def cross_entropy(logits_BKHW: Tensor, label_BHW: Tensor) -> Tensor:
    """−log softmax of the true class, mean over labelled pixels; (B, H, W) train ids, 255 never counts."""
    total = F.cross_entropy(logits_BKHW, label_BHW.long(), ignore_index=IGNORE, reduction="sum")
    return total / (label_BHW != IGNORE).sum().clamp(min=1)

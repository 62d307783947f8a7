"""Losses on mask logits: focal, structural similarity and dice, without loops over classes or images."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

IGNORE = 255


def one_hot_masks(label_BHW: Tensor, classes: int) -> Tensor:
    """(B, H, W) train ids -> (B, K, H, W) float; ignored pixels (255) belong to no class.

    Raises: ValueError for labels that are neither a class nor 255.
    """
    label_BHW = label_BHW.long()
    counted = label_BHW != IGNORE
    top = int(label_BHW.where(counted, torch.zeros_like(label_BHW)).max())
    if top >= classes:
        raise ValueError(
            f"A mask holds label {top}, but there are {classes} classes (0 to {classes - 1}). Its pixels would be "
            "learned as another class; map the labels to train ids first."
        )
    hot_BHWK = F.one_hot(label_BHW.where(counted, torch.full_like(label_BHW, classes)), classes + 1)
    return hot_BHWK[..., :classes].permute(0, 3, 1, 2).float()


def focal_loss(
    logits_BKHW: Tensor, target_BKHW: Tensor, counted_B1HW: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss: mean over counted pixels, summed over masks, divided by (image, present class) pairs."""
    focal_BKHW = sigmoid_focal_loss(logits_BKHW, target_BKHW, alpha=alpha, gamma=gamma)
    pixels_B1 = counted_B1HW.flatten(1).sum(1, keepdim=True).clamp(min=1)
    mean_BK = (focal_BKHW * counted_B1HW).flatten(2).sum(-1) / pixels_B1
    return mean_BK.sum() / target_BKHW.flatten(2).any(-1).sum().clamp(min=1)


def _gaussian_window(size: int, sigma: float, like: Tensor) -> Tensor:
    offset = torch.arange(size, device=like.device, dtype=like.dtype) - (size - 1) / 2
    weight = torch.exp(-(offset**2) / (2 * sigma**2))
    return weight / weight.sum()


def ssim_loss(mask_BKHW: Tensor, target_BKHW: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """1 − SSIM of predicted and true masks, each class a channel, in Gaussian windows.

    SSIM = (2 μx μy + C1)(2 σxy + C2) / ((μx² + μy² + C1)(σx² + σy² + C2)), C1 = 0.01², C2 = 0.03²
    [Wang, Simoncelli and Bovik 2003]; the border is padded with zeros, as released.
    """
    window_S = _gaussian_window(window, sigma, mask_BKHW)

    def blur(x_P1HW: Tensor) -> Tensor:
        x_P1HW = F.conv2d(x_P1HW, window_S.view(1, 1, -1, 1), padding=(window // 2, 0))
        return F.conv2d(x_P1HW, window_S.view(1, 1, 1, -1), padding=(0, window // 2))

    x, y = mask_BKHW.flatten(0, 1)[:, None], target_BKHW.flatten(0, 1)[:, None]
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return 1 - (similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def dice_loss(logits_BKHW: Tensor, target_BKHW: Tensor, counted_B1HW: Tensor, smooth: float = 1.0) -> Tensor:
    """1 − (2 Σ p t + 1) / (Σ p + Σ t + 1) a mask, summed, divided by (image, present class) pairs."""
    p_BKP = (logits_BKHW.sigmoid() * counted_B1HW).flatten(2)
    t_BKP = target_BKHW.flatten(2)
    dice_BK = 1 - (2 * (p_BKP * t_BKP).sum(-1) + smooth) / (p_BKP.sum(-1) + t_BKP.sum(-1) + smooth)
    return dice_BK.sum() / t_BKP.any(-1).sum().clamp(min=1)

"""Self-training on unseen classes: pixels without a seen label learn from the model's own prediction.

Training masks know three kinds of pixels: seen classes by their train ids, pixels of some unseen class
(HIDDEN: which one is not told), and ignored ones (255). The second half of training replaces HIDDEN by
the unseen class that the model itself now finds most likely there [ZegCLIP, transductive setting].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .splits import Split, check_labels

HIDDEN = 254  # a pixel of an unseen class, whichever; never a train id


def mark_unseen(label_BHW: Tensor, split: Split, ignore: int = 255) -> Tensor:
    """Masks as self-training may see them: seen train ids stay, unseen ones become HIDDEN, 255 stays.

    Shapes: (B, H, W) integer train ids -> (B, H, W) int64. Raises: ValueError for labels that are
    neither in the class list nor 255.
    """
    check_labels(label_BHW, len(split.classes), ignore)
    table = torch.arange(256, device=label_BHW.device)
    table[list(split.unseen_ids)] = HIDDEN
    return table[label_BHW.long()]


def pseudo_labels(logits_BKhw: Tensor, label_BHW: Tensor, unseen_ids: tuple[int, ...]) -> Tensor:
    """Fill HIDDEN pixels with the unseen class of the highest logit; all others keep their label.

    Shapes: mask logits (B, K, h, w) on any grid, train ids (B, H, W) -> (B, H, W) int64.
    """
    unseen_U = torch.tensor(unseen_ids, device=label_BHW.device)
    logits_BUHW = F.interpolate(logits_BKhw[:, unseen_U], size=label_BHW.shape[-2:], mode="bilinear")
    return torch.where(label_BHW == HIDDEN, unseen_U[logits_BUHW.argmax(1)], label_BHW)


@torch.no_grad()
def label_unseen(
    segmenter: nn.Module, image_B3HW: Tensor, label_BHW: Tensor, class_text_KE: Tensor, unseen_ids: tuple[int, ...]
) -> Tensor:
    """Pseudo labels from the model as it stands, without dropout: (B, H, W) with HIDDEN -> (B, H, W) without.

    A pass of its own, so that labels do not depend on how a batch is shared out or accumulated.
    """
    training = segmenter.training
    logits_BKhw = segmenter.eval()(image_B3HW, class_text_KE)
    segmenter.train(training)
    return pseudo_labels(logits_BKhw, label_BHW, unseen_ids)

"""Self-training on unseen classes: pixels without a seen label learn from the model's own prediction.

Training masks know three kinds of pixels: seen classes by their train ids, pixels of some unseen class
(HIDDEN: which one is not told), and ignored ones (255). The second half of training replaces HIDDEN by
the unseen class that the model itself now finds most likely there [ZegCLIP, transductive setting]; or only
where it finds it in several views [STRICT]; or, at the start, by CLIP's own [MaskCLIP+, Zhou, Loy and Dai 2022].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip.dense import dense_clip
from .splits import Split, check_labels

HIDDEN = 254  # a pixel of an unseen class, whichever; never a train id
GUIDED = 0.1  # share of the iterations in which MaskCLIP+ takes CLIP's labels: 2,000 of 20,000 as released
VIEWS = ((1.0, False), (1.0, True), (0.75, False), (1.25, False))  # scale, and whether mirrored


def label_source(pseudo: str, step: int, iterations: int) -> str:
    """Where the labels of one iteration come from; `pseudo` as in TrainSettings."""
    if pseudo == "clip" and step >= GUIDED * iterations:
        return "own"
    return pseudo


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


def view_labels(
    segmenter: nn.Module, image_B3HW: Tensor, label_BHW: Tensor, class_text_KE: Tensor, unseen_ids: tuple[int, ...]
) -> Tensor:
    """Fill HIDDEN pixels where the model gives the same unseen class in every view, with 255 elsewhere.

    Views are the picture itself, its mirror image and the picture at other sizes; on each it is predicted anew, and
    the prediction is carried back. Shapes as `label_unseen` [STRICT: Pastore et al. 2021, with VIEWS of our choice].
    """
    kept_BHW = None
    for scale, mirrored in VIEWS:
        sides = [max(1, round(side * scale / segmenter.patch)) * segmenter.patch for side in image_B3HW.shape[-2:]]
        view_B3hw = F.interpolate(image_B3HW, size=sides, mode="bilinear", antialias=True)
        if mirrored:
            logits_BKhw = segmenter(view_B3hw.flip(-1), class_text_KE).flip(-1)
        else:
            logits_BKhw = segmenter(view_B3hw, class_text_KE)
        filled_BHW = pseudo_labels(logits_BKhw, label_BHW, unseen_ids)
        kept_BHW = filled_BHW if kept_BHW is None else kept_BHW.where(kept_BHW == filled_BHW, 255)
    return kept_BHW


@torch.no_grad()
def label_unseen(
    segmenter: nn.Module,
    image_B3HW: Tensor,
    label_BHW: Tensor,
    class_text_KE: Tensor,
    unseen_ids: tuple[int, ...],
    source: str = "own",
) -> Tensor:
    """Pseudo labels from the model as it stands, without dropout: (B, H, W) with HIDDEN -> (B, H, W) without.

    source: "own", the model's; "consistent", those of `view_labels`; "clip", dense CLIP's by its value path.
    A pass of its own, so that labels do not depend on how a batch is shared out or accumulated.
    """
    training = segmenter.training
    segmenter.eval()
    if source == "consistent":
        filled_BHW = view_labels(segmenter, image_B3HW, label_BHW, class_text_KE, unseen_ids)
    else:
        if source == "clip":
            logits_BKhw = dense_clip(segmenter.encoder.backbone, segmenter.normalise(image_B3HW), class_text_KE)
        else:
            logits_BKhw = segmenter(image_B3HW, class_text_KE)
        filled_BHW = pseudo_labels(logits_BKhw, label_BHW, unseen_ids)
    segmenter.train(training)
    return filled_BHW

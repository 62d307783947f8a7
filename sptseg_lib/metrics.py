"""Scores of generalised zero-shot segmentation, all from one confusion matrix over the whole test set."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .splits import Split, check_labels


def confusion_matrix(predicted_BHW: Tensor, label_BHW: Tensor, classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns): (B, H, W) twice -> (K, K) int64.

    Pixels labelled 255 do not count. Raises: ValueError for labels or predictions outside the
    class list, which would otherwise give a wrong score in silence.
    """
    check_labels(label_BHW, classes)
    check_labels(predicted_BHW, classes, ignore=None)
    return multiclass_confusion_matrix(
        predicted_BHW.long(), label_BHW.long(), num_classes=classes, ignore_index=255, validate_args=False
    )


def class_iou(confusion_KK: Tensor) -> Tensor:
    """Intersection over union a class: (K, K) -> (K,) float64; nan where a class has no true pixel.

    A class that is predicted but never there would score 0 for want of ground truth; nan tells the
    two apart, and means leave it out. Its false pixels still lower the other classes' scores.
    """
    hit_K = confusion_KK.diagonal().double()
    true_K, predicted_K = confusion_KK.sum(1).double(), confusion_KK.sum(0).double()
    return torch.where(true_K > 0, hit_K / (true_K + predicted_K - hit_K), torch.nan)


def harmonic_mean(a: float, b: float) -> float:
    """hIoU = 2ab / (a + b)    [SPT-SEG, eq. 11]; 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


def trade_off_area(seen: Sequence[float], unseen: Sequence[float]) -> float:
    """The area that a seen-unseen curve dominates: mIoU(S) and mIoU(U) in per cent at every shift -> per cent.

    A point (u, s) of the square is dominated where some shift reaches at least u and at least s: 100 is a method with
    100 % of both at one shift. After the area under the seen-unseen curve of Chao et al. 2016, which joins the points
    by lines; IoUs, unlike accuracies, both fall when a shift goes too far, and those lines would cross.
    Raises: ValueError for lists of different length, or for none.
    """
    if len(seen) != len(unseen) or not len(seen):
        raise ValueError(
            f"{len(seen)} scores of seen and {len(unseen)} of unseen classes make no curve; give one pair a shift."
        )
    area, lowest = 0.0, 0.0
    for s, u in sorted(zip(seen, unseen), reverse=True):  # from the highest seen score down, in strips of new width
        area += s * max(0.0, u - lowest)
        lowest = max(lowest, u)
    return area / 100


def scores(confusion_KK: Tensor, split: Split) -> dict:
    """pAcc, mIoU_seen, mIoU_unseen and hIoU in per cent, the same for things and stuff, and per class.

    per_class: {name: {"iou": per cent or None where the class is absent, "seen": bool}}. A mean over
    no class (no unseen class in the split, or none in the pictures) is None.
    """
    iou_K = class_iou(confusion_KK) * 100
    per_class = {
        name: {"iou": None if iou.isnan() else float(iou), "seen": name in split.seen}
        for name, iou in zip(split.classes, iou_K)
    }

    def mean(names) -> float | None:
        present = [per_class[name]["iou"] for name in names if per_class[name]["iou"] is not None]
        return round(sum(present) / len(present), 2) if present else None

    seen, unseen = mean(split.seen), mean(split.unseen)
    result = {
        "pAcc": round(100 * float(confusion_KK.diagonal().sum() / confusion_KK.sum().clamp(min=1)), 2),
        "mIoU": mean(split.classes),
        "mIoU_seen": seen,
        "mIoU_unseen": unseen,
        "hIoU": None if seen is None or unseen is None else round(harmonic_mean(seen, unseen), 2),
    }
    if split.stuff:
        for kind, names in (
            ("things", [n for n in split.classes if n not in split.stuff]),
            ("stuff", list(split.stuff)),
        ):
            result[f"{kind}_seen"] = mean(n for n in names if n in split.seen)
            result[f"{kind}_unseen"] = mean(n for n in names if n in split.unseen)
    return result | {"per_class": per_class}

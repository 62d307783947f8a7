"""Known disasters, recognised from a confusion matrix: what a score of zero is a symptom of."""

from typing import NamedTuple

import torch
from torch import Tensor

from .splits import Split

# A displaced class must hold this share of a true class's pixels, and twice what the right class holds.
LEAST_SHARE = 0.1


class Diagnosis(NamedTuple):
    """What is wrong, how the matrix shows it, and what to do."""

    name: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}. {self.evidence} {self.remedy}"


HEALTHY = Diagnosis(
    "nothing wrong found", "True classes are not displaced.", "If the score is low, the model is; train it further."
)


def diagnose(confusion_KK: Tensor, split: Split) -> Diagnosis:
    """Recognise a known disaster of evaluation: pixels by true (rows) and predicted class (K, K) -> Diagnosis.

    Known are weights that were not loaded, raw ids with gaps used as train ids, background reduced twice, and
    labels one too high or too low; HEALTHY means none of them. Labels are told from shares of each true class,
    so that large classes do not decide, and need a model that gets some classes right.
    Raises: ValueError where the matrix is not of the split's classes.
    """
    K = len(split.classes)
    if confusion_KK.shape != (K, K):
        raise ValueError(
            f"A confusion matrix of {tuple(confusion_KK.shape)} is not one of the {K} classes of split "
            f"{split.name!r}. Rows would be read as other classes; give the split that was scored."
        )
    pixels_K = confusion_KK.sum(1)
    if not pixels_K.any():
        return Diagnosis(
            "no labelled pixel", "Every pixel is labelled 255.", "Check that the masks belong to this class list."
        )
    share_KK = confusion_KK.double() / pixels_K.clamp(min=1)[:, None]
    there_K = pixels_K > 0
    found = (_unloaded(confusion_KK, split), _raw_ids(share_KK, there_K), _shifted(share_KK, there_K, split))
    return next((one for one in found if one), HEALTHY)


def _unloaded(confusion_KK: Tensor, split: Split) -> Diagnosis | None:
    predicted_K, true_K = confusion_KK.sum(0), confusion_KK.sum(1)
    no_seen = split.unseen and not predicted_K[list(split.seen_ids)].any() and true_K[list(split.seen_ids)].any()
    constant = int((predicted_K > 0).sum()) == 1 and int((true_K > 0).sum()) > 1
    if no_seen:
        evidence = "No pixel at all is predicted as a seen class, so all seen classes score exactly 0."
    elif constant:
        evidence = f"Every pixel is predicted as {split.classes[int(predicted_K.argmax())]!r}."
    else:
        return None
    return Diagnosis(
        "weights not loaded",
        evidence + " Masks of a model that learned nothing are all near 0, and γ lets unseen classes win everywhere.",
        "Load CLIP and the checkpoint strictly and see that training got past its first iterations; "
        "if both did, γ is too large.",
    )


def _raw_ids(share_KK: Tensor, there_K: Tensor) -> Diagnosis | None:
    """Ids that skip numbers: after the first skipped id, row r holds class r minus the ids skipped up to r."""
    K = len(there_K)
    id_K = torch.arange(K)
    skipped_NK = (~there_K).cumsum(0) - (~there_K).cumsum(0)[:, None] + 1  # ids skipped in n..r, if n is the first
    path_NK = share_KK[id_K, (id_K - skipped_NK).clamp(min=0)]
    before_NK, after_NK = there_K & (id_K < id_K[:, None]), there_K & (id_K > id_K[:, None])
    right_K = share_KK.diagonal()
    before_N = (right_K * before_NK).sum(1) / before_NK.sum(1).clamp(min=1)
    after_N, moved_N = ((x * after_NK).sum(1) / after_NK.sum(1).clamp(min=1) for x in (right_K, path_NK))
    fits_N = ~there_K & (after_NK.sum(1) > 1) & (before_N >= LEAST_SHARE) & _outweighs(moved_N, after_N)
    if not fits_N.any():
        return None
    n = int(fits_N.int().argmax())
    return Diagnosis(
        "raw ids used as train ids",
        f"The first {n} classes are right, id {n} never occurs, and of the classes after it "
        f"{100 * moved_N[n]:.0f} % of the pixels are predicted as a lower one, {100 * after_N[n]:.0f} % as their own.",
        "The masks hold ids that skip numbers, as COCO's raw ones do: convert them to train ids 0, 1, 2, …",
    )


def _shifted(share_KK: Tensor, there_K: Tensor, split: Split) -> Diagnosis | None:
    right, below, above = (_mean_on_diagonal(share_KK, there_K, offset) for offset in (0, -1, 1))
    last, never_last = split.classes[-1], not there_K[-1] and bool(share_KK[:, -1].any())
    if _outweighs(below, right):
        return Diagnosis(
            "labels shifted by one",
            f"Labels are one too high: {100 * below:.0f} % of a class's pixels are predicted as the class before it, "
            f"{100 * right:.0f} % as itself.",
            "Background still counts as class 0: turn 0 into 255 and take one from all other ids, once.",
        )
    if never_last and not _outweighs(above, right):
        # Trained on the same wrong labels, seen classes look right; unseen ones follow their names.
        there_K = there_K & torch.tensor([name in split.unseen for name in split.classes])
        right, above = (_mean_on_diagonal(share_KK, there_K, offset) for offset in (0, 1))
    if not _outweighs(above, right):
        return None
    evidence = (
        f"Labels are one too low: {100 * above:.0f} % of a class's pixels are predicted as the class after it, "
        f"{100 * right:.0f} % as itself"
    )
    if never_last:
        return Diagnosis(
            "background reduced twice",
            f"{evidence}, and {last!r}, the last class, has no true pixel though it is predicted.",
            "Both the prepared masks and the loader take background out: leave it to one of them.",
        )
    return Diagnosis("labels shifted by one", f"{evidence}.", "Check the masks' ids against the class list.")


def _mean_on_diagonal(share_KK: Tensor, there_K: Tensor, offset: int) -> Tensor:
    """Mean share of the class `offset` places after the true one, over the true classes that are there."""
    first, stop = max(0, -offset), len(there_K) - max(0, offset)
    there = there_K[first:stop]
    return share_KK.diagonal(offset)[there].sum() / there.sum().clamp(min=1)


def _outweighs(moved: Tensor, right: Tensor) -> Tensor:
    return (moved >= LEAST_SHARE) & (moved >= 2 * right)

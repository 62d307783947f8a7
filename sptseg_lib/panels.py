"""Pictures for a comparison of two methods, chosen by a rule; and label maps as short texts, for results files."""

import base64
from collections.abc import Iterable, Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .evaluate import Predictor, picture_scores
from .inference import label_maps
from .splits import Split

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)  # the worst, three between, the best for us


def encode_labels(label_HW: Tensor) -> str:
    """A label map as the base64 text of a grey PNG: (H, W) of 0 to 255 -> text.

    Raises: ValueError for labels that a byte cannot hold.
    """
    if int(label_HW.min()) < 0 or int(label_HW.max()) > 255:
        raise ValueError(
            f"Labels from {int(label_HW.min())} to {int(label_HW.max())} do not fit a byte. Others would be kept in "
            "their place; use train ids from 0 to 255."
        )
    file = BytesIO()
    Image.fromarray(label_HW.cpu().to(torch.uint8).numpy()).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def decode_labels(text: str) -> Tensor:
    """What `encode_labels` was given: text -> (H, W) int64."""
    return torch.from_numpy(np.array(Image.open(BytesIO(base64.b64decode(text))))).long()


def at_quantiles(values: Sequence[float], quantiles: Sequence[float] = QUANTILES) -> list[int]:
    """Which values lie at quantiles: places in `values`, the first of equal ones; 0 is the lowest, 1 the highest."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    return [order[round(q * (len(values) - 1))] for q in quantiles]


def compare_pictures(
    ours: Predictor,
    baseline: Predictor,
    gammas: tuple[float, float],
    pictures: Iterable,
    split: Split,
    most: int,
) -> dict:
    """Both methods on the first `most` pictures, and the rows to show: at QUANTILES of mIoU(ours) − mIoU(baseline).

    mIoU of a picture is the mean over the classes in it, per cent. gammas: each one's own shift, ours first.
    Returns: {"differences": [one a picture], "rows": [{"picture", "quantile", "ours": mIoU, "baseline": mIoU,
    "labels": {"ours": text, "baseline": text}}]}; the texts are for `decode_labels`.
    """
    rows, maps = [], []
    for image, label, index in pictures:
        predicted = [
            label_maps(predict(image), split.seen_ids, [gamma])[0].cpu()
            for predict, gamma in zip((ours, baseline), gammas)
        ]
        own = [picture_scores(predicted_BHW, label, index, split) for predicted_BHW in predicted]
        rows += [(a["picture"], a["mIoU"], b["mIoU"]) for a, b in zip(*own)]
        maps += list(zip(*predicted))
        if len(rows) >= most:
            break
    rows = rows[:most]
    differences = [round(ours - baseline, 2) for _, ours, baseline in rows]
    shown = [
        {
            "picture": rows[i][0], "quantile": quantile, "ours": rows[i][1], "baseline": rows[i][2],
            "labels": {name: encode_labels(label_HW) for name, label_HW in zip(("ours", "baseline"), maps[i])},
        }
        for quantile, i in zip(QUANTILES, at_quantiles(differences))
    ]  # fmt: skip
    return {"differences": differences, "rows": shown}

"""Names that a run was never told: classes added when testing, and names of what is in no picture.

A decoder that gives each class a probability of its own, as ours do, needs no retraining for a new name, and the
probabilities of the others stay what they were: names only compete for pixels. So every list of names is scored from
one pass over the pictures.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .class_lists import ADE, COCO, CONTEXT, VOC, common_name
from .evaluate import Predictor
from .inference import label_maps
from .metrics import confusion_matrix, scores
from .scenes.counter import uniform
from .scenes.render import class_shares
from .splits import Split, make_split

ABSENT = (0, 1, 2, 4, 8, 16)  # known names that a picture does not hold, beside those that it does
FOREIGN = (0, 1, 4, 16, 64)  # names of other data sets, beside all names of this one
IGNORE = 255


def foreign_names(split: Split, count: int, seed: int) -> tuple[str, ...]:
    """Names of photographs' classes that a split does not have, in an order that the seed draws.

    Raises: ValueError where there are not so many.
    """
    own = {common_name(name) for name in split.classes}
    pool = {common_name(name): name for name in (*VOC, *COCO, *CONTEXT, *ADE) if common_name(name) not in own}
    names = list(pool.values())
    if count > len(names):
        raise ValueError(
            f"{count} foreign names asked for, and there are {len(names)}. Some would be named twice; ask for fewer."
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return tuple(names[i] for i in order[:count])


def with_foreign(split: Split, names: tuple[str, ...]) -> Split:
    """A split with more unseen classes, after its own: their train ids follow, and no pixel has them."""
    if not names:
        return split
    return make_split(
        f"{split.name} and {len(names)} more", (*split.classes, *names), (*split.unseen, *names), split.stuff
    )


def offered(label_BHW: Tensor, classes: int, absent: int, chance_BK: Tensor) -> Tensor:
    """Names offered for each picture, those of its own classes and some that it lacks: (B, H, W) -> (B, K) bool.

    absent: how many it lacks at most; chance_BK: random numbers that choose which.
    """
    there_BK = class_shares(label_BHW, classes) > 0
    order_BK = chance_BK.masked_fill(there_BK, torch.inf).argsort(1).argsort(1)  # classes that are there come last
    return there_BK | (order_BK < absent)


class OpenClass(NamedTuple):
    """An unseen class that even the list of names lacked, before and after its name was added. Per cent.

    gamma was chosen without it. iou: its own, all pixels counted. seen and unseen: mIoU of the others on their own
    pixels, before and after.
    """

    gamma: float
    iou: float | None
    seen: tuple[float | None, float | None]
    unseen: tuple[float | None, float | None]


class Names(NamedTuple):
    """Scores with other lists of names: open classes by name, and test scores by count of absent or foreign names."""

    open: dict[str, OpenClass]
    absent: dict[int, dict]
    foreign: dict[int, dict]


def score_names(
    predict: Predictor,
    split: Split,
    foreign: tuple[str, ...],
    parts: dict[str, Iterable],
    gamma: float,
    gammas: list[float],
    seed: int = 0,
) -> Names:
    """Score a predictor with names left out, added and offered in vain, in one pass over each part's pictures.

    predict: (B, 3, H, W) -> probabilities (B, K + F, H, W) of the split's classes and then of the foreign names.
    parts: batches of "test", and of "validation", where γ is chosen anew, among `gammas`, for each class left out;
    without that part, and for the other two questions, `gamma` is used. seed: which absent names are offered.
    """
    wide = with_foreign(split, foreign)
    K, total = len(split.classes), len(wide.classes)
    found: dict[tuple, Tensor] = defaultdict(lambda: torch.zeros(total, total, dtype=torch.int64))

    def count(key: tuple, probability_BKHW: Tensor, label_BHW: Tensor, shifts: dict[str, float]) -> None:
        predicted_GBHW = label_maps(probability_BKHW, split.seen_ids, list(shifts.values())).cpu()
        for name, predicted_BHW in zip(shifts, predicted_GBHW):
            found[*key, name] += confusion_matrix(predicted_BHW, label_BHW, total)

    def without(x: Tensor, k: int) -> Tensor:
        """Probabilities of all of the split's names but one."""
        return x[:, :K].index_fill(1, torch.tensor([k], device=x.device), -torch.inf)

    every = {str(g): g for g in gammas}
    for image, label, _ in tqdm(parts.get("validation", ()), desc="names, validation", leave=False):
        probability = predict(image)
        for k in split.unseen_ids:
            count(("validation", k), without(probability, k), label.masked_fill(label == k, IGNORE), every)
    chosen = dict.fromkeys(split.unseen_ids, gamma)
    if "validation" in parts:
        for k in chosen:
            chosen[k] = max(gammas, key=lambda g: scores(found["validation", k, str(g)], wide)["hIoU"] or 0)
    for image, label, index in tqdm(parts["test"], desc="names, test", leave=False):
        probability = predict(image)
        for k, own in chosen.items():
            others = label.masked_fill(label == k, IGNORE)
            count(("before", k), without(probability, k), others, {"": own})
            count(("after", k), probability[:, :K], others, {"": own})
            count(("own", k), probability[:, :K], label, {"": own})
        chance_BK = uniform(seed, index, K)
        for n in ABSENT:
            names_BK = offered(label, K, n, chance_BK).to(probability.device)
            listed = probability[:, :K].masked_fill(~names_BK[..., None, None], -torch.inf)
            count(("absent", n), listed, label, {"": gamma})
        for n in FOREIGN:
            if n <= len(foreign):
                count(("foreign", n), probability[:, : K + n], label, {"": gamma})
    card = {key[:-1]: scores(matrix, wide) for key, matrix in found.items() if key[0] != "validation"}

    def open_class(k: int) -> OpenClass:
        iou = card["own", k]["per_class"][split.classes[k]]["iou"]
        before, after = card["before", k], card["after", k]
        pairs = [(before[score], after[score]) for score in ("mIoU_seen", "mIoU_unseen")]
        return OpenClass(chosen[k], iou if iou is None else round(iou, 2), *pairs)

    return Names(
        {split.classes[k]: open_class(k) for k in chosen},
        {n: card["absent", n] for n in ABSENT},
        {n: card["foreign", n] for n in FOREIGN if n <= len(foreign)},
    )

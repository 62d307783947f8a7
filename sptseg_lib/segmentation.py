"""One call from a picture and class names to a label map, per-class scores and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .class_names import check_names
from .inference import Best, shift_seen
from .pictures import Source, read_picture
from .predictor import load_predictor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 16  # pictures of one size that are computed together


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What `segment` found in one picture.

    image_3HW, in [0, 1]; label_HW, int64 indices into class_names; heat_Khw, each class's probability on a
    coarse grid, one cell a patch; seen_K, which classes are held back by γ; best, what decides about every pixel.
    """

    image_3HW: Tensor
    class_names: tuple[str, ...]
    seen_K: Tensor
    gamma: float
    heat_Khw: Tensor
    best: Best

    @property
    def label_HW(self) -> Tensor:
        label_hw, (H, W) = self._decided(), self.image_3HW.shape[1:]
        h, w = label_hw.shape
        if (h, w) == (H, W):
            return label_hw
        return label_hw[torch.arange(H) * h // H][:, torch.arange(W) * w // W]

    def _decided(self) -> Tensor:
        """Labels at the size at which they were decided: the picture's, or a smaller one for large pictures."""
        return shift_seen(self.best, [self.gamma])[0, 0].long()

    @property
    def seen(self) -> tuple[str, ...]:
        return tuple(name for name, seen in zip(self.class_names, self.seen_K.tolist()) if seen)

    def at(self, gamma: float) -> "Segmentation":
        """The same result under another seen-class shift; nothing is computed anew."""
        return replace(self, gamma=gamma)

    def scores(self) -> list[dict]:
        """Per class, the largest first: share of the pixels (per cent), mean and highest probability."""
        label_P = self._decided().flatten()
        share_K = torch.bincount(label_P, minlength=len(self.class_names)) / len(label_P)
        columns = (100 * share_K, self.heat_Khw.mean((1, 2)), self.heat_Khw.amax((1, 2)), self.seen_K)
        rows = zip(self.class_names, *(column.tolist() for column in columns))
        keys = ("class", "share", "mean", "highest", "seen")
        return sorted((dict(zip(keys, row)) for row in rows), key=lambda row: (-row["share"], -row["highest"]))

    def figure(self, columns: int = 2) -> "Figure":
        """The picture and its label map, the largest classes named; columns=1 for narrow screens."""
        from .plots import segmentation_figure

        return segmentation_figure(self.image_3HW, self.label_HW, self.class_names, self.seen, columns)

    def heat_figure(self, most: int = 6, columns: int = 3) -> "Figure":
        """Where each of the `most` likeliest classes is, as maps of its probability."""
        from .plots import heat_figure

        rows = sorted(self.scores(), key=lambda row: -row["highest"])[:most]
        names = [row["class"] for row in rows]
        return heat_figure(
            self.image_3HW, self.heat_Khw[[self.class_names.index(name) for name in names]], names, columns
        )


def segment(
    image: Source | Sequence[Source],
    class_names: Sequence[str],
    checkpoint: str | Path | None = None,
    *,
    clip: str | None = None,
    weights: str | None = None,
    prompt: str | None = None,
    seen: Sequence[str] | None = None,
    gamma: float | None = None,
    size: int | None = None,
    stride: int = 0,
    progress: bool = True,
) -> Segmentation | list[Segmentation]:
    """Segment a picture of any size into the classes that you name.

        segment("holiday.jpg", ["sky", "sea", "dog"]).figure()

    image: a path, a file's bytes, a PIL image, an array (H, W, 3) or a tensor (3, H, W); several in a list or a
    tensor (B, 3, H, W) give a list of results. checkpoint: a run's folder; None: the shipped one, whose CLIP has
    seen drawings of sixteen shapes and textures only. clip, weights: where that run's CLIP lies, if not where its
    settings say. prompt: a text with {} for the name, or "ensemble". seen: classes that γ is taken from; None:
    those that the run was trained on. gamma: the shift; None: the run's own. size: pixels of the shorter side at
    which the picture is looked at; None: that of training. stride: as in `class_probabilities`.
    Raises: ValueError, TypeError or FileNotFoundError for names, pictures, a checkpoint or weights that cannot be
    used, before anything is computed.
    """
    names = check_names(class_names)
    predictor = load_predictor(checkpoint, clip, weights)
    held_back = predictor.seen if seen is None else check_names(seen) if len(seen) else ()
    if seen is not None and (unknown := [name for name in held_back if name not in names]):
        raise ValueError(
            f"Seen class(es) {', '.join(unknown)} are not among class_names. γ would be taken from nothing; name them "
            "in both, or leave them out."
        )
    if size is not None and size < predictor.patch:
        raise ValueError(
            f"size={size} is less than one patch of {predictor.patch} pixels. There would be nothing to classify; "
            f"choose {predictor.size} or so."
        )
    text_KE = predictor.text(names, prompt)
    many = _is_batch(image)
    images = [read_picture(one, least_side=predictor.patch) for one in (image if many else [image])]
    if not images:
        raise ValueError("No pictures. There would be nothing to segment; give at least one.")
    seen_K = torch.tensor([name in held_back for name in names])
    gamma = predictor.gamma if gamma is None else gamma
    results: list[Segmentation | None] = [None] * len(images)
    for places in _groups(images):
        stacked = torch.stack([images[i] for i in places]) if len(places) > 1 else images[places[0]][None]
        best, heat_BKhw = predictor.best(
            stacked, text_KE, seen_K, size or predictor.size, stride,
            progress,
        )  # fmt: skip
        for row, place in enumerate(places):
            own = Best(*(x[row : row + 1] for x in best))
            results[place] = Segmentation(images[place], names, seen_K, gamma, heat_BKhw[row], own)
    return results if many else results[0]


def _is_batch(image) -> bool:
    if isinstance(image, Tensor | np.ndarray):
        return image.ndim == 4
    return isinstance(image, Sequence) and not isinstance(image, str | bytes | Image.Image)


def _groups(images: list[Tensor]) -> list[list[int]]:
    """Places of pictures of the same size, at most BATCH together."""
    by_size: dict[tuple, list[int]] = {}
    for place, image in enumerate(images):
        by_size.setdefault(tuple(image.shape), []).append(place)
    return [places[i : i + BATCH] for places in by_size.values() for i in range(0, len(places), BATCH)]

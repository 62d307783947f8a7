"""A trained run and its CLIP, ready for any class names and pictures of any size."""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoint import SETTINGS, load_segmenter, read_settings
from .clip.load import TINY, load_clip
from .clip.text import class_text
from .data import training_split
from .encoder import Encoded
from .inference import Best, best_classes, class_probabilities
from .pictures import reduced_size
from .precision import backbone_dtype, find_device
from .settings import project_root
from .shipped import FOLDER as SHIPPED

# Probabilities held at once, over classes and pixels: 128 MB of float32.
MOST_VALUES = 2**25
# Labels are decided at no more pixels than this; enlarged to a larger picture, they look the same.
MOST_DECIDED_PIXELS = 2**20
# The work done on one picture grows with its area; long panoramas are taken smaller.
MOST_WORKING_PIXELS = 2**22

Window = tuple[Encoded, Tensor | None]  # of a window: patches and global embedding; log Σ exp over all classes


class Predictor:
    """Class probabilities of pictures, for class names that need not be those of training.

    `seen` are the names whose labels the run was trained on, `size` is the side of its training images
    and of the sliding windows. Make it by `load_predictor`.
    """

    def __init__(self, folder: Path, clip: str | None = None, weights: str | None = None):
        self.trained = read_settings(folder)
        model = self.trained.model()
        name, weights = clip or model.clip, weights or model.weights
        if name != TINY and weights is None:
            raise ValueError(
                f"{folder} was trained on a {name} without weights, drawn at random. It cannot be drawn again, and "
                "every score would be chance; name the weights."
            )
        self.device = find_device()
        self.clip = load_clip(name, weights, model.activation)
        dtype = backbone_dtype(self.trained.precision, self.device)
        segmenter, _ = load_segmenter(folder, self.clip, dtype)
        self.segmenter = segmenter.to(self.device)
        self.size, self.patch, self.prompt = self.trained.size, segmenter.patch, model.prompt
        self.gamma = model.seen_shift
        split = training_split(self.trained)
        self.seen = split.seen if self.trained.setting == "inductive" else split.classes

    def text(self, names: tuple[str, ...], prompt: str | None = None) -> Tensor:
        """Embeddings of class names, K names -> (K, E), kept for the next call.

        Raises: ValueError for a name that CLIP's text encoder would cut off, and as `class_text`.
        """
        prompt = prompt or self.prompt
        if hasattr(self.clip.tokenize, "encode"):
            room = self.clip.model.context_length - 2  # start and end
            for name in names:
                if (tokens := len(self.clip.tokenize.encode(prompt.replace("{}", name)))) > room:
                    raise ValueError(
                        f"Class name {name[:60]!r} takes {tokens} tokens with its prompt, and {self.clip.name} reads "
                        f"{room}. Its end would be cut off; shorten it."
                    )
        return class_text(self.clip, names, prompt).to(self.device)

    @torch.inference_mode()
    def best(
        self,
        image_B3HW: Tensor,
        class_text_KE: Tensor,
        seen_K: Tensor,
        size: int,
        stride: int = 0,
        progress: bool = False,
    ) -> tuple[Best, Tensor]:
        """The best seen and unseen class of every pixel, and all probabilities on a coarse grid.

        Pictures (B, 3, H, W) in [0, 1] are resized so that their shorter side has `size` pixels, and windows of the
        training size slide over them. -> Best at (B, H, W), or fewer pixels of the same shape for large pictures, ids
        int16; and (B, K, h, w), one cell a patch. Memory is bounded: classes are decoded in parts, and only their
        maximum is kept.
        """
        B, _, H, W = image_B3HW.shape
        h, w = working_size(H, W, size, self.patch)
        working_B3hw = image_B3HW.to(self.device)
        if (h, w) != (H, W):
            working_B3hw = F.interpolate(working_B3hw, size=(h, w), mode="bilinear", antialias=True)
        W, H = reduced_size(W, H, max(MOST_DECIDED_PIXELS, h * w))
        cells = (-(-h // self.patch), -(-w // self.patch))
        at_once = max(1, MOST_VALUES // (B * max(H * W, h * w)))
        parts = list(zip(class_text_KE.split(at_once), seen_K.to(self.device).split(at_once)))
        windows: list[Window] = []
        best, heat_BKhw, first = None, [], 0
        for text_KE, seen_k in tqdm(parts, desc="classes", disable=not progress or len(parts) == 1):
            score = self._scorer(text_KE, windows, [text for text, _ in parts])
            probability = class_probabilities(score, working_B3hw, self.size, self.patch, stride)
            heat_BKhw.append(F.adaptive_avg_pool2d(probability, cells).cpu())
            if (h, w) != (H, W):
                probability = F.interpolate(probability, size=(H, W), mode="bilinear")
            best = _better(best, best_classes(probability, seen_k), first)
            first += len(text_KE)
        return Best(*(x.cpu() for x in best)), torch.cat(heat_BKhw, dim=1)

    def _scorer(self, text_KE: Tensor, windows: list[Window], texts: list[Tensor]) -> Callable[[Tensor], Tensor]:
        """Scores windows in turn; what all parts of the classes need of them is computed once and kept in `windows`."""
        turn: Iterator[int] = itertools.count()
        segmenter = self.segmenter

        def score(piece: Tensor) -> Tensor:
            place = next(turn)
            if place == len(windows):
                windows.append((encoded := segmenter.encode(piece), segmenter.normaliser(encoded, texts)))
            encoded, normaliser_B1hw = windows[place]
            return segmenter.probabilities(segmenter.decode(encoded, text_KE), normaliser_B1hw)

        return score


def _better(best: Best | None, new: Best, first: int) -> Best:
    """Pixel by pixel the better of two, seen and unseen apart; ids of `new` count from `first`."""
    ids = [(x + first).to(torch.int16) for x in (new.seen_id_BHW, new.unseen_id_BHW)]
    new = Best(new.seen_BHW, ids[0], new.unseen_BHW, ids[1])
    if best is None:
        return new
    seen, unseen = new.seen_BHW > best.seen_BHW, new.unseen_BHW > best.unseen_BHW
    take = (seen, seen, unseen, unseen)
    return Best(*(torch.where(t, a, b) for t, a, b in zip(take, new, best)))


def working_size(height: int, width: int, size: int, patch: int) -> tuple[int, int]:
    """Height and width with a shorter side of `size`, less for long panoramas, but never less than a patch."""
    short = min(height, width)
    scale = min(size / short, (MOST_WORKING_PIXELS / (height * width)) ** 0.5)
    scale = max(scale, patch / short)
    return max(patch, round(height * scale)), max(patch, round(width * scale))


def find_checkpoint(checkpoint: str | Path | None) -> Path:
    """The folder of a trained run: None for the shipped one, a run's folder, or one that holds a single run.

    Relative paths count from the current folder, or else from the checkout.
    Raises: FileNotFoundError where there is none; ValueError where there are several.
    """
    if checkpoint is None:
        return SHIPPED
    folder = next((p for p in (Path(checkpoint), project_root() / checkpoint) if p.is_dir()), Path(checkpoint))
    if (folder / SETTINGS).is_file():
        return folder
    runs = sorted(path.parent for path in folder.glob(f"train/*/{SETTINGS}"))
    if len(runs) > 1:
        raise ValueError(
            f"{folder} holds {len(runs)} runs, and which one is meant cannot be told; name one of: "
            f"{', '.join(str(run) for run in runs)}."
        )
    if not runs:
        raise FileNotFoundError(f"{folder} holds no trained run. Nothing can be segmented; train, or check the path.")
    return runs[0]


def load_predictor(
    checkpoint: str | Path | None = None, clip: str | None = None, weights: str | None = None
) -> Predictor:
    """A trained run, ready to predict; the last ones are kept.

    checkpoint: as `find_checkpoint`. clip, weights: in the place of those that the run's settings name, such as
    where the weights lie on this machine; they must be those that it was trained with.
    Raises: ValueError or FileNotFoundError for a run or weights that cannot be loaded.
    """
    folder = find_checkpoint(checkpoint).resolve()
    return _load(folder, (folder / SETTINGS).stat().st_mtime_ns, clip, weights)


@lru_cache(maxsize=4)
def _load(folder: Path, written_ns: int, clip: str | None, weights: str | None) -> Predictor:
    return Predictor(folder, clip, weights)

"""Data sets for training and testing: ShapeScenes rendered on the fly, or a folder in PASCAL VOC's layout."""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision.transforms.v2.functional import pil_to_tensor

from .augment import augment, recipe
from .datasets.manifest import check_manifest, read_names
from .pictures import read_rgb
from .scenes.render import SceneSettings, render_scenes
from .settings import TrainSettings
from .splits import SPLITS, Split, fewer_seen, find_split, hide_unseen, make_split, transfer_split
from .transductive import mark_unseen

# Seeds of the scene streams; a run's own seed is added to the first alone. γ was chosen on validation scenes.
TRAIN_SEED, TEST_SEED, VALIDATION_SEED = 11, 12, 13
_TRAIN_IDS = np.arange(-1, 255, dtype=np.int16).astype(np.uint8)  # raw label 0 -> 255, k -> k - 1
_TRAIN_IDS[255] = 255
Hide = Callable[[Tensor], Tensor]  # (B, H, W) train ids -> what training may see of them


class Batch(NamedTuple):
    """image_B3HW in [0, 1]; label_BHW int64 with 255 ignored; index_B, which pictures these are."""

    image_B3HW: Tensor
    label_BHW: Tensor
    index_B: Tensor


@lru_cache(maxsize=2)
def _order(length: int, seed: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


def _place(index: int, images: int, seed: int) -> int:
    """Which of `images` pictures comes at an index, when all come before any comes again, each time in a new order."""
    turn, place = divmod(index, images)
    return _order(images, seed + turn)[place]


class SceneData(Dataset):
    """`length` ShapeScenes; a whole batch of them is rendered in one call. `hide` turns masks into training masks.

    images: how many different ones there are; 0: as many as asked for.
    """

    def __init__(self, length: int, settings: SceneSettings, seed: int, hide: Hide | None = None, images: int = 0):
        self.length, self.settings, self.seed, self.hide, self.images = length, settings, seed, hide, images
        self.first = 0  # where a resumed run goes on

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        return Batch(*(x[0] for x in self.__getitems__([index])))

    def __getitems__(self, indices: list[int]) -> Batch:
        index_B = torch.tensor(indices) + self.first
        if self.images:
            index_B = torch.tensor([_place(index, self.images, self.seed) for index in index_B.tolist()])
        image_B3HW, label_BHW = render_scenes(index_B, self.settings, self.seed)
        label_BHW = self.hide(label_BHW) if self.hide else label_BHW.long()
        return Batch(image_B3HW, label_BHW, index_B)


class VocData(Dataset):
    """Pictures and masks of one set of a folder in PASCAL VOC's layout.

    Label 0 is background and becomes 255; others shift down by one. Training pictures (`crop`) are
    augmented by the recipe; test pictures keep their size. images: how many of the listed ones are used, drawn by
    the seed, more keeping those of fewer; 0: all.
    Raises: FileNotFoundError for a missing list, image or mask; ValueError where image and mask
    differ in size, for an empty set or more images than listed, for labels outside the class list, or where a
    prepared folder is no longer what its manifest says.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        split: Split,
        crop: int = 0,
        length: int = 0,
        hide: Hide | None = None,
        seed: int = 0,
        images: int = 0,
    ):
        self.folder, self.split, self.hide, self.seed = Path(folder), split, hide, seed
        self.first = 0  # where a resumed run goes on
        listing = self.folder / "ImageSets" / "Segmentation" / f"{name}.txt"
        if not listing.is_file():
            raise FileNotFoundError(
                f"{listing} is missing: {folder} is not a complete folder in PASCAL VOC's layout. "
                "Nothing could be read; write or unpack it again."
            )
        self.stems = listing.read_text().split()
        if not self.stems:
            raise ValueError(f"{listing} lists no picture. There would be nothing to learn or score; fill it.")
        if images > len(self.stems):
            raise ValueError(
                f"images={images}, and {listing} lists {len(self.stems)} pictures. There would be fewer than asked "
                f"for; choose at most {len(self.stems)}, or 0 for all of them."
            )
        if images:
            self.stems = [self.stems[i] for i in _order(len(self.stems), seed)[:images]]
        manifest = check_manifest(self.folder, split.classes) or {}
        self.suffix = manifest.get("image_suffix", ".jpg")
        self.length = length or len(self.stems)
        self.augment = recipe(crop) if crop else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        index += self.first
        stem = self.stems[_place(index, len(self.stems), self.seed) if self.augment else index % len(self.stems)]
        image_path = self.folder / "JPEGImages" / f"{stem}{self.suffix}"
        mask_path = self.folder / "SegmentationClass" / f"{stem}.png"
        for path in (image_path, mask_path):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is listed but missing; the folder is incomplete, write it again.")
        image, label = read_rgb(image_path), np.asarray(Image.open(mask_path))
        if label.ndim != 2 or label.dtype != np.uint8:
            raise ValueError(
                f"{mask_path} has shape {label.shape} and type {label.dtype}, not one byte a pixel. Colours would be "
                "taken for classes; write the mask as class ids (a palette or grey PNG)."
            )
        if image.size != label.shape[1::-1]:
            raise ValueError(
                f"{stem}: the image has {image.size[::-1]} and the mask {label.shape[:2]} pixels. Labels would fall on "
                "other pixels than their own; replace one of the two."
            )
        label_HW = torch.from_numpy(_TRAIN_IDS[label])
        if self.augment:
            image_3HW, label_HW = augment(self.augment, image, label_HW, 1_000_003 * self.seed + index)
        else:
            image_3HW = pil_to_tensor(image).float() / 255
        label_HW = self.hide(label_HW[None])[0] if self.hide else label_HW.long()
        return Batch(image_3HW, label_HW, torch.tensor(index))


def _stack(items: "Batch | list[Batch]") -> Batch:
    return items if isinstance(items, Batch) else Batch(*(torch.stack(x) for x in zip(*items)))


def split_for(dataset: str, split: str) -> Split:
    """The split of a run: a named one, or for a folder the classes of its classes.txt with that split's unseen ones.

    Where the folder holds the classes of another known data set, it is that split transferred to them: what a run
    trained on `split` is scored under there (splits.transfer_split), named "voc12_to_coco_stuff".
    """
    named = find_split(split)
    if dataset == "shapescenes" or not (Path(dataset) / "classes.txt").is_file():
        return named
    classes = read_names(Path(dataset))
    if set(classes) != set(named.classes):
        target = next((other for other in SPLITS.values() if set(other.classes) == set(classes)), None)
        if target is not None:
            return transfer_split(named, make_split(target.name, classes, (), target.stuff))
    return make_split(named.name, classes, named.unseen, named.stuff)


def training_split(settings: TrainSettings) -> Split:
    """What a training run sees: its data set's split, with fewer seen classes where its settings say so."""
    return fewer_seen(split_for(settings.dataset, settings.split), settings.seen_classes, settings.seed)


def _known(dataset: str) -> None:
    if dataset != "shapescenes" and not Path(dataset).is_dir():
        raise ValueError(
            f"There is no data set {dataset!r}: neither 'shapescenes' nor a folder. "
            "Nothing could be read; check the path."
        )


class Shares(Sampler):
    """For each iteration, the part of the global batch that one of `world` processes takes."""

    def __init__(self, iterations: int, batch: int, rank: int, world: int):
        self.iterations, self.batch, self.rank, self.share = iterations, batch, rank, batch // world

    def __len__(self) -> int:
        return self.iterations

    def __iter__(self):
        for first in range(0, self.iterations * self.batch, self.batch):
            own = first + self.rank * self.share
            yield list(range(own, own + self.share))


def train_loader(
    settings, split: Split, scenes: SceneSettings | None = None, rank: int = 0, world: int = 1
) -> DataLoader:
    """Batches for `settings.iterations` iterations of training, in an order that its seed fixes.

    settings: TrainSettings. In the inductive setting unseen labels are 255 and seen ones count from 0;
    in the transductive one unseen labels are `transductive.HIDDEN` and seen ones stay. Of `world` processes,
    each gets its share of every global batch.
    """
    _known(settings.dataset)
    length = settings.iterations * settings.batch
    hide = {"inductive": hide_unseen, "transductive": mark_unseen}.get(settings.setting)
    hide = hide and partial(hide, split=split)
    if settings.dataset == "shapescenes":
        scenes = scenes or SceneSettings(size=settings.size)
        data, workers = SceneData(length, scenes, TRAIN_SEED + 1000 * settings.seed, hide, settings.images), 0
    else:
        data = VocData(
            settings.dataset, "train", split, settings.size, length, hide, settings.seed, settings.images
        )  # fmt: skip
        workers = settings.num_workers
    return DataLoader(
        data, batch_sampler=Shares(settings.iterations, settings.batch, rank, world), collate_fn=_stack,
        num_workers=workers, prefetch_factor=4 if workers else None, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def first_images(loader: DataLoader, count: int) -> Tensor:
    """The first `count` images that a training loader's data hold, over all devices: (count, 3, H, W)."""
    data, indices = loader.dataset, list(range(count))
    batch = data.__getitems__(indices) if hasattr(data, "__getitems__") else _stack([data[i] for i in indices])
    return batch.image_B3HW


def held_out_loader(
    settings, split: Split, scenes: SceneSettings | None = None, rank: int = 0, world: int = 1
) -> DataLoader:
    """Held-out pictures, each once: settings.scenes ShapeScenes, or the folder's val set.

    settings: EvaluateSettings. Of `world` processes, each gets every world-th batch: together they see each
    picture once, in the very batches of a single process, and none is repeated to fill up the last ones.
    """
    _known(settings.dataset)
    seed = TEST_SEED if settings.part == "test" else VALIDATION_SEED
    if settings.dataset == "shapescenes":
        data = SceneData(settings.scenes, scenes or SceneSettings(size=settings.size), seed)
        batch, workers = settings.batch, 0
    else:  # pictures differ in size: one at a time
        data, batch, workers = VocData(settings.dataset, "val", split), 1, settings.num_workers
    batches = list(BatchSampler(range(len(data)), batch, drop_last=False))[rank::world]
    return DataLoader(data, batch_sampler=batches, collate_fn=_stack, num_workers=workers)

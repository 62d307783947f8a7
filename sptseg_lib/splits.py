"""Which classes are seen in training and which are not, under each data set's protocol."""

from typing import Annotated

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from torch import Tensor

from .class_lists import ADE, CITYSCAPES, COCO, COCO_STUFF, CONTEXT, VOC, common_name
from .scenes.atlas import CLASSES, STUFF, THINGS
from .settings import one_of


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{', '.join(twice)} named more than once. Two train ids would share a name; name each class once."
        )
    return names


Names = Annotated[tuple[str, ...], AfterValidator(_distinct)]


class Split(BaseModel):
    """Classes in the order of their train ids, seen and unseen.

    Raises: ValueError where a class is in both lists or in neither, or where no class is seen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    seen: Names
    unseen: Names
    classes: Names
    stuff: Names = ()

    @model_validator(mode="after")
    def _consistent(self):
        if leaked := [name for name in self.seen if name in self.unseen]:
            raise ValueError(
                f"{len(leaked)} class(es) are both seen and unseen: {', '.join(leaked)}. "
                "Zero-shot scores would be inflated; remove them from one list."
            )
        if not self.seen:
            raise ValueError(f"Split {self.name!r} has no seen class. There would be no label to learn from; name one.")
        listed = {*self.seen, *self.unseen}
        if odd := listed.symmetric_difference(self.classes):
            raise ValueError(
                f"{', '.join(sorted(odd))}: not in both the class list and the split. Its pixels would be scored as "
                "something else; list each class once, as seen or as unseen."
            )
        return self

    @property
    def seen_ids(self) -> tuple[int, ...]:
        return tuple(i for i, name in enumerate(self.classes) if name in self.seen)

    @property
    def unseen_ids(self) -> tuple[int, ...]:
        return tuple(i for i, name in enumerate(self.classes) if name in self.unseen)


def make_split(name: str, classes: tuple[str, ...], unseen: tuple[str, ...], stuff: tuple[str, ...] = ()) -> Split:
    """A split from the class list and its unseen part; raises ValueError for an unknown unseen class."""
    for one in unseen:
        one_of("class", one, classes)
    seen = tuple(one for one in classes if one not in unseen)
    return Split(name=name, classes=classes, seen=seen, unseen=unseen, stuff=stuff)


def _shapes(name: str, *unseen: str) -> Split:
    return make_split(name, CLASSES, unseen, STUFF)


_COCO_UNSEEN = (
    *("cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors", "cardboard", "clouds", "grass"),
    *("playingfield", "river", "road", "tree", "wall-concrete"),
)
_CONTEXT_UNSEEN = ("cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "keyboard", "aeroplane")

SPLITS: dict[str, Split] = {
    split.name: split
    for split in (
        _shapes("default", "star", "ring", "arrow", "checkerboard", "waves"),
        _shapes("unseen_things", "star", "ring", "arrow", "heart", "gear"),
        _shapes("unseen_stuff", "checkerboard", "waves", "clouds"),
        _shapes("half", *THINGS[1::2], *STUFF[1::2]),
        make_split("voc12", VOC, VOC[15:]),
        make_split("coco_stuff", COCO, _COCO_UNSEEN, COCO_STUFF),
        make_split("pascal_context", CONTEXT, _CONTEXT_UNSEEN),
        make_split("pascal_context_60", ("background", *CONTEXT), _CONTEXT_UNSEEN),
        # Tests of what was learned elsewhere (see transfer_split); on their own, all of their classes are seen.
        make_split("ade20k", ADE, ()),
        make_split("cityscapes", CITYSCAPES, ()),
    )
}


def find_split(name: str) -> Split:
    """A split by name; raises ValueError that lists the known ones."""
    return SPLITS[one_of("split", name, SPLITS)]


def transfer_split(train_split: Split, target: Split) -> Split:
    """The target data set's classes, seen where training on `train_split` saw a class of that name.

    aeroplane and airplane are one name (class_lists.common_name): what was learned as one is not unseen as the
    other. Raises: ValueError where the two share no seen class, so that no score of seen classes could be given.
    """
    known = {common_name(name) for name in train_split.seen}
    unseen = tuple(name for name in target.classes if common_name(name) not in known)
    if len(unseen) == len(target.classes):
        raise ValueError(
            f"Training on {train_split.name!r} saw no class of {target.name!r}. Its mIoU(S) and hIoU would be of "
            "nothing; choose a data set that shares classes, or score it as a split of its own."
        )
    return make_split(f"{train_split.name}_to_{target.name}", target.classes, unseen, target.stuff)


def fewer_seen(split: Split, count: int, seed: int) -> Split:
    """A split of which `count` seen classes stay seen and the others join the unseen ones; 0: the split as it is.

    Which ones, the seed draws, things and stuff in proportion; a larger count keeps those of a smaller one.
    Raises: ValueError where the split has not so many seen classes.
    """
    if not count:
        return split
    if count > len(split.seen):
        raise ValueError(
            f"seen_classes={count}, and split {split.name!r} has {len(split.seen)} seen classes. There would be fewer "
            f"than asked for; choose at most {len(split.seen)}, or 0 for all of them."
        )
    chance = torch.rand(len(split.seen), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [name for _, name in sorted(zip(chance, split.seen))]
    kinds = [[name for name in drawn if (name in split.stuff) == stuff] for stuff in (False, True)]
    place = {name: (i + 0.5) / len(kind) for kind in kinds for i, name in enumerate(kind)}
    kept = sorted(drawn, key=place.get)[:count]
    unseen = tuple(name for name in split.classes if name not in kept)
    return make_split(f"{split.name}, {count} seen", split.classes, unseen, split.stuff)


def hide_unseen(label_BHW: Tensor, split: Split, ignore: int = 255) -> Tensor:
    """Masks as training may see them: unseen pixels become 255, seen classes count from 0 in order.

    Shapes: (B, H, W) integer train ids -> (B, H, W) int64 indices into `split.seen_ids`.
    Raises: ValueError for labels that are neither in the class list nor 255.
    """
    table = torch.full((256,), -1, dtype=torch.int64, device=label_BHW.device)
    table[list(split.seen_ids)] = torch.arange(len(split.seen_ids), device=label_BHW.device)
    table[list(split.unseen_ids)] = ignore
    table[ignore] = ignore
    check_labels(label_BHW, len(split.classes), ignore)
    return table[label_BHW.long()]


def check_labels(label_BHW: Tensor, classes: int, ignore: int = 255) -> None:
    """Raises ValueError, naming them, for labels outside the class list."""
    outside = label_BHW[((label_BHW < 0) | (label_BHW >= classes)) & (label_BHW != ignore)]
    if len(outside):
        raise ValueError(
            f"Labels {sorted(set(outside.tolist()))} are outside the class list of {classes} (ids 0 to {classes - 1}, "
            f"{ignore} ignored). Those pixels would be scored as errors of every class; convert the masks to train ids."
        )

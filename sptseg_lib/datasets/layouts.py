"""The five data sets: their archives, where files lie in them, their labels, and how many pictures there must be."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..class_lists import ADE, CITYSCAPES, COCO, CONTEXT, VOC
from .labels import (
    ADE_TABLE,
    CITYSCAPES_TABLE,
    COCO_TABLE,
    SBD_TABLE,
    VOC_TABLE,
    check_context_names,
    context_table,
)

Rule = tuple[str, str]  # what a member's path ends in, as a pattern -> its place in the folder that is being prepared


@dataclass(frozen=True)
class Archive:
    """One archive. checksum: as published by torchvision, GluonCV or COCO's users; None where nobody published one."""

    name: str
    url: str | None
    checksum: str | None
    rules: tuple[Rule, ...]

    def place(self, member: str) -> str | None:
        for pattern, target in self.rules:
            if match := re.search(rf"(?:^|/){pattern}$", member):
                return match.expand(target)
        return None


@dataclass(frozen=True)
class Layout:
    """A data set. `pairs` gives, of an unpacked folder, by set the pictures' (raw mask, table) by name."""

    name: str
    classes: tuple[str, ...]
    archives: tuple[Archive, ...]
    counts: dict[str, int]
    pairs: Callable[[Path], dict[str, dict[str, tuple[Path, np.ndarray]]]]
    suffix: str = ".jpg"
    by_hand: str = ""


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} was in none of the sources. Without it nobody knows which pictures are for training; hand "
            "over the complete archive."
        )
    return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def _masks(folder: Path, table: np.ndarray, pattern: str = "*.png") -> dict[str, tuple[Path, np.ndarray]]:
    return {path.stem: (path, table) for path in sorted(folder.glob(pattern))}


def _named(names: list[str], folder: Path, suffix: str, table: np.ndarray) -> dict[str, tuple[Path, np.ndarray]]:
    return {name: (folder / f"{name}{suffix}", table) for name in names}


def _voc_pairs(raw: Path) -> dict:
    """Train is VOC's train and all of SBD but VOC's val; where both have a mask, VOC's own finer one is used."""
    train, val = (_lines(raw / "lists" / f"{name}.txt") for name in ("train", "val"))
    sbd = {name for part in ("train", "val") for name in _lines(raw / "sbd_lists" / f"{part}.txt")}
    extra = sorted(sbd - {*train, *val})
    return {
        "train": _named(train, raw / "voc", ".png", VOC_TABLE) | _named(extra, raw / "sbd", ".mat", SBD_TABLE),
        "val": _named(val, raw / "voc", ".png", VOC_TABLE),
    }


def _context_pairs(raw: Path, classes: tuple[str, ...]) -> dict:
    """VOC 2010's main lists, 4,998 and 5,105 pictures: all of them, and nothing else, are labelled."""
    if (listing := raw / "labels.txt").is_file():
        check_context_names(listing)
    table = context_table(classes)
    return {
        name: _named(_lines(raw / "lists" / f"{name}.txt"), raw / "masks", ".mat", table) for name in ("train", "val")
    }


def _folder_pairs(raw: Path, table: np.ndarray) -> dict:
    return {name: _masks(raw / name, table) for name in ("train", "val")}


_JPEG = r"([^/]+)\.jpg"
_IMAGE = r"JPEGImages/\1.jpg"

VOC12 = Layout(
    "voc12",
    VOC,
    (
        Archive(
            "VOCtrainval_11-May-2012.tar",
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "md5:6cd6e144f989b92b3379bac3b3de84fd",
            (
                (rf"VOC2012/JPEGImages/{_JPEG}", _IMAGE),
                (r"VOC2012/SegmentationClass/([^/]+)\.png", r"raw/voc/\1.png"),
                (r"VOC2012/ImageSets/Segmentation/(train|val)\.txt", r"raw/lists/\1.txt"),
            ),
        ),
        Archive(
            "benchmark.tgz",
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            "md5:82b4d87ceb2ed10f6038a1cba92111cb",
            (
                (r"dataset/cls/([^/]+)\.mat", r"raw/sbd/\1.mat"),
                (r"dataset/(train|val)\.txt", r"raw/sbd_lists/\1.txt"),
            ),
        ),
    ),
    {"train": 10_582, "val": 1_449},
    _voc_pairs,
)

COCO_STUFF = Layout(
    "coco_stuff",
    COCO,
    (
        Archive(
            "train2017.zip",
            "http://images.cocodataset.org/zips/train2017.zip",
            "md5:cced6f7f71b7629ddf16f17bbcfab6b2",
            ((rf"train2017/{_JPEG}", _IMAGE),),
        ),
        Archive(
            "val2017.zip",
            "http://images.cocodataset.org/zips/val2017.zip",
            "md5:442b8da7639aecaf257c1dceb8ba8c80",
            ((rf"val2017/{_JPEG}", _IMAGE),),
        ),
        Archive(
            "stuffthingmaps_trainval2017.zip",
            "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
            None,
            ((r"(train|val)2017/([0-9]{12})\.png", r"raw/\1/\2.png"),),  # other tools put theirs beside them
        ),
    ),
    {"train": 118_287, "val": 5_000},
    partial(_folder_pairs, table=COCO_TABLE),
)


def pascal_context(classes: tuple[str, ...] = CONTEXT) -> Layout:
    """PASCAL Context with its 59 classes, or with 'background' before them."""
    return Layout(
        "pascal_context" if classes == CONTEXT else "pascal_context_60",
        classes,
        (
            Archive(
                "VOCtrainval_03-May-2010.tar",
                "https://thor.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
                "md5:da459979d0c395079b5c75ee67908abb",
                (
                    (rf"VOC2010/JPEGImages/{_JPEG}", _IMAGE),
                    (r"VOC2010/ImageSets/Main/(train|val)\.txt", r"raw/lists/\1.txt"),
                ),
            ),
            Archive(
                "trainval.tar.gz",
                "https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz",
                None,
                ((r"([0-9]{4}_[0-9]{6})\.mat", r"raw/masks/\1.mat"), (r"labels\.txt", r"raw/labels.txt")),
            ),
        ),
        {"train": 4_998, "val": 5_105},
        partial(_context_pairs, classes=classes),
    )


ADE20K = Layout(
    "ade20k",
    ADE,
    (
        Archive(
            "ADEChallengeData2016.zip",
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
            (
                (rf"images/(?:training|validation)/{_JPEG}", _IMAGE),
                (r"annotations/(train|val)(?:ing|idation)/([^/]+)\.png", r"raw/\1/\2.png"),
            ),
        ),
    ),
    {"train": 20_210, "val": 2_000},
    partial(_folder_pairs, table=ADE_TABLE),
)

_AFTER_LOGIN = "after a login at www.cityscapes-dataset.com (free for research)"
CITYSCAPES_19 = Layout(
    "cityscapes",
    CITYSCAPES,
    (
        Archive(
            "leftImg8bit_trainvaltest.zip",
            None,
            None,
            ((r"leftImg8bit/(?:train|val)/[^/]+/([^/]+)_leftImg8bit\.png", r"JPEGImages/\1.png"),),
        ),
        Archive(
            "gtFine_trainvaltest.zip",
            None,
            None,
            ((r"gtFine/(train|val)/[^/]+/([^/]+)_gtFine_labelIds\.png", r"raw/\1/\2.png"),),
        ),
    ),
    {"train": 2_975, "val": 500},
    partial(_folder_pairs, table=CITYSCAPES_TABLE),
    suffix=".png",
    by_hand=_AFTER_LOGIN,
)

LAYOUTS = {
    layout.name: layout
    for layout in (
        VOC12,
        COCO_STUFF,
        pascal_context(),
        pascal_context(("background", *CONTEXT)),
        ADE20K,
        CITYSCAPES_19,
    )
}

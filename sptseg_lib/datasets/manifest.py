"""What a prepared folder holds, written down when it was made, and the quick check of it when it is loaded.

A prepared folder has PASCAL VOC's layout: JPEGImages/, SegmentationClass/ (palette PNGs holding train id + 1, 0 for
ignored), ImageSets/Segmentation/{train,val}.txt and classes.txt, one name a line; and manifest.json beside them.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from .download import write_json
from .labels import COCO_GAPS, COCO_RAW

NAME, FORMAT, SAMPLE = "manifest.json", 1, 12
SETS = ("train", "val")


def read_names(folder: Path) -> tuple[str, ...]:
    """Class names of classes.txt, one a line; spaces inside a name belong to it."""
    lines = (folder / "classes.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())


def read_list(folder: Path, name: str) -> list[str]:
    return _listing(folder, name).read_text().split()


def _listing(folder: Path, name: str) -> Path:
    return folder / "ImageSets" / "Segmentation" / f"{name}.txt"


def mask_path(folder: Path, stem: str) -> Path:
    return folder / "SegmentationClass" / f"{stem}.png"


def label_counts(path: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels of each stored value (256,) and the size (width, height) of a mask of a prepared folder.

    Raises: ValueError for a mask of colours, FileNotFoundError for none.
    """
    with Image.open(path) as mask:
        if mask.mode not in ("P", "L"):
            raise ValueError(
                f"The mask {path} has mode {mask.mode}, not one label a pixel (P or L). Its colours would be taken "
                "for classes; prepare the folder again."
            )
        return np.bincount(np.asarray(mask).ravel(), minlength=256), mask.size


def fingerprint(folder: Path) -> dict:
    """How many files a folder holds, their bytes, and a hash of their names and sizes. Reads no file."""
    with os.scandir(folder) as entries:
        files = sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file())
    digest = hashlib.sha256("\n".join(f"{name} {size}" for name, size in files).encode()).hexdigest()
    return {"files": len(files), "bytes": sum(size for _, size in files), "names_and_sizes": digest}


def describe(folder: Path, dataset: str, official: bool, suffix: str, sets: dict, sources: list[dict]) -> dict:
    """The manifest of a folder; sets: {"train": pixels and pictures of each stored value}, as `verify` counts them."""
    stems = [stem for name in SETS for stem in read_list(folder, name)]
    sample = stems[:: max(1, len(stems) // SAMPLE)][:SAMPLE]
    return {
        "format": FORMAT,
        "dataset": dataset,
        "official": official,
        "image_suffix": suffix,
        "classes": list(read_names(folder)),
        "sets": {name: {"list": _hash(read_list(folder, name)), **row} for name, row in sets.items()},
        "folders": {part: fingerprint(folder / part) for part in ("JPEGImages", "SegmentationClass")},
        "sample": {stem: _counts(label_counts(mask_path(folder, stem))[0]) for stem in sample},
        "sources": sources,
    }


def _counts(counts: np.ndarray) -> dict[str, int]:
    return {str(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _hash(stems: list[str]) -> str:
    return hashlib.sha256("\n".join(stems).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict) -> None:
    write_json(folder / NAME, manifest)


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a folder, or None. Raises: ValueError for one that cannot be read."""
    try:
        manifest = json.loads((folder / NAME).read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return manifest
        reason = f"format {manifest['format']}, not {FORMAT}"
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        reason = repr(error)
    raise ValueError(
        f"{folder / NAME} cannot be read ({reason}), so the folder cannot be told from a broken one. Prepare it again."
    )


def check_manifest(folder: Path, classes: tuple[str, ...] | None = None) -> dict | None:
    """Hold a folder against its manifest in well under a second: names, sizes, lists, and a few masks' labels.

    classes: the names that its labels will be scored under. Returns: the manifest, None where there is none: any
    folder in the layout may be used, and of that only some masks are held against the class list.
    Raises: ValueError that names what happened to the folder.
    """
    if (manifest := read_manifest(folder)) is None:
        check_some_masks(folder, classes or read_names(folder))
        return None
    made = tuple(manifest["classes"])
    for where, names in (("classes.txt", read_names(folder)), ("the split", classes or made)):
        if names != made:
            differ = [f"{i}: {a!r}, not {b!r}" for i, (a, b) in enumerate(zip(names, made)) if a != b]
            raise ValueError(
                f"{folder}: {where} names {len(names)} classes, the labels were made for {len(made)} "
                f"({'; '.join(differ[:3]) or 'one list is longer'}). Scores would stand under other names; use the "
                f"split of {manifest['dataset']}, or prepare the folder again."
            )
    for stem, known in manifest["sample"].items():
        if not (path := mask_path(folder, stem)).is_file():
            raise FileNotFoundError(f"{path} is listed but missing; the folder is incomplete, prepare it again.")
        counts, _ = label_counts(path)
        if _counts(counts) != known:
            was = np.zeros(256, np.int64)
            was[[int(value) for value in known]] = list(known.values())
            raise ValueError(f"{path} was changed: {diagnose(counts, was, made)} Prepare the folder again.")
    for name, row in manifest["sets"].items():
        if _hash(read_list(folder, name)) != row["list"]:
            raise ValueError(
                f"{folder}: the list {name}.txt is not the one that was verified ({row['pictures']} pictures). Scores "
                "would be of another set; prepare the folder again, or copy the part you want without its manifest."
            )
    for part, known in manifest["folders"].items():
        found = fingerprint(folder / part)
        if found != known:
            raise ValueError(
                f"{folder / part} holds {found['files']} files of {found['bytes']} bytes, and {known['files']} of "
                f"{known['bytes']} were verified. Files were added, lost or replaced; prepare the folder again."
            )
    return manifest


def check_some_masks(folder: Path, classes: tuple[str, ...], most: int = 48) -> None:
    """Raises ValueError where masks of a folder without a manifest hold values beyond the class list, but for 255."""
    stems = [stem for name in SETS if _listing(folder, name).is_file() for stem in read_list(folder, name)]
    paths = [mask_path(folder, stem) for stem in stems[:: max(1, len(stems) // most)][:most]]
    pixels = sum((label_counts(path)[0] for path in paths if path.is_file()), np.zeros(256, np.int64))
    if pixels[len(classes) + 1 : 255].any():
        raise ValueError(
            f"{folder} has no manifest, and of {len(paths)} masks looked at some do not fit the class list: "
            f"{suspect(pixels, classes)} Scores would be of the wrong classes; convert the masks with the data set's "
            "prepare script, to train id + 1 with 0 for ignored."
        )


def diagnose(found: np.ndarray, right: np.ndarray, classes: tuple[str, ...]) -> str:
    """Which of the known disasters turned the label counts `right` into `found`; both (256,) of stored values.

    Stored values are train id + 1 and 0 for ignored.
    """
    ids = np.arange(256)
    disasters = {
        "its labels are shifted up by one: every class is scored as the next one, and the last one as none": np.where(
            (ids > 0) & (ids < 255), ids + 1, ids
        ),
        "its background was reduced twice (labels shifted down by one): the first class is ignored, and "
        f"{classes[-1]!r} has no pixel left, so that its score is not a number": np.maximum(ids - 1, 0),
        "it holds train ids that count from 0, with 255 for ignored, as other tools write them; here they are stored "
        "plus one, so every class would be scored as the one before it": np.where(ids == 0, 255, ids - 1),
    }
    if len(classes) == len(COCO_RAW):
        raw = ids.copy()
        raw[1 : len(COCO_RAW) + 1] = COCO_RAW
        raw[0] = 255
        disasters |= {
            "it holds raw COCO-Stuff ids, not train ids: only the first 11 classes would be right": raw,
            "it holds raw COCO-Stuff ids plus one, not train ids: only the first 11 classes would be right": np.where(
                ids == 0, 0, np.minimum(raw + 1, 255)
            ),
        }
    for name, moved in disasters.items():
        if np.array_equal(np.bincount(moved, weights=right, minlength=256).astype(np.int64), found):
            return f"{name}."
    lost, new = (np.flatnonzero((a > 0) & (b == 0)).tolist() for a, b in ((right, found), (found, right)))
    return f"its label counts are not those that were verified (values lost: {lost}, new: {new})."


def suspect(pixels: np.ndarray, classes: tuple[str, ...]) -> str | None:
    """What is wrong with the label counts (256,) of a whole data set, judged by its class list alone, or None.

    For folders of unknown origin: counts that are right say nothing, but most disasters leave a class without pixels
    or values beyond the list.
    """
    count = len(classes)
    beyond = np.flatnonzero(pixels[count + 1 :]) + count + 1
    empty = [name for name, n in zip(classes, pixels[1 : count + 1]) if not n]
    gaps = np.array(COCO_GAPS)
    if count == len(COCO_RAW) and len(beyond):
        for offset, kind in ((0, "raw ids"), (1, "raw ids plus one")):
            if beyond[beyond < 255].size and not pixels[gaps + offset].any() and pixels[COCO_RAW[-1] + offset]:
                return f"These are COCO-Stuff's {kind}, not train ids: only its first 11 classes would be right."
    if len(beyond):
        if set(beyond.tolist()) == {255} and pixels[0] and not pixels[count]:
            return (
                "These are train ids that count from 0, with 255 for ignored: every class would be scored as the one "
                "before it. Stored labels count from 1."
            )
        shifted = beyond[0] == count + 1 and not pixels[1]
        return f"The values {beyond.tolist()[:8]} are beyond the list of {count} classes" + (
            f", and {classes[0]!r} has no pixel: labels are shifted up by one." if shifted else "."
        )
    if empty == [classes[-1]]:
        return f"{empty[0]!r}, the last class, has no pixel: labels are shifted down, the background was reduced twice."
    if empty:
        return f"{len(empty)} classes have no pixel: {', '.join(empty[:8])}."
    return None

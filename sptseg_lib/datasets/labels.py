"""Raw masks of the data sets -> the masks of a prepared folder: palette PNGs of train id + 1, with 0 for ignored."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat
from tqdm.auto import tqdm

from ..palette import palette

UNKNOWN = -1  # in a table: a raw value that the data set does not have


def lookup(raw_to_train: dict[int, int], ignored=()) -> np.ndarray:
    """The table of a data set: raw value -> train id + 1, 0 where ignored, UNKNOWN elsewhere; (256 or more,) int16."""
    table = np.full(max([*raw_to_train, *ignored, 255]) + 1, UNKNOWN, np.int16)
    table[list(ignored)] = 0
    table[list(raw_to_train)] = np.fromiter(raw_to_train.values(), np.int16) + 1
    return table


VOC_TABLE = lookup({raw: raw - 1 for raw in range(1, 21)}, (0, 255))
SBD_TABLE = lookup({raw: raw - 1 for raw in range(1, 21)}, (0,))
ADE_TABLE = lookup({raw: raw - 1 for raw in range(1, 151)}, (0,))

# COCO-Stuff numbers its 171 classes with 11 gaps: objects that were never annotated.
COCO_GAPS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
COCO_RAW = tuple(raw for raw in range(182) if raw not in COCO_GAPS)
COCO_TABLE = lookup({raw: train for train, raw in enumerate(COCO_RAW)}, (255,))

CITYSCAPES_RAW = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_TABLE = lookup(
    {raw: train for train, raw in enumerate(CITYSCAPES_RAW)}, [raw for raw in range(34) if raw not in CITYSCAPES_RAW]
)

# PASCAL Context labels 459 classes; these are the 59 that are scored, by their number in its labels.txt.
CONTEXT_RAW = {
    "aeroplane": 2, "bag": 9, "bed": 18, "bedclothes": 19, "bench": 22, "bicycle": 23, "bird": 25, "boat": 31,
    "book": 33, "bottle": 34, "building": 44, "bus": 45, "cabinet": 46, "car": 59, "cat": 65, "ceiling": 68,
    "chair": 72, "cloth": 80, "computer": 85, "cow": 98, "cup": 104, "curtain": 105, "dog": 113, "door": 115,
    "fence": 144, "floor": 158, "flower": 159, "food": 162, "grass": 187, "ground": 189, "horse": 207,
    "keyboard": 220, "light": 232, "motorbike": 258, "mountain": 259, "mouse": 260, "person": 284, "plate": 295,
    "platform": 296, "pottedplant": 308, "road": 324, "rock": 326, "sheep": 347, "shelves": 349, "sidewalk": 354,
    "sign": 355, "sky": 360, "snow": 366, "sofa": 368, "table": 397, "track": 415, "train": 416, "tree": 420,
    "truck": 424, "tvmonitor": 427, "wall": 440, "water": 445, "window": 454, "wood": 458,
}  # fmt: skip
CONTEXT_COUNT = 459


def context_table(classes: tuple[str, ...]) -> np.ndarray:
    """PASCAL Context's table, by name; all other classes are ignored, or are 'background' where that is a class."""
    others = [raw for raw in range(CONTEXT_COUNT + 1) if raw not in CONTEXT_RAW.values()]
    table = {CONTEXT_RAW[name]: train for train, name in enumerate(classes) if name != "background"}
    if "background" in classes:
        table |= dict.fromkeys(others, classes.index("background"))
    return lookup(table, others)


def check_context_names(listing: Path) -> None:
    """Raises ValueError where PASCAL Context's own labels.txt numbers the classes otherwise than CONTEXT_RAW."""
    lines = (line.partition(":") for line in listing.read_text().splitlines() if ":" in line)
    named = {int(number): name.replace(" ", "") for number, _, name in lines}
    wrong = {name: named.get(raw) for name, raw in CONTEXT_RAW.items() if named.get(raw) != name}
    if wrong:
        name, other = next(iter(wrong.items()))
        raise ValueError(
            f"{listing.name} calls number {CONTEXT_RAW[name]} {other!r} and not {name!r} ({len(wrong)} differ). Masks "
            "would be given other names than theirs; use the labels of the data set's own trainval.tar.gz."
        )


def read_raw(path: Path) -> np.ndarray:
    """Raw labels (H, W) of a PNG mask, or of a .mat file of SBD or PASCAL Context.

    Raises: ValueError for a mask of colours or of another form, or one that cannot be read.
    """
    try:
        if path.suffix == ".mat":
            content = loadmat(path)
            return content["LabelMap"] if "LabelMap" in content else content["GTcls"]["Segmentation"][0, 0]
        with Image.open(path) as mask:
            mode = mask.mode
            if mode in ("P", "L"):
                return np.asarray(mask)
    except Exception as error:  # PIL and scipy raise a dozen kinds for damaged files
        raise ValueError(f"The mask {path} cannot be read ({error}); unpack it again from its archive.") from None
    raise ValueError(
        f"The mask {path} has mode {mode}: colours or wide numbers, not one label a pixel (P or L). Its values would "
        "be taken for other classes; use the data set's label masks, not pictures of them."
    )


def convert(raw_HW: np.ndarray, table: np.ndarray, name: str) -> np.ndarray:
    """Raw labels -> train id + 1, 0 where ignored: (H, W) uint8. Raises: ValueError that names unknown values."""
    if raw_HW.dtype == np.uint8:  # every value is in the table: the fast way
        label_HW = table[raw_HW]
    else:
        inside = (raw_HW >= 0) & (raw_HW < len(table))
        label_HW = np.where(inside, table[np.where(inside, raw_HW, 0)], UNKNOWN)
    if (label_HW == UNKNOWN).any():
        unknown = np.unique(raw_HW[label_HW == UNKNOWN]).tolist()
        raise ValueError(
            f"The mask {name} holds the values {unknown}, which this data set does not have. Its pixels would be "
            "scored as other classes; was it converted already, or does it belong to another data set?"
        )
    return label_HW.astype(np.uint8)


def convert_mask(source: Path, target: Path, table: np.ndarray) -> None:
    """Write one converted mask, as a whole or not at all; one that is there already is kept."""
    if target.exists():
        return
    mask = Image.fromarray(convert(read_raw(source), table, source.name))
    mask.putpalette(palette())
    temporary = target.with_name(target.name + ".tmp")
    mask.save(temporary, format="PNG")
    os.replace(temporary, target)


def spread(work, items: list, workers: int, title: str, unit: str = " files") -> list:
    """[work(item) for item in items] by `workers` processes, in order, with a progress bar.

    An error in one of them ends the others.
    """
    if workers <= 1 or len(items) < 64:
        return [work(item) for item in tqdm(items, desc=title, unit=unit)]
    # spawn: a fork of a process with threads (torch's, a notebook's) can hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            return list(tqdm(pool.map(work, items, chunksize=32), desc=title, unit=unit, total=len(items)))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

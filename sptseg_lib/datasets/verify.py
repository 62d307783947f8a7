"""Full verification of a prepared folder: every picture and every mask is opened, by several processes."""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from .labels import spread
from .manifest import SETS, label_counts, mask_path, read_list, read_names, suspect


def check_pair(stem: str, folder: Path, suffix: str) -> np.ndarray:
    """One picture and its mask: both there, whole, and of one size. Returns: pixels of each stored value (256,).

    Raises: FileNotFoundError for a missing file, ValueError for one that is damaged or of another size.
    """
    image, mask = folder / "JPEGImages" / f"{stem}{suffix}", mask_path(folder, stem)
    for path, what in ((image, "picture"), (mask, "mask")):
        if not path.is_file():
            raise FileNotFoundError(
                f"The {what} {path} is listed but missing. Training would stop there; prepare the folder again from "
                "complete archives."
            )
    try:
        with Image.open(image) as picture:
            size = _upright(picture)
            if not _ends_as_it_should(image):
                picture.load()  # slow, and raises where the picture is cut off
        counts, mask_size = label_counts(mask)
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{stem}: the picture or its mask is damaged ({error}). It could not be trained on or scored; prepare the "
            "folder again from whole archives."
        ) from None
    if size != mask_size:
        raise ValueError(
            f"{stem}: the picture has {size[0]}×{size[1]} pixels and its mask {mask_size[0]}×{mask_size[1]}. Labels "
            "would fall on other pixels than their own; the two do not belong together: fetch both archives again."
        )
    return counts.astype(np.int32)  # 120,000 of them are kept


def _upright(picture: Image.Image) -> tuple[int, int]:
    """Width and height as the picture is loaded: turned as its EXIF entry says, read without decoding it."""
    turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return picture.size[::-1] if turned else picture.size


def _ends_as_it_should(path: Path) -> bool:
    """Whether the end marker of a JPEG or PNG is near its end: cheap proof that nothing was cut off."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        tail = file.read()
    return (b"IEND" if path.suffix == ".png" else b"\xff\xd9") in tail


def verify(folder: Path, suffix: str = ".jpg", workers: int = 1, expected: dict[str, int] | None = None) -> dict:
    """Open every picture and mask of a folder in the layout.

    expected: pictures of each set, enforced where given; then every class must have pixels, too.
    Returns: by set, `pictures`, and of each stored value its `pixels` and the number of `pictures_with` it.
    Raises: as `check_pair`; ValueError for an empty set, wrong counts, a picture in two sets, values beyond the class
    list, or label counts that give away one of the known mistakes.
    """
    classes, stems = read_names(folder), {name: read_list(folder, name) for name in SETS}
    for name, listed in stems.items():
        if not listed:
            raise ValueError(f"{folder}: the set {name!r} lists no picture. There would be nothing to learn or score.")
        if len(set(listed)) < len(listed):
            raise ValueError(
                f"{folder}: {name}.txt lists {len(listed) - len(set(listed))} picture(s) twice. They would count "
                "double; prepare the folder again."
            )
        if expected and len(listed) != expected[name]:
            raise ValueError(
                f"{folder}: the set {name!r} has {len(listed)} pictures, the official one {expected[name]}. Scores "
                "could not stand beside published ones; complete the archives, or say --unofficial for a subset."
            )
    if both := set(stems["train"]) & set(stems["val"]):
        raise ValueError(
            f"{folder}: {len(both)} picture(s) are in both sets, {min(both)} first. Scores would be of pictures that "
            "were trained on; prepare the folder again."
        )
    everything = [stem for listed in stems.values() for stem in listed]
    check = partial(check_pair, folder=folder, suffix=suffix)
    counts = np.stack(spread(check, everything, workers, f"verifying {folder.name}", " pairs"))
    total = counts.sum(0, dtype=np.int64)
    beyond = np.flatnonzero(total[len(classes) + 1 :])
    if (expected or len(beyond)) and (wrong := suspect(total, classes)):
        raise ValueError(
            f"{folder}: {wrong} Scores would be of the wrong classes; convert the masks from the original archives."
        )
    parts = np.split(counts, [len(stems["train"])])
    last = len(classes) + 1
    return {
        name: {
            "pictures": len(part),
            "pixels": part.sum(0, dtype=np.int64)[:last].tolist(),
            "pictures_with": (part > 0).sum(0)[:last].tolist(),
        }
        for name, part in zip(SETS, parts)
    }

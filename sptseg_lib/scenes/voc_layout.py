"""ShapeScenes on disk, in the folder layout of PASCAL VOC: JPEG images and palette PNG masks."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..disk import check_room
from ..palette import palette
from .atlas import CLASSES
from .render import DEFAULT, SceneSettings, render_scenes

SETS = {"train": 0, "val": 1}


def write_voc(folder: str | Path, counts: dict[str, int], settings: SceneSettings = DEFAULT, seed: int = 0) -> Path:
    """Write scenes below `folder`: JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/<set>.txt.

    counts: scenes by set, e.g. {"train": 1000, "val": 200}. As in PASCAL VOC, label 0 is background
    and class ids count from 1, in the order of classes.txt. Each set has its own seed. The list of a
    set is written last, so that an interrupted set cannot be taken for a complete one.
    Raises: ValueError for an unknown set; OSError where the disk is too full.
    """
    folder = Path(folder)
    if unknown := set(counts) - set(SETS):
        raise ValueError(f"Unknown sets {sorted(unknown)}. No reader would look for them; use {sorted(SETS)}.")
    check_room(folder, sum(counts.values()) * (settings.size**2 + 4096))
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    colours = palette()
    for name, count in counts.items():
        (folder / "ImageSets" / "Segmentation" / f"{name}.txt").unlink(missing_ok=True)
        stems = [f"{name}_{i:06d}" for i in range(count)]
        for first in tqdm(range(0, count, 64), desc=f"writing {name}", unit="64 scenes"):
            index = torch.arange(first, min(first + 64, count))
            scenes = render_scenes(index, settings, seed + 1000 * SETS[name])
            pixels = (scenes.image_B3HW * 255).round().byte().permute(0, 2, 3, 1).numpy()
            labels = scenes.label_BHW.numpy()
            labels = np.where(labels == 255, 0, labels + 1).astype(np.uint8)
            for stem, image, label in zip(stems[first:], pixels, labels):
                Image.fromarray(image).save(folder / "JPEGImages" / f"{stem}.jpg", quality=95)
                mask = Image.fromarray(label, mode="P")
                mask.putpalette(colours)
                mask.save(folder / "SegmentationClass" / f"{stem}.png")
        (folder / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(stems) + "\n")
    return folder

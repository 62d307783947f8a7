"""ShapeScenes in the archive form, folders, file types and raw label values of each photograph data set."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from sptseg_lib.class_lists import CONTEXT
from sptseg_lib.scenes.render import SceneSettings, render_scenes

SIZE = 24


@cache
def _scenes() -> tuple[torch.Tensor, torch.Tensor]:
    return render_scenes(torch.arange(40), SceneSettings(size=SIZE), 5)[:2]


class Scene:
    """One scene; `raw` gives each of its 16 classes a raw label of a data set."""

    def __init__(self, index: int):
        images, labels = _scenes()
        self.image = Image.fromarray((images[index] * 255).byte().permute(1, 2, 0).numpy())
        self.label = labels[index].numpy().copy()
        self.label[0] = 255  # a row of unlabelled pixels

    def raw(self, values, unlabelled: int) -> np.ndarray:
        table = np.full(256, unlabelled, np.int64)
        table[:16] = values
        return table[self.label]

    def encoded(self, kind: str) -> bytes:
        return encode(self.image, kind)


def encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def png(raw: np.ndarray, palette: bool = False) -> bytes:
    mask = Image.fromarray(raw.astype(np.uint8))
    if palette:
        mask.putpalette(list(range(256)) * 3)
    return encode(mask, "PNG")


def mat(**content) -> bytes:
    file = io.BytesIO()
    savemat(file, content, do_compression=True)
    return file.getvalue()


def sbd_mat(raw: np.ndarray) -> bytes:
    """As in SBD: a struct GTcls with the fields Boundaries, Segmentation and CategoriesPresent."""
    boundaries = np.empty((20, 1), object)
    boundaries[:] = [[np.zeros((1, 1))]] * 20
    content = {"Boundaries": boundaries, "Segmentation": raw.astype(np.uint8), "CategoriesPresent": np.unique(raw)}
    return mat(GTcls=content)


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


# Of each data set, the raw labels that stand for the 16 classes of ShapeScenes.
VOC_RAW = list(range(1, 17))
COCO_RAW = [0, 9, 10, 12, 24, 26, 27, 30, 43, 45, 64, 66, 69, 89, 91, 181]
CONTEXT_RAW = [2, 23, 25, 98, 397, 9, 18, 19, 33, 440, 445, 454, 458, 80, 85, 232]
ADE_RAW = [1, 2, 3, 10, 50, 75, 76, 99, 100, 101, 120, 130, 140, 148, 149, 150]
CITY_RAW = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 31, 32, 33]


def voc12(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """VOC's tar and SBD's tgz: 2 pictures of VOC's train, 2 of val, 5 of SBD of which one is VOC's train, one val's.

    Returns: the train ids (255 ignored) that the masks of train and val must come out with.
    """
    scenes = {f"2007_{i:06d}": Scene(i) for i in range(8)}
    names = list(scenes)
    train, val, extra = names[:2], names[2:4], names[4:]
    root = "VOCdevkit/VOC2012"
    voc = {f"{root}/JPEGImages/{name}.jpg": scene.encoded("JPEG") for name, scene in scenes.items()}
    voc[f"{root}/JPEGImages/2007_999999.jpg"] = scenes[names[0]].encoded("JPEG")  # in no list
    voc[f"{root}/Annotations/{names[0]}.xml"] = b"<annotation/>"
    for name in train + val:
        raw = scenes[name].raw(VOC_RAW, 255)
        raw[1] = 0  # background
        voc[f"{root}/SegmentationClass/{name}.png"] = png(raw, palette=True)
        voc[f"{root}/SegmentationObject/{name}.png"] = png(raw * 0, palette=True)
    for part, listed in {"train": train, "val": val, "trainval": train + val}.items():
        voc[f"{root}/ImageSets/Segmentation/{part}.txt"] = ("\n".join(listed) + "\n").encode()
    write_tar(folder / "VOCtrainval_11-May-2012.tar", voc)
    root = "benchmark_RELEASE/dataset"
    sbd = {f"{root}/cls/{name}.mat": sbd_mat(scenes[name].raw(VOC_RAW, 0)) for name in extra}
    for name in (train[0], val[0]):  # coarser masks of the same pictures: not to be used
        sbd[f"{root}/cls/{name}.mat"] = sbd_mat(np.full((SIZE, SIZE), 20))
    sbd |= {f"{root}/img/{name}.jpg": scenes[name].encoded("JPEG") for name in (*extra, train[0], val[0])}
    sbd[f"{root}/train.txt"] = "\n".join([*extra[:2], val[0]]).encode()
    sbd[f"{root}/val.txt"] = "\n".join([*extra[2:], train[0]]).encode()
    write_tar(folder / "benchmark.tgz", sbd)

    def wanted(name: str) -> np.ndarray:
        label = scenes[name].raw(range(16), 255)
        if name in train + val:
            label[1] = 255
        return label

    return {name: wanted(name) for name in train + extra}, {name: wanted(name) for name in val}


def coco_stuff(folder: Path) -> tuple[dict, dict]:
    """Three zips: pictures of train, of val, and grey maps of raw ids of both."""
    wanted, masks = [], {}
    for part, first, count in (("train", 0, 4), ("val", 10, 3)):
        scenes = {f"{i:012d}": Scene(i) for i in range(first, first + count)}
        images = {f"{part}2017/{name}.jpg": scene.encoded("JPEG") for name, scene in scenes.items()}
        write_zip(folder / f"{part}2017.zip", images)
        masks |= {f"{part}2017/{name}.png": png(scene.raw(COCO_RAW, 255)) for name, scene in scenes.items()}
        ids = [raw - sum(gap < raw for gap in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)) for raw in COCO_RAW]
        wanted.append({name: scene.raw(ids, 255) for name, scene in scenes.items()})
    masks["train2017/000000000000_labelTrainIds.png"] = png(np.zeros((SIZE, SIZE)))  # another tool's, not to be used
    write_zip(folder / "stuffthingmaps_trainval2017.zip", masks)
    return tuple(wanted)


def pascal_context(folder: Path, labels: str | None = None) -> tuple[dict, dict]:
    """VOC 2010's tar, and a tar.gz of .mat files with maps of 459 labels and their names."""
    scenes = {f"2008_{i:06d}": Scene(i) for i in range(7)}
    lists = {"train": list(scenes)[:4], "val": list(scenes)[4:]}
    root = "VOCdevkit/VOC2010"
    voc = {f"{root}/JPEGImages/{name}.jpg": scene.encoded("JPEG") for name, scene in scenes.items()}
    voc |= {f"{root}/ImageSets/Main/{part}.txt": ("\n".join(names) + "\n").encode() for part, names in lists.items()}
    voc |= {f"{root}/ImageSets/Main/dog_{part}.txt": b"2008_000000 -1\n" for part in lists}
    write_tar(folder / "VOCtrainval_03-May-2010.tar", voc)
    names = {raw: name for name, raw in CONTEXT_NAMES.items()}
    maps = {
        f"trainval/{name}.mat": mat(LabelMap=scene.raw(CONTEXT_RAW, 100).astype(np.uint16))
        for name, scene in scenes.items()
    }
    maps["labels.txt"] = (labels or "\n".join(f"{raw}: {names.get(raw, 'other')}" for raw in range(1, 460))).encode()
    write_tar(folder / "trainval.tar.gz", maps)
    ids = [CONTEXT.index(names[raw]) for raw in CONTEXT_RAW]
    return tuple({name: scenes[name].raw(ids, 255) for name in listed} for listed in lists.values())


def ade20k(folder: Path) -> tuple[dict, dict]:
    files, wanted = {}, []
    root = "ADEChallengeData2016"
    for part, long, first in (("train", "training", 0), ("val", "validation", 20)):
        scenes = {f"ADE_{part}_{i:08d}": Scene(i) for i in range(first, first + 3)}
        files |= {f"{root}/images/{long}/{name}.jpg": scene.encoded("JPEG") for name, scene in scenes.items()}
        files |= {f"{root}/annotations/{long}/{name}.png": png(s.raw(ADE_RAW, 0)) for name, s in scenes.items()}
        wanted.append({name: scene.raw([raw - 1 for raw in ADE_RAW], 255) for name, scene in scenes.items()})
    files[f"{root}/objectInfo150.txt"] = b"Idx\n"
    write_zip(folder / "ADEChallengeData2016.zip", files)
    return tuple(wanted)


def cityscapes(folder: Path) -> tuple[dict, dict]:
    images, masks, wanted = {}, {}, []
    train_ids = [*range(13), 16, 17, 18]
    for part, city, first in (("train", "aachen", 0), ("val", "lindau", 20), ("test", "berlin", 30)):
        scenes = {f"{city}_{i:06d}_000019": Scene(i) for i in range(first, first + 3)}
        for name, scene in scenes.items():
            images[f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png"] = scene.encoded("PNG")
            stem = f"gtFine/{part}/{city}/{name}_gtFine"
            masks[f"{stem}_labelIds.png"] = png(scene.raw(CITY_RAW, 3))
            masks[f"{stem}_color.png"] = scene.encoded("PNG")
            masks[f"{stem}_instanceIds.png"] = png(scene.raw(CITY_RAW, 3))
            masks[f"{stem}_polygons.json"] = b"{}"
        wanted.append({name: scene.raw(train_ids, 255) for name, scene in scenes.items()})
    write_zip(folder / "leftImg8bit_trainvaltest.zip", images)
    write_zip(folder / "gtFine_trainvaltest.zip", masks)
    return tuple(wanted[:2])


# Written down here a second time, by name, so that the library's table is held against something.
CONTEXT_NAMES = {
    name: int(raw)
    for name, raw in (
        pair.split(":")
        for pair in (
            "aeroplane:2 bag:9 bed:18 bedclothes:19 bench:22 bicycle:23 bird:25 boat:31 book:33 bottle:34 building:44 "
            "bus:45 cabinet:46 car:59 cat:65 ceiling:68 chair:72 cloth:80 computer:85 cow:98 cup:104 curtain:105 "
            "dog:113 door:115 fence:144 floor:158 flower:159 food:162 grass:187 ground:189 horse:207 keyboard:220 "
            "light:232 motorbike:258 mountain:259 mouse:260 person:284 plate:295 platform:296 pottedplant:308 road:324 "
            "rock:326 sheep:347 shelves:349 sidewalk:354 sign:355 sky:360 snow:366 sofa:368 table:397 track:415 "
            "train:416 tree:420 truck:424 tvmonitor:427 wall:440 water:445 window:454 wood:458"
        ).split()
    )
}

WRITERS: dict[str, Callable[[Path], tuple[dict, dict]]] = {
    "voc12": voc12,
    "coco_stuff": coco_stuff,
    "pascal_context": pascal_context,
    "ade20k": ade20k,
    "cityscapes": cityscapes,
}

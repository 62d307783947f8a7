"""Prepared folders: from every data set's archives to train ids, interrupted, resumed, spoilt and found out."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fake_archives import WRITERS, Scene, encode, png, write_zip
from PIL import Image
from torchvision.datasets import SBDataset, VOCSegmentation

from sptseg_lib.data import VocData, split_for
from sptseg_lib.datasets import prepare as steps
from sptseg_lib.datasets.layouts import LAYOUTS
from sptseg_lib.datasets.manifest import check_manifest, diagnose, read_manifest, suspect
from sptseg_lib.datasets.prepare import prepare
from sptseg_lib.datasets.verify import verify
from sptseg_lib.splits import SPLITS

ROOT = Path(__file__).resolve().parents[1]


def made(name: str, folder: Path, **options) -> tuple[Path, dict]:
    """A prepared folder and the train ids that its masks must hold, by set."""
    train, val = WRITERS[name.removesuffix("_60")](folder / "archives")
    out = folder / name
    prepare(LAYOUTS[name], out, [folder / "archives"], official=False, **options)
    return out, {"train": train, "val": val}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """COCO-Stuff's layout: the one in which raw and train ids differ."""
    return made("coco_stuff", tmp_path_factory.mktemp("coco"))[0]


@pytest.fixture
def broken(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "coco_stuff")


@pytest.mark.parametrize("name", WRITERS)
def test_archives_become_train_ids(name, tmp_path):
    out, wanted = made(name, tmp_path)
    split = SPLITS[name]
    assert split_for(str(out), name).classes == split.classes  # names with spaces survive
    for part, labels in wanted.items():
        data = VocData(out, part, split)
        assert sorted(data.stems) == sorted(labels)
        for i, stem in enumerate(data.stems):
            assert np.array_equal(data[i].label_BHW.numpy(), labels[stem]), stem
            assert data[i].image_B3HW.shape[1:] == labels[stem].shape
    assert {path.name for path in tmp_path.iterdir()} == {"archives", name}
    manifest = read_manifest(out)
    pixels = np.bincount(np.concatenate([label.ravel() for label in wanted["train"].values()]), minlength=256)
    count = len(split.classes)
    assert manifest["sets"]["train"]["pixels"] == [pixels[255], *pixels[:count]]
    assert manifest["sets"]["val"]["pictures"] == len(wanted["val"])
    assert {row["name"] for row in manifest["sources"]} == {archive.name for archive in LAYOUTS[name].archives}
    assert all(len(row["sha256"]) == 64 for row in manifest["sources"])


def test_context_with_background_keeps_what_is_not_one_of_the_59(tmp_path):
    out, wanted = made("pascal_context_60", tmp_path)
    data = VocData(out, "val", SPLITS["pascal_context_60"])
    for i, stem in enumerate(data.stems):
        label = np.where(wanted["val"][stem] == 255, -1, wanted["val"][stem]) + 1
        assert np.array_equal(data[i].label_BHW.numpy(), label)


def test_torchvisions_loaders_read_the_same_labels(tmp_path):
    """The fakes are VOC's and SBD's own form, and conversion changes nothing but background and border."""
    out, _ = made("voc12", tmp_path)
    shutil.unpack_archive(tmp_path / "archives" / "VOCtrainval_11-May-2012.tar", tmp_path, filter="data")
    shutil.unpack_archive(tmp_path / "archives" / "benchmark.tgz", tmp_path, filter="data")
    ours = {stem: np.asarray(Image.open(out / "SegmentationClass" / f"{stem}.png")) for stem in _stems(out, "train")}
    voc = VOCSegmentation(str(tmp_path), "2012", "train")
    assert len(voc) == 2
    for path, (_, mask) in zip(voc.images, voc, strict=True):
        theirs = np.asarray(mask)
        assert np.array_equal(ours.pop(Path(path).stem), np.where(theirs == 255, 0, theirs))
    for part in ("train", "val"):
        sbd = SBDataset(str(tmp_path / "benchmark_RELEASE" / "dataset"), part, "segmentation")
        for path, (_, mask) in zip(sbd.images, sbd, strict=True):
            if (mine := ours.pop(Path(path).stem, None)) is not None:
                assert np.array_equal(mine, np.asarray(mask))
    assert not ours


def _stems(folder: Path, part: str) -> list[str]:
    return (folder / "ImageSets" / "Segmentation" / f"{part}.txt").read_text().split()


@pytest.mark.parametrize("level", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_folders_may_be_given_at_any_level(level, tmp_path):
    train, val = WRITERS["voc12"](tmp_path / "archives")
    for name in ("VOCtrainval_11-May-2012.tar", "benchmark.tgz"):
        shutil.unpack_archive(tmp_path / "archives" / name, tmp_path / "mine", filter="data")
    before = sorted(path.read_bytes() for path in (tmp_path / "mine").rglob("*.jpg"))
    manifest = prepare(
        LAYOUTS["voc12"],
        tmp_path / "voc12",
        [tmp_path / "mine" / level, tmp_path / "mine" / "benchmark_RELEASE"],
        official=False,
    )
    assert manifest["sets"]["train"]["pictures"] == len(train) and set(_stems(tmp_path / "voc12", "val")) == set(val)
    assert sorted(path.read_bytes() for path in (tmp_path / "mine").rglob("*.jpg")) == before


def test_a_second_call_verifies_and_changes_nothing(prepared, broken):
    (broken.parent / "empty").mkdir()  # made by hand, and taken as it is
    WRITERS["coco_stuff"](broken.parent / "archives")
    prepare(LAYOUTS["coco_stuff"], broken.parent / "empty", [broken.parent / "archives"], official=False)
    state = {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    again = prepare(LAYOUTS["coco_stuff"], broken, official=False)
    assert again == read_manifest(prepared)
    assert {path: path.stat().st_mtime_ns for path in broken.rglob("*")} == state


def test_several_processes_count_what_one_counts(tmp_path):
    scene = Scene(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / part).mkdir(parents=True)
    stems = [f"p{i:03d}" for i in range(70)]
    for i, stem in enumerate(stems):
        (tmp_path / "JPEGImages" / f"{stem}.jpg").write_bytes(scene.encoded("JPEG"))
        (tmp_path / "SegmentationClass" / f"{stem}.png").write_bytes(png(scene.label * 0 + i % 3))
    (tmp_path / "classes.txt").write_text("a b\nc\n")
    for part, listed in (("train", stems[:60]), ("val", stems[60:])):
        (tmp_path / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(listed))
    one, two = (verify(tmp_path, workers=workers) for workers in (1, 2))
    assert one == two and one["train"]["pictures_with"] == [20, 20, 20]


@pytest.mark.parametrize("name", ["voc12", "coco_stuff"])
def test_interrupted_anywhere_nothing_looks_complete_and_it_goes_on(name, tmp_path, monkeypatch):
    """Stopped at every few files that it renames or removes, from the first to the folder's own name."""
    whole, _ = made(name, tmp_path / "whole")
    WRITERS[name](tmp_path / "archives")
    out, stops, left = tmp_path / name, 0, 0

    def stopping(real):
        def call(*arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", stopping(os.replace))
        patch.setattr("shutil.rmtree", stopping(shutil.rmtree))
        patch.setattr("pathlib.Path.unlink", stopping(Path.unlink))
        while not out.exists():
            left = (0, 3, 4, 1)[stops % 4]
            try:
                prepare(LAYOUTS[name], out, [tmp_path / "archives"], official=False)
            except KeyboardInterrupt:
                stops += 1
                assert not out.exists() and stops < 100
                with pytest.raises(FileNotFoundError, match="is missing"):
                    VocData(out, "train", SPLITS[name])
    assert stops > 5
    files = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    expected = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert files.keys() == expected.keys()
    assert all(files[path] == expected[path] for path in files if path.name != "manifest.json")
    assert read_manifest(out)["sets"] == read_manifest(whole)["sets"]


def test_the_partial_folder_belongs_to_one_command(tmp_path):
    WRITERS["coco_stuff"](tmp_path / "archives")
    (tmp_path / "archives" / "stuffthingmaps_trainval2017.zip").write_bytes(b"<!DOCTYPE html><title>moved</title>")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="should be a zip archive and is neither"):
        prepare(LAYOUTS["coco_stuff"], out, [tmp_path / "archives"], official=False)
    WRITERS["ade20k"](tmp_path / "archives")
    with pytest.raises(ValueError, match="was begun with .*coco_stuff"):
        prepare(LAYOUTS["ade20k"], out, [tmp_path / "archives"], official=False)
    with (tmp_path / "archives" / "train2017.zip").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="another file. Two versions would be mixed"):
        prepare(LAYOUTS["coco_stuff"], out, [tmp_path / "archives"], official=False)
    (tmp_path / "foreign.partial").mkdir()
    (tmp_path / "foreign.partial" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="files of unknown origin"):
        prepare(LAYOUTS["coco_stuff"], tmp_path / "foreign", [tmp_path / "archives"], official=False)


def test_official_checksums_and_counts_are_enforced(tmp_path, monkeypatch):
    WRITERS["ade20k"](tmp_path / "archives")
    with pytest.raises(ValueError, match="sha1 .*, the published one is 219e1696"):
        prepare(LAYOUTS["ade20k"], tmp_path / "out", [tmp_path / "archives"])
    WRITERS["cityscapes"](tmp_path / "archives")  # without published checksums
    with pytest.raises(ValueError, match="'train' has 3 pictures, the official one 2975"):
        prepare(LAYOUTS["cityscapes"], tmp_path / "out2", [tmp_path / "archives"])
    out, _ = made("ade20k", tmp_path / "subset")
    with pytest.raises(ValueError, match="prepared with --unofficial"):
        prepare(LAYOUTS["ade20k"], out)


def spoil(folder: Path, kind: str, content: bytes | None, *numbers: int) -> None:
    """Replace val pictures (jpg) or masks (png) in COCO's archives; None takes them out."""
    path = folder / {"png": "stuffthingmaps_trainval2017.zip", "jpg": "val2017.zip"}[kind]
    with zipfile.ZipFile(path) as old:
        files = {info.filename: old.read(info) for info in old.infolist()}
    files |= {f"val2017/{number:012d}.{kind}": content for number in numbers}
    write_zip(path, {name: value for name, value in files.items() if value is not None})


RGB = encode(Image.new("RGB", (24, 24), (200, 3, 4)), "PNG")


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("png", RGB, r"000000000012.png has mode RGB: colours"),
        ("png", png(np.full((24, 24), 11)), r"000000000012.png holds the values \[11\], which this data set does not"),
        ("png", png(np.full((24, 24), 200)), r"holds the values \[200\]"),
        ("png", png(np.zeros((24, 20))), r"000000000012: the picture has 24×24 pixels and its mask 20×24"),
        ("png", png(np.zeros((24, 24)))[:40], r"The mask .*000000000012.png cannot be read"),
        ("jpg", None, r"The picture .*000000000012.jpg is listed but missing"),
        ("jpg", Scene(1).encoded("JPEG")[:-200], r"000000000012: the picture or its mask is damaged"),
    ],
)
def test_spoilt_pictures_and_masks_are_named(kind, content, message, tmp_path):
    WRITERS["coco_stuff"](tmp_path / "archives")
    spoil(tmp_path / "archives", kind, content, 12)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(LAYOUTS["coco_stuff"], tmp_path / "out", [tmp_path / "archives"], official=False)
    assert not (tmp_path / "out").exists()


def test_missing_masks_empty_sets_and_missing_lists_are_named(tmp_path):
    WRITERS["coco_stuff"](tmp_path / "a")
    spoil(tmp_path / "a", "png", None, 10, 11, 12)
    with pytest.raises(ValueError, match="the set 'val' is empty"):
        prepare(LAYOUTS["coco_stuff"], tmp_path / "out", [tmp_path / "a"], official=False)
    WRITERS["pascal_context"](tmp_path / "b")
    shutil.unpack_archive(tmp_path / "b" / "trainval.tar.gz", tmp_path / "maps", filter="data")
    (tmp_path / "maps" / "trainval" / "2008_000003.mat").unlink()
    sources = [tmp_path / "b" / "VOCtrainval_03-May-2010.tar", tmp_path / "maps"]
    with pytest.raises(FileNotFoundError, match="2008_000003 is listed but has no mask"):
        prepare(LAYOUTS["pascal_context"], tmp_path / "context", sources, official=False)
    WRITERS["voc12"](tmp_path / "c")
    shutil.unpack_archive(tmp_path / "c" / "benchmark.tgz", tmp_path / "sbd", filter="data")
    next((tmp_path / "sbd").rglob("val.txt")).unlink()
    with pytest.raises(FileNotFoundError, match="val.txt was in none of the sources"):
        prepare(
            LAYOUTS["voc12"],
            tmp_path / "voc",
            [tmp_path / "c" / "VOCtrainval_11-May-2012.tar", tmp_path / "sbd"],
            official=False,
        )


def test_context_labels_are_held_against_their_names(tmp_path):
    WRITERS["pascal_context"](tmp_path / "archives", labels="\n".join(f"{raw}: bicycle" for raw in range(460)))
    with pytest.raises(ValueError, match="labels.txt calls number 2 'bicycle' and not 'aeroplane'"):
        prepare(LAYOUTS["pascal_context"], tmp_path / "out", [tmp_path / "archives"], official=False)


def test_sources_that_cannot_serve_are_named(tmp_path):
    layout, out = LAYOUTS["cityscapes"], tmp_path / "out"
    with pytest.raises(ValueError, match="2 of 2 archives are missing.*after a login"):
        prepare(layout, out)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        prepare(layout, out, [tmp_path / "gone"])
    (tmp_path / "odd.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match="made from leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip"):
        prepare(layout, out, [tmp_path / "odd.zip"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="was not prepared"):
        prepare(layout, tmp_path / "mine")
    assert not out.exists() and not out.with_name("out.partial").exists()


def restore(folder: Path, change) -> None:
    """Rewrite every mask of a prepared folder by `change` of its stored values."""
    for path in (folder / "SegmentationClass").iterdir():
        mask = Image.fromarray(change(np.asarray(Image.open(path)).astype(int)).astype(np.uint8))
        mask.save(path)


COCO_IDS = np.array([255, *(raw for raw in range(182) if raw not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: np.where(x > 0, x + 1, 0), "shifted up by one"),
        (lambda x: np.maximum(x - 1, 0), "background was reduced twice"),
        (lambda x: np.where(x == 0, 255, x - 1), "train ids that count from 0"),
        (lambda x: COCO_IDS[x], "raw COCO-Stuff ids, not train ids: only the first 11"),
        (lambda x: np.where(x == 0, 0, COCO_IDS[x] + 1), "raw COCO-Stuff ids plus one"),
        (lambda x: np.where(x == 1, 5, x), r"label counts are not those that were verified \(values lost: \[1\]"),
    ],
)
def test_known_disasters_are_named_when_loading(change, message, broken):
    restore(broken, change)
    with pytest.raises(ValueError, match=message):
        VocData(broken, "val", SPLITS["coco_stuff"])


def test_changed_folders_are_found_out(broken):
    split = SPLITS["coco_stuff"]
    VocData(broken, "val", split)
    with pytest.raises(ValueError, match="the split names 20 classes, the labels were made for 171"):
        VocData(broken, "val", SPLITS["voc12"])
    extra = broken / "JPEGImages" / "new.jpg"
    extra.write_bytes(b"x")
    with pytest.raises(ValueError, match="JPEGImages holds 8 files of .* and 7 of .* were verified"):
        VocData(broken, "val", split)
    extra.unlink()
    listing = broken / "ImageSets" / "Segmentation" / "val.txt"
    listing.write_text("\n".join(listing.read_text().split()[:2]))
    with pytest.raises(ValueError, match="val.txt is not the one that was verified"):
        VocData(broken, "val", split)
    names = broken / "classes.txt"
    names.write_text(names.read_text().replace("traffic light", "lamp"))
    with pytest.raises(ValueError, match="9: 'lamp', not 'traffic light'"):
        VocData(broken, "val", split)
    (broken / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99, not 1"):
        VocData(broken, "val", split)
    (broken / "manifest.json").unlink()
    assert check_manifest(broken) is None  # any folder in the layout may be used
    restore(broken, lambda x: COCO_IDS[x])
    with pytest.raises(ValueError, match="no manifest, and of 6 masks .* COCO-Stuff's raw ids, not train ids"):
        VocData(broken, "val", split)


def test_pictures_count_as_they_are_turned_when_loaded(broken):
    stem = _stems(broken, "val")[0]
    entry = Image.Exif()
    entry[0x0112] = 6
    wide = Image.new("RGB", (24, 20))
    wide.save(broken / "JPEGImages" / f"{stem}.jpg", exif=entry)
    mask = broken / "SegmentationClass" / f"{stem}.png"
    mask.write_bytes(png(np.zeros((24, 20))))
    (broken / "manifest.json").unlink()
    verify(broken)
    assert VocData(broken, "val", SPLITS["coco_stuff"])[0].image_B3HW.shape == (3, 24, 20)
    mask.write_bytes(png(np.zeros((20, 24))))
    with pytest.raises(ValueError, match=f"{stem}: the picture has 20×24 pixels and its mask 24×20"):
        verify(broken)
    data = VocData(broken, "val", SPLITS["coco_stuff"])
    mask.write_bytes(RGB)
    with pytest.raises(ValueError, match="not one byte a pixel. Colours"):
        data[0]


def test_a_second_call_finds_one_changed_mask_of_many(broken):
    manifest = read_manifest(broken)
    stem = next(iter(manifest["sample"]))
    manifest["sample"] = {}  # as if it were not among those that loading looks at
    (broken / "manifest.json").write_text(json.dumps(manifest))
    path = broken / "SegmentationClass" / f"{stem}.png"
    label = np.asarray(Image.open(path)).copy()
    label[3, 3] = 1 if label[3, 3] != 1 else 2
    Image.fromarray(label).save(path)
    manifest["folders"]["SegmentationClass"] = steps.describe(broken, "", False, "", {}, [])["folders"][
        "SegmentationClass"
    ]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not those that were verified when it was prepared"):
        prepare(LAYOUTS["coco_stuff"], broken, official=False)


def test_whole_data_sets_of_unknown_origin_are_suspected():
    classes = SPLITS["coco_stuff"].classes
    right = np.zeros(256, np.int64)
    right[: len(classes) + 1] = np.arange(1, len(classes) + 2)
    move = lambda ids: np.bincount(ids, weights=right, minlength=256).astype(int)  # noqa: E731
    ids = np.arange(256)
    assert suspect(right, classes) is None and diagnose(right + 1, right, classes).startswith("its label counts")
    assert "raw ids," in suspect(move(np.where(ids < 172, COCO_IDS[np.minimum(ids, 171)], 255)), classes)
    assert "plus one" in suspect(move(np.where(ids == 0, 0, COCO_IDS[np.minimum(ids, 171)] + 1) % 256), classes)
    assert "reduced twice" in suspect(move(np.maximum(ids - 1, 0)), classes)
    assert "shifted up" in suspect(move(np.where((ids > 0) & (ids < 255), ids + 1, ids)), classes)
    assert "count from 0" in suspect(move(np.where(ids == 0, 255, ids - 1)), classes)
    right[5] = 0
    assert suspect(right, classes) == f"1 classes have no pixel: {classes[4]}."


def test_the_scripts_are_command_lines(tmp_path):
    WRITERS["cityscapes"](tmp_path / "archives")
    command = [sys.executable, ROOT / "data_scripts" / "prepare_cityscapes.py", tmp_path / "city"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = lambda *more: subprocess.run([*command, *more], capture_output=True, text=True, env=env)  # noqa: E731
    refused = run()
    assert refused.returncode == 2 and "Error: cityscapes cannot be prepared yet" in refused.stderr
    done = run("--from", tmp_path / "archives", "--unofficial", "--workers", "1")
    assert done.returncode == 0 and "prepared and verified (unofficial; 3 train, 3 val)" in done.stdout
    again = run("--unofficial", "--workers", "1")
    assert again.returncode == 0 and "verified, nothing to do" in again.stdout

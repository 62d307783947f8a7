"""ShapeScenes: reproducible from (seed, index), labelled as painted, described truly, written and read back."""

import re
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from sptseg_lib.scenes.atlas import CLASSES, STUFF, THINGS, shape_distances, texture_tiles
from sptseg_lib.scenes.captions import truth, write_captions
from sptseg_lib.scenes.counter import hash32, uniform
from sptseg_lib.scenes.render import SceneSettings, class_shares, render_scenes
from sptseg_lib.scenes.voc_layout import palette, write_voc

SMALL = SceneSettings(size=48)


@pytest.fixture(scope="module")
def many():
    """300 scenes, enough for every class to turn up."""
    return render_scenes(torch.arange(300), SceneSettings(size=64), seed=5)


def test_a_scene_is_the_same_alone_and_in_any_batch():
    index = torch.tensor([40, 7, 2**40 + 3, 0, 7, 123456789])
    batch = render_scenes(index, SMALL, seed=3)
    assert torch.equal(batch.image_B3HW[1], batch.image_B3HW[4])
    backwards = render_scenes(index.flip(0), SMALL, seed=3)
    for i in range(len(index)):
        alone = render_scenes(index[i : i + 1], SMALL, seed=3)
        for other, at in ((alone, 0), (backwards, len(index) - 1 - i)):
            assert torch.equal(other.image_B3HW[at], batch.image_B3HW[i])
            assert torch.equal(other.label_BHW[at], batch.label_BHW[i])


@pytest.mark.parametrize("seed", [1, 2**33, 2**33 + 1])
def test_seeds_and_indices_give_other_scenes(seed):
    index = torch.arange(16)
    images = torch.cat([render_scenes(index, SMALL, s).image_B3HW for s in (0, seed)]).flatten(1)
    distance = torch.cdist(images, images, p=1) / images.shape[1] + torch.eye(32)
    assert distance.min() > 0.02  # no two of the 32 are alike


def test_images_and_labels_are_in_range_and_every_class_appears(many):
    image, label = many
    assert image.dtype == torch.float32 and label.dtype == torch.uint8
    assert image.shape == (300, 3, 64, 64) and label.shape == (300, 64, 64)
    assert 0 <= float(image.min()) and float(image.max()) <= 1
    assert set(label.unique().tolist()) == {*range(len(CLASSES)), 255}


def test_number_of_things_and_plain_grounds_follow_the_settings():
    index = torch.arange(64)
    empty = render_scenes(index, SceneSettings(size=48, things=(0, 0), plain=0.0, split=0.0))
    assert (empty.label_BHW.flatten(1) == empty.label_BHW[:, :1, 0]).all()  # one texture from edge to edge
    assert set(empty.label_BHW.unique().tolist()) <= set(range(len(THINGS), len(CLASSES)))
    plain = render_scenes(index, SceneSettings(size=48, things=(1, 1), plain=1.0, noise=0.0))
    for label in plain.label_BHW:
        assert len(label.unique()) == 2 and label.max() == 255
    both = render_scenes(index, SceneSettings(size=48, things=(0, 0), plain=0.0, split=1.0))
    assert max(len(label.unique()) for label in both.label_BHW) == 2


def test_a_thing_is_painted_where_its_label_is():
    """Without noise, over plain ground, the pixels of a thing share one colour and the ground's another."""
    settings = SceneSettings(size=64, things=(1, 1), plain=1.0, split=0.0, noise=0.0)
    image, label = render_scenes(torch.arange(20), settings)
    for picture, mask in zip(image, label != 255, strict=True):
        inside, outside = picture[:, mask], picture[:, ~mask]
        a, b = inside.median(1).values, outside.median(1).values
        assert float((a - b).abs().max()) > 0.15  # it can be seen
        nearer = (picture - a[:, None, None]).norm(dim=0) < (picture - b[:, None, None]).norm(dim=0)
        assert float((nearer == mask).float().mean()) > 0.99


def test_of_two_overlapping_things_the_labelled_one_is_seen():
    settings = SceneSettings(size=64, things=(2, 2), radius=(0.28, 0.32), plain=1.0, split=0.0, noise=0.0)
    told_apart = 0
    for picture, label in zip(*render_scenes(torch.arange(40), settings), strict=True):
        kinds = label.unique().tolist()
        colours = torch.stack([picture[:, label == kind].median(1).values for kind in kinds])
        if len(kinds) < 3 or torch.nn.functional.pdist(colours).min() < 0.25:
            continue  # two of a kind, one quite hidden, or two of a colour
        assert colours.amax(1).min() > 0.02  # painted, not left black
        told_apart += 1
        nearest = torch.cdist(picture.flatten(1).T, colours).argmin(1).view(64, 64)
        assert float((torch.tensor(kinds)[nearest] == label).float().mean()) > 0.97
    assert told_apart > 10


def test_shares_and_visible_classes_by_loop(many):
    label = many.label_BHW[:20]
    share, visible = class_shares(label), many.visible_BK(0.02)
    for b in range(20):
        pixels = label[b].flatten().tolist()
        for k in range(len(CLASSES)):
            own = pixels.count(k) / len(pixels)
            assert float(share[b, k]) == pytest.approx(own, abs=1e-6)
            assert bool(visible[b, k]) == (own >= 0.02)


def test_distance_fields_and_tiles():
    fields, tiles = shape_distances(), texture_tiles()
    assert len(fields) == len(THINGS) and len(tiles) == len(STUFF)
    half = fields.shape[-1] // 2
    inside = dict(zip(THINGS, (fields[:, half, half] < 0).tolist(), strict=True))
    assert not inside["ring"] and not inside["gear"] and inside["circle"] and inside["square"]
    # A circle's signed distance is its radius less 0.9.
    axis = (torch.arange(160) + 0.5) / 160 * 2.5 - 1.25
    exact = torch.hypot(axis[:, None], axis[None]) - 0.9
    assert float((fields[0] - exact).abs().max()) < 2 * 2.5 / 160
    assert 0 <= float(tiles.min()) and float(tiles.max()) <= 1
    for tile in tiles:  # periodic: the step over the edge is no larger than the largest step inside
        for rolled in (tile, tile.T):
            steps = (rolled - rolled.roll(1, 0)).abs()
            assert float(steps[0].max()) <= float(steps[1:].max()) + 1e-6


def captions_of(scenes, seed=0):
    present = scenes.visible_BK(0.015)
    return present, *write_captions(present, torch.arange(len(present)), seed)


def named_in(caption: str) -> set[str]:
    return {name for name in CLASSES if re.search(rf"\b{name}\b", caption)}


def test_captions_name_what_is_there(many):
    present, single, some, full, every = captions_of(many)
    for b in range(len(present)):
        there = {CLASSES[k] for k in present[b].nonzero().flatten().tolist()}
        assert named_in(full[b]) == there == {CLASSES[k] for k in every[b].nonzero().flatten().tolist()}
        assert named_in(single[b]) == {CLASSES[k] for k in some[b].nonzero().flatten().tolist()}
        assert named_in(single[b]) <= there and len(named_in(single[b])) == bool(there)
    assert len({re.sub("|".join(CLASSES), "#", caption) for caption in single}) >= 8  # templates differ
    assert captions_of(many, seed=0)[1] == single != captions_of(many, seed=1)[1]


def test_a_scene_with_nothing_gets_a_caption_that_says_so():
    single, some, full, _ = write_captions(torch.zeros(1, len(CLASSES), dtype=torch.bool), torch.tensor([0]))
    assert "nothing" in single[0] and "nothing" in full[0] and not some.any()


def test_truth_is_the_subset_relation(many):
    present, _, some, _, every = captions_of(many)
    present = torch.cat([present[:25], torch.zeros(1, len(CLASSES), dtype=torch.bool)])
    named = torch.cat([some[:25], every[:25], torch.zeros(1, len(CLASSES), dtype=torch.bool)])
    actual = truth(named, present)
    sets = [[set(row.nonzero().flatten().tolist()) for row in table] for table in (present, named)]
    for b, there in enumerate(sets[0]):
        for c, said in enumerate(sets[1]):
            assert bool(actual[b, c]) == (said <= there if said else not there)


def test_hash_by_python_integers():
    for x in (0, 1, 12345, 2**31, 2**32 - 1):
        y = x ^ (x >> 16)
        y = y * 0x7FEB352D % 2**32
        y ^= y >> 15
        y = y * 0x846CA68B % 2**32
        assert int(hash32(torch.tensor(x))) == y ^ (y >> 16)


def test_uniform_numbers_are_uniform_and_independent():
    u = uniform(9, torch.arange(20_000), 6)
    assert u.dtype == torch.float32 and 0 <= float(u.min()) and float(u.max()) < 1
    assert torch.equal(u[[17, 5]], uniform(9, torch.tensor([17, 5]), 6)) and torch.equal(
        u[:, :2], uniform(9, torch.arange(20_000), 2)
    )
    error = 1 / 20_000**0.5  # a standard error, in standard deviations
    assert float((u.mean(0) - 0.5).abs().max()) < 4 * error * (1 / 12) ** 0.5
    assert float((u.var(0) - 1 / 12).abs().max()) < 4 * error * 0.0745  # standard deviation of (u − ½)²
    counts = torch.histc(u, bins=32, min=0, max=1) / u.numel() * 32
    assert float((counts - 1).abs().max()) < 5 * (31 / u.numel()) ** 0.5
    other = torch.cat([u, u.roll(1, 0), uniform(10, torch.arange(20_000), 6)], dim=1)  # slots, neighbours, next seed
    correlation = torch.corrcoef(other.T) - torch.eye(18)
    assert float(correlation.abs().max()) < 4.5 * error


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 4}, {"things": (3, 1)}, {"radius": (-0.1, 0.2)}, {"plain": 1.5}, {"noise": -1}, {"colour": "red"},
        {"period": (0, 0)}, {"radius": (0, 0)},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_rendered_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SceneSettings(**wrong)


def test_palette_is_pascal_vocs():
    expected = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    colours = palette()
    assert len(colours) == 768
    assert {i: tuple(colours[3 * i : 3 * i + 3]) for i in expected} == expected


def test_written_scenes_are_read_back(tmp_path):
    folder = write_voc(tmp_path / "voc", {"train": 3, "val": 2}, SMALL, seed=4)
    assert (folder / "classes.txt").read_text().split() == list(CLASSES)
    drawn = {"train": render_scenes(torch.arange(3), SMALL, 4), "val": render_scenes(torch.arange(2), SMALL, 1004)}
    for name, scenes in drawn.items():
        stems = (folder / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split()
        assert len(stems) == len(set(stems)) == len(scenes.image_B3HW)
        for stem, image, label in zip(stems, *scenes, strict=True):
            mask = Image.open(folder / "SegmentationClass" / f"{stem}.png")
            assert mask.mode == "P" and mask.getpalette()[:768] == palette()
            ids = np.asarray(mask).astype(int)
            assert np.array_equal(np.where(ids == 0, 255, ids - 1), label.numpy())
            jpeg = np.asarray(Image.open(folder / "JPEGImages" / f"{stem}.jpg")).transpose(2, 0, 1) / 255
            assert np.abs(jpeg - image.numpy()).mean() < 0.04


@pytest.mark.parametrize("older", [False, True], ids=["new folder", "over an older one"])
def test_an_interrupted_set_is_not_taken_for_a_complete_one(tmp_path, monkeypatch, older):
    if older:
        write_voc(tmp_path, {"val": 2}, SMALL)
    save, calls = Image.Image.save, []

    def fail_at_the_third(self, path, **options):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write_voc(tmp_path, {"val": 4}, SMALL, seed=1)
    assert list((tmp_path / "SegmentationClass").iterdir())
    assert not (tmp_path / "ImageSets" / "Segmentation" / "val.txt").exists()


def test_unknown_sets_and_full_disks_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Unknown sets \['test'\]"):
        write_voc(tmp_path / "voc", {"train": 1, "test": 1}, SMALL)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(10**9, 10**9, 5000))
    with pytest.raises(OSError, match="0 MB are free"):
        write_voc(tmp_path / "voc", {"train": 3}, SMALL)
    assert not (tmp_path / "voc").exists()

"""Batches for training and testing: what is hidden, in which order, and what bad folders say."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from sptseg_lib.data import TEST_SEED, TRAIN_SEED, SceneData, VocData, held_out_loader, split_for, train_loader
from sptseg_lib.scenes.atlas import CLASSES
from sptseg_lib.scenes.render import SceneSettings, render_scenes
from sptseg_lib.scenes.voc_layout import write_voc
from sptseg_lib.settings import EvaluateSettings, TrainSettings
from sptseg_lib.splits import SPLITS, hide_unseen, make_split

held_out_loader.__test__ = False  # a loader of test pictures, not a test
DEFAULT = SPLITS["default"]
SMALL = SceneSettings(size=32)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"), {"train": 5, "val": 3}, SMALL)


@pytest.fixture
def broken(voc, tmp_path):
    """A copy of the folder, to be spoilt."""
    return shutil.copytree(voc, tmp_path / "voc")


def train_settings(**changes) -> TrainSettings:
    return TrainSettings(**{"iterations": 3, "batch": 2, "size": 32} | changes)


def same(first, second) -> bool:
    return all(
        torch.equal(a, b) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_training_batches_hide_what_is_unseen():
    inductive = list(train_loader(train_settings(), DEFAULT))
    supervised = list(train_loader(train_settings(setting="supervised"), DEFAULT))
    assert len(inductive) == len(supervised) == 3
    for hidden, full in zip(inductive, supervised, strict=True):
        assert hidden.image_B3HW.shape == (2, 3, 32, 32) and torch.equal(hidden.image_B3HW, full.image_B3HW)
        assert torch.equal(hidden.label_BHW, hide_unseen(full.label_BHW, DEFAULT))
        assert hidden.label_BHW.dtype == full.label_BHW.dtype == torch.int64
    assert torch.cat([batch.index_B for batch in inductive]).tolist() == list(range(6))


def test_batches_depend_on_the_seed_alone():
    first, again, other = (list(train_loader(train_settings(seed=s), DEFAULT)) for s in (0, 0, 1))
    assert same(first, again)
    assert not any(torch.equal(a.image_B3HW, b.image_B3HW) for a, b in zip(first, other, strict=True))


def test_single_items_are_rows_of_the_batch():
    data = SceneData(10, SMALL, seed=4, hide=partial(hide_unseen, split=DEFAULT))
    batch = data.__getitems__([3, 8])
    assert len(data) == 10
    for row, index in enumerate((3, 8)):
        assert all(torch.equal(a, b[row]) for a, b in zip(data[index], batch, strict=True))


def test_held_out_scenes_are_each_scored_once_and_never_trained_on():
    settings = EvaluateSettings(scenes=5, batch=2, size=32)
    batches = list(held_out_loader(settings, DEFAULT))
    assert torch.cat([batch.index_B for batch in batches]).tolist() == list(range(5))
    expected = render_scenes(torch.arange(5), SMALL, TEST_SEED)
    assert torch.equal(torch.cat([batch.image_B3HW for batch in batches]), expected.image_B3HW)
    assert torch.equal(torch.cat([batch.label_BHW for batch in batches]), expected.label_BHW.long())
    other_seed = list(held_out_loader(EvaluateSettings(scenes=5, batch=2, size=32, seed=3), DEFAULT))
    assert same(batches, other_seed)  # every run is scored on the same pictures
    for seed in range(3):
        trained = torch.cat([b.image_B3HW for b in train_loader(train_settings(seed=seed), DEFAULT)])
        assert torch.cdist(trained.flatten(1), expected.image_B3HW.flatten(1)).min() > 1


def test_test_pictures_of_a_folder_keep_size_and_labels(voc):
    settings = EvaluateSettings(dataset=str(voc), size=32, batch=16)
    batches = list(held_out_loader(settings, split_for(str(voc), "default")))
    expected = render_scenes(torch.arange(3), SMALL, seed=1000)
    assert len(batches) == 3
    assert torch.equal(torch.cat([b.label_BHW for b in batches]), expected.label_BHW.long())
    images = torch.cat([b.image_B3HW for b in batches])
    assert images.dtype == torch.float32 and float((images - expected.image_B3HW).abs().mean()) < 0.04


def test_training_pictures_of_a_folder_are_cropped_with_their_masks(tmp_path):
    """Colour tells the label, so that image and mask can be compared after scaling, cropping and flipping."""
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / part).mkdir(parents=True)
    label = np.zeros((40, 60), np.uint8)
    label[:20], label[20:, 30:] = 1, 2
    image = np.stack([(label == k) * 255 for k in (0, 1, 2)], -1).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "JPEGImages" / "x.jpg", quality=100, subsampling=0)
    Image.fromarray(label).save(tmp_path / "SegmentationClass" / "x.png")
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("x\n")
    data = VocData(tmp_path, "train", make_split("x", ("a", "b"), ()), crop=32, length=12)
    assert len(data) == 12
    for i in range(12):
        image, label, _ = data[i]
        assert image.shape == (3, 32, 32) and label.shape == (32, 32) and label.dtype == torch.int64
        assert type(image) is type(label) is torch.Tensor
        colour = image.argmax(0).where(image.sum(0) > 0.5, 0)
        wanted = torch.where(label == 255, 0, label + 1)
        assert float((colour == wanted).float().mean()) > 0.9


def test_a_few_pictures_come_again_in_new_orders(voc):
    for changes, split in (({}, DEFAULT), ({"dataset": str(voc)}, split_for(str(voc), "default"))):
        few = train_settings(images=3, iterations=6, **changes)
        batches = list(train_loader(few, split))
        places = torch.cat([batch.index_B for batch in batches]).view(-1, 3)
        if changes:  # augmented anew each time, so the pictures themselves differ
            assert len(set(train_loader(few, split).dataset.stems)) == 3
            with pytest.raises(ValueError, match="images=6, and .*lists 5"):
                train_loader(few.model_copy(update={"images": 6}), split)
        else:
            assert places.sort().values.tolist() == [[0, 1, 2]] * 4 and len(set(map(tuple, places.tolist()))) > 1
            own = render_scenes(places.flatten(), SMALL, TRAIN_SEED).image_B3HW
            assert torch.equal(torch.cat([batch.image_B3HW for batch in batches]), own)
        resumed = train_loader(few, split)
        resumed.dataset.first = 4
        assert same(list(resumed)[:4], batches[2:])


def test_more_pictures_keep_those_of_fewer(voc):
    stems = [train_loader(train_settings(dataset=str(voc), images=n), DEFAULT).dataset.stems for n in (2, 4, 5)]
    assert stems[0] == stems[1][:2] and stems[1] == stems[2][:4] and len(stems[2]) == 5


def test_augmentation_depends_on_seed_and_index_alone(voc):
    """Else a resumed run would see other crops than one that was not interrupted."""
    split = split_for(str(voc), "default")

    def batches(seed: int, noise: int):
        torch.manual_seed(noise)
        return list(train_loader(train_settings(dataset=str(voc), seed=seed), split))

    first = batches(seed=0, noise=1)
    assert len(first) == 3 and first[0].image_B3HW.shape == (2, 3, 32, 32)
    assert same(first, batches(seed=0, noise=2))
    assert not same(first, batches(seed=1, noise=1))


def test_classes_of_a_folder_come_from_its_list(voc, broken):
    assert split_for("shapescenes", "half") is SPLITS["half"]
    split = split_for(str(voc), "default")
    assert split.classes == CLASSES and split.unseen == DEFAULT.unseen and split.stuff == DEFAULT.stuff
    (broken / "classes.txt").write_text("star\nring\n")
    with pytest.raises(ValueError, match="no class"):
        split_for(str(broken), "default")


def test_a_data_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no data set 'shapescene'"):
        train_loader(train_settings(dataset="shapescene"), DEFAULT)
    with pytest.raises(ValueError, match="no data set"):
        held_out_loader(EvaluateSettings(dataset=str(tmp_path / "gone")), DEFAULT)
    with pytest.raises(FileNotFoundError, match="train.txt is missing"):
        train_loader(train_settings(dataset=str(tmp_path)), DEFAULT)


def test_spoilt_folders_say_what_is_wrong(broken):
    listing = broken / "ImageSets" / "Segmentation" / "val.txt"
    mask = broken / "SegmentationClass" / "val_000001.png"
    data = VocData(broken, "val", DEFAULT, hide=partial(hide_unseen, split=DEFAULT))
    label = np.asarray(Image.open(mask))
    Image.fromarray(label[:-3]).save(mask)
    with pytest.raises(ValueError, match=r"val_000001: the image has \(32, 32\) and the mask \(29, 32\) pixels"):
        data[1]
    Image.fromarray(np.full_like(label, 40)).save(mask)
    with pytest.raises(ValueError, match=r"Labels \[39\] are outside the class list of 16"):
        data[1]
    for spoilt in (np.zeros((*label.shape, 3), np.uint8), label.astype(np.uint16)):
        Image.fromarray(spoilt).save(mask)
        with pytest.raises(ValueError, match="val_000001.png has shape .* not one byte a pixel"):
            data[1]
    mask.unlink()
    with pytest.raises(FileNotFoundError, match="val_000001.png is listed but missing"):
        data[1]
    listing.write_text("\n")
    with pytest.raises(ValueError, match="lists no picture"):
        VocData(broken, "val", DEFAULT)

"""The recipe's augmentation: geometry kept by image and mask alike, its limits, its colours, and its seed."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from sptseg_lib.augment import MEAN_COLOUR, PadTo, PhotometricDistortion, ScaledCrop, augment, recipe


def coloured(height: int, width: int, cell: int = 25) -> tuple[Image.Image, torch.Tensor]:
    """A picture whose colour tells the label: random cells of 0 (red), 1 (green) and 2 (blue)."""
    small = np.random.default_rng(0).integers(0, 3, (-(-height // cell), -(-width // cell)), np.uint8)
    label = small.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    return Image.fromarray(np.eye(3, dtype=np.uint8)[label] * 255), torch.from_numpy(label.copy())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [(100, 160), (60, 40), (300, 90)], ids=str)
def test_image_and_mask_stay_aligned_and_beyond_the_picture_is_neither_class_nor_black(seed, size):
    torch.manual_seed(seed)
    image, mask = coloured(*size)
    image, mask = v2.Compose([ScaledCrop(64), PadTo(64)])(image, tv_tensors.Mask(mask))
    image, mask = torch.from_numpy(np.array(image)), mask.as_subclass(torch.Tensor)
    assert image.shape == (64, 64, 3) and mask.shape == (64, 64) and mask.dtype == torch.uint8
    inside = mask != 255
    assert (image[~inside] == torch.tensor(MEAN_COLOUR, dtype=torch.uint8)).all()
    pure = inside & (image.max(-1).values > 250)  # not where two cells are mixed
    assert pure.sum() > 0.5 * inside.sum()
    assert torch.equal(image.argmax(-1)[pure].to(torch.uint8), mask[pure])


def sides(size: int, height: int, width: int, draws: int = 200) -> torch.Tensor:
    """Height and width of the scaled picture in units of the training size, over many draws."""
    crop, image = ScaledCrop(size), Image.new("RGB", (width, height))
    scales = [crop.make_params([image])["scale"] for _ in range(draws)]
    return torch.tensor(scales)[:, None] * torch.tensor([height, width]) / size


def test_the_shorter_side_becomes_half_to_twice_the_training_size():
    shorter, longer = sides(64, 75, 100).T
    assert 0.5 <= shorter.min() < 0.55 and 1.95 < shorter.max() <= 2.0
    assert shorter.mean() == pytest.approx(1.25, abs=0.1)
    torch.testing.assert_close(longer / shorter, torch.full((200,), 100 / 75))
    very_long = sides(64, 10, 100)[:, 1]  # the longer side is held to four times the size
    assert 2.0 <= very_long.min() and very_long.max() <= 8.0


def test_crops_fall_everywhere():
    crop, image = ScaledCrop(64, factors=(2.0, 2.0)), Image.new("RGB", (100, 100))
    boxes = torch.tensor([crop.make_params([image])["box"] for _ in range(300)])
    assert boxes.min() >= 0 and boxes.max() <= 100
    first = boxes[:, :2]
    assert (first.min(0).values < 3).all() and (first.max(0).values > 47).all()
    assert first.mean() == pytest.approx(25, abs=3)


def test_a_crop_with_too_much_of_one_class_is_drawn_again():
    """One class fills the picture but for a corner: without drawing again, few crops would hold enough of the other."""
    image, label = Image.new("RGB", (200, 200)), torch.zeros(200, 200, dtype=torch.uint8)
    label[:90, :90] = 1

    def mixed(again: int) -> float:
        crop, kept = ScaledCrop(64, factors=(2.0, 2.0), again=again), 0
        for _ in range(100):
            _, mask = crop(image, tv_tensors.Mask(label))
            share = torch.bincount(mask.flatten(), minlength=256) / mask.numel()
            kept += bool((share > 0).sum() > 1 and share.max() <= 0.76)  # resampling moves an edge by a pixel
        return kept / 100

    assert mixed(again=0) < 0.5 and mixed(again=10) > 0.9


def test_a_picture_of_one_class_is_cropped_all_the_same_and_ignored_pixels_are_no_class():
    tries = Counter()

    class Counting(ScaledCrop):
        def _is_mixed(self, labels):
            tries["n"] += 1
            return super()._is_mixed(labels)

    label = torch.zeros(80, 80, dtype=torch.uint8)
    label[:, 40:] = 255
    Counting(32)(Image.new("RGB", (80, 80)), tv_tensors.Mask(label))
    assert tries["n"] == 11  # the first and ten more


def test_colours_change_within_the_recipe_and_the_mask_does_not():
    distortion, grey = PhotometricDistortion(), Image.new("RGB", (4, 4), (100, 100, 100))
    mask = tv_tensors.Mask(torch.arange(16, dtype=torch.uint8).view(4, 4))
    levels = []
    for _ in range(300):
        image, same = distortion(grey, mask)
        assert torch.equal(same, mask)
        pixel = image.getpixel((0, 0))
        assert max(pixel) - min(pixel) <= 1  # grey has no hue and no saturation to change
        levels.append(pixel[0])
    assert 30 <= min(levels) < 60 and 180 < max(levels) <= 198  # (100 ± 32) · 0.5 to 1.5
    assert sum(level == 100 for level in levels) == pytest.approx(75, abs=30)  # a quarter has neither


def test_hue_turns_by_at_most_a_tenth_of_the_circle_and_saturation_by_half():
    distortion = PhotometricDistortion()
    params = [distortion.make_params([]) for _ in range(400)]
    for name, neutral, low, high in (
        ("brightness", 0.0, -32, 32), ("contrast", 1.0, 0.5, 1.5), ("saturation", 1.0, 0.5, 1.5), ("hue", 0, -26, 26),
    ):  # fmt: skip
        drawn = [p[name] for p in params if p[name] != neutral]
        assert low <= min(drawn) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(drawn) <= high
        assert len(drawn) == pytest.approx(200, abs=45)
    still = {"brightness": 0.0, "contrast": 1.0, "late": False, "saturation": 1.0, "hue": 0}
    red = Image.new("RGB", (1, 1), (200, 0, 0))
    assert distortion.transform(red, still).getpixel((0, 0)) == (200, 0, 0)
    r, g, b = distortion.transform(red, still | {"hue": 21}).getpixel((0, 0))  # a twelfth: halfway to yellow
    assert r == 200 and b == 0 and g == pytest.approx(100, abs=5)
    r, g, b = distortion.transform(red, still | {"saturation": 0.5}).getpixel((0, 0))
    assert r == 200 and (g, b) == (pytest.approx(100, abs=2),) * 2
    levels = Image.new("RGB", (1, 1), (250, 20, 100))
    early = still | {"brightness": 32.0, "contrast": 0.5}
    assert distortion.transform(levels, early).getpixel((0, 0)) == (127, 26, 66)  # cut off at 255 before halving


def test_chance_depends_on_the_seed_alone_and_leaves_the_callers_alone():
    image, label = coloured(90, 120)
    torch.manual_seed(1)
    first = augment(recipe(48), image, label, 7)
    after = torch.rand(3)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, augment(recipe(48), image, label, 7)))
    assert not torch.equal(first[0], augment(recipe(48), image, label, 8)[0])
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    pixels, mask = first
    assert pixels.dtype == torch.float32 and 0 <= pixels.min() and pixels.max() <= 1 and mask.dtype == torch.uint8
    flips = 0
    for seed in range(40):  # the left half is class 0: after a flip it is at the right
        half = torch.zeros(64, 64, dtype=torch.uint8)
        half[:, 32:] = 1
        mask = augment(recipe(32), Image.new("RGB", (64, 64)), half, seed)[1]
        row = mask[0][mask[0] != 255]
        flips += bool(row[0] == 1 and (row == 0).any())
        assert (mask[0, len(row) :] == 255).all()  # padding is at the right, flipped or not
    assert 8 <= flips <= 32

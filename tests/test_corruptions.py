"""Corruptions: untouched at 0, worse with severity, alike in any batch, and with energy where it should be."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from sptseg_lib.corruptions import CELLS, CORRUPTIONS, RADIUS, SEVERITIES, band_noise, corrupt, white_noise
from sptseg_lib.scenes.render import SceneSettings, render_scenes

INDEX_B = torch.tensor([3, 7, 11])
IMAGE_B3HW = render_scenes(INDEX_B, SceneSettings(size=48), seed=12).image_B3HW

every_corruption = pytest.mark.parametrize("name", CORRUPTIONS)


@every_corruption
def test_severity_0_is_untouched_and_each_further_one_is_worse(name):
    assert torch.equal(corrupt(IMAGE_B3HW, name, 0, INDEX_B).image_B3HW, IMAGE_B3HW)
    change = [
        float((corrupt(IMAGE_B3HW, name, s, INDEX_B).image_B3HW - IMAGE_B3HW).square().mean()) for s in SEVERITIES
    ]
    assert change == sorted(change) and len(set(change)) == len(change) == len(CORRUPTIONS[name].levels)


@every_corruption
def test_a_picture_is_spoilt_alike_in_any_batch_and_otherwise_by_another_seed(name):
    before_B3HW = IMAGE_B3HW.clone()
    together = corrupt(IMAGE_B3HW, name, 3, INDEX_B, seed=5)
    torch.rand(3)  # numbers drawn elsewhere change nothing
    alone = corrupt(IMAGE_B3HW[1:2], name, 3, INDEX_B[1:2], seed=5)
    torch.testing.assert_close(together.image_B3HW[1:2], alone.image_B3HW, atol=1e-6, rtol=0)
    assert torch.equal(together.covered_BHW[1:2], alone.covered_BHW)
    assert torch.equal(IMAGE_B3HW, before_B3HW)
    assert 0 <= together.image_B3HW.min() and together.image_B3HW.max() <= 1
    drawn = name not in ("blur", "jpeg", "contrast")
    other = corrupt(IMAGE_B3HW, name, 3, INDEX_B, seed=6)
    assert torch.equal(other.image_B3HW, together.image_B3HW) is not drawn


@pytest.mark.parametrize("size", [(48, 48), (40, 45)])
@pytest.mark.parametrize("high", [False, True])
def test_the_energy_of_noise_lies_on_one_side_of_the_radius(size, high):
    noise_3HW = band_noise(INDEX_B, size, 0, high)[1].double()
    assert float(noise_3HW.square().mean()) == pytest.approx(1, abs=1e-5)
    # Each frequency by its own sum, in place of a fast transform.
    H, W = size
    row, column = np.arange(H), np.arange(W)
    inside = outside = 0.0
    for u in range(H):
        for v in range(W):
            wave = np.exp(-2j * np.pi * (u * row[:, None] / H + v * column[None] / W))
            energy = float((np.abs((noise_3HW.numpy() * wave).sum((1, 2))) ** 2).sum())
            distance = math.hypot(min(u, H - u) / H, min(v, W - v) / W)
            if (distance >= RADIUS) == high and distance > 0:
                inside += energy
            else:
                outside += energy
    assert outside < 1e-8 * inside
    assert inside == pytest.approx(3 * (H * W) ** 2, rel=1e-4)  # Parseval: the same total for low and high


def test_three_kinds_of_noise_have_the_same_energy_before_they_are_cut_off():
    grey_B3HW = torch.full((3, 3, 96, 96), 0.5)
    for severity in (1, 2):  # at more, much of it leaves [0, 1]
        power = [
            float((corrupt(grey_B3HW, name, severity, INDEX_B).image_B3HW - 0.5).square().mean())
            for name in ("noise", "low frequency", "high frequency")
        ]
        assert power == pytest.approx([CORRUPTIONS["noise"].levels[severity] ** 2] * 3, rel=0.02)


def test_white_noise_is_normal():
    noise_P = white_noise(torch.arange(4), (64, 64), 1).flatten().double()
    assert noise_P.isfinite().all() and abs(float(noise_P.mean())) < 0.02
    moments = [float((noise_P**k).mean()) for k in (2, 3, 4)]
    assert moments == pytest.approx([1, 0, 3], abs=0.1)
    assert len(set(map(float, noise_P))) > 0.99 * len(noise_P)


@pytest.mark.parametrize("severity", [1, 2, 3, 4])
def test_occlusion_covers_whole_cells_and_the_share_it_says(severity):
    spoilt = corrupt(IMAGE_B3HW, "occlusion", severity, INDEX_B)
    share_B = spoilt.covered_BHW.float().mean((1, 2))
    assert share_B.tolist() == pytest.approx([CORRUPTIONS["occlusion"].levels[severity]] * 3)
    side = 48 // CELLS
    for covered_HW in spoilt.covered_BHW:
        for top in range(0, 48, side):
            for left in range(0, 48, side):
                assert len(covered_HW[top : top + side, left : left + side].unique()) == 1
    changed_BHW = (spoilt.image_B3HW != IMAGE_B3HW).any(1)
    assert torch.equal(changed_BHW, spoilt.covered_BHW)


def test_blur_and_contrast_are_what_they_are_called():
    sigma, left = CORRUPTIONS["blur"].levels[2], CORRUPTIONS["contrast"].levels[2]
    blurred = corrupt(IMAGE_B3HW, "blur", 2, INDEX_B).image_B3HW
    own = [[gaussian_filter(plane.numpy(), sigma, mode="mirror") for plane in image] for image in IMAGE_B3HW]
    inner = (..., slice(6, -6), slice(6, -6))
    np.testing.assert_allclose(blurred[inner].numpy(), np.stack(own)[inner], atol=5e-3)
    flat = corrupt(IMAGE_B3HW, "contrast", 2, INDEX_B).image_B3HW
    ratio_B = flat.amax((1, 2, 3)) - flat.amin((1, 2, 3))
    wanted_B = left * (IMAGE_B3HW.amax((1, 2, 3)) - IMAGE_B3HW.amin((1, 2, 3)))
    torch.testing.assert_close(ratio_B, wanted_B, atol=1e-4, rtol=0)


def test_small_pictures_can_be_blurred():
    tiny = IMAGE_B3HW[..., :9, :9]
    assert corrupt(tiny, "blur", 4, INDEX_B).image_B3HW.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "blurr"}, "no corruption 'blurr'.*Did you mean 'blur'"),
        ({"severity": 5}, "Severity 5 .*from 0"),
        ({"severity": -1}, "Severity -1"),
        ({"image_B3HW": IMAGE_B3HW * 255}, r"not in \[0, 1\].*divide"),
        ({"image_B3HW": IMAGE_B3HW * torch.nan}, r"from nan to nan are not in"),
        ({"image_B3HW": IMAGE_B3HW[0]}, "not .B, 3, H, W"),
        ({"index_B": INDEX_B[:2]}, "with 2 indices"),
    ],
)
def test_what_cannot_be_corrupted_is_told(changes, named):
    with pytest.raises(ValueError, match=named):
        corrupt(**{"image_B3HW": IMAGE_B3HW, "name": "blur", "severity": 1, "index_B": INDEX_B} | changes)


def test_pictures_too_small_for_low_frequencies_are_refused():
    with pytest.raises(ValueError, match="8×8 pixels have no frequency below"):
        band_noise(INDEX_B, (8, 8), 0, high=False)

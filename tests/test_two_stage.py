"""Two stages against slow versions: crops, what regions get, fusion, and how often the encoder is asked."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.testing import assert_close

from sptseg_lib.clip.load import load_clip
from sptseg_lib.clip.text import class_text
from sptseg_lib.graph.features import load_featurizer
from sptseg_lib.scenes.render import SceneSettings, render_scenes
from sptseg_lib.splits import find_split
from sptseg_lib.two_stage import (
    TwoStage,
    TwoStageSettings,
    fuse,
    region_crops,
    spectral_regions,
    spread_over_regions,
    superpixel_regions,
)

SCENES = render_scenes(torch.arange(3), SceneSettings(size=96), seed=1)


def regions(seed=0, B=2, side=12, S=4):
    return torch.randint(0, S, (B, side, side), generator=torch.Generator().manual_seed(seed))


def test_both_kinds_of_regions_cover_every_pixel():
    spectral = spectral_regions(load_featurizer(), SCENES.image_B3HW, 4, 10.0, seed=0)
    superpixels = superpixel_regions(SCENES.image_B3HW, 6)
    for region_BHW in (spectral, superpixels):
        assert region_BHW.shape == SCENES.label_BHW.shape and region_BHW.dtype == torch.int64
        for region_HW in region_BHW:
            assert 1 <= len(region_HW.unique()) <= 12 and int(region_HW.min()) == 0
        assert int(region_BHW.max()) > 0
    cells = spectral.unflatten(2, (12, 8)).unflatten(1, (12, 8))
    assert (cells == cells[:, :, :1, :, :1]).all()  # whole patches
    assert_close(spectral, spectral_regions(load_featurizer(), SCENES.image_B3HW, 4, 10.0, seed=0))


def test_regions_follow_what_is_in_the_picture():
    image_B3HW = torch.zeros(1, 3, 96, 96)
    image_B3HW[..., 32:64, 24:72] = 1.0
    inside_HW = image_B3HW[0, 0] > 0
    region_HW = superpixel_regions(image_B3HW, 6)[0]
    for part in region_HW.unique():
        share = float(inside_HW[region_HW == part].float().mean())
        assert min(share, 1 - share) < 0.05, "a superpixel crosses an edge of full contrast"


@pytest.mark.parametrize("masked", [True, False])
def test_crops_are_those_of_a_slow_loop(masked):
    """Where the square has as many pixels as the crop nothing is interpolated, and a crop is a slice."""
    image_B3HW = torch.randn(2, 3, 12, 12)
    region_BHW = torch.zeros(2, 12, 12, dtype=torch.int64)
    region_BHW[0, 4:8, 6:10] = 1  # a square of 4
    region_BHW[1, 0:2, 3:7] = 2  # 4 wide and 2 high: its square sticks out at the top
    region_BHW[1, 1, 4] = 0
    crop_R344, image_R, id_R = region_crops(image_B3HW, region_BHW, 4, masked)
    assert list(zip(image_R.tolist(), id_R.tolist())) == [(0, 0), (0, 1), (1, 0), (1, 2)]

    def by_hand(b, k, top, left):
        crop_344 = torch.zeros(3, 4, 4)
        for i in range(4):
            for j in range(4):
                y, x = top + i, left + j
                if 0 <= y < 12 and 0 <= x < 12 and (not masked or region_BHW[b, y, x] == k):
                    crop_344[:, i, j] = image_B3HW[b, :, y, x]
        return crop_344

    assert_close(crop_R344[1], by_hand(0, 1, 4, 6))
    # Just outside the image roi_align repeats the border; further out it gives 0, and a mask gives 0 anyway.
    ours, slow = crop_R344[3], by_hand(1, 2, -1, 3)
    assert_close(ours[:, 1:], slow[:, 1:])
    if not masked:
        assert_close(crop_R344[0], F.interpolate(image_B3HW[:1], (4, 4), mode="area")[0])  # 3 × 3 pixels averaged


def test_every_pixel_gets_what_its_region_got():
    region_BHW = regions()
    region_BHW[0][region_BHW[0] == 3] = 0  # an image with fewer regions
    _, image_R, id_R = region_crops(torch.zeros(2, 3, 12, 12), region_BHW, 4)
    value_RK = torch.randn(len(image_R), 5)
    given = {(int(b), int(k)): value for b, k, value in zip(image_R, id_R, value_RK)}
    assert len(given) == 7
    spread_BKHW = spread_over_regions(value_RK, image_R, id_R, region_BHW)
    for b in range(2):
        for y in range(12):
            for x in range(12):
                assert_close(spread_BKHW[b, :, y, x], given[b, int(region_BHW[b, y, x])])


def test_fusion_is_the_geometric_mean():
    region_BKHW, pixel_BKHW = torch.rand(2, 2, 4, 6, 6).double()
    fused_BKHW = fuse(region_BKHW, pixel_BKHW, 0.3)
    for b, y, x in ((0, 0, 0), (1, 3, 5)):
        own = [
            float(torch.exp(0.3 * region_BKHW[b, k, y, x].log() + 0.7 * pixel_BKHW[b, k, y, x].log())) for k in range(4)
        ]
        assert_close(fused_BKHW[b, :, y, x], torch.tensor(own, dtype=torch.float64) / sum(own))
    assert_close(fuse(region_BKHW, pixel_BKHW, 1.0), region_BKHW / region_BKHW.sum(1, keepdim=True))
    assert_close(fuse(region_BKHW, pixel_BKHW, 0.0), pixel_BKHW / pixel_BKHW.sum(1, keepdim=True))
    assert fuse(torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1), 0.5).isfinite().all()


def test_all_crops_pass_the_encoder_together():
    clip = load_clip()
    names = find_split("default").classes
    asked = []

    def pixels(image_B3HW):
        return torch.full((len(image_B3HW), len(names), 12, 12), 1 / len(names))

    def ask(chunk):
        two = TwoStage(clip, class_text(clip, names), pixels, TwoStageSettings(proposals="superpixels", chunk=chunk))
        whole = two.backbone.forward
        two.backbone.forward = lambda x: asked.append(len(x)) or whole(x)
        return two(SCENES.image_B3HW)

    probability_BKHW = ask(256)
    assert len(asked) == 1 and asked[0] > 4
    assert probability_BKHW.shape == (3, len(names), 96, 96)
    assert_close(probability_BKHW.sum(1), torch.ones(3, 96, 96))
    asked.clear()
    assert_close(ask(4), probability_BKHW, atol=1e-5, rtol=1e-4)
    assert max(asked) == 4


def test_a_crop_of_one_thing_is_named():
    """One large thing alone, cut out by its true mask: CLIP names most of them, also those that are unseen."""
    one = render_scenes(torch.arange(24), SceneSettings(size=96, things=(1, 1), radius=(0.3, 0.4)), seed=3)
    clip, names = load_clip(), find_split("default").classes
    two = TwoStage(clip, class_text(clip, names), None, TwoStageSettings(weight=1.0))
    thing_BHW = (one.label_BHW < 10).long()
    crop_R3ss, _, id_R = region_crops(two.featurizer.normalised(one.image_B3HW), thing_BHW, 96)
    named_R = two.classify(crop_R3ss).argmax(1)[id_R == 1]
    true_R = one.label_BHW.flatten(1).long().where(thing_BHW.flatten(1) == 1, -1).amax(1)
    assert float((named_R == true_R).float().mean()) > 0.7


@pytest.mark.parametrize("wrong", [{"regions": 1}, {"weight": 1.5}, {"proposals": "selective search"}, {"crops": 3}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValidationError):
        TwoStageSettings(**wrong)


def test_more_regions_than_patches_are_refused():
    with pytest.raises(ValueError, match="do not exist"):
        spectral_regions(load_featurizer(), torch.rand(1, 3, 16, 16), 5, 0.0, seed=0)

"""MetaFormers: SPANet's sizes and cost, scales, Semantic FPN, and networks of equal size."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sptseg_lib.cost.count import count_cost, transform_operations
from sptseg_lib.mixers.equal import MIXERS, block_parameters, equal_hidden, equal_metaformer
from sptseg_lib.mixers.fpn import SemanticFPN
from sptseg_lib.mixers.metaformer import Classifier, DenseClassifier, MetaFormer, Residual
from sptseg_lib.mixers.pooling import SpectralPoolingFilter
from sptseg_lib.mixers.spam import SPAM
from sptseg_lib.mixers.spanet import RADII, SIZES, spanet, spanet_backbone, spanet_segmenter

# Published parameters (M) and multiply-adds (G) at 224, and both counted on the released models.
TABLE = {
    "S": (28.7, 4.6, 28.66, 4.61),
    "M": (41.8, 6.8, 41.77, 6.79),
    "MX": (54.9, 9.0, 54.88, 8.98),
    "B": (75.9, 12.0, 75.94, 11.94),
    "BX": (99.8, 15.8, 99.83, 15.78),
}


@pytest.mark.parametrize("size", SIZES)
def test_cost_is_the_published_one(size):
    with torch.device("meta"):
        model = spanet(size)
    cost = count_cost(model, (1, 3, 224, 224))
    published_parameters, published_adds, counted_parameters, counted_adds = TABLE[size]
    millions, billions = (cost.parameters + cost.filter_values) / 1e6, cost.multiply_adds / 1e9
    assert round(millions, 1) == published_parameters and round(millions, 2) == counted_parameters
    assert round(billions, 2) == counted_adds
    assert billions == pytest.approx(published_adds, abs=0.07)  # the table says 12.0 for B, which is 11.94
    assert 1.005 < cost.multiply_adds_with_ffts / cost.multiply_adds < 1.025


def test_fixed_filters_hold_what_the_released_ones_hold():
    with torch.device("meta"):
        model = spanet("S")
    sides = (56, 28, 14, 7)
    expected = sum(3 * blocks * side**2 for blocks, side in zip(SIZES["S"].blocks, sides))
    assert count_cost(model, (1, 3, 224, 224)).filter_values == expected


def test_cost_counts_what_it_says():
    conv = nn.Conv2d(3, 5, 3, padding=1, groups=1)
    assert count_cost(conv, (2, 3, 8, 6)).multiply_adds == 2 * 5 * 8 * 6 * 3 * 9
    pool = nn.Sequential(nn.Conv2d(2, 4, 1), SpectralPoolingFilter(1, 0.7))
    cost = count_cost(pool, (1, 2, 8, 4))
    assert (cost.parameters, cost.filter_values, cost.multiply_adds) == (12, 32, 32 * 2 * 4)
    there_and_back = 2 * transform_operations(4, 32, real=True)
    assert there_and_back == 2 * 2.5 * 4 * 32 * 5
    assert cost.multiply_adds_with_ffts == cost.multiply_adds + there_and_back / 2


def test_released_shapes_and_scales():
    with torch.device("meta"):
        model = spanet_backbone("S")
    for stage, (body, blocks, width) in enumerate(zip(model.stages, SIZES["S"].blocks, SIZES["S"].widths)):
        assert len(body) == 2 * blocks
        assert all(branch.kind == ("none" if stage < 2 else "res") for branch in body)
        assert isinstance(body[0].branch, SPAM) and body[0].branch.gates[0].filter.radius == RADII[stage]
        assert body[1].branch[0].out_channels == 4 * width
    assert len(model.mixers()) == sum(SIZES["S"].blocks) and list(model.mixers())[:5] == [
        "1.1",
        "1.2",
        "1.3",
        "1.4",
        "2.1",
    ]


def tiny(scales=("none", "res"), widths=(6, 12)) -> MetaFormer:
    return MetaFormer(widths, (1, 1), lambda _, w: SPAM(w, 1, kernel=3), lambda w, _: 2 * w, scales)


@pytest.mark.parametrize("size", [(64, 64), (33, 70)], ids=str)
def test_classifier_and_segmenter_take_odd_and_rectangular_images(size):
    backbone = tiny().eval()
    classifier, segmenter = Classifier(backbone, 5), DenseClassifier(backbone, SemanticFPN((6, 12), 5, 8, 8, groups=2))
    image = torch.rand(2, 3, *size)
    assert classifier(image).shape == (2, 5) and segmenter(image).shape == (2, 5, *size)
    last = backbone(image)[-1]
    assert_close(classifier(image), classifier.head(classifier.norm(last).mean((2, 3))))
    segmenter(image).square().sum().backward()
    missing = [name for name, p in segmenter.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


def test_published_sizes_run_on_small_images():
    image = torch.rand(1, 3, 64, 96)
    assert spanet("S", classes=3).eval()(image).shape == (1, 3)
    with torch.device("meta"):
        assert spanet_segmenter("BX", 7)(torch.rand(1, 3, 128, 160)).shape == (1, 7, 128, 160)


def test_pyramid_levels_reach_the_finest_one():
    head = SemanticFPN((2, 3, 4), 2, pyramid=4, width=4, groups=1)
    assert [len(steps) for steps in head.raise_level] == [1, 1, 2]
    maps = [torch.randn(1, 2, 9, 12), torch.randn(1, 3, 5, 6), torch.randn(1, 4, 3, 3)]
    before = head(maps)
    assert before.shape == (1, 2, 9, 12)
    for level in range(3):
        changed = [x + (1.0 if i == level else 0.0) * torch.randn_like(x) for i, x in enumerate(maps)]
        assert (head(changed) - before).abs().max() > 1e-4


def test_scales_are_where_their_names_say():
    x, branch = torch.randn(1, 4, 3, 3), nn.Conv2d(4, 4, 1)
    for kind in ("none", "res", "layer"):
        block = Residual(4, branch, kind)
        if kind == "none":
            assert block.scale_C11 is None
            expected = x + branch(block.norm(x))
        else:
            assert_close(block.scale_C11, torch.full((4, 1, 1), {"res": 1.0, "layer": 1e-5}[kind]))
            block.scale_C11.data = torch.arange(4.0).view(4, 1, 1)
            change, s = branch(block.norm(x)), block.scale_C11
            expected = s * x + change if kind == "res" else x + s * change
        assert_close(block(x), expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_blocks_hold_equally_many_parameters(mixer):
    model = equal_metaformer(mixer, (16, 16))
    for body, width in zip(model.stages, model.widths):
        for mix, network in zip(body[::2], body[1::2]):
            held = sum(p.numel() for part in (mix.branch, network.branch) for p in part.parameters())
            assert held == pytest.approx(block_parameters(width), abs=width + 1)
    Classifier(model, 3)(torch.rand(1, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_cannot_be_built_is_refused():
    with pytest.raises(ValueError, match="no SPANet 'XL'.*S, M, MX, B, BX"):
        spanet("XL")
    with pytest.raises(ValueError, match="no mixer 'mlp'.*pool, conv"):
        equal_metaformer("mlp", (8, 8))
    with pytest.raises(ValueError, match="alone takes all"):
        equal_hidden(8, MIXERS["gate"](8, (32, 32)))
    with pytest.raises(ValueError, match="scale='both'"):
        Residual(4, nn.Identity(), "both")
    with pytest.raises(ValueError, match="2 widths, 1 numbers of blocks"):
        MetaFormer((4, 8), (1,), lambda *_: nn.Identity(), lambda *_: 4, ("none",))
    with pytest.raises(ValueError, match="2×40 pixels"):
        tiny()(torch.rand(1, 3, 2, 40))
    with pytest.raises(ValueError, match="reaches beyond a grid of 1×1"):
        tiny()(torch.rand(1, 3, 4, 4))

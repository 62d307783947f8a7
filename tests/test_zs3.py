"""ZS3: the MMD against a slow double loop, what generator and classifier learn, and what never reaches them."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.testing import assert_close

from sptseg_lib.splits import hide_unseen, make_split
from sptseg_lib.zs3 import Generator, Patches, Zs3, Zs3Settings, fit_zs3, mmd, seen_patches, train_generator

SPLIT = make_split("four", ("a", "b", "c", "d"), ("b", "d"))
QUICK = Zs3Settings(pictures=8, drawn=8, hidden=16, generator_steps=3, classifier_steps=3)


def encode(image_B3HW):
    """A stand-in for CLIP: unit vectors of 8 numbers a patch of 4 × 4 pixels."""
    pooled_B3hw = F.avg_pool2d(image_B3HW, 4)
    mixed_B8hw = torch.einsum("bchw,ce->behw", pooled_B3hw, torch.linspace(-1, 1, 24).view(3, 8))
    return F.normalize(mixed_B8hw.permute(0, 2, 3, 1) + 0.1, dim=-1)


def pictures(swap=None, seed=0, pictures=8):
    """Masks of quarters, one class each; `swap` renames classes before unseen ones are hidden."""
    generator = torch.Generator().manual_seed(seed)
    quarter_B22 = torch.stack([torch.randperm(4, generator=generator).view(2, 2) for _ in range(pictures)])
    image_B3HW = torch.rand(pictures, 3, 16, 16, generator=generator)
    label_BHW = quarter_B22.repeat_interleave(8, 1).repeat_interleave(8, 2)
    image_B3HW = image_B3HW * 0.2 + label_BHW[:, None] / 5
    if swap is not None:
        label_BHW = torch.tensor(swap)[label_BHW]
    return [(image_B3HW, hide_unseen(label_BHW, SPLIT))]


def test_mmd_is_that_of_a_slow_double_loop():
    real_CnE, made_CmE = torch.randn(2, 5, 3).double(), torch.randn(2, 4, 3).double()
    bandwidths = torch.tensor([0.5, 2.0]).double()

    def k(a, b):
        return sum(float(torch.exp(-((a - b) ** 2).sum() / (2 * s**2))) for s in bandwidths)

    for c in range(2):
        x, y = real_CnE[c], made_CmE[c]
        slow = sum(k(a, b) for a in x for b in x) / 25 + sum(k(a, b) for a in y for b in y) / 16
        slow -= 2 * sum(k(a, b) for a in x for b in y) / 20
        assert float(mmd(real_CnE, made_CmE, bandwidths)[c]) == pytest.approx(slow, abs=1e-12)
    assert_close(mmd(real_CnE, real_CnE, bandwidths), torch.zeros(2).double())


def test_gradients_are_finite_where_points_coincide():
    made_CnE = torch.zeros(1, 3, 2, requires_grad=True)
    mmd(torch.zeros(1, 3, 2), made_CnE, torch.ones(1)).sum().backward()
    assert made_CnE.grad.isfinite().all()


def test_only_whole_patches_of_seen_classes_are_kept():
    image_B3HW, label_BHW = pictures()[0]
    label_BHW = label_BHW.clone()
    label_BHW[0, 0, 0] = 1 - label_BHW[0, 0, 1] if label_BHW[0, 0, 1] < 2 else 0  # spoils one patch
    found = seen_patches(encode, [(image_B3HW, label_BHW)], 2, QUICK)
    feature_BhwE, kept = encode(image_B3HW), {0: [], 1: []}
    for b in range(8):
        for i in range(4):
            for j in range(4):
                values = label_BHW[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].unique().tolist()
                if len(values) == 1 and values[0] != 255:
                    kept[values[0]].append(feature_BhwE[b, i, j])
    assert found.count_S.tolist() == [len(kept[0]), len(kept[1])] and found.first_S.tolist() == [0, len(kept[0])]
    for k, first in enumerate(found.first_S):
        ours = found.feature_RE[first : first + found.count_S[k]]
        assert_close(ours[ours[:, 0].argsort()], torch.stack(kept[k])[torch.stack(kept[k])[:, 0].argsort()])
    for k, drawn_nE in zip((1, 0), found.draw(torch.tensor([1, 0]), 50)):
        distance_nR = (drawn_nE[:, None] - torch.stack(kept[k])[None]).square().sum(-1)
        assert not distance_nR.amin(1).any()  # real patches of that class


def test_no_unseen_label_reaches_training():
    """Whichever unseen class a pixel has, the same is learned; a seen label that changes does change it."""
    text_KE = F.normalize(torch.randn(4, 8), dim=-1)

    def fitted(swap=None):
        return fit_zs3(encode, pictures(swap), text_KE, SPLIT, QUICK, seed=1)

    as_is = fitted()
    assert_close(fitted([0, 3, 2, 1]).weight, as_is.weight, rtol=0, atol=0)
    assert not torch.equal(fitted([2, 1, 0, 3]).weight, as_is.weight)
    found = seen_patches(encode, pictures(), 2, QUICK)
    assert int(found.count_S.sum()) == len(found.feature_RE) == 8 * 8  # two quarters of each picture, of four patches


def test_a_seen_class_without_a_patch_is_imagined_too():
    image_B3HW, label_BHW = pictures()[0]
    one = [(image_B3HW, label_BHW.where(label_BHW == 0, 255))]
    found = seen_patches(encode, one, 2, QUICK)
    assert found.present_C.tolist() == [0] and found.count_S.tolist() == [8 * 4, 0]
    text_KE = F.normalize(torch.randn(4, 8), dim=-1)
    assert fit_zs3(encode, one, text_KE, SPLIT, QUICK, seed=0).weight.isfinite().all()


def test_masks_that_still_show_unseen_classes_are_refused():
    image_B3HW, _ = pictures()[0]
    with pytest.raises(ValueError, match="hide_unseen"):
        seen_patches(encode, [(image_B3HW, torch.full((8, 16, 16), 3))], 2, QUICK)


def test_a_seed_says_what_is_learned_and_leaves_others_alone():
    text_KE = F.normalize(torch.randn(4, 8), dim=-1)
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (fit_zs3(encode, pictures(), text_KE, SPLIT, QUICK, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), before)
    assert torch.equal(one.weight, two.weight) and not torch.equal(one.weight, other.weight)
    probability_BKhw = Zs3(encode, one)(pictures()[0][0])
    assert probability_BKhw.shape == (8, 4, 4, 4)
    assert_close(probability_BKhw.sum(1), torch.ones(8, 4, 4))


def test_the_generator_learns_a_class_and_its_spread():
    """Two classes around two directions: made patches end nearer to their own class's than to the other's."""
    centre_2E = F.normalize(torch.randn(2, 1, 8), dim=-1)
    real_RE = F.normalize(centre_2E + 0.2 * torch.randn(2, 200, 8), dim=-1).flatten(0, 1)
    patches = Patches(real_RE, torch.tensor([0, 200]), torch.tensor([200, 200]))
    text_2E = F.normalize(torch.randn(2, 8), dim=-1)
    settings = Zs3Settings(hidden=32, generator_steps=200)
    trained, fresh = train_generator(patches, text_2E, settings), Generator(8, settings)
    with torch.no_grad():
        made_2nE, fresh_2nE = trained(text_2E, 100), fresh(text_2E, 100)
    real_2nE = real_RE.view(2, 200, 8)
    usual = torch.tensor([0.5])
    assert (mmd(real_2nE, made_2nE, usual) < 0.3 * mmd(real_2nE, fresh_2nE, usual)).all()
    assert (made_2nE.std(1) > 0.3 * real_2nE.std(1)).float().mean() > 0.7  # not one point a class


def test_what_cannot_be_learned_is_refused():
    text_KE = F.normalize(torch.randn(4, 8), dim=-1)
    with pytest.raises(ValueError, match="no unseen class"):
        fit_zs3(encode, pictures(), text_KE, make_split("all", SPLIT.classes, ()), QUICK, seed=0)
    image_B3HW, label_BHW = pictures()[0]
    with pytest.raises(ValueError, match="nothing to learn from"):
        seen_patches(encode, [(image_B3HW, torch.full_like(label_BHW, 255))], 2, QUICK)
    for wrong in ({"drawn": 1}, {"bandwidths": ()}, {"generator_rate": 0.0}, {"epochs": 3}):
        with pytest.raises(ValidationError):
            Zs3Settings(**wrong)

"""Losses against loops over pixels and windows."""

import math

import pytest
import torch

from sptseg_lib.losses import dice_loss, focal_loss, one_hot_masks, ssim_loss

H, W, K = 7, 9, 3


@pytest.fixture
def logits():
    return 2 * torch.randn(2, K, H, W)


@pytest.fixture
def label():
    label_BHW = torch.randint(0, 2, (2, H, W))  # class 2 is in no picture
    label_BHW[:, 2:4, 3:] = 255
    return label_BHW


def counted_pixels(label_BHW, ignored: str):
    if ignored == "negative":
        return torch.ones(len(label_BHW), 1, H, W)
    return (label_BHW != 255)[:, None].float()


def present_pairs(label_BHW) -> int:
    return sum(k in label.tolist() for label in label_BHW.flatten(1) for k in range(K))


def test_masks_of_classes_by_loop(label):
    masks = one_hot_masks(label.byte(), K)
    assert masks.dtype == torch.float32 and masks.shape == (2, K, H, W)
    for k in range(K):
        assert torch.equal(masks[:, k].bool(), label == k)


@pytest.mark.parametrize("wrong", [3, 254, 300, -1])
def test_a_label_outside_the_classes_is_named(label, wrong):
    label[0, 0, 0] = wrong
    with pytest.raises(ValueError, match=f"{wrong}.* 3 "):
        one_hot_masks(label, K)


@pytest.mark.parametrize("ignored", ["negative", "left out"])
def test_focal_loss_by_pixel(logits, label, ignored):
    target, counted = one_hot_masks(label, K), counted_pixels(label, ignored)
    total = 0.0
    for b in range(2):
        for k in range(K):
            terms = []
            for y in range(H):
                for x in range(W):
                    if not counted[b, 0, y, x]:
                        continue
                    p = 1 / (1 + math.exp(-float(logits[b, k, y, x])))
                    if label[b, y, x] == k:
                        terms.append(-0.25 * (1 - p) ** 2 * math.log(p))
                    else:
                        terms.append(-0.75 * p**2 * math.log(1 - p))
            total += sum(terms) / len(terms)
    expected = total / present_pairs(label)
    assert float(focal_loss(logits, target, counted)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ignored", ["negative", "left out"])
def test_dice_loss_by_pixel(logits, label, ignored):
    target, counted = one_hot_masks(label, K), counted_pixels(label, ignored)
    total = 0.0
    for b in range(2):
        for k in range(K):
            both = area = 0.0
            for y in range(H):
                for x in range(W):
                    p = float(logits[b, k, y, x].sigmoid()) * float(counted[b, 0, y, x])
                    t = float(label[b, y, x] == k)
                    both, area = both + p * t, area + p + t
            total += 1 - (2 * both + 1) / (area + 1)
    expected = total / present_pairs(label)
    assert float(dice_loss(logits, target, counted)) == pytest.approx(expected, rel=1e-5)


def test_ssim_loss_by_window(logits, label):
    target = one_hot_masks(label, K)
    weight = {
        (i, j): math.exp(-(i * i + j * j) / (2 * 1.5**2)) for i in range(-5, 6) for j in range(-5, 6)
    }  # 11 × 11, σ 1.5
    whole = sum(weight.values())
    values = []
    for b in range(2):
        for k in range(K):
            x, y = logits[b, k].tolist(), target[b, k].tolist()
            for row in range(H):
                for column in range(W):
                    mx = my = xx = yy = xy = 0.0  # pixels beyond the border are zeros and add nothing
                    for (i, j), w in weight.items():
                        if 0 <= row + i < H and 0 <= column + j < W:
                            p, t, w = x[row + i][column + j], y[row + i][column + j], w / whole
                            mx, my, xx, yy, xy = mx + w * p, my + w * t, xx + w * p * p, yy + w * t * t, xy + w * p * t
                    top = (2 * mx * my + 0.01**2) * (2 * (xy - mx * my) + 0.03**2)
                    bottom = (mx * mx + my * my + 0.01**2) * (xx - mx * mx + yy - my * my + 0.03**2)
                    values.append(top / bottom)
    expected = 1 - sum(values) / len(values)
    assert float(ssim_loss(logits, target)) == pytest.approx(expected, rel=1e-4)
    assert float(ssim_loss(target, target)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("ignored", ["negative", "left out"])
def test_ignored_pixels_count_as_negatives_or_not_at_all(logits, label, ignored):
    """Raising a logit under a 255 costs something in one reading and nothing in the other."""
    target, counted = one_hot_masks(label, K), counted_pixels(label, ignored)
    raised = logits + 3 * (label == 255)[:, None]
    for loss in (focal_loss, dice_loss):
        before, after = loss(logits, target, counted), loss(raised, target, counted)
        assert (after > before) if ignored == "negative" else torch.equal(after, before)


@pytest.mark.parametrize("ignored", ["negative", "left out"])
def test_one_picture_and_no_label_at_all_give_finite_losses(logits, label, ignored):
    one = logits[:1].requires_grad_()
    for of_one in (label[:1], torch.full((1, H, W), 255)):
        target, counted = one_hot_masks(of_one, K), counted_pixels(of_one, ignored)
        loss = focal_loss(one, target, counted) + dice_loss(one, target, counted)
        loss = loss + ssim_loss(one.sigmoid() * counted, target)
        assert loss.isfinite() and torch.autograd.grad(loss, one)[0].isfinite().all()
    # The mean over a batch of twins is the loss of one.
    target, counted = one_hot_masks(label[:1], K), counted_pixels(label[:1], ignored)
    for loss in (focal_loss, dice_loss):
        alone, twice = loss(one, target, counted), loss(*(x.repeat(2, 1, 1, 1) for x in (one, target, counted)))
        torch.testing.assert_close(alone, twice)


def test_large_logits_do_not_overflow():
    logits_BKHW = torch.tensor([[1e4, -1e4], [-1e4, 1e4]]).view(1, 1, 2, 2).requires_grad_()
    target = torch.ones(1, 1, 2, 2)
    loss = focal_loss(logits_BKHW, target, target) + dice_loss(logits_BKHW, target, target)
    loss.backward()
    assert loss.isfinite() and logits_BKHW.grad.isfinite().all()


@pytest.mark.parametrize("planes", [1, 2, 6, 100])
@pytest.mark.parametrize("empty", [False, True])
def test_losses_in_pieces_equal_the_whole(logits, label, monkeypatch, planes, empty):
    target = one_hot_masks(torch.full_like(label, 255) if empty else label, K).double()
    counted = counted_pixels(label, "left out").double()
    x = logits.double().requires_grad_()
    monkeypatch.setattr("sptseg_lib.losses.PIXELS_AT_ONCE", planes * H * W)
    loss = 3 * focal_loss(x, target, counted) + 2 * ssim_loss(x.sigmoid() * counted, target)
    (gradient,) = torch.autograd.grad(loss, x)
    # The whole at once, as torch differentiates it.
    monkeypatch.setattr("sptseg_lib.losses.sum_in_pieces", lambda f, *t: f(*(u.expand_as(x).flatten(0, 1) for u in t)))
    whole = 3 * focal_loss(x, target, counted) + 2 * ssim_loss(x.sigmoid() * counted, target)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, x)[0])

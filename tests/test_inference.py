"""Sliding windows and the seen-class shift."""

import pytest
import torch
import torch.nn.functional as F

from sptseg_lib.inference import class_probabilities, label_maps, scaled_probabilities, window_starts


@pytest.mark.parametrize("length", [1, 5, 12, 13, 16, 17, 29, 40])
@pytest.mark.parametrize(("window", "stride"), [(12, 10), (12, 12), (12, 1), (7, 3)])
def test_windows_cover_every_pixel_once_at_least_and_end_at_the_border(length, window, stride):
    starts = window_starts(length, window, stride)
    covered = {at for start in starts for at in range(start, min(start + window, length))}
    assert covered == set(range(length))
    assert starts == sorted(set(starts)) and starts[0] == 0
    assert starts[-1] + window == length or starts == [0]


@pytest.mark.parametrize("size", [(8, 8), (20, 33), (5, 30), (16, 16)])
def test_a_constant_scorer_gives_a_constant(size):
    def score(piece):
        assert piece.shape[-2] % 4 == piece.shape[-1] % 4 == 0 and max(piece.shape[-2:]) <= 16
        return torch.tensor([0.2, 0.7]).view(1, 2, 1, 1).expand(len(piece), 2, piece.shape[-2] // 4, -1)

    actual = class_probabilities(score, torch.rand(3, 3, *size), window=16, patch=4)
    torch.testing.assert_close(actual, torch.tensor([0.2, 0.7]).view(1, 2, 1, 1).expand(3, 2, *size))


@pytest.mark.parametrize("stride", [0, 1, 5, 12])
def test_windows_do_not_matter_to_a_scorer_of_single_pixels(stride):
    mix = torch.randn(4, 3)

    def score(piece):
        return torch.einsum("kc,bchw->bkhw", mix, piece).sigmoid()

    image = torch.rand(2, 3, 13, 30)
    windowed = class_probabilities(score, image, window=12, patch=1, stride=stride)
    torch.testing.assert_close(windowed, score(image))


def test_overlapping_windows_are_averaged_by_loop():
    """Each window answers with its own mean colour; a pixel gets the mean over the windows that hold it."""

    def score(piece):
        return piece.mean((2, 3), keepdim=True)

    image = torch.rand(1, 3, 10, 14)
    actual = class_probabilities(score, image, window=8, patch=2, stride=4)
    windows = [(top, left) for top in (0, 2) for left in (0, 4, 6)]
    for y in range(10):
        for x in range(14):
            own = [
                image[0, :, t : t + 8, s : s + 8].mean((1, 2)) for t, s in windows if 0 <= y - t < 8 and 0 <= x - s < 8
            ]
            torch.testing.assert_close(actual[0, :, y, x], torch.stack(own).mean(0))


@pytest.mark.parametrize("size", [(9, 13), (4, 15), (21, 18)])
def test_sides_that_the_patch_does_not_divide_are_padded_by_their_border(size):
    seen = []

    def score(piece):
        seen.append(piece)
        return F.avg_pool2d(piece, 4)

    image = torch.rand(1, 3, *size)
    assert class_probabilities(score, image, window=16, patch=4).shape == (1, 3, *size)
    for piece in seen:
        assert piece.shape[-2] % 4 == piece.shape[-1] % 4 == 0
    border = seen[0][..., min(size[0], 16) - 1 :, :]
    torch.testing.assert_close(border, border[..., :1, :].expand_as(border))


@pytest.mark.parametrize("size", [(3, 20), (20, 3)])
def test_an_image_smaller_than_a_patch_is_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]}×{size[1]} pixels is smaller than one 4×4 patch"):
        class_probabilities(lambda piece: piece, torch.rand(1, 3, *size), window=16, patch=4)


def test_a_stride_that_would_leave_gaps_is_refused():
    """Pixels in no window would be 0 / 0, and their argmax some class."""
    with pytest.raises(ValueError, match="13"):
        class_probabilities(lambda piece: piece, torch.rand(1, 3, 40, 40), window=12, patch=4, stride=13)


def test_label_maps_are_the_argmax_of_shifted_probabilities():
    probability = torch.rand(2, 5, 4, 6)
    seen_ids, gammas = (0, 2, 3), [-0.2, 0.0, 0.1, 0.45, 2.0]
    maps = label_maps(probability, seen_ids, gammas)
    assert maps.shape == (5, 2, 4, 6) and maps.dtype == torch.int64
    for g, gamma in enumerate(gammas):
        for b in range(2):
            for y in range(4):
                for x in range(6):
                    shifted = [float(p) - gamma * (k in seen_ids) for k, p in enumerate(probability[b, :, y, x])]
                    assert int(maps[g, b, y, x]) == shifted.index(max(shifted))
    assert set(maps[-1].unique().tolist()) <= {1, 4}  # beyond any probability, unseen classes win everywhere
    assert len({tuple(m.flatten().tolist()) for m in maps}) == len(gammas)


@pytest.mark.parametrize("seen_ids", [(0, 1, 2), ()])
def test_one_sided_splits_are_a_plain_argmax(seen_ids):
    probability = torch.rand(2, 3, 4, 4)
    maps = label_maps(probability, seen_ids, [0.0, 0.3])
    assert torch.equal(maps, probability.argmax(1).expand(2, -1, -1, -1))


def test_a_resized_test_keeps_the_pictures_own_size():
    seen = []

    def score(piece):
        seen.append(tuple(piece.shape[-2:]))
        return piece[:, :2]

    image = torch.linspace(0, 1, 40).expand(1, 3, 30, 40)
    probability = scaled_probabilities(score, image, window=64, patch=8, short_side=60)
    assert probability.shape == (1, 2, 30, 40) and seen == [(64, 64), (64, 64)]  # 60 × 80, padded to the patch
    assert float((probability - image[:, :2]).abs().max()) < 0.02
    seen.clear()
    scaled_probabilities(score, torch.rand(1, 3, 16, 320), window=512, patch=8, short_side=64)
    assert seen == [(16, 256)]  # the longer side is held to four times the shorter one's size
    assert torch.equal(scaled_probabilities(score, image, 64, 8), class_probabilities(score, image, 64, 8))

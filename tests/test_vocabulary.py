"""Names added when testing: every list of names scored in one pass gives what a pass of its own would."""

import numpy as np
import pytest
import torch

from sptseg_lib.class_lists import common_name
from sptseg_lib.metrics import harmonic_mean
from sptseg_lib.scenes.atlas import CLASSES
from sptseg_lib.splits import SPLITS, make_split
from sptseg_lib.vocabulary import ABSENT, foreign_names, offered, score_names, with_foreign

SPLIT = make_split("small", ("a", "b", "c", "d"), ("b", "d"))
FOREIGN = ("x",)
GAMMAS = [0.0, 0.3]


def test_foreign_names_are_new_and_drawn_by_the_seed():
    split = SPLITS["voc12"]
    names = foreign_names(split, 100, 0)
    assert len({common_name(name) for name in names}) == 100
    assert not {common_name(name) for name in names} & {common_name(name) for name in split.classes}
    assert names[:10] == foreign_names(split, 10, 0) != foreign_names(split, 10, 1)
    assert not set(foreign_names(SPLITS["default"], 64, 0)) & set(CLASSES)  # COCO-Stuff has clouds too
    with pytest.raises(ValueError, match="10000 foreign names"):
        foreign_names(split, 10_000, 0)


def test_a_wider_split_keeps_its_ids_and_what_is_seen():
    wide = with_foreign(SPLIT, ("x", "y"))
    assert wide.classes == (*SPLIT.classes, "x", "y") and wide.seen == SPLIT.seen and wide.unseen_ids == (1, 3, 4, 5)
    assert with_foreign(SPLIT, ()) is SPLIT


def test_a_picture_is_offered_its_own_names_and_some_that_it_lacks():
    label_BHW = torch.randint(0, 4, (6, 2, 2))
    label_BHW[0] = 255
    chance_BK = torch.rand(6, 4)
    for absent in range(5):
        found_BK = offered(label_BHW, 4, absent, chance_BK)
        for label_HW, chance_K, found_K in zip(label_BHW, chance_BK, found_BK):
            own = {int(k) for k in label_HW.flatten() if k != 255}
            lacked = sorted(set(range(4)) - own, key=lambda k: float(chance_K[k]))
            assert set(found_K.nonzero().flatten().tolist()) == own | set(lacked[:absent])


def plain_iou(probability, label, names, gamma, ignored=None):
    """IoU by class of an argmax over `names` alone (per picture, or for all), in numpy, pixel by pixel."""
    hit, seen_or_said = np.zeros(5), np.zeros(5)
    there = np.zeros(5, dtype=bool)
    for b in range(len(label)):
        own = names[b] if isinstance(names[0], list) else names
        for i, j in np.ndindex(*label[b].shape):
            true = label[b, i, j]
            if true in (255, ignored):
                continue
            said = max(own, key=lambda k: probability[b, k, i, j] - (gamma if k in (0, 2) else 0))
            there[true] = True
            hit[true] += said == true
            seen_or_said[true] += 1
            seen_or_said[said] += said != true
    return {k: 100 * hit[k] / seen_or_said[k] for k in range(5) if there[k]}


def mean_over(iou, ids):
    values = [iou[k] for k in ids if k in iou]
    return sum(values) / len(values)


def test_every_list_of_names_is_scored_as_if_alone():
    generator = torch.Generator().manual_seed(3)
    batches = {}
    for part in ("validation", "test"):
        label_BHW = torch.randint(0, 4, (5, 4, 4), generator=generator)
        label_BHW[0, 0] = 255
        label_BHW[1] %= 2
        batches[part] = (torch.rand(5, 5, 4, 4, generator=generator), label_BHW, torch.arange(5))
    found = score_names(
        lambda x: x, SPLIT, FOREIGN, {part: [batch] for part, batch in batches.items()}, 0.3, GAMMAS, seed=4
    )
    probability, label, _ = (x.numpy() for x in batches["test"])
    for k, name in ((1, "b"), (3, "d")):
        rest = [j for j in range(4) if j != k]
        others = [j for j in (1, 3) if j != k]

        def harmonic(gamma, rest=rest, k=k, others=others):
            p, y, _ = (x.numpy() for x in batches["validation"])
            iou = plain_iou(p, y, rest, gamma, k)
            return harmonic_mean(mean_over(iou, (0, 2)), mean_over(iou, others))

        got = found.open[name]
        assert got.gamma == max(GAMMAS, key=harmonic)
        before, after = (plain_iou(probability, label, ids, got.gamma, k) for ids in (rest, [0, 1, 2, 3]))
        assert got.seen == pytest.approx([mean_over(iou, (0, 2)) for iou in (before, after)], abs=0.01)
        assert got.unseen == pytest.approx([mean_over(iou, others) for iou in (before, after)], abs=0.01)
        assert got.iou == pytest.approx(plain_iou(probability, label, [0, 1, 2, 3], got.gamma)[k], abs=0.01)
    for n, names in ((0, [0, 1, 2, 3]), (1, [0, 1, 2, 3, 4])):
        iou = plain_iou(probability, label, names, 0.3)
        assert found.foreign[n]["mIoU_unseen"] == pytest.approx(mean_over(iou, (1, 3)), abs=0.01)
        assert found.foreign[n]["mIoU_seen"] == pytest.approx(mean_over(iou, (0, 2)), abs=0.01)
    own = [sorted(set(y.flatten().tolist()) - {255}) for y in label]
    iou = plain_iou(probability, label, own, 0.3)
    assert found.absent[0]["mIoU_unseen"] == pytest.approx(mean_over(iou, (1, 3)), abs=0.01)
    assert list(found.absent) == list(ABSENT)
    assert found.absent[ABSENT[-1]]["per_class"] == found.foreign[0]["per_class"]


def test_without_validation_pictures_the_given_shift_is_used():
    batch = (torch.rand(2, 4, 3, 3), torch.randint(0, 4, (2, 3, 3)), torch.arange(2))
    found = score_names(lambda x: x, SPLIT, (), {"test": [batch]}, 0.1, GAMMAS)
    assert {value.gamma for value in found.open.values()} == {0.1} and list(found.foreign) == [0]

"""Scores against counts made by hand."""

import pytest
import torch

from sptseg_lib.evaluate import picture_scores
from sptseg_lib.metrics import class_iou, confusion_matrix, harmonic_mean, scores
from sptseg_lib.splits import Split

SPLIT = Split(name="toy", classes=("a", "b", "c", "d"), seen=("a", "b"), unseen=("c", "d"), stuff=("b", "d"))


def test_confusion_matrix_by_pixel():
    predicted, label = torch.randint(0, 4, (3, 5, 6)), torch.randint(0, 4, (3, 5, 6), dtype=torch.uint8)
    label[:, 1] = 255
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for p, t in zip(predicted.flatten().tolist(), label.flatten().tolist(), strict=True):
        if t != 255:
            expected[t, p] += 1
    actual = confusion_matrix(predicted, label, 4)
    assert torch.equal(actual, expected) and actual.dtype == torch.int64
    assert not confusion_matrix(predicted, torch.full_like(label, 255), 4).any()


def test_scores_of_a_matrix_worked_out_by_hand():
    confusion = torch.tensor([[6, 2, 0, 0], [0, 4, 0, 0], [1, 0, 3, 0], [0, 4, 0, 0]])  # d is there and never found
    result = scores(confusion, SPLIT)
    iou = {"a": 6 / 9, "b": 4 / 10, "c": 3 / 4, "d": 0.0}
    assert {name: entry["iou"] for name, entry in result["per_class"].items()} == pytest.approx(
        {name: 100 * value for name, value in iou.items()}, abs=0.01
    )
    assert [entry["seen"] for entry in result["per_class"].values()] == [True, True, False, False]
    seen, unseen = 100 * (6 / 9 + 0.4) / 2, 37.5
    expected = {
        "pAcc": 65.0, "mIoU": (2 * seen + 2 * unseen) / 4, "mIoU_seen": seen, "mIoU_unseen": unseen,
        "hIoU": 2 * seen * unseen / (seen + unseen), "things_seen": 100 * 6 / 9, "things_unseen": 75.0,
        "stuff_seen": 40.0, "stuff_unseen": 0.0,
    }  # fmt: skip
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=0.02)


def test_an_absent_class_has_no_score_and_a_missed_one_has_zero():
    # c is nowhere, though predicted once; d is there and missed.
    confusion = torch.tensor([[5, 0, 1, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0]])
    iou = class_iou(confusion)
    assert iou[2].isnan() and iou[3] == 0 and float(iou[0]) == pytest.approx(5 / 6)
    result = scores(confusion, SPLIT)
    assert result["per_class"]["c"]["iou"] is None and result["per_class"]["d"]["iou"] == 0
    assert result["mIoU_unseen"] == 0 and result["hIoU"] == 0
    assert result["mIoU"] == pytest.approx(100 * (5 / 6 + 4 / 6 + 0) / 3, abs=0.02)
    assert result["things_unseen"] is None


def test_no_unseen_class_and_no_labelled_pixel():
    seen_only = Split(name="all", classes=("a", "b"), seen=("a", "b"), unseen=())
    result = scores(torch.tensor([[1, 1], [0, 2]]), seen_only)
    assert result["mIoU_unseen"] is None and result["hIoU"] is None and result["pAcc"] == 75.0
    assert "things_seen" not in result
    empty = scores(torch.zeros(4, 4, dtype=torch.int64), SPLIT)
    assert empty["pAcc"] == 0 and empty["mIoU_seen"] is None and empty["hIoU"] is None


def test_harmonic_mean():
    assert harmonic_mean(60, 30) == pytest.approx(40)
    assert harmonic_mean(0, 0) == harmonic_mean(80, 0) == 0


@pytest.mark.parametrize("wrong", [4, 254, -1])
@pytest.mark.parametrize("place", ["predicted", "label"])
def test_ids_outside_the_class_list_are_refused(place, wrong):
    maps = {"predicted": torch.zeros(1, 2, 2, dtype=torch.int64), "label": torch.zeros(1, 2, 2, dtype=torch.int64)}
    maps[place][0, 1, 1] = wrong
    with pytest.raises(ValueError, match=rf"\[{wrong}\] are outside the class list of 4"):
        confusion_matrix(maps["predicted"], maps["label"], 4)
    with pytest.raises(ValueError, match=r"\[255\] are outside"):  # ignored is a label, never an answer
        confusion_matrix(torch.full((1, 2, 2), 255), maps["label"].clamp(0, 3), 4)


def test_scores_of_single_pictures_by_loop():
    predicted, label = torch.randint(0, 4, (3, 4, 5)), torch.randint(0, 3, (3, 4, 5))
    label[0, :2], label[2] = 255, 255
    rows = picture_scores(predicted, label, torch.tensor([7, 8, 9]), SPLIT)
    assert [row["picture"] for row in rows] == [7, 8, 9]
    for row, p, t in zip(rows[:2], predicted, label, strict=False):
        kept = t != 255
        p, t = p[kept], t[kept]
        iou = [float(((p == k) & (t == k)).sum() / ((p == k) | (t == k)).sum()) for k in t.unique()]
        assert row["pAcc"] == pytest.approx(100 * float((p == t).float().mean()), abs=0.01)
        assert row["mIoU"] == pytest.approx(100 * sum(iou) / len(iou), abs=0.01)
    assert rows[2]["pAcc"] == rows[2]["mIoU"] == 0

"""Known disasters, each made on purpose, are named from the confusion matrix; healthy runs are left alone."""

import pytest
import torch

from sptseg_lib.diagnose import HEALTHY, diagnose
from sptseg_lib.metrics import confusion_matrix
from sptseg_lib.splits import find_split, make_split

# As many classes as COCO-Stuff, and the raw ids that its pixel maps skip.
SKIPPED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
NAMES = tuple(f"class {k}" for k in range(171))
STUFF = make_split("stuff", NAMES, NAMES[19:171:10])
SPLITS = [find_split("default"), find_split("half"), find_split("voc12"), STUFF]
every_split = pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.name)


def picture(split, quality, classes=None, pixels=30_000):
    """True labels with 30 % background, and what a model of this recall predicts: errors anywhere."""
    label = torch.randint(classes or len(split.classes), (1, pixels, 1))
    predicted = torch.where(torch.rand(label.shape) < quality, label, torch.randint_like(label, len(split.classes)))
    return torch.where(torch.rand(label.shape) < 0.3, 255, label), predicted


def background_kept(label, split):
    """Raw ids as train ids: background is class 0, the last class is beyond the list and falls out."""
    raised = torch.where(label == 255, 0, label + 1)
    return torch.where(raised == len(split.classes), 255, raised)


def reduced_twice(label, split):
    return torch.where((label == 255) | (label == 0), 255, label - 1)


def raw_ids(label, split, skipped=SKIPPED):
    K = len(split.classes)
    raw = torch.tensor([r for r in range(K + len(skipped)) if r not in skipped])
    raw = torch.where(raw < K, raw, 255)
    return torch.where(label == 255, 255, raw[label.clamp(max=K - 1)])


@every_split
@pytest.mark.parametrize("quality", [0.25, 0.9])
@pytest.mark.parametrize(
    ("broken", "name"),
    [(background_kept, "labels shifted by one"), (reduced_twice, "background reduced twice")],
)
def test_moved_labels_are_named(split, quality, broken, name):
    label, predicted = picture(split, quality)
    found = diagnose(confusion_matrix(predicted, broken(label, split), len(split.classes)), split)
    assert found.name == name
    assert (split.classes[-1] in found.evidence) == (name == "background reduced twice")


@pytest.mark.parametrize("quality", [0.25, 0.9])
@pytest.mark.parametrize(("split", "skipped"), [(STUFF, SKIPPED), (SPLITS[0], (5, 9, 10))], ids=["171", "16"])
def test_raw_ids_are_named(split, skipped, quality):
    label, predicted = picture(split, quality)
    found = diagnose(confusion_matrix(predicted, raw_ids(label, split, skipped), len(split.classes)), split)
    assert found.name == "raw ids used as train ids"
    assert f"first {skipped[0]} classes are right" in found.evidence


@every_split
def test_weights_that_were_not_loaded_are_named(split):
    label, _ = picture(split, 1)
    unseen = torch.tensor(split.unseen_ids)
    predicted = unseen[torch.randint(len(unseen), label.shape)]
    found = diagnose(confusion_matrix(predicted, label, len(split.classes)), split)
    assert found.name == "weights not loaded" and "seen class" in found.evidence
    predicted[0, 0] = split.seen_ids[0]  # one single pixel is not "exactly 0" any more
    label[0, 0] = split.seen_ids[0]
    assert diagnose(confusion_matrix(predicted, label, len(split.classes)), split) is HEALTHY


def test_one_class_everywhere_is_named_where_no_class_is_unseen():
    split = make_split("all", NAMES[:7], ())
    label, _ = picture(split, 1)
    found = diagnose(confusion_matrix(torch.full_like(label, 3), label, 7), split)
    assert found.name == "weights not loaded" and "'class 3'" in found.evidence


@every_split
def test_the_same_wrong_labels_in_training_still_show_on_unseen_classes(split):
    label, predicted = picture(split, 0.6)
    label = reduced_twice(label, split)
    learnt = torch.isin(label, torch.tensor(split.seen_ids)) & (predicted > 0)
    found = diagnose(confusion_matrix(torch.where(learnt, predicted - 1, predicted), label, len(split.classes)), split)
    assert found.name == "background reduced twice"


@every_split
@pytest.mark.parametrize("quality", [0.0, 0.1, 0.25, 0.9])
@pytest.mark.parametrize("absent", [0, 1, 5])
def test_a_healthy_or_merely_bad_model_is_left_alone(split, quality, absent):
    K = len(split.classes)
    label, predicted = picture(split, quality, classes=K - absent)
    label = torch.where(label == 2, 255, label)
    assert diagnose(confusion_matrix(predicted, label, K), split) is HEALTHY


@every_split
def test_unseen_classes_never_found_are_no_disaster_of_labels(split):
    label, predicted = picture(split, 0.8)
    seen = torch.tensor(split.seen_ids)
    predicted = torch.where(torch.isin(label, seen), predicted, seen[torch.randint(len(seen), label.shape)])
    assert diagnose(confusion_matrix(predicted, label, len(split.classes)), split) is HEALTHY


@every_split
def test_neighbours_that_are_often_confused_are_no_shift(split):
    label, predicted = picture(split, 0.45)
    K = len(split.classes)
    confused = torch.rand(label.shape) < 0.3
    predicted = torch.where(confused & (label < K), (label + 1).clamp(max=K - 1), predicted)
    assert diagnose(confusion_matrix(predicted, label, K), split) is HEALTHY


def test_no_labelled_pixel_and_a_matrix_of_other_classes():
    split = SPLITS[0]
    assert diagnose(torch.zeros(16, 16, dtype=torch.int64), split).name == "no labelled pixel"
    with pytest.raises(ValueError, match=r"\(5, 5\) is not one of the 16 classes of split 'default'"):
        diagnose(torch.eye(5), split)


def test_a_diagnosis_reads_as_one_message():
    assert str(HEALTHY).startswith("nothing wrong found. ") and str(HEALTHY).endswith("further.")

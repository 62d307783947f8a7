"""Robustness and growth: what is scored, what is kept, and that the same test is put to every run."""

import json

import pytest
import torch

from sptseg_lib import robustness, study
from sptseg_lib.corruptions import CORRUPTIONS, corrupt
from sptseg_lib.data import held_out_loader
from sptseg_lib.evaluate import score_images
from sptseg_lib.metrics import harmonic_mean, scores
from sptseg_lib.panels import QUANTILES
from sptseg_lib.robustness import FLOOR, HIDDEN_TOO, METHODS, SCORES, common_scores, kept, measure, variants
from sptseg_lib.settings import EvaluateSettings
from sptseg_lib.splits import SPLITS, fewer_seen
from sptseg_lib.study import FORMS, Form, run_key
from sptseg_lib.vocabulary import ABSENT, FOREIGN

DEFAULT = SPLITS["default"]
TINY = Form(
    {
        "size": 32, "batch": 2, "iterations": 2, "warmup": 1, "precision": "float32",
        "overrides": {"grid": 4, "decoder_layers": 1, "prompt_tokens": 1},
    },
    validation=3, test=4,
)  # fmt: skip


def by_colour(image_B3HW):
    """A predictor that looks at each pixel: probabilities (B, 16, H, W)."""
    weight_K3 = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    return torch.einsum("kc,bchw->bkhw", weight_K3, image_B3HW).sigmoid()


@pytest.fixture
def pictures():
    return held_out_loader(EvaluateSettings(size=32, scenes=5, batch=2), DEFAULT)


def test_corruptions_in_one_pass_are_those_of_passes_of_their_own(pictures):
    found = robustness.score_corrupted(by_colour, pictures, DEFAULT, gamma=0.1, seed=3)
    for name, severity in (("blur", 2), ("noise", 4), ("jpeg", 0), ("occlusion", 3), (HIDDEN_TOO, 3)):
        kind = "occlusion" if name == HIDDEN_TOO else name
        spoilt = []
        for image, label, index in pictures:
            image, covered = corrupt(image, kind, severity, index, seed=3)
            spoilt.append((image, label if name == HIDDEN_TOO else label.masked_fill(covered, 255), index))
        own = scores(score_images(by_colour, spoilt, DEFAULT, [0.1])[0][0], DEFAULT)
        assert {score: found[name][score][severity] for score in SCORES} == {score: own[score] for score in SCORES}
    assert set(found) == {*CORRUPTIONS, HIDDEN_TOO}
    assert len({tuple(values["hIoU"][:1]) for values in found.values()}) == 1  # all start from the same pictures


def test_what_was_found_is_kept_until_something_else_is_asked(tmp_path):
    path, calls = tmp_path / "deep" / "found.json", []

    def find():
        calls.append(1)
        return {1: len(calls)}

    assert kept(path, {"levels": (1, 2)}, find) == kept(path, {"levels": (1, 2)}, find) == {"1": 1}
    assert kept(path, {"levels": (1, 3)}, find) == {"1": 2} and len(calls) == 2


def test_growth_has_36_runs_beside_the_studies_own():
    rows = variants()
    names = [row.name for row in rows]
    keys = {run_key(row.settings(FORMS["short"], seed)) for row in rows for seed in range(3)}
    assert names[:3] == [row.name for row in variants(())] == list(METHODS)
    assert len(set(names)) == 15 and len(keys) == 36 + 9


def test_runs_are_compared_on_the_same_classes():
    generator = torch.Generator().manual_seed(0)

    def card():
        return {
            str(gamma): {
                "hIoU": 50.0,
                "per_class": {name: {"iou": float(torch.rand((), generator=generator))} for name in DEFAULT.classes},
            }
            for gamma in (0.0, 0.1, 0.2)
        }

    runs = [{"settings": {"seed": seed}, "validation": card(), "test": card()} for seed in (0, 1)]

    def plain(part, seed, gamma):
        iou = runs[seed][part][gamma]["per_class"]
        seen = [iou[name]["iou"] for name in fewer_seen(DEFAULT, 2, seed).seen]
        unseen = [iou[name]["iou"] for name in ("star", "ring", "arrow", "checkerboard", "waves")]
        return sum(seen) / 2, sum(unseen) / 5

    best = max(("0.0", "0.1", "0.2"), key=lambda g: sum(harmonic_mean(*plain("validation", s, g)) for s in (0, 1)))
    found = common_scores(runs, DEFAULT)
    assert found["gamma"] == float(best)
    for seed in (0, 1):
        seen, unseen = plain("test", seed, best)
        assert found["mIoU_seen"][seed] == pytest.approx(seen, abs=0.006)
        assert found["mIoU_unseen"][seed] == pytest.approx(unseen, abs=0.006)


def test_all_of_it_is_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(FORMS, "tiny", TINY)
    monkeypatch.setattr(study, "workers_for", lambda jobs: 1)
    monkeypatch.setattr(robustness, "IMAGES", (2,))
    monkeypatch.setattr(robustness, "SEEN_CLASSES", (2,))
    where = {"cache": str(tmp_path / "cache"), "run_dir": str(tmp_path / "run"), "dataset": "", "split": "default"}
    found = measure("tiny", [0], grown=["spt_seg"], **where)
    assert json.loads((tmp_path / "run" / "robustness_tiny.json").read_text()) == json.loads(json.dumps(found))
    assert set(found["corrupted"]) == set(found["names"]) == {*METHODS, FLOOR} and len(found["variants"]) == 5
    assert set(found["common"]) == {*METHODS, "spt_seg, seen_classes=2"}
    for method in METHODS:
        clean = found["variants"][method]["test"][0][str(found["gammas"][method])]
        corrupted, names = found["corrupted"][method][0], found["names"][method][0]
        for score in SCORES:  # the same runs, pictures and shift
            assert corrupted["blur"][score][0] == names["foreign"]["0"][score] == clean[score]
            assert names["absent"][str(ABSENT[-1])][score] == clean[score]
        assert set(names["open"]) == set(DEFAULT.unseen) and len(names["foreign"]) == len(FOREIGN)
    assert len(found["panels"]["rows"]) == len(QUANTILES)
    for part in ("score_corrupted", "score_names"):
        monkeypatch.setattr(robustness, part, None)
    assert measure("tiny", [0], grown=["spt_seg"], **where) == found


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no form 'shrt'.*Did you mean 'short'"):
        measure("shrt", [0], str(tmp_path), str(tmp_path))

"""One's own picture: from a path and names to labels, scores and figures; and the checkpoint that is shipped."""

import hashlib
import json
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sptseg_lib
from data_scripts.ship_checkpoint import CARD, ship
from sptseg_lib import Segmentation, segment
from sptseg_lib import predictor as predictor_module
from sptseg_lib.checkpoint import load_segmenter, save_checkpoint
from sptseg_lib.class_names import check_names, split_names
from sptseg_lib.clip.load import load_clip
from sptseg_lib.clip.text import class_text
from sptseg_lib.clip.tiny import WEIGHTS_PATH
from sptseg_lib.inference import Best, class_probabilities, label_maps
from sptseg_lib.model import build_segmenter
from sptseg_lib.predictor import MOST_WORKING_PIXELS, find_checkpoint, load_predictor, working_size
from sptseg_lib.scenes.render import SceneSettings, render_scenes
from sptseg_lib.settings import TrainSettings
from sptseg_lib.shipped import FOLDER
from sptseg_lib.splits import SPLITS

matplotlib.use("Agg")
NAMES = SPLITS["default"].classes
SEEN_IDS = SPLITS["default"].seen_ids


def write_run(folder, **changes):
    """A run as training leaves it, its parameters drawn at random."""
    settings = TrainSettings(**{"size": 32, "precision": "float32", "overrides": {"grid": 4}} | changes)
    clip = load_clip()  # draws random numbers in its first call in a process, and in no later one
    torch.manual_seed(0)
    segmenter = build_segmenter(settings.model(), clip)
    with torch.no_grad():
        for parameter in segmenter.trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    segmenter.eval().open_gates(torch.rand(4, 3, 32, 32))  # about half of all random gates are closed
    save_checkpoint(folder, segmenter, settings)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "train" / "spt_seg-inductive-seed0")


@pytest.fixture
def scene_3HW():
    return render_scenes(torch.tensor([5]), SceneSettings(size=48), seed=3).image_B3HW[0]


def by_hand(run, image_B3HW, names, prompt="a photo of a {}"):
    segmenter, settings = load_segmenter(run)
    text_KE = class_text(load_clip(), names, prompt)
    return class_probabilities(
        lambda piece: segmenter(piece, text_KE).sigmoid(), image_B3HW, settings.size, segmenter.patch
    ).detach()


def test_agrees_with_the_evaluation_of_the_same_picture(run, scene_3HW):
    result = segment(scene_3HW, NAMES, run, size=48, gamma=0.05)
    probability = by_hand(run, scene_3HW[None], NAMES)
    assert torch.equal(result.label_HW, label_maps(probability, SEEN_IDS, [0.05])[0, 0])
    torch.testing.assert_close(result.heat_Khw, F.adaptive_avg_pool2d(probability, (6, 6))[0])
    assert result.seen == SPLITS["default"].seen and result.label_HW.dtype == torch.int64


def test_classes_in_parts_give_the_same(run, scene_3HW, monkeypatch):
    whole = segment(scene_3HW, NAMES, run)
    monkeypatch.setattr(predictor_module, "MOST_VALUES", 3 * 48 * 48)
    parts = segment(scene_3HW, NAMES, run, progress=False)
    torch.testing.assert_close(parts.heat_Khw, whole.heat_Khw)
    for gamma in (-0.1, 0.0, 0.2):
        assert (parts.at(gamma).label_HW != whole.at(gamma).label_HW).float().mean() < 0.001


def test_gamma_moves_pixels_from_seen_to_unseen_without_computing_anew(run, scene_3HW):
    result = segment(scene_3HW, NAMES, run, gamma=0.0)
    for gamma, kind in ((-2.0, True), (2.0, False)):
        assert all(result.seen_K[result.at(gamma).label_HW.unique()] == kind)
    assert torch.equal(result.at(0.1).label_HW, segment(scene_3HW, NAMES, run, gamma=0.1).label_HW)
    assert segment(scene_3HW, NAMES, run).gamma == 0.1  # the run's own


def test_seen_classes_may_be_named(run, scene_3HW):
    assert segment(scene_3HW, ("cat", "star"), run).seen == ()
    assert segment(scene_3HW, ("cat", "star"), run, seen=("cat",)).seen == ("cat",)
    assert segment(scene_3HW, NAMES, run, seen=()).seen == ()
    with pytest.raises(ValueError, match="Seen class.es. dog are not among class_names"):
        segment(scene_3HW, ("cat", "star"), run, seen=("dog",))


@pytest.mark.parametrize("size", [(8, 8), (9, 200), (131, 57), (32, 32)])
def test_any_size_gives_labels_of_that_size(run, size):
    result = segment(np.random.rand(*size, 3), ("cat", "dog", "sky"), run)
    assert result.label_HW.shape == size and result.image_3HW.shape == (3, *size)
    assert 0 <= result.label_HW.min() and result.label_HW.max() < 3


def test_labels_of_large_pictures_are_decided_at_fewer_pixels(run, scene_3HW, monkeypatch):
    image_3HW = F.interpolate(scene_3HW[None], size=(300, 450), mode="bilinear")[0]
    whole = segment(image_3HW, NAMES, run)
    monkeypatch.setattr(predictor_module, "MOST_DECIDED_PIXELS", 100 * 150)
    fewer = segment(image_3HW, NAMES, run)
    assert fewer.best.seen_BHW.shape == (1, 100, 150) and fewer.label_HW.shape == (300, 450)
    assert (fewer.label_HW != whole.label_HW).float().mean() < 0.05
    assert [row["class"] for row in fewer.scores()][0] == [row["class"] for row in whole.scores()][0]


def test_fewer_labels_are_enlarged_in_place():
    unseen_BHW = torch.tensor([[[0.1, 0.9, 0.1], [0.9, 0.1, 0.9]]])
    ids = torch.zeros(1, 2, 3, dtype=torch.int16)
    best = Best(torch.full((1, 2, 3), 0.5), ids, unseen_BHW, ids + 1)
    result = Segmentation(
        torch.zeros(3, 4, 6), ("a", "b"), torch.tensor([True, False]), 0.0, torch.zeros(2, 1, 1), best
    )
    expected = torch.tensor([[0, 1, 0], [1, 0, 1]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(result.label_HW, expected)
    assert [row["share"] for row in result.scores()] == [50, 50]


def test_a_batch_gives_the_results_of_its_pictures(run):
    pictures = [np.random.rand(*size, 3) for size in ((40, 40), (33, 50), (40, 40))]
    together = segment(pictures, NAMES, run)
    for picture, result in zip(pictures, together, strict=True):
        torch.testing.assert_close(result.heat_Khw, segment(picture, NAMES, run).heat_Khw, atol=1e-5, rtol=1e-4)
    as_tensor = segment(torch.rand(2, 3, 20, 20), NAMES, run)
    assert [r.label_HW.shape for r in as_tensor] == [(20, 20)] * 2
    with pytest.raises(ValueError, match="No pictures"):
        segment([], NAMES, run)


def test_scores_name_every_class_once_and_share_out_the_picture(run, scene_3HW):
    result = segment(scene_3HW, NAMES, run)
    rows = result.scores()
    assert sorted(row["class"] for row in rows) == sorted(NAMES)
    assert abs(sum(row["share"] for row in rows) - 100) < 1e-3
    first = NAMES.index(rows[0]["class"])
    assert rows[0]["share"] == pytest.approx(100 * (result.label_HW == first).float().mean().item(), abs=1e-3)
    assert all(0 <= row["mean"] <= row["highest"] <= 1 for row in rows)


@pytest.mark.parametrize("size", [(40, 40), (20, 90), (90, 20)])
@pytest.mark.parametrize("count", [1, 16, 40])
def test_figures_are_drawn(run, size, count):
    names = [f"thing {i}" for i in range(count)]
    result = segment(np.random.rand(*size, 3), names, run)
    for figure in (result.figure(), result.heat_figure()):
        figure.canvas.draw()
        plt.close(figure)


def test_prompt_changes_the_text(run, scene_3HW):
    plain, other = (segment(scene_3HW, NAMES, run, prompt=p) for p in (None, "a drawing of many {}"))
    assert not torch.allclose(plain.heat_Khw, other.heat_Khw, atol=1e-4)
    with pytest.raises(ValueError, match="has no {}"):
        segment(scene_3HW, NAMES, run, prompt="a photo")


@pytest.mark.parametrize(
    ("names", "error", "complaint"),
    [
        ([], ValueError, "No class names"),
        (["cat", " "], ValueError, "Class name 2 of 2 is empty"),
        (["cat", "dog", "Cat "], ValueError, "cat: named more than once"),
        (["cat", "🐶"], ValueError, "emoji.*'dog face'"),
        ("cat", TypeError, "one text 'cat'"),
        (["cat", 3], TypeError, "3 is no class name but a int"),
        ([f"n{i}" for i in range(10_001)], ValueError, "10001 class names"),
        (["cat", "very " * 30 + "long"], ValueError, "Its end would be cut off"),
    ],
)
def test_names_that_cannot_be_used_are_refused(run, scene_3HW, names, error, complaint):
    with pytest.raises(error, match=complaint):
        segment(scene_3HW, names, run)


def test_names_in_other_scripts_are_allowed():
    assert check_names([" café  au lait", "кошка", "猫"]) == ("café au lait", "кошка", "猫")
    assert split_names("cat, dog;\n sky,") == ("cat", "dog", "sky")


@pytest.mark.slow
def test_two_thousand_names(run):
    result = segment(np.random.rand(60, 80, 3), [f"thing number {i}" for i in range(2000)], run, progress=False)
    assert result.heat_Khw.shape[0] == 2000 and len(result.scores()) == 2000


def test_pictures_that_cannot_be_used_are_refused(run, tmp_path):
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"half\.png"):
        segment(tmp_path / "half.png", NAMES, run)
    with pytest.raises(ValueError, match="1×1 pixels is smaller than one 8×8 patch"):
        segment(Image.new("RGB", (1, 1)), NAMES, run)
    with pytest.raises(ValueError, match="size=3 is less than one patch"):
        segment(Image.new("RGB", (20, 20)), NAMES, run, size=3)


@pytest.mark.parametrize("size", [(9000, 12_000), (8, 2_000_000), (64, 64), (500, 375), (8, 8), (20, 40_000)])
def test_the_working_size_is_bounded_and_never_less_than_a_patch(size):
    h, w = working_size(*size, 128, 8)
    assert min(h, w) >= 8 and h * w <= max(1.01 * MOST_WORKING_PIXELS, size[0] * size[1])
    assert min(h, w) <= 128 and (max(size) > 1000 or min(h, w) == 128)


def test_a_checkpoint_is_found_by_its_run_or_the_folder_above(run, tmp_path):
    assert find_checkpoint(run) == find_checkpoint(run.parent.parent) == run
    assert find_checkpoint(None) == FOLDER
    with pytest.raises(FileNotFoundError, match="holds no trained run"):
        find_checkpoint(tmp_path)
    write_run(tmp_path / "train" / "a")
    write_run(tmp_path / "train" / "b")
    with pytest.raises(ValueError, match="holds 2 runs"):
        find_checkpoint(tmp_path)


def test_a_run_that_is_written_anew_is_loaded_anew(tmp_path):
    write_run(tmp_path)
    first = load_predictor(tmp_path)
    assert load_predictor(tmp_path) is first
    write_run(tmp_path, seed=1)
    assert load_predictor(tmp_path).trained.seed == 1


def test_a_clip_that_was_drawn_at_random_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text(TrainSettings(overrides={"clip": "ViT-B-32"}).model_dump_json())
    with pytest.raises(ValueError, match="ViT-B-32 without weights, drawn at random"):
        segment(np.zeros((40, 40, 3)), NAMES, tmp_path)


def test_other_weights_of_the_same_clip_may_be_named(run, scene_3HW, tmp_path):
    weights = tmp_path / "own.safetensors"
    weights.write_bytes(WEIGHTS_PATH.read_bytes())
    named = segment(scene_3HW, NAMES, run, weights=str(weights))
    torch.testing.assert_close(named.heat_Khw, segment(scene_3HW, NAMES, run).heat_Khw)
    with pytest.raises(FileNotFoundError, match="no weight file"):
        segment(scene_3HW, NAMES, run, weights=str(tmp_path / "gone.safetensors"))


def test_importing_the_package_imports_no_torch():
    code = "import sys, sptseg_lib; assert 'torch' not in sys.modules; assert sptseg_lib.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        sptseg_lib.unknown  # noqa: B018


def scored(run) -> dict:
    entry = {"seen": True, "iou": 50.0}
    return {
        "method": "spt_seg", "setting": "inductive", "seed": 0, "gamma": 0.2, "reported": True, "pAcc": 60.0,
        "mIoU_seen": 50.0, "mIoU_unseen": None, "hIoU": 0.0, "per_class": {"circle": entry, "star": entry},
    }  # fmt: skip


def test_a_scored_run_is_shipped_whole_with_its_gamma(run, tmp_path, scene_3HW):
    run_folder = run.parent.parent
    (run_folder / "metrics.json").write_text(json.dumps({"runs": [scored(run)]}))
    ship(run_folder, run.name, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, "checkpoint.safetensors", "settings.json"]
    assert hashlib.sha256(WEIGHTS_PATH.read_bytes()).hexdigest() in (tmp_path / CARD).read_text()
    shipped = segment(scene_3HW, NAMES, tmp_path)
    assert shipped.gamma == 0.2
    assert torch.equal(shipped.label_HW, segment(scene_3HW, NAMES, run, gamma=0.2).label_HW)


def test_what_is_not_scored_or_not_whole_is_not_shipped(run, tmp_path):
    run_folder = run.parent.parent
    target = tmp_path / "target"
    (run_folder / "metrics.json").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="was not scored"):
        ship(run_folder, run.name, target)
    (run_folder / "metrics.json").write_text(json.dumps({"runs": []}))
    with pytest.raises(ValueError, match="reports 0 scores"):
        ship(run_folder, run.name, target)
    assert not target.exists()


shipped = pytest.mark.skipif(not (FOLDER / "checkpoint.safetensors").is_file(), reason="no checkpoint is shipped")


@shipped
def test_the_shipped_checkpoint_is_small_and_belongs_to_the_shipped_clip():
    assert (FOLDER / "checkpoint.safetensors").stat().st_size <= 5_000_000
    assert hashlib.sha256(WEIGHTS_PATH.read_bytes()).hexdigest() in (FOLDER / CARD).read_text()


@shipped
def test_the_shipped_checkpoint_segments_a_scene():
    scenes = render_scenes(torch.arange(8), SceneSettings(size=128), seed=99)
    results = segment(scenes.image_B3HW, NAMES)
    labels = torch.stack([result.label_HW for result in results])
    assert (labels == scenes.label_BHW)[scenes.label_BHW != 255].float().mean() > 0.5

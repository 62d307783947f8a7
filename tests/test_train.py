"""Training: schedule, exact resuming, checkpoints, and errors before work is lost."""

import json
import shutil
import signal
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sptseg_lib.checkpoint import SETTINGS, WEIGHTS, load_segmenter, read_settings, save_checkpoint
from sptseg_lib.clip.load import load_clip
from sptseg_lib.clip.text import class_text
from sptseg_lib.evaluate import evaluate
from sptseg_lib.model import Segmenter, build_segmenter
from sptseg_lib.scenes.render import SceneSettings
from sptseg_lib.scenes.voc_layout import write_voc
from sptseg_lib.settings import EvaluateSettings, TrainSettings
from sptseg_lib.splits import SPLITS, make_split
from sptseg_lib.train import RESUME, SegmentationTraining, fit, learning_rate_factor

SMALL = {
    "overrides": {"decoder_layers": 1, "prompt_tokens": 2, "grid": 4}, "iterations": 5, "batch": 2, "size": 32,
    "warmup": 2, "save_every": 2, "precision": "float32",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def settings_in(folder, **changes) -> TrainSettings:
    return TrainSettings(run_dir=str(folder), **SMALL | changes)


def train(folder, **changes):
    return fit(settings_in(folder, **changes), progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    return train(tmp_path_factory.mktemp("run"))


def fail_at(monkeypatch, step: int, fault) -> None:
    """Make the loss of one iteration an exception or another value."""
    loss_of, calls = Segmenter.loss, []

    def loss(self, *inputs):
        calls.append(1)
        if len(calls) - 1 != step:
            return loss_of(self, *inputs)
        if isinstance(fault, BaseException):
            raise fault
        return {name: value * fault for name, value in loss_of(self, *inputs).items()}

    monkeypatch.setattr(Segmenter, "loss", loss)


def assert_same_weights(one, other) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU adds up gradients in no fixed order: two runs agree only nearly")
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs by {(value - second[name]).abs().max():.1e}"


def test_learning_rate_warms_up_and_falls_by_a_power():
    warmup, steps = 4, 14
    factors = [learning_rate_factor(step, warmup, steps) for step in range(steps + 3)]
    assert factors[0] == pytest.approx(1e-6) and factors[2] == pytest.approx(0.5, rel=1e-5) and factors[4] == 1
    assert factors[9] == pytest.approx(0.5**0.9, rel=1e-5)
    assert factors[14:] == pytest.approx([1e-6] * 3)
    assert factors[:5] == sorted(factors[:5]) and factors[4:] == sorted(factors[4:], reverse=True)
    assert learning_rate_factor(0, 0, 10) == 1 and learning_rate_factor(20, 50, 20) == pytest.approx(0.4, rel=1e-4)


def test_a_finished_run_holds_what_was_trained_and_no_backbone(finished):
    settings = read_settings(finished)
    assert finished.parts[-2:] == ("train", "spt_seg-inductive-seed0")
    assert settings.iterations == 5 and settings.method == "spt_seg"
    tensors = load_file(finished / WEIGHTS)
    fresh = build_segmenter(settings.model())
    assert tensors.keys() == fresh.trainable().keys() and not any("backbone" in name for name in tensors)
    assert (finished / "log" / "metrics.csv").is_file() and not (finished / RESUME).exists()
    assert not list(finished.glob("*.part"))


def test_a_finished_run_is_not_repeated(finished, monkeypatch):
    before = (finished / WEIGHTS).stat().st_mtime_ns
    fail_at(monkeypatch, 0, AssertionError("trained again"))
    assert train(finished.parents[1], save_every=3, devices=2) == finished  # how it is run is not what it is
    assert (finished / WEIGHTS).stat().st_mtime_ns == before


def test_the_same_settings_give_the_same_weights_whatever_ran_before(finished, tmp_path):
    torch.manual_seed(99)
    assert_same_weights(train(tmp_path), finished)


@pytest.mark.parametrize("step", [1, 3, 4], ids=lambda step: f"iteration {step}")
def test_an_interrupted_run_ends_as_one_that_was_not(finished, tmp_path, monkeypatch, step):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        fail_at(patch, step, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    try:
        assert signal.getsignal(signal.SIGINT) is handler  # Ctrl+C works again afterwards
    finally:
        signal.signal(signal.SIGINT, handler)
    folder = tmp_path / "train" / finished.name
    assert (folder / RESUME).is_file() == (step >= 2) and not (folder / WEIGHTS).exists()
    torch.manual_seed(99)
    assert_same_weights(train(tmp_path), finished)


def test_a_run_interrupted_after_its_last_iteration_is_finished(finished, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("sptseg_lib.train.save_checkpoint", full_disk)
        with pytest.raises(OSError, match="no space left"):
            train(tmp_path, save_every=5)
    assert_same_weights(train(tmp_path, save_every=5), finished)


def test_a_run_on_a_folder_of_pictures_resumes_exactly(tmp_path, monkeypatch):
    voc = str(write_voc(tmp_path / "voc", {"train": 4}, SceneSettings(size=32)))
    whole = train(tmp_path / "whole", dataset=voc, iterations=4)
    with monkeypatch.context() as patch:
        fail_at(patch, 3, RuntimeError("power cut"))
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path / "cut", dataset=voc, iterations=4)
    torch.manual_seed(99)
    assert_same_weights(train(tmp_path / "cut", dataset=voc, iterations=4), whole)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_at(patch, 3, float("nan"))
        with pytest.raises(RuntimeError, match="loss is nan at iteration 3.*last.ckpt.*learning_rate .now 0.002"):
            train(tmp_path)
    folder = tmp_path / "train" / finished.name
    assert not (folder / WEIGHTS).exists()
    last = torch.load(folder / RESUME, weights_only=True)
    names = build_segmenter(read_settings(folder).model()).trainable().keys()
    assert {name.removeprefix("segmenter.") for name in last["state_dict"]} == set(names)
    assert all(value.isfinite().all() for value in last["state_dict"].values()) and last["global_step"] == 2


def test_a_loss_that_is_not_finite_before_the_first_checkpoint_names_none(tmp_path, monkeypatch):
    fail_at(monkeypatch, 0, float("inf"))
    with pytest.raises(RuntimeError, match="loss is inf at iteration 0") as error:
        train(tmp_path)
    assert RESUME not in str(error.value)


@pytest.mark.parametrize("seed", range(6))
def test_training_begins_whatever_the_seed(tmp_path, seed):
    """A gate that is closed to every patch passes no gradient: norms, which do not decay, would stay as they were."""
    folder = train(tmp_path, seed=seed, iterations=1, warmup=0, overrides={})
    weights = load_file(folder / WEIGHTS)
    assert weights["encoder.norm.bias"].any()


def test_a_folder_of_another_run_is_refused(finished):
    before = (finished / SETTINGS).read_text()
    with pytest.raises(ValueError, match="holds a run with .*iterations=5, not 6.*choose another run_dir"):
        train(finished.parents[1], iterations=6)
    with pytest.raises(ValueError, match="overrides="):
        train(finished.parents[1], overrides={"window": 2})
    assert (finished / SETTINGS).read_text() == before


def test_a_run_that_could_not_start_does_not_occupy_its_folder(tmp_path):
    with pytest.raises(ValueError, match="no CLIP 'sptseg-tinny'"):
        train(tmp_path, overrides={"clip": "sptseg-tinny"})
    with pytest.raises(ValueError, match="7 heads"):
        train(tmp_path, overrides={"heads": 7})
    with pytest.raises(ValueError, match=r"spectral_layers \[9\]"):
        train(tmp_path, overrides={"spectral_layers": (9,)})
    assert not list(tmp_path.rglob(SETTINGS))


def test_unknown_splits_data_sets_and_full_disks_stop_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no split 'defualt'"):
        train(tmp_path, split="defualt")
    with pytest.raises(ValueError, match="no data set 'shapes'"):
        train(tmp_path, dataset="shapes")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(10**9, 10**9, 3_000_000))
    with pytest.raises(OSError, match="3 MB are free for .* MB are needed"):
        train(tmp_path)
    assert not list(tmp_path.iterdir())


def test_loading_restores_what_was_saved(finished, tmp_path):
    segmenter, settings = load_segmenter(finished)
    assert not segmenter.training and settings == read_settings(finished)
    clip = load_clip()
    text_KE, image = class_text(clip, ("star", "ring")), torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        expected = segmenter(image, text_KE)
        for p in segmenter.trainable().values():
            assert p.dtype == torch.float32
        save_checkpoint(tmp_path, segmenter, settings)
        again, _ = load_segmenter(tmp_path)
        rough, _ = load_segmenter(finished, dtype=torch.bfloat16)
        assert expected.shape == (1, 2, 4, 6)
        assert torch.equal(again(image, text_KE), expected)
        assert float((rough(image, text_KE) - expected).abs().mean() / expected.abs().mean()) < 0.1
    assert next(clip.model.visual.parameters()).dtype == torch.float32


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decoder": "cross"}, "another architecture"),
        ({"prompt_tokens": 3}, r"tokens_LMD: \(\d+, 2, \d+\), not \(\d+, 3,"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_architecture_is_refused(copied, changes, named):
    content = json.loads((copied / SETTINGS).read_text())
    content["overrides"] |= changes
    (copied / SETTINGS).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=named):
        load_segmenter(copied)


def test_damaged_or_missing_files_are_named(copied):
    whole, described = (copied / WEIGHTS).read_bytes(), (copied / SETTINGS).read_text()
    (copied / WEIGHTS).write_bytes(whole[:-1000])
    with pytest.raises(ValueError, match=f"{WEIGHTS} .* cannot be read.*truncated"):
        load_segmenter(copied)
    (copied / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        load_segmenter(copied)
    (copied / SETTINGS).write_text(described[:40])
    with pytest.raises(ValueError, match=f"{SETTINGS} is damaged"):
        load_segmenter(copied)
    (copied / SETTINGS).write_text(described.replace('"iterations"', '"iteratoins"'))
    with pytest.raises(ValueError, match="there is no setting 'iteratoins'"):
        load_segmenter(copied)
    (copied / SETTINGS).unlink()
    with pytest.raises(FileNotFoundError, match="is no training run"):
        load_segmenter(copied)


def test_a_damaged_settings_file_is_named_when_a_run_resumes(tmp_path):
    folder = tmp_path / "train" / settings_in(tmp_path).name
    folder.mkdir(parents=True)
    (folder / SETTINGS).write_text('{"iterations": 5, "batch')
    with pytest.raises(ValueError, match=f"{SETTINGS} is damaged"):
        train(tmp_path)


def test_evaluation_scores_every_run_and_the_floor(finished):
    run_dir = finished.parents[1]
    settings = EvaluateSettings(
        run_dir=str(run_dir), scenes=4, batch=2, size=32, gammas=[0.0, 0.3], gamma=0.1, precision="float32"
    )
    runs = evaluate(settings)["runs"]
    assert json.loads((run_dir / "metrics.json").read_text())["runs"] == runs
    assert [(r["method"], r["gamma"], r["reported"]) for r in runs] == [
        ("dense_clip", 0.0, True), ("patch_tokens", 0.0, True),
        ("spt_seg", 0.1, True), ("spt_seg", 0.0, False), ("spt_seg", 0.3, False),
    ]  # fmt: skip
    for run in runs:
        assert {
            "dataset",
            "split",
            "setting",
            "seed",
            "pAcc",
            "mIoU_seen",
            "mIoU_unseen",
            "hIoU",
            "seconds",
            "diagnosis",
        } <= run.keys()
        assert run["images_per_second"] > 0 and len(run["per_class"]) == 16
        assert set(next(iter(run["per_class"].values()))) == {"iou", "seen"}
    assert len((run_dir / "pictures.csv").read_text().split()) == 1 + 3 * 4


def test_a_run_is_not_scored_on_a_split_that_it_was_not_trained_for(finished):
    """Classes that it saw would count as unseen: the scores would be inflated."""
    other = EvaluateSettings(run_dir=str(finished.parents[1]), scenes=2, batch=2, size=32, split="half")
    with pytest.raises(ValueError, match="'default'.*'half'|'half'.*'default'"):
        evaluate(other)


def test_a_run_is_scored_on_the_classes_of_another_data_set(tmp_path, monkeypatch):
    """Two data sets that share half of their classes, one of them under another name."""
    shapes, places = ("circle", "square", "star", "ring"), ("aeroplane", "star", "moon", "square")
    monkeypatch.setitem(SPLITS, "shapes", make_split("shapes", ("airplane", *shapes), ("star",)))
    monkeypatch.setitem(SPLITS, "places", make_split("places", places, ("moon",)))
    for name in ("shapes", "places"):
        folder = write_voc(tmp_path / name, {"train": 3, "val": 2}, SceneSettings(size=32))
        (folder / "classes.txt").write_text("\n".join(SPLITS[name].classes))
        for path in (folder / "SegmentationClass").iterdir():
            mask = Image.open(path)
            label = Image.fromarray(np.asarray(mask) % (len(SPLITS[name].classes) + 1))
            label.save(path)
    run_dir = tmp_path / "run"
    train(run_dir, dataset=str(tmp_path / "shapes"), split="shapes", iterations=2)
    settings = EvaluateSettings(
        run_dir=str(run_dir), dataset=str(tmp_path / "places"), split="shapes", size=32, gammas=[0.0], num_workers=0
    )
    run = evaluate(settings)["runs"][-1]
    assert run["split"] == "shapes_to_places"
    assert {name: row["seen"] for name, row in run["per_class"].items()} == {
        "aeroplane": True, "star": False, "moon": False, "square": True,
    }  # fmt: skip
    with pytest.raises(ValueError, match="tested on it, not trained"):
        train(tmp_path / "other", dataset=str(tmp_path / "places"), split="shapes")


def test_nothing_to_evaluate_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="No finished run below"):
        evaluate(EvaluateSettings(run_dir=str(tmp_path)))


def test_only_training_parameters_and_optimiser_are_kept_for_resuming(finished):
    training = SegmentationTraining(
        build_segmenter(read_settings(finished).model()), torch.randn(3, 128), settings_in("x")
    )
    checkpoint = {"state_dict": training.state_dict()}
    training.on_save_checkpoint(checkpoint)
    assert len(checkpoint["state_dict"]) == len(training.segmenter.trainable()) > 0
    [with_decay, without] = training.configure_optimizers()["optimizer"].param_groups
    assert (with_decay["weight_decay"], without["weight_decay"]) == (0.01, 0.0)

"""Two processes are one: the same losses, weights and confusion matrix, however they are started."""

import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import papermill
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load_file

from sptseg_lib.checkpoint import WEIGHTS
from sptseg_lib.clip.load import load_clip
from sptseg_lib.data import first_images, held_out_loader, train_loader
from sptseg_lib.distributed import Place, present_pairs
from sptseg_lib.evaluate import evaluate
from sptseg_lib.model import Segmenter, build_segmenter
from sptseg_lib.scenes.render import SceneSettings
from sptseg_lib.scenes.voc_layout import write_voc
from sptseg_lib.settings import EvaluateSettings, TrainSettings, preset
from sptseg_lib.splits import SPLITS
from sptseg_lib.train import RESUME, fit

ROOT = Path(__file__).resolve().parents[1]
# No dropout: each process draws its own, so that only the mean over draws would agree.
SMALL = {
    "overrides": {"decoder_layers": 2, "prompt_tokens": 2, "grid": 4, "dropout": 0.0}, "iterations": 4, "batch": 4,
    "size": 32, "warmup": 2, "save_every": 2, "precision": "float32", "num_workers": 0,
}  # fmt: skip
TEST = {"scenes": 7, "batch": 2, "size": 32, "gammas": [0.0], "precision": "float32", "num_workers": 0}
TOGETHER = """
import json, sys
from sptseg_lib.evaluate import evaluate
from sptseg_lib.settings import EvaluateSettings, TrainSettings
from sptseg_lib.train import fit

for job in json.loads(sys.argv[1]):
    if "iterations" in job:
        fit(TrainSettings(**job), progress=False)
    else:
        evaluate(EvaluateSettings(**job))
"""
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def train_settings(folder, **changes) -> TrainSettings:
    return TrainSettings(run_dir=str(folder), **SMALL | changes)


def train(folder, **changes) -> Path:
    return fit(train_settings(folder, **changes), progress=False)


def torchrun(script: Path, *jobs) -> None:
    """Run training and evaluation jobs in two processes that share nothing but a socket."""
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    described = json.dumps([job.model_dump(mode="json") for job in jobs])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, described], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def losses(folder: Path) -> torch.Tensor:
    """All logged losses of a run, (iterations, 3)."""
    rows = list(csv.DictReader((folder / "log" / "metrics.csv").open()))
    return torch.tensor([[float(row[name]) for name in ("focal", "ssim", "loss")] for row in rows])


def assert_close_runs(one: Path, other: Path) -> None:
    assert len(losses(one)) == len(losses(other)) > 0
    torch.testing.assert_close(losses(one), losses(other), rtol=1e-4, atol=0)
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    for name, value in first.items():
        # Adam divides a gradient by its own size: where that is nearly zero, rounding decides its sign.
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return str(write_voc(tmp_path_factory.mktemp("voc"), {"train": 6, "val": 5}, SceneSettings(size=32)))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    train(folder)
    return folder


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_what_one_began(one, voc, tmp_path, monkeypatch):
    name = train_settings(one).name
    pictures = train(tmp_path / "pictures one", dataset=voc)
    with monkeypatch.context() as patch:
        loss_of, calls = Segmenter.loss, []

        def loss(self, *inputs):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("power cut")
            return loss_of(self, *inputs)

        patch.setattr(Segmenter, "loss", loss)
        with pytest.raises(RuntimeError, match="power cut"):
            train(tmp_path / "resumed")
    assert (tmp_path / "resumed" / "train" / name / RESUME).is_file()
    two = tmp_path / "two"
    (two / "scored").mkdir(parents=True)
    torchrun(
        tmp_path / "jobs.py",
        train_settings(two, devices=2),
        train_settings(tmp_path / "resumed", devices=2),
        train_settings(tmp_path / "pictures", devices=2, dataset=voc),
        EvaluateSettings(run_dir=str(one), devices=2, **TEST),
        EvaluateSettings(run_dir=str(tmp_path / "pictures one"), devices=2, dataset=voc, **TEST),
    )
    assert_close_runs(one / "train" / name, two / "train" / name)
    assert_close_runs(pictures, tmp_path / "pictures" / "train" / name)
    resumed, whole = tmp_path / "resumed" / "train" / name, one / "train" / name
    for key, value in load_file(whole / WEIGHTS).items():
        torch.testing.assert_close(load_file(resumed / WEIGHTS)[key], value, rtol=1e-4, atol=2e-4)
    for folder, dataset in ((one, "shapescenes"), (tmp_path / "pictures one", voc)):
        together = json.loads((folder / "metrics.json").read_text())["runs"]
        rows = (folder / "pictures.csv").read_text()
        alone = evaluate(EvaluateSettings(run_dir=str(folder), dataset=dataset, **TEST))["runs"]
        timing = {"seconds", "images_per_second"}
        for a, b in zip(together, alone, strict=True):
            assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}
        assert rows == (folder / "pictures.csv").read_text()  # each picture once, in order


@pytest.mark.slow
def test_processes_are_forked_in_a_notebook_under_papermill(one, tmp_path):
    source = f"""
from sptseg_lib.evaluate import evaluate
from sptseg_lib.settings import EvaluateSettings, TrainSettings
from sptseg_lib.train import fit
folder = fit(TrainSettings(run_dir=run_dir, devices=devices, **{SMALL!r}))
runs = evaluate(EvaluateSettings(run_dir=run_dir, devices=devices, **{TEST!r}))["runs"]
"""
    cells = [new_code_cell("devices = 1\nrun_dir = ''", metadata={"tags": ["parameters"]}), new_code_cell(source)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "in.ipynb")
    parameters = {"devices": 2, "run_dir": str(tmp_path / "run")}
    papermill.execute_notebook(
        tmp_path / "in.ipynb", tmp_path / "out.ipynb", parameters, cwd=ROOT, progress_bar=False, execution_timeout=400
    )
    folder = tmp_path / "run" / "train" / train_settings(one).name
    assert_close_runs(one / "train" / folder.name, folder)
    assert len((tmp_path / "run" / "pictures.csv").read_text().split()) == 1 + 3 * TEST["scenes"]


def test_what_lightning_says_about_accumulating_by_hand_is_not_shown_to_users(tmp_path):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        train(tmp_path)
    assert not [str(w.message) for w in shown if "optimization" in str(w.message)]


def test_accumulating_parts_gives_the_loss_of_the_whole_batch(one, tmp_path):
    folder = train(tmp_path, accumulate=4)
    assert_close_runs(one / "train" / folder.name, folder)


def test_recomputing_layers_changes_no_gradient():
    settings = preset("spt_seg", grid=4, prompt_tokens=2, dropout=0.0)
    image, text, gradients = torch.rand(2, 3, 32, 32), torch.randn(3, 128), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        segmenter, runs = build_segmenter(settings, load_clip()), []
        segmenter.encoder.checkpointing = checkpointing
        handle = segmenter.encoder.backbone.blocks[2].ln_1.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        segmenter(image, text).square().mean().backward()
        handle.remove()
        assert len(runs) == 1 + checkpointing
        gradients.append({name: p.grad for name, p in segmenter.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_no_held_out_picture_is_left_out_or_counted_twice(voc, world):
    for settings in (EvaluateSettings(**TEST), EvaluateSettings(dataset=voc, **TEST)):
        whole = [batch.index_B.tolist() for batch in held_out_loader(settings, SPLITS["default"])]
        shares = [
            [batch.index_B.tolist() for batch in held_out_loader(settings, SPLITS["default"], None, rank, world)]
            for rank in range(world)
        ]
        assert sorted(batch for share in shares for batch in share) == whole  # the very batches: the same rounding
        assert sum(whole, []) == list(range(len(sum(whole, []))))


def test_devices_share_the_batch_and_the_first_pictures_are_those_of_one_device():
    settings, split = train_settings("x"), SPLITS["default"]
    whole = [batch.index_B.tolist() for batch in train_loader(settings, split)]
    shares = [[b.index_B.tolist() for b in train_loader(settings, split, None, rank, 2)] for rank in (0, 1)]
    assert whole == [first + second for first, second in zip(*shares, strict=True)] and len(whole) == 4
    loader = train_loader(settings, split, None, 1, 2)
    assert torch.equal(first_images(loader, 4), next(iter(train_loader(settings, split))).image_B3HW)


def test_pairs_are_counted_as_the_loss_counts_them():
    label = torch.tensor([[[0, 0], [2, 255]], [[255, 255], [255, 255]], [[1, 1], [1, 1]]])
    assert present_pairs(label, 3) == 3
    assert present_pairs(label.to(torch.uint8), 3) == 3


def test_a_batch_that_cannot_be_shared_out_is_refused():
    for how in ({"devices": 3}, {"num_nodes": 5}, {"accumulate": 6}, {"devices": 4, "accumulate": 8}):
        with pytest.raises(ValueError, match="batch=16 cannot be shared out .* choose a multiple of"):
            TrainSettings(**how)
    assert TrainSettings(devices=8, num_nodes=2).batch == TrainSettings(accumulate=16).batch == 16


def test_one_process_gathers_itself():
    assert Place(0, 1, "cpu").gather("x") == ["x"]

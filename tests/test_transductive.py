"""Self-training on unseen classes: which pixels get a label of the model's own, which label, and from which run."""

import pytest
import torch
from safetensors.torch import load_file

from sptseg_lib.checkpoint import WEIGHTS
from sptseg_lib.data import train_loader
from sptseg_lib.evaluate import evaluate
from sptseg_lib.model import Segmenter
from sptseg_lib.pipeline import PipelineError, load_pipeline
from sptseg_lib.settings import EvaluateSettings, TrainSettings
from sptseg_lib.splits import SPLITS, make_split
from sptseg_lib.train import fit
from sptseg_lib.transductive import HIDDEN, label_unseen, mark_unseen, pseudo_labels

SPLIT = make_split("x", ("a", "b", "c", "d"), ("b", "d"))
SMALL = {
    "overrides": {"decoder_layers": 1, "prompt_tokens": 2, "grid": 4}, "iterations": 4, "batch": 2, "size": 32,
    "warmup": 2, "save_every": 2, "precision": "float32",
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def train(folder, **changes):
    return fit(TrainSettings(run_dir=str(folder), **SMALL | changes), progress=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with an inductive run and the transductive one that goes on from it."""
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    train(folder, setting="transductive")
    return folder


def test_masks_tell_unseen_from_ignored_pixels_but_not_which_class():
    label = torch.tensor([[[0, 1, 2, 3, 255]]], dtype=torch.uint8)
    marked = mark_unseen(label, SPLIT)
    assert marked.dtype == torch.int64 and marked.flatten().tolist() == [0, HIDDEN, 2, HIDDEN, 255]
    with pytest.raises(ValueError, match=r"Labels \[4\] are outside"):
        mark_unseen(torch.tensor([[[4]]]), SPLIT)


def test_hidden_pixels_get_the_best_unseen_class_and_no_other_pixel_changes():
    logits = torch.randn(2, 4, 6, 6)
    logits[:, 0] += 10  # a seen class wins everywhere, and may not be given
    label = torch.tensor([0, 2, 255, HIDDEN])[torch.randint(4, (2, 6, 6))]
    filled = pseudo_labels(logits, label, SPLIT.unseen_ids)
    for b, y, x in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
        unseen = 1 if logits[b, 1, y, x] > logits[b, 3, y, x] else 3
        old = int(label[b, y, x])
        assert int(filled[b, y, x]) == (unseen if old == HIDDEN else old)
    assert (filled == 1).any() and (filled == 3).any()


def test_logits_on_the_patch_grid_reach_the_pixels():
    logits = torch.zeros(1, 4, 2, 2)
    logits[0, 1, :, 0], logits[0, 3, :, 1] = 1.0, 1.0  # b at the left, d at the right
    filled = pseudo_labels(logits, torch.full((1, 8, 8), HIDDEN), SPLIT.unseen_ids)
    assert (filled[..., :4] == 1).all() and (filled[..., 4:] == 3).all()


def test_labels_come_from_the_model_without_dropout_and_leave_its_mode_alone():
    class Probe(torch.nn.Module):
        def forward(self, image, text):
            assert not self.training and not torch.is_grad_enabled()
            return torch.zeros(1, 4, 2, 2)

    probe = Probe().train()
    label_unseen(probe, torch.zeros(1, 3, 8, 8), torch.full((1, 8, 8), HIDDEN), torch.zeros(4, 2), SPLIT.unseen_ids)
    assert probe.training


def test_training_masks_of_scenes_hide_which_unseen_class_it_is():
    default = SPLITS["default"]
    changes = {"iterations": 2, "batch": 4, "size": 64}
    marked, full = (
        torch.cat([batch.label_BHW for batch in train_loader(TrainSettings(setting=setting, **changes), default)])
        for setting in ("transductive", "supervised")
    )
    unseen = torch.isin(full, torch.tensor(default.unseen_ids))
    assert unseen.any() and (marked[unseen] == HIDDEN).all() and torch.equal(marked[~unseen], full[~unseen])


def test_self_training_begins_with_the_inductive_weights_and_learns_from_filled_masks(runs, tmp_path, monkeypatch):
    shown, loss_of = [], Segmenter.loss

    def loss(self, image, label, text):
        shown.append((self.decoder.descriptor.phi.weight.detach().cpu().clone(), label.cpu(), len(text)))
        return loss_of(self, image, label, text)

    monkeypatch.setattr(Segmenter, "loss", loss)
    inductive = runs / "train" / "spt_seg-inductive-seed0"
    train(tmp_path, setting="transductive", start=str(inductive))
    first, label, classes = shown[0]
    assert torch.equal(first, load_file(inductive / WEIGHTS)["decoder.descriptor.phi.weight"])
    assert classes == 16 and not any((label == HIDDEN).any() for _, label, _ in shown)
    unseen = torch.tensor(SPLITS["default"].unseen_ids)
    assert any(torch.isin(label, unseen).any() for _, label, _ in shown)


def test_transductive_and_inductive_scores_stand_side_by_side_and_only_the_latter_is_shifted(runs):
    settings = EvaluateSettings(run_dir=str(runs), scenes=2, batch=2, size=32, gammas=[0.0], precision="float32")
    scored = [(r["setting"], r["gamma"]) for r in evaluate(settings)["runs"] if r["method"] == "spt_seg"]
    assert scored == [("inductive", 0.2), ("inductive", 0.0), ("transductive", 0.0)]


def test_a_run_without_the_inductive_one_is_refused_before_anything_is_written(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="starts from a finished inductive run.*spt_seg-inductive-seed0"):
        train(tmp_path, setting="transductive")
    inductive = str(runs / "train" / "spt_seg-inductive-seed0")
    with pytest.raises(ValueError, match="another split .default, not half"):
        train(tmp_path, setting="transductive", start=inductive, split="half")
    with pytest.raises(ValueError, match="another model"):
        train(tmp_path, setting="transductive", start=inductive, overrides=SMALL["overrides"] | {"window": 2})
    with pytest.raises(ValueError, match="another setting .transductive, not inductive"):
        train(tmp_path, setting="transductive", start=str(runs / "train" / "spt_seg-transductive-seed0"))
    with pytest.raises(ValueError, match="start='x' has no meaning in the inductive setting"):
        train(tmp_path, start="x")
    assert not list(tmp_path.iterdir())


def test_a_pipeline_that_would_self_train_from_nothing_is_refused(tmp_path):
    folder = tmp_path / "notebooks" / "pipelines"
    folder.mkdir(parents=True)
    (folder.parent / "05_train.ipynb").write_text(
        '{"cells": [{"cell_type": "code", "execution_count": null, "id": "a", "metadata": {"tags": ["parameters"]}, '
        '"outputs": [], "source": "setting = \\"inductive\\"\\nmethod = \\"spt_seg\\"\\nseed = 0\\nstart = \\"\\""}], '
        '"metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )
    step = "{notebook: 05_train, id: st, parameters: {setting: transductive, seed: 1}}"
    path = folder / "x.yaml"
    path.write_text(f"name: x\nsteps:\n  - {{notebook: 05_train}}\n  - {step}\n")
    with pytest.raises(PipelineError, match="'st' would go on from train/spt_seg-inductive-seed1, which no step"):
        load_pipeline(path)
    path.write_text(f"name: x\nparameters: {{seed: 1}}\nsteps:\n  - {{notebook: 05_train}}\n  - {step}\n")
    assert len(load_pipeline(path).steps) == 2

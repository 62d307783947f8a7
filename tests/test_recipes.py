"""The recipes for photographs: the paper's numbers, and a run of each kind on scenes in the place of photographs."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest

from sptseg_lib.evaluate import evaluate
from sptseg_lib.execute import run_pipeline, train_pipeline
from sptseg_lib.pipeline import load_pipeline
from sptseg_lib.scenes.atlas import CLASSES
from sptseg_lib.scenes.render import SceneSettings
from sptseg_lib.scenes.voc_layout import write_voc
from sptseg_lib.settings import EvaluateSettings, TrainSettings
from sptseg_lib.splits import SPLITS

FOLDER = Path(__file__).resolve().parents[1] / "notebooks" / "pipelines"
DATA = {"voc12": (20_000, 10), "coco_stuff": (96_000, 100), "pascal_context": (40_000, 10)}  # iterations, tokens
KINDS = ("inductive", "transductive", "supervised")
RECIPES = [*(f"{data}_{kind}" for data in DATA for kind in KINDS), "cross_dataset"]
# A recipe in miniature: the tiny CLIP at 32 pixels, on scenes.
TINY = "{decoder_layers: 1, prompt_tokens: 2, grid: 4}"
SMALL = ("split=default", "size=32", "batch=2", "num_workers=0")
SHORT = (f"overrides={TINY}", "iterations=3", "warmup=1", "save_every=2")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def in_miniature(name: str, data: str, *changes: str):
    """A recipe with the sizes of a test: its own steps, settings and order, on the folder `data`."""
    steps = [step.id for step in load_pipeline(FOLDER / f"{name}.yaml").steps if step.product != "metrics.json"]
    short = [f"{step}.{change}" for step in steps for change in SHORT]
    test = ("06_evaluate.short_side=48", "06_evaluate.stride=0", *changes)
    return load_pipeline(FOLDER / f"{name}.yaml", [f"dataset={data}", *SMALL, *short, *test])


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    return str(write_voc(tmp_path_factory.mktemp("voc"), {"train": 4, "val": 3}, SceneSettings(size=40)))


def test_no_recipe_is_missing():
    assert {path.stem for path in FOLDER.glob("*.yaml")} >= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_the_papers_numbers(name):
    pipeline = load_pipeline(FOLDER / f"{name}.yaml")
    data, _, kind = name.rpartition("_")
    if name == "cross_dataset":
        data, kind = "coco_stuff", "inductive"
    iterations, tokens = DATA[data]
    assert pipeline.name == name and [step.notebook.stem for step in pipeline.steps][-1] == "06_evaluate"
    runs = [TrainSettings(**step.parameters) for step in pipeline.steps[:-1]]
    assert [run.setting for run in runs] == (["inductive"] if kind == "transductive" else []) + [kind]
    assert sum(run.iterations for run in runs) == iterations
    for run in runs:
        model = run.model()
        assert (run.dataset, run.split, run.method) == (f"data/{data}", data, "spt_seg")
        assert (run.batch, run.size, run.learning_rate, run.warmup, run.weight_decay) == (16, 512, 2e-4, 1500, 0.01)
        assert (model.clip, model.weights, model.normalisation) == ("ViT-B-16-quickgelu", "openai", "imagenet")
        assert (model.grid, model.prompt_tokens) == (512 // 16, tokens)
        assert model.prompt == ("ensemble" if data == "coco_stuff" else "a photo of a {}")
        assert (model.focal_weight, model.ssim_weight, model.dropout) == (100, 1, 0.1)
    test = EvaluateSettings(**pipeline.steps[-1].parameters)
    assert (test.short_side, test.size, test.stride, test.gamma) == (512, 512, 426, 0.1)
    assert (test.dataset, test.split) == (f"data/{data}", data) and data in SPLITS
    assert set(test.transfer) == (
        {"voc12", "pascal_context", "ade20k", "cityscapes"} if name == "cross_dataset" else set()
    )
    assert set(test.transfer) <= set(SPLITS)


@pytest.mark.parametrize("name", ["voc12_transductive", "voc12_supervised"])
def test_recipes_run_on_scenes_in_the_place_of_photographs(name, voc, tmp_path):
    train_pipeline(in_miniature(name, voc), tmp_path)
    runs = json.loads((tmp_path / name / "metrics.json").read_text())["runs"]
    trained = {run["setting"] for run in runs if run["method"] == "spt_seg"}
    assert trained == ({"inductive", "transductive"} if name == "voc12_transductive" else {"supervised"})
    assert all(run["dataset"] == voc and set(run["per_class"]) == set(CLASSES) for run in runs)
    assert len((tmp_path / name / "pictures.csv").read_text().split()) == 1 + 3 * len({r["method"] for r in runs}) + (
        3 if name == "voc12_transductive" else 0
    )


def test_other_data_sets_are_scored_with_what_training_knew(voc, tmp_path):
    """On another data set with the same names a class is seen if training saw it, whatever the target's own split."""
    other = str(write_voc(tmp_path / "other", {"val": 2}, SceneSettings(size=40), seed=5))
    pipeline = in_miniature("cross_dataset", voc, f"06_evaluate.transfer={{half: {other}}}")
    train_pipeline(pipeline, tmp_path / "runs")
    folder = tmp_path / "runs" / "cross_dataset"
    runs = json.loads((folder / "metrics.json").read_text())["runs"]
    [there] = [run for run in runs if run["dataset"] == other and run["reported"]]
    assert there["split"] == "default_to_half" and there["method"] == "spt_seg"
    assert {name for name, entry in there["per_class"].items() if entry["seen"]} == set(SPLITS["default"].seen)
    rows = (folder / "pictures.csv").read_text().splitlines()
    assert sum("on default_to_half" in row for row in rows) == 2
    settings = EvaluateSettings(**pipeline.steps[-1].parameters, run_dir=str(folder))
    with pytest.raises(ValueError, match="no split 'hlaf'"):
        evaluate(settings.model_copy(update={"transfer": {"hlaf": other}}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inductive", "supervised"])
def test_a_recipe_runs_as_notebooks_what_was_trained_without_them(voc, tmp_path, kind):
    name, data = f"voc12_{kind}", shutil.copytree(voc, tmp_path / "data")
    (data / "classes.txt").write_text("\n".join(SPLITS["voc12"].classes) + "\n")  # VOC's names and split, no stuff
    train_pipeline(in_miniature(name, data, "split=voc12"), tmp_path)
    weights = tmp_path / name / "train" / f"spt_seg-{kind}-seed0" / "checkpoint.safetensors"
    before = weights.stat().st_mtime_ns
    report = run_pipeline(in_miniature(name, data, "split=voc12", "num_workers=1"), tmp_path)
    assert weights.stat().st_mtime_ns == before and "spt_seg" in report.read_text()
    for path in report.parent.glob("*.ipynb"):
        nbformat.validate(nbformat.read(path, as_version=4))

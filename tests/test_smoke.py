"""Pipelines from start to end, as a user would launch them; the smoke one once more, when nothing is left to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sptseg_lib.pipeline import load_pipeline

ROOT = Path(__file__).resolve().parents[1]


def run_pipeline(name: str, out: Path, *changes: str) -> str:
    command = [sys.executable, "-m", "sptseg_lib", "run", f"notebooks/pipelines/{name}.yaml", "--out", str(out)]
    for change in changes:
        command += ["-p", change]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_smoke_pipeline_runs_and_is_not_repeated(tmp_path):
    run_pipeline("smoke", tmp_path)
    folder = tmp_path / "smoke"
    runs = json.loads((folder / "metrics.json").read_text())["runs"]
    assert {(run["method"], run["setting"]) for run in runs} == {
        ("dense_clip", "training-free"),
        ("patch_tokens", "training-free"),
        ("spt_seg", "inductive"),
        ("zegclip", "inductive"),
    }
    wanted = {"dataset", "split", "setting", "method", "seed", "gamma", "pAcc", "mIoU_seen", "mIoU_unseen", "hIoU"}
    for run in runs:
        assert wanted | {"per_class", "seconds", "images_per_second"} <= run.keys()
        assert 0 <= run["pAcc"] <= 100 and run["per_class"]["star"]["seen"] is False
    assert "dense_clip" in (folder / "report.html").read_text()
    assert run_pipeline("smoke", tmp_path).count("done before") == 3


@pytest.mark.parametrize("name, steps", [("ablations", 1), ("paper", 4)])
@pytest.mark.parametrize("form", ["brief", "short", "long", "voc12", "coco_stuff"])
def test_studies_take_every_form_by_a_parameter(name, steps, form):
    pipeline = load_pipeline(ROOT / "notebooks" / "pipelines" / f"{name}.yaml", [f"form={form}"])
    assert len(pipeline.steps) == steps
    assert all(step.parameters["form"] == form for step in pipeline.steps if step.id != "10_cost")


@pytest.mark.slow
def test_ablations_in_miniature(tmp_path):
    run_pipeline("ablations", tmp_path, "form=smoke", "seeds=2", f"cache={tmp_path / 'study'}")
    found = json.loads((tmp_path / "ablations" / "ablations_smoke.json").read_text())
    assert found["runs"] == 60 and all(len(variant["test"]) == 2 for variant in found["variants"].values())
    assert "image/png" in (tmp_path / "ablations" / "01-08_ablations.ipynb").read_text()

"""The smoke pipeline from start to end, as a user would launch it; and once more, when nothing is left to do."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_smoke(out: Path) -> str:
    command = [sys.executable, "-m", "sptseg_lib", "run", "notebooks/pipelines/smoke.yaml", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_smoke_pipeline_runs_and_is_not_repeated(tmp_path):
    run_smoke(tmp_path)
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
    assert run_smoke(tmp_path).count("done before") == 3

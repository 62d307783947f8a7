"""The measuring scripts of the graph methods, in miniature: they run, write their results, and do not measure twice."""

import json

import pytest
from scripts import load_script


def test_deep_spectral_is_measured_once(tmp_path, monkeypatch, capsys):
    module = load_script("measure_deep_spectral")
    monkeypatch.setattr(module.crf, "refine", lambda label_BHW, image_B3HW, method: label_BHW)  # slow, tested elsewhere
    small = ["--pictures", "11", "--seeds", "1", "--steps", "2", "--kinds", "key", "--blocks", "6", "--weights", "0"]
    command = [*small, "--vectors", "1", "--results", str(tmp_path / "found.json")]
    assert module.main(command) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert set(rows) == {
        f"{name}/{things}/{rest}"
        for things, segments in (("1-1", 2), ("1-3", 3))
        for name, rest in (("location", "key/6/λ0"), ("classes", f"{segments}/1/seed0"), ("selftrain", "seed0"))
    }
    assert all(0 <= value <= 100 for row in rows.values() for value in row.values())
    for step in ("location", "classes", "selftrain"):
        monkeypatch.setattr(module, step, None)  # a second measurement would fail
    assert module.main(command) == 0
    with pytest.raises(ValueError, match="could not be compared"):
        module.main([*command, "--pictures", "13"])


def test_benchmark_reports_ratio_and_residuals(tmp_path, monkeypatch, capsys):
    module = load_script("benchmark_graph")
    base = ["benchmark_graph.py", "--width", "16", "--images", "1", "--repeats", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*base, "--grids", "12x13", "--out", str(tmp_path / "times.json")])
    module.main()
    rows = json.loads((tmp_path / "times.json").read_text())
    assert [row["colour_weight"] for row in rows] == [0, 10]
    assert all(row["residual_ours"] < 1e-4 and row["ratio"] > 0 for row in rows)
    monkeypatch.setattr("sys.argv", [*base, "--pixels", "32x48"])
    module.main()
    assert "1,536 nodes" in capsys.readouterr().out


def test_prompts_are_compared(tmp_path):
    module = load_script("compare_prompts")
    small = ["--seeds", "1", "--iterations", "1", "--batch", "2", "--scenes", "2"]
    command = [*small, "--run-dir", str(tmp_path / "runs"), "--results", str(tmp_path / "prompts.json")]
    assert module.main(command) == 0
    result = json.loads((tmp_path / "prompts.json").read_text())
    assert {run["basis"] for run in result["runs"]} == {"fourier", "graph"}
    assert result["prompt_parameters"]["graph"] == 2 * 16 * 128

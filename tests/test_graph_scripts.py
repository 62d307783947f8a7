"""The measuring scripts of the graph methods, in miniature: they run, write their results, and do not measure twice."""

import json

import pytest
from scripts import load_script


def test_deep_spectral_is_measured_once(tmp_path, monkeypatch, capsys):
    module = load_script("measure_deep_spectral")
    monkeypatch.setattr(module.crf, "refine", lambda label_BHW, image_B3HW, method: label_BHW)  # slow, tested elsewhere
    monkeypatch.setattr(module, "OTHERS", {"value": module.Choice(kind="value")})
    monkeypatch.setattr(module, "EIGENVECTORS", (2,))
    monkeypatch.setattr(module, "PHOTOGRAPHS", {"flower": module.PHOTOGRAPHS["flower"]})
    results = tmp_path / "found.json"
    command = ["--pictures", "11", "--seeds", "2", "--steps", "2", "--results", str(results)]
    assert module.main([*command, "--rows", "location/1-1"]) == 0
    assert set(json.loads(results.read_text())["rows"]) == {"location/1-1/default", "location/1-1/value"}
    assert module.main(command) == 0
    rows = json.loads(results.read_text())["rows"]
    assert set(rows) == {
        *(f"photograph/flower/λ{weight}" for weight in (0, 10)),
        *(f"{what}/{things}/{choice}" for what in ("location", "classes") for things in ("1-1", "1-3")
          for choice in ("default", "value")),
        "classes/1-1/2 eigenvectors", "selftrain/1-1", "selftrain/1-3",
    }  # fmt: skip
    assert len(rows["location/1-1/default"]["corloc"]) == 5 and len(rows["classes/1-1/default"]["miou"]) == 2
    assert len(rows["selftrain/1-3"]["miou_after"]) == 2
    scores = [row[name] for key, row in rows.items() if "photograph" not in key for name in row]
    assert all(0 <= value <= 100 for values in scores for value in values)

    def again(*arguments):
        raise AssertionError("measured twice")

    for step in ("location", "classes", "selftraining", "photograph"):
        monkeypatch.setattr(module, step, again)
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
    assert all(row["ratio_cpu"] > 0 and row["nodes"] == 156 for row in rows)
    monkeypatch.setattr("sys.argv", [*base, "--pixels", "32x48", "--out", str(tmp_path / "times.json")])
    module.main()
    assert "1,536 nodes" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "times.json").read_text())) == 3  # added to what was there

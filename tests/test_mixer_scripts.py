"""The scripts that train and compare mixers, in miniature: they run, write, and go on where they stopped."""

import json

import pytest
from scripts import load_script


@pytest.fixture
def trainer(monkeypatch):
    module = load_script("train_mixers")
    monkeypatch.setattr(module, "MIXERS", {"pool": None, "spam": None})
    return module


def test_mixers_are_trained_once_each_and_the_file_grows_run_by_run(trainer, tmp_path, capsys):
    path = tmp_path / "results" / "mixers.json"
    small = ["--steps", "2", "--batch", "2", "--held-out", "4", "--seeds", "1", "--results", str(path)]
    small += ["--tasks", "segmentation"]
    assert trainer.main([*small, "--budget", "0"]) == 0
    assert not path.exists() and "budget is used up" in capsys.readouterr().out
    assert trainer.main(small) == 0
    first = path.read_text()
    runs = json.loads(first)["runs"]
    assert [run["mixer"] for run in runs] == ["pool", "spam"]
    assert runs[0]["parameters"] == pytest.approx(runs[1]["parameters"], rel=0.005)
    for run in runs:
        assert 0 <= run["test"] <= 100 and run["loss"] > 0 and list(run["trained"]) == ["1.1", "1.2", "2.1", "2.2"]
        assert run["trained"] != run["untrained"] and len(run["trained"]["1.1"]["kept"]) == 1 + trainer.BINS
    assert trainer.main(small) == 0
    assert path.read_text() == first, "finished runs were repeated"


def test_classification_and_learned_filters(trainer):
    run = trainer.Run(
        "learned", "start", "classification", "spam", {"low_weights": (0.5, 0.6), "learned": True}, 1, 2, 2
    )
    result = trainer.train(run, held_out=6)
    assert len(result["found"]) == 4 * 2 and 0 < result["found"][0]["low_weight"] < 1
    assert trainer.train(run, held_out=6)["trained"] == result["trained"], "the seed does not reach everything"


def test_every_planned_run_can_be_built():
    module = load_script("train_mixers")
    planned = [run for part in ("mixers", "ablation", "learned") for run in module.planned(part, module.TASKS, 1, 5, 2)]
    assert len({module.identity(run._asdict()) for run in planned}) == len(planned)
    for run in planned:
        module.build(run)
    assert [run.seed for run in module.planned("mixers", module.TASKS, 2, 5, 2)] == [0] * 12 + [1] * 12


def test_decoders_are_compared(tmp_path):
    module = load_script("compare_decoders")
    path = tmp_path / "decoders.json"
    small = ["--iterations", "1", "--batch", "2", "--scenes", "2", "--seeds", "1", "--results", str(path)]
    assert module.main([*small, "--run-dir", str(tmp_path / "runs")]) == 0
    found = json.loads(path.read_text())
    assert sorted(run["method"] for run in found["runs"]) == sorted(module.METHODS)
    assert found["cost"]["spt_balanced"]["decoder_parameters"] > 0
    assert (
        found["cost"]["spt_balanced"]["decoder_multiply_adds_with_ffts"]
        > (found["cost"]["spt_balanced"]["decoder_multiply_adds"])
    )


def test_benchmark_prints_a_row_for_each_mixer(capsys):
    module = load_script("benchmark_mixers")
    assert module.main(["--rounds", "1", "--width", "32", "--batch", "1", "--grids", "4"]) == 0
    assert capsys.readouterr().out.count("4×4, 32 wide") == len(module.MIXERS)

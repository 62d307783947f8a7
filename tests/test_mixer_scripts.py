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
        assert 0 <= run["test"] <= 100 and run["loss"] > 0 and list(run["trained"]) == ["1.1", "2.1"]
        assert run["trained"] != run["untrained"] and len(run["trained"]["1.1"]["kept"]) == 1 + trainer.BINS
    assert trainer.main(small) == 0
    assert path.read_text() == first, "finished runs were repeated"


def test_classification_and_learned_filters(trainer):
    run = trainer.Run(
        "learned", "start", "classification", "spam", {"low_weights": (0.5, 0.6), "learned": True}, 1, 2, 2
    )
    result = trainer.train(run, held_out=6)
    assert len(result["found"]) == 2 * 2 and 0 < result["found"][0]["low_weight"] < 1
    again = trainer.train(run, held_out=6)
    assert again | {"cpu_seconds": 0} == result | {"cpu_seconds": 0}, "the seed does not reach everything"


def test_filters_norms_and_scales_are_not_drawn_to_zero(trainer):
    options = {"learned": True, "scale": "res", "low_weights": (0.5,)}
    run = trainer.Run("learned", "start", "segmentation", "spam", options, 0, 1, 2)
    model = trainer.build(run)
    decayed, kept = trainer.optimiser_of(model, 1e-2).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] > 0 == kept["weight_decay"]
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    endings = {names[id(p)].rsplit(".", 1)[-1] for p in kept["params"]}
    assert endings == {"logit", "log_radius", "scale_C11", "bias", "weight"}


def test_hilo_is_measured_branch_by_branch(trainer):
    model = trainer.build(trainer.Run("mixers", "mixer", "classification", "hilo", {}, 0, 1, 2)).eval()
    found = trainer.spectra(model, trainer.scenes(0, 2, 0)[0])
    low, high = found["1.1"]["low heads"], found["1.1"]["high heads"]
    assert low[0] > 5 * low[4]  # queries hardly differ: nearly one mean for all
    assert high[1] > 3 * low[1]


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
    small = ["--form", "smoke", "--seeds", "1", "--images", "2", "--workers", "1", "--root", str(tmp_path)]
    assert module.main([*small, "--results", str(path)]) == 0
    found = json.loads(path.read_text())
    methods = ["spt_seg", "spt_shortcut", "spt_balanced"]
    assert list(found["variants"]) == list(found["cost"]) == list(found["gains"]) == methods
    cost = found["cost"]["spt_balanced"]
    assert cost["decoder_multiply_adds_with_ffts"] > cost["decoder_multiply_adds"] > 0
    (gains,) = found["gains"]["spt_balanced"]
    assert gains["trained"] != gains["untrained"] and len(gains["trained"]["decoder 1 SPAM"]) == 1 + module.BINS
    (heads,) = found["gains"]["spt_shortcut"]
    # The shortcut keeps what the heads do not pass.
    assert heads["untrained"]["decoder 1 low heads"][6] < 0.1 < 0.9 < heads["untrained"]["decoder 1"][6]


def test_benchmark_prints_a_row_for_each_mixer(capsys):
    module = load_script("benchmark_mixers")
    assert module.main(["--rounds", "1", "--width", "32", "--batch", "1", "--grids", "4"]) == 0
    assert capsys.readouterr().out.count("4×4, 32 wide") == len(module.MIXERS)

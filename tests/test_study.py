"""Studies: what is the same run, what is trained once, what goes on after a stop, and what is chosen on what."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sptseg_lib import study
from sptseg_lib.ablations import ablation_rows
from sptseg_lib.evaluate import evaluate
from sptseg_lib.metrics import harmonic_mean
from sptseg_lib.pipeline import load_pipeline
from sptseg_lib.predictor import load_predictor
from sptseg_lib.results import PUBLISHED_GAMMA, at_gamma, choose_gamma, read_results, summarise, write_results
from sptseg_lib.scenes.render import SceneSettings
from sptseg_lib.scenes.voc_layout import write_voc
from sptseg_lib.settings import PRESETS, EvaluateSettings, TrainSettings
from sptseg_lib.splits import SPLITS, fewer_seen
from sptseg_lib.study import FORMS, Form, Variant, run_key, run_study, train_and_score

ROOT = Path(__file__).resolve().parents[1]
TINY = Form(
    {
        "size": 32, "batch": 2, "iterations": 2, "warmup": 1, "precision": "float32",
        "overrides": {"grid": 4, "decoder_layers": 1, "prompt_tokens": 1},
    },
    validation=3, test=4,
)  # fmt: skip
TWO = [Variant("one shared", {"overrides": {"spectral_shared": True}}), Variant("none", {"method": "zegclip_sgd"})]


def test_a_key_names_what_a_run_computes():
    def key(seed=0, **changes):
        return run_key(Variant("", changes).settings(TINY, seed))

    assert key() == key(devices=1, num_workers=0, save_every=7)  # how it is computed does not count
    assert key() == key(images=0, seen_classes=0) != key(images=2) != key(seen_classes=2) != key()
    assert key(method="zegclip_sgd") == key(overrides=dict(PRESETS["zegclip_sgd"]))
    different = [key(), key(seed=1), key(iterations=3), key(overrides={"window": 2}), key(method="zegclip")]
    assert len(set(different)) == len(different)


def test_a_study_trains_each_run_once_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    fitted, fit = [], study.fit

    def counted(settings, **options):
        fitted.append(run_key(settings))
        if len(fitted) == 3:
            raise KeyboardInterrupt
        return fit(settings, **options)

    monkeypatch.setattr(study, "fit", counted)
    again = Variant("the same", {"overrides": {"spectral_layers": []}})
    with pytest.raises(KeyboardInterrupt):
        run_study([*TWO, again], [0, 1], TINY, tmp_path, workers=1)
    found = run_study([*TWO, again], [0, 1], TINY, tmp_path, workers=1)
    assert len(fitted) == 5 and len(set(fitted)) == 4  # four runs, one of them begun twice
    assert found["none"] == found["the same"] != found["one shared"]
    monkeypatch.setattr(study, "fit", None)
    assert run_study(TWO, [0, 1], TINY, tmp_path, workers=1) == {v.name: found[v.name] for v in TWO}
    results = write_results(tmp_path / "results.json", found, "short", note="tiny")
    assert results == json.loads((tmp_path / "results.json").read_text()) and results["runs"] == 4
    kept = results["variants"]["none"]
    assert kept["seeds"] == [0, 1] and len(kept["test"]) == len(kept["per_class"]) == 2
    first = found["none"][0]["test"][str(kept["gamma"])]
    assert at_gamma(kept, "mIoU_seen")[0] == first["mIoU_seen"]
    assert at_gamma(kept, "pAcc", 0.5)[1] == found["none"][1]["test"]["0.5"]["pAcc"]


def test_what_a_run_with_fewer_seen_classes_did_not_see_is_unseen(tmp_path):
    settings = Variant("", {"seen_classes": 3}).settings(TINY, 1)
    kept = fewer_seen(SPLITS["default"], 3, 1).seen
    for card in train_and_score(settings, TINY, tmp_path)["test"].values():
        assert {name for name, found in card["per_class"].items() if found["seen"]} == set(kept)
    folder = next(tmp_path.glob("*/train/*"))
    assert load_predictor(folder).seen == kept
    asked = EvaluateSettings(run_dir=str(folder.parents[1]), size=32, scenes=2, gammas=[0.0], gamma=0.0)
    found = {name for name, value in evaluate(asked)["runs"][-1]["per_class"].items() if value["seen"]}
    assert found == set(kept)


@pytest.mark.slow
def test_two_workers_find_what_one_finds(tmp_path):
    one = run_study(TWO, [0], TINY, tmp_path / "one", workers=1)
    two = run_study(TWO, [0], TINY, tmp_path / "two", workers=2)
    for name in one:
        assert one[name][0]["test"] == two[name][0]["test"]
        assert one[name][0]["validation"] == two[name][0]["validation"]


def test_scores_of_other_settings_under_a_key_are_refused(tmp_path):
    settings = TWO[0].settings(TINY, 0)
    train_and_score(settings, TINY, tmp_path)
    path = tmp_path / run_key(settings) / "scores.json"
    held = json.loads(path.read_text())
    held["settings"]["learning_rate"] = 1.0
    path.write_text(json.dumps(held))
    with pytest.raises(ValueError, match="delete that folder"):
        train_and_score(settings, TINY, tmp_path)


def test_other_scenes_to_score_are_other_scores(tmp_path):
    settings = TWO[0].settings(TINY, 0)
    train_and_score(settings, TINY, tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        train_and_score(settings, TINY._replace(test=5), tmp_path)


def test_self_training_goes_on_from_its_inductive_run(tmp_path):
    found = run_study([Variant("self", {"setting": "transductive", "iterations": 1})], [0], TINY, tmp_path, workers=1)
    folders = {run_key(v.settings(TINY, 0)) for v in (Variant("", {}), Variant("", {"setting": "transductive"}))}
    assert len(list(tmp_path.glob("*/train/*/checkpoint.safetensors"))) == 2 and len(folders) == 2
    assert list(found["self"][0]["test"]) == ["0.0"]


def test_gamma_is_chosen_on_validation_scenes_over_all_seeds():
    def run(validation, test):
        return {part: {g: {"hIoU": v} for g, v in zip(("0.0", "0.1", "0.2"), values)} for part, values in
                (("validation", validation), ("test", test))}  # fmt: skip

    assert choose_gamma([run((50, 10, 20), (0, 0, 90)), run((1, 10, 40), (0, 0, 90))]) == 0.2
    assert choose_gamma([run((50, 10, 20), (0, 0, 90)), run((20, 10, 40), (0, 0, 90))]) == 0.0
    assert choose_gamma([{"test": {"0.0": {}, "0.1": {}}}]) == PUBLISHED_GAMMA
    assert choose_gamma([{"test": {"0.0": {}}}]) == 0  # self-training and supervision take no shift


def test_workers_are_as_many_as_memory_allows(monkeypatch):
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda _: range(8), raising=False)
    memory = type("Memory", (), {"available": 3 * study.WORKER_BYTES + 1})
    monkeypatch.setattr(study.psutil, "virtual_memory", lambda: memory)
    tiny = TrainSettings()
    assert [study.workers_for([tiny] * jobs) for jobs in (1, 2, 99)] == [1, 2, 3]
    memory.available = 10
    assert study.workers_for([tiny] * 9) == 1


def test_workers_do_not_outlive_the_process_that_was_killed():
    program = """
import multiprocessing, os
from concurrent.futures import ProcessPoolExecutor
from sptseg_lib.study import _begin_worker
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin_worker, (None, 1))
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), 9)
"""
    told = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout
    worker, until = int(told), time.monotonic() + 20
    while psutil.pid_exists(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not psutil.pid_exists(worker)


def test_large_models_take_a_gpu_each_and_tiny_ones_share(monkeypatch):
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(study.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**40}))
    tiny, large = TrainSettings(), Variant("", {}).settings(FORMS["voc12"], 0)
    assert study.workers_for([tiny] * 99) == 2 * study.TINY_RUNS_A_GPU
    assert study.workers_for([tiny, large] * 9) == 2


@pytest.mark.parametrize("layers", [6, 12])
def test_every_row_of_the_ablations_is_a_run_of_its_own_or_the_baseline(layers):
    rows = ablation_rows(layers)
    names = [row.variant.name for row in rows]
    assert len(set(names)) == len(names)
    keys = [run_key(row.variant.settings(FORMS["long"], 0)) for row in rows]
    others = [key for key in keys if key != keys[0]]
    assert len(set(others)) == len(others) == 29
    tables = [row.table for row in rows]
    for table in set(tables):
        assert keys[0] in [key for key, own in zip(keys, tables) if own == table], f"{table} lacks the baseline"


def test_published_scores_agree_with_themselves():
    for row in ablation_rows(12):
        if row.published:
            seen, unseen, harmonic = row.published
            assert harmonic_mean(seen, unseen) == pytest.approx(harmonic, abs=0.15), row


def test_forms_for_photographs_are_the_recipes(tmp_path):
    for name in ("voc12", "coco_stuff"):
        recipe = load_pipeline(ROOT / "notebooks" / "pipelines" / f"{name}_inductive.yaml")
        train, score = (step.parameters for step in recipe.steps)
        ours = Variant("", {}).settings(FORMS[name], 0, dataset=train["dataset"])
        assert ours == TrainSettings(**train).model_copy(update={"run_dir": ours.run_dir})
        theirs = EvaluateSettings(**score)
        assert FORMS[name].score == {"short_side": theirs.short_side, "stride": theirs.stride}
        assert PUBLISHED_GAMMA == theirs.gamma


def test_photographs_have_no_validation_part(tmp_path):
    folder = write_voc(tmp_path / "voc", {"train": 4, "val": 3}, SceneSettings(size=32))
    found = run_study([Variant("", {})], [0], TINY, tmp_path / "runs", workers=1, dataset=str(folder))
    assert "validation" not in found[""][0]
    assert summarise(found)[""]["gamma"] == PUBLISHED_GAMMA


def test_results_that_are_not_there_are_named():
    with pytest.raises(FileNotFoundError, match="short"):
        read_results("no_such_study")

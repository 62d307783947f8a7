"""Table 1's rows: published numbers agree with themselves, every peer runs, and one call measures all and goes on."""

import json

import pytest
import torch
from test_study import TINY
from torch import nn

from sptseg_lib import peer_study, study
from sptseg_lib.metrics import harmonic_mean, trade_off_area
from sptseg_lib.peer_study import CURVE, build_predictor, encoder_images, measure_peers, measured_peers, time_peers
from sptseg_lib.peers import PEERS, peer
from sptseg_lib.scenes.render import SceneSettings
from sptseg_lib.scenes.voc_layout import write_voc
from sptseg_lib.study import FORMS, run_key

ZS3 = peer("ZS3")._replace(options={"pictures": 8, "generator_steps": 2, "classifier_steps": 2, "drawn": 2})


def test_published_scores_agree_with_themselves():
    published = [numbers for row in PEERS for numbers in (row.voc, row.coco) if numbers]
    assert len(published) == 21
    odd = [n for n in published if abs(harmonic_mean(n.mIoU_seen, n.mIoU_unseen) - n.hIoU) > 0.15]
    assert odd == [peer("CaGNet").coco]  # 17.9 by eq. 11, 18.2 as printed


def test_each_row_is_one_of_its_kind():
    assert len({row.name for row in PEERS}) == len(PEERS)
    assert {row.name for row in PEERS if not row.measured} == {"CaGNet", "SIGN", "Joint", "ZegFormer", "zsseg"}
    assert all(row.voc for row in PEERS if not row.measured)
    for form in FORMS.values():
        runs = [row.variant.settings(form, 0) for row in PEERS if row.changes is not None and not row.build]
        assert len({run_key(run) for run in runs}) == len(runs)
        for row, run in zip((row for row in PEERS if row.changes is not None and not row.build), runs):
            assert row.labels == run.setting
    with pytest.raises(ValueError, match="SPNet"):
        peer("SPnet")
    with pytest.raises(ValueError, match="published numbers alone"):
        build_predictor(peer("SIGN"), peer("SIGN").variant.settings(TINY, 0), TINY, None)


def test_area_of_a_trade_off_is_that_of_a_slow_count():
    seen, unseen = [80.0, 70.0, 60.0, 62.0, 10.0, 5.0], [0.0, 20.0, 30.0, 25.0, 40.0, 35.0]
    cells = sum(
        any(s >= row + 1 and u >= column + 1 for s, u in zip(seen, unseen))
        for row in range(100)
        for column in range(100)
    )
    assert trade_off_area(seen, unseen) == pytest.approx(cells / 100)
    assert trade_off_area(seen[::-1], unseen[::-1]) == pytest.approx(cells / 100)
    assert trade_off_area([100.0], [100.0]) == 100 and trade_off_area([50.0, 60.0], [0.0, 0.0]) == 0
    for wrong in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="one pair a shift"):
            trade_off_area(*wrong)


@pytest.mark.slow
def test_every_peer_runs_and_is_measured_once(tmp_path, monkeypatch):
    rows = [ZS3 if row.name == "ZS3" else row for row in PEERS]
    found, curves = measure_peers(rows, [0, 1], TINY, tmp_path, workers=1)
    assert list(found) == [row.name for row in PEERS if row.measured]
    for row in rows:
        if row.measured:
            assert [run["settings"]["seed"] for run in found[row.name]] == ([0, 1] if row.random else [0])
            for run in found[row.name]:
                assert all(0 <= card["pAcc"] <= 100 for card in run["test"].values())
    assert set(curves) == {row.name for row in PEERS if row.curve}
    monkeypatch.setattr(peer_study, "build_predictor", None)
    again = measure_peers(rows, [0, 1], TINY, tmp_path, workers=1)
    assert json.dumps(again) == json.dumps((found, curves))


def test_training_free_peers_are_kept_and_drawn_over_all_shifts(tmp_path, monkeypatch):
    rows = [peer("MaskCLIP"), peer("MaskCLIP, 15 templates"), peer("two stages, superpixels")]
    found, curves = measure_peers(rows, [0, 1, 2], TINY, tmp_path)
    assert [len(runs) for runs in found.values()] == [1, 1, 1]
    assert found["MaskCLIP"][0]["test"] != found["MaskCLIP, 15 templates"][0]["test"]
    (curve,) = curves["MaskCLIP"]
    assert list(curve["test"]) == [str(gamma) for gamma in CURVE]
    assert curve["test"][str(CURVE[0])]["mIoU_unseen"] == 0 == curve["test"][str(CURVE[-1])]["mIoU_seen"]
    assert curve["test"]["0.0"]["mIoU_seen"] == found["MaskCLIP"][0]["test"]["0.0"]["mIoU_seen"]
    monkeypatch.setattr(peer_study, "build_predictor", None)
    assert measure_peers(rows, [0, 1, 2], TINY, tmp_path)[0] == found


def test_encoder_passes_are_counted(tmp_path):
    cost = time_peers([peer("MaskCLIP"), peer("two stages, superpixels")], 0, TINY, tmp_path, images=4, rounds=1)
    assert cost["MaskCLIP"]["encoder_images"] == 1
    assert cost["two stages, superpixels"]["encoder_images"] >= 2  # the pixels' own pass, and a crop at least
    assert all(len(own["seconds"]) == 3 and own["seconds"][0] > 0 for own in cost.values())
    patches = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 4, 1))
    assert encoder_images(lambda x: patches(x) + patches(x), torch.rand(5, 3, 8, 8)) == 10
    assert not nn.modules.module._global_forward_pre_hooks  # the hook is gone


def test_photographs_need_no_code_of_their_own(tmp_path, monkeypatch):
    folder = write_voc(tmp_path / "voc", {"train": 4, "val": 3}, SceneSettings(size=32))
    monkeypatch.setitem(FORMS, "tiny", TINY)
    rows = (peer("MaskCLIP"), peer("two stages, spectral"), peer("SPNet"))
    monkeypatch.setattr(peer_study, "PEERS", rows)
    monkeypatch.setattr(study, "workers_for", lambda jobs: 1)
    found = measured_peers("tiny", [0, 1], str(tmp_path / "runs"), tmp_path / "out", dataset=str(folder), split="")
    assert found == json.loads((tmp_path / "out" / "peers_tiny.json").read_text())
    assert found["variants"]["SPNet"]["seeds"] == [0, 1] and not found["variants"]["SPNet"]["validation_hIoU"]
    assert set(found["curves"]) == {row.name for row in rows} and set(found["cost"]) == {row.name for row in rows[:2]}
    assert len(found["curves"]["SPNet"]["mIoU_seen"]) == 2
    with pytest.raises(ValueError, match="There is no form"):
        measured_peers("shrt", [0], str(tmp_path), tmp_path)

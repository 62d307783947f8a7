"""Splits and settings: what they hold, and one clear error for each thing that cannot be."""

import pytest
import torch
from pydantic import ValidationError

from sptseg_lib.precision import backbone_dtype
from sptseg_lib.scenes.atlas import CLASSES, STUFF
from sptseg_lib.settings import (
    PRESETS,
    EvaluateSettings,
    ModelSettings,
    TrainSettings,
    explain,
    preset,
    project_root,
)
from sptseg_lib.splits import (
    SPLITS,
    Split,
    check_labels,
    fewer_seen,
    find_split,
    hide_unseen,
    make_split,
    transfer_split,
)


def test_presets_differ_where_paper_code_and_baseline_do():
    paper, released, zegclip = (preset(name) for name in ("spt_seg", "spt_seg_released", "zegclip"))
    assert released.high_heads == 1 and released.heads == 8  # int(0.9 · 8) = 7 low heads
    assert paper.high_heads == 1 and paper.alpha_side == "high"
    assert (paper.spectral_layers, paper.spectral_shared) == ((1, 2), False)
    assert (released.spectral_layers, released.spectral_shared) == ((1, 2), True)
    assert released.class_token_twice and not paper.class_token_twice
    assert paper.high_projection and not released.high_projection
    assert (paper.ssim_on, released.ssim_on) == ("probabilities", "logits")
    assert released.normalisation == "imagenet"
    for one in (paper, released):
        assert (one.decoder, one.focal_weight, one.ssim_weight, one.dice_weight) == ("spectral", 100, 1, 0)
    assert (zegclip.decoder, zegclip.focal_weight, zegclip.ssim_weight, zegclip.dice_weight) == ("cross", 100, 0, 1)
    assert zegclip.spectral_layers == ()
    for one in (paper, released, zegclip):
        assert (one.prompt_tokens, one.decoder_layers, one.window, one.dropout, one.seen_shift) == (10, 3, 3, 0.1, 0.1)


def test_ablations_change_one_ingredient():
    zegclip, paper = preset("zegclip").model_dump(), preset("spt_seg").model_dump()
    for name, base, changed in (
        ("zegclip_spt", zegclip, {"spectral_layers"}),
        ("zegclip_sgd", paper, {"spectral_layers"}),
    ):
        one = preset(name).model_dump()
        assert {key for key in one if one[key] != base[key]} == changed
    assert preset("zegclip_spt").decoder == "cross" and preset("zegclip_sgd").decoder == "spectral"


@pytest.mark.parametrize(
    ("heads", "alpha", "side", "high"),
    [
        (8, 0.0, "high", 0),
        (8, 1.0, "high", 8),
        (8, 0.0, "low", 8),
        (8, 1.0, "low", 0),
        (8, 0.9, "high", 7),
        (4, 0.5, "low", 2),
    ],
)
def test_alpha_counts_whole_heads(heads, alpha, side, high):
    assert ModelSettings(heads=heads, alpha=alpha, alpha_side=side).high_heads == high


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="no preset 'spt_sge'.*Did you mean 'spt_seg'.*zegclip"):
        preset("spt_sge")
    with pytest.raises(ValueError, match="no model setting 'windw'.*Did you mean 'window'"):
        preset("spt_seg", windw=2)
    with pytest.raises(ValueError, match="no split 'defualt'.*Did you mean 'default'"):
        find_split("defualt")
    with pytest.raises(ValueError, match="no class 'starr'.*Did you mean 'star'"):
        make_split("mine", CLASSES, ("starr",))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window": 0}, "window=0"), ({"heads": "many"}, "heads='many'"), ({"alpha": 1.5}, "alpha=1.5"),
        ({"decoder": "crosss"}, "decoder='crosss'"), ({"dropout": 1.0}, "dropout=1.0"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        preset("spt_seg", **changes)


@pytest.mark.parametrize("kind", [TrainSettings, EvaluateSettings, ModelSettings])
def test_settings_are_frozen_and_refuse_names_they_do_not_know(kind):
    with pytest.raises(ValidationError) as error:
        kind(iteratoins=3)
    assert "there is no setting 'iteratoins'" in explain(error.value)
    settings = kind()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, next(iter(kind.model_fields)), "x")


def test_a_training_run_checks_its_model_when_it_is_described():
    for wrong, named in (
        ({"method": "zegclipp"}, "Did you mean 'zegclip'"),
        ({"overrides": {"windoww": 2}}, "Did you mean 'window'"),
        ({"overrides": {"window": -1}}, "window=-1"),
        ({"iterations": 0}, "iterations"),
        ({"setting": "transductiv"}, "setting"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=named):
            TrainSettings(**wrong)
    settings = TrainSettings(method="zegclip", setting="supervised", seed=3, overrides={"window": 2})
    assert settings.name == "zegclip-supervised-seed3" and settings.model().window == 2
    assert TrainSettings.model_validate_json(settings.model_dump_json()) == settings


def test_fewer_seen_classes_are_drawn_by_the_seed_in_proportion():
    default = SPLITS["default"]
    assert fewer_seen(default, 0, 3) is default
    draws = {seed: [fewer_seen(default, count, seed) for count in (2, 4, 7, 11)] for seed in range(4)}
    for splits in draws.values():
        kept = [set(split.seen) for split in splits]
        assert kept[0] < kept[1] < kept[2] < kept[3] == set(default.seen)
        assert [len(seen & set(STUFF)) for seen in kept] == [1, 1, 3, 4]  # of 4 and 7 things
        for split in splits:
            assert split.classes == default.classes and set(split.unseen) >= set(default.unseen)
    assert len({draw[0].seen for draw in draws.values()}) > 1
    assert fewer_seen(SPLITS["voc12"], 3, 0).seen == fewer_seen(SPLITS["voc12"], 3, 0).seen
    with pytest.raises(ValueError, match="seen_classes=12, and split 'default' has 11"):
        fewer_seen(default, 12, 0)
    with pytest.raises(ValueError, match="seen_classes=2 has no meaning in the supervised"):
        TrainSettings(setting="supervised", seen_classes=2)


def test_relative_run_folders_count_from_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "notebooks" / "pipelines").mkdir(parents=True)
    for here in (tmp_path, tmp_path / "notebooks", tmp_path / "notebooks" / "pipelines"):
        monkeypatch.chdir(here)
        assert project_root() == tmp_path
        assert TrainSettings(run_dir="runs/x").folder == tmp_path / "runs" / "x"
    assert TrainSettings(run_dir=str(tmp_path / "own")).folder == tmp_path / "own"


def test_precision_is_what_was_asked_for():
    assert backbone_dtype("float32", "cpu") is torch.float32 and backbone_dtype("bfloat16", "cpu") is torch.bfloat16
    assert backbone_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)


def test_named_splits():
    default = SPLITS["default"]
    assert default.classes == CLASSES and set(default.unseen) == {"star", "ring", "arrow", "checkerboard", "waves"}
    voc = SPLITS["voc12"]
    assert (len(voc.seen), len(voc.unseen)) == (15, 5) and voc.classes[0] == "aeroplane"
    assert voc.unseen == ("pottedplant", "sheep", "sofa", "train", "tvmonitor") and voc.unseen_ids == (
        15,
        16,
        17,
        18,
        19,
    )
    for split in SPLITS.values():
        assert sorted(split.seen_ids + split.unseen_ids) == list(range(len(split.classes)))
        assert [split.classes[i] for i in split.seen_ids] == list(split.seen)
        if split.classes == CLASSES:
            assert split.stuff == STUFF


def test_splits_of_photographs_are_the_protocols():
    coco = SPLITS["coco_stuff"]
    assert (len(coco.seen), len(coco.unseen), len(coco.stuff)) == (156, 15, 91)
    assert coco.unseen_ids == (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160)
    context, with_background = SPLITS["pascal_context"], SPLITS["pascal_context_60"]
    assert (len(context.seen), len(context.unseen)) == (49, 10) and context.unseen == with_background.unseen
    assert with_background.classes == ("background", *context.classes) and "background" in with_background.seen
    assert [len(SPLITS[name].classes) for name in ("ade20k", "cityscapes")] == [150, 19]


def test_classes_seen_under_another_name_are_not_unseen():
    voc, coco = SPLITS["voc12"], SPLITS["coco_stuff"]
    split = transfer_split(coco, voc)  # COCO saw couches, motorcycles and tvs, and never a cow
    assert split.classes == voc.classes and split.unseen == ("cow",)
    back = transfer_split(voc, coco)
    assert {"airplane", "motorcycle", "dining table"} <= set(back.seen)
    assert {"potted plant", "couch", "tv", "zebra"} <= set(back.unseen)  # known to VOC, but unseen there
    assert len(back.seen) == 15 and back.stuff == coco.stuff
    assert transfer_split(SPLITS["default"], SPLITS["half"]).unseen == SPLITS["default"].unseen
    with pytest.raises(ValueError, match="'default' saw no class of 'voc12'"):
        transfer_split(SPLITS["default"], voc)


def test_a_split_that_cannot_be_is_refused():
    ab = {"name": "x", "classes": ("a", "b")}
    with pytest.raises(ValueError, match=r"2 class\(es\) are both seen and unseen: a, b. Zero-shot"):
        Split(**ab, seen=("a", "b"), unseen=("b", "a"))
    with pytest.raises(ValueError, match="'x' has no seen class"):
        Split(**ab, seen=(), unseen=("a", "b"))
    with pytest.raises(ValueError, match="has no seen class"):
        make_split("all hidden", ("a", "b"), ("a", "b"))
    with pytest.raises(ValueError, match="b: not in both the class list and the split"):
        Split(**ab, seen=("a",), unseen=())
    with pytest.raises(ValueError, match="c: not in both"):
        Split(**ab, seen=("a", "b"), unseen=("c",))
    with pytest.raises(ValueError, match="a named more than once"):
        Split(name="x", classes=("a", "a", "b"), seen=("a",), unseen=("b",))


def test_unseen_pixels_are_hidden_and_seen_ones_count_from_zero():
    split = make_split("x", ("a", "b", "c", "d", "e"), ("a", "d"))
    table = {0: 255, 1: 0, 2: 1, 3: 255, 4: 2, 255: 255}
    label = torch.tensor([*table] * 2, dtype=torch.uint8).view(2, 2, 3)
    hidden = hide_unseen(label, split)
    assert hidden.dtype == torch.int64
    assert hidden.flatten().tolist() == [table[int(i)] for i in label.flatten()]


@pytest.mark.parametrize("wrong", [5, 254, 300, -1])
def test_labels_outside_the_class_list_are_named(wrong):
    split = make_split("x", ("a", "b", "c", "d", "e"), ("a", "d"))
    label = torch.tensor([[[0, 255, wrong]]])
    with pytest.raises(ValueError, match=rf"Labels \[{wrong}\] are outside the class list of 5 \(ids 0 to 4"):
        hide_unseen(label, split)
    with pytest.raises(ValueError, match=rf"\[{wrong}\]"):
        check_labels(label, 5)


def test_every_preset_can_be_described():
    assert {"spt_seg", "spt_seg_released", "zegclip"} <= set(PRESETS)
    for name in PRESETS:
        assert TrainSettings(method=name).model() == preset(name)

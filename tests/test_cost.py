"""Costs: the counter against counts by hand, parts that add up, interleaved clocks, and the results file."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
from scripts import load_script

from sptseg_lib.cost import clock, measure, plan
from sptseg_lib.cost.count import count_cost, counted, multiply_adds
from sptseg_lib.cost.methods import METHODS, TWO_STAGE, Setup, build_method, class_texts, label_pixels, scenes
from sptseg_lib.cost.parts import (
    _LABEL,
    BACKWARD,
    LOSS,
    PARTS,
    REST,
    SPECTRAL,
    Tally,
    _kernel_seconds,
    _own_seconds,
    part_of,
    watched,
)
from sptseg_lib.model import build_segmenter
from sptseg_lib.settings import preset

SMALL = Setup(size=32, batch=2)


def layer_by_hand(tokens: int, width: int) -> int:
    """A transformer layer: 12 D² a token for its matrices, and twice N² D for attention."""
    return 12 * tokens * width**2 + 2 * tokens**2 * width


def spectral_by_hand(side: int, width: int) -> float:
    """There and back, half a complex transform each: 2.5 N log₂ N operations a channel, two to a multiply-add."""
    return 2 * 2.5 * side**2 * math.log2(side**2) * width / 2


def test_the_counter_agrees_with_a_count_by_hand():
    method = build_method("zegclip_spt", SMALL)
    backbone = method.segmenter.encoder.backbone
    N, D, E, K, M = (32 // backbone.patch) ** 2, backbone.width, backbone.joint, SMALL.classes, 10
    layers = len(backbone.blocks)
    encoder = N * 3 * backbone.patch**2 * D + layers * (layer_by_hand(1 + M + N, D) + M * D**2) + (1 + N) * D * E
    query, key, value, out, products = K * E**2, N * E**2, N * E**2, K * E**2, K * N * E
    full = query + key + value + out + 3 * products + 8 * K * E**2
    decoder = 2 * K * E * E + 2 * full + query + key + products
    found = measure.count_method(method, SMALL)
    assert found["multiply_adds"] == encoder + decoder
    spectral = 2 * spectral_by_hand(32 // backbone.patch, D)
    assert found["multiply_adds_with_ffts"] - found["multiply_adds"] == found["spectral"]["multiply_adds"] == spectral


def test_what_is_counted_does_not_depend_on_the_attention_kernel():
    def attend(device):
        q = torch.zeros(1, 2, 6, 4, device=device)
        with counted() as counter:
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        return multiply_adds(counter)[0]

    assert attend("cpu") == attend("meta") == 2 * 2 * 6 * 6 * 4


@pytest.mark.parametrize("name", METHODS)
def test_every_method_labels_pixels_and_is_counted(name):
    method = build_method(name, SMALL)
    label_BHW = label_pixels(method.network, scenes(SMALL, 2)[0], class_texts(SMALL))
    assert label_BHW.shape == (2, 32, 32) and 0 <= label_BHW.min() and label_BHW.max() < SMALL.classes
    found = measure.count_method(method, SMALL)
    backbone = sum(p.numel() for p in build_segmenter(preset("vpt")).encoder.backbone.parameters())
    assert found["parameters"] >= backbone > 0 and found["multiply_adds_with_ffts"] >= found["multiply_adds"] > 0
    assert (found["trained"] == 0) == (method.segmenter is None)
    if name == "full_fine_tuning":
        assert found["trained"] == found["parameters"]
    elif name == "linear_probe":
        assert found["trained"] == 11 * 128 + 2  # a row for each seen class, scale and threshold


def test_two_stages_encode_the_image_and_its_regions():
    one = measure.count_method(build_method("dense_clip", SMALL), SMALL)["multiply_adds"]
    two = measure.count_method(build_method(TWO_STAGE, SMALL), SMALL)["multiply_adds"]
    assert two > 3 * one


def test_trained_and_frozen_parameters_are_told_apart():
    segmenter = build_segmenter(preset("spt_seg", grid=4))
    cost = count_cost(segmenter.decoder, (1, 4, 4, 128), (1, 128), (3, 128))
    assert cost.trained == cost.parameters == sum(p.numel() for p in segmenter.decoder.parameters())
    assert count_cost(segmenter.decoder.requires_grad_(False), (1, 4, 4, 128), (1, 128), (3, 128)).trained == 0


@pytest.mark.parametrize("name", ["spt_seg", "spt_balanced", "zegclip", "linear_probe"])
def test_parts_add_up_to_the_whole(name):
    method = build_method(name, SMALL)
    found, whole = measure.parts_of(method, SMALL), measure.count_method(method, SMALL)
    assert sum(found["parameters"].values()) == whole["parameters"]
    assert sum(found["multiply_adds"].values()) == pytest.approx(whole["multiply_adds_with_ffts"], rel=1e-12)
    assert set(found["parameters"]) | set(found["multiply_adds"]) <= set(PARTS)


def test_names_lead_to_parts():
    assert part_of("encoder.backbone.blocks.3.attn.in_proj_weight") == "CLIP's layers"
    assert part_of("encoder.backbone.class_embedding") == "patch embedding"
    assert part_of("encoder.spectral.1.weight_hfD2") == SPECTRAL
    assert part_of("decoder.attentions.2.frequencies.branch.low.q.weight") == "low heads"
    assert part_of("decoder.attentions.0.q.weight") == "classes meet patches"
    assert part_of("") == REST


def test_the_model_is_left_as_it_was():
    segmenter = build_segmenter(preset("spt_seg", grid=4))
    before = [set(vars(module)) for module in segmenter.modules()]
    with pytest.raises(RuntimeError, match="stop"), watched(segmenter, Tally(time.perf_counter)):
        raise RuntimeError("stop")
    assert [set(vars(module)) for module in segmenter.modules()] == before


def test_a_tally_takes_inner_parts_out_of_outer_ones():
    now = iter([0.0, 2.0, 5.0, 6.0, 7.0, 10.0])
    tally = Tally(lambda: next(now))
    with tally("outer"):  # 0 to 10
        with tally("inner"):  # 2 to 5
            pass
        with tally("inner"):  # 6 to 7
            pass
    assert dict(tally.spent) == {"outer": 6.0, "inner": 4.0}


def event(name, parent=None, microseconds=0, kernels=()):
    """As the profiler tells of it; kernels: their microseconds."""
    took = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(
        name=name, cpu_parent=parent, time_range=took, kernels=[SimpleNamespace(duration=d) for d in kernels]
    )


def test_a_cpu_s_seconds_belong_to_the_nearest_part():
    outer = event(_LABEL + REST, None, 9e6)
    unnamed = event("aten::linear", outer, 6e6)
    inner = event(_LABEL + SPECTRAL, unnamed, 5e6)
    later = event(_LABEL + BACKWARD, None, 2e6)
    events = [outer, unnamed, inner, event("aten::_fft_r2c", inner, 4e6), later]
    assert _own_seconds(events) == {REST: 4.0, SPECTRAL: 5.0, BACKWARD: 2.0}


def test_kernels_belong_to_the_nearest_part_and_to_the_backward_pass_without_one():
    outer = event(_LABEL + REST, kernels=[1e6])  # a label has no kernels of its own
    inner = event(_LABEL + SPECTRAL, outer)
    fft, other = event("aten::_fft_r2c", inner, kernels=[1e6, 1e6]), event("aten::add", outer, kernels=[1e6])
    late = event("aten::mm", kernels=[4e6])  # in autograd's own thread
    assert _kernel_seconds([outer, inner, fft, other, late]) == {SPECTRAL: 2.0, REST: 1.0, BACKWARD: 4.0}


def test_rounds_are_interleaved_and_the_first_one_is_not_kept(monkeypatch):
    ran = []
    now = iter(range(1000))
    monkeypatch.setattr(clock, "clock_for", lambda device: ("steps", lambda: next(now)))
    found = clock.interleave({name: lambda name=name: ran.append(name) for name in "abcd"}, rounds=5)
    rounds = [ran[i : i + 4] for i in range(0, len(ran), 4)]
    assert len(rounds) == 6 and all(sorted(one) == list("abcd") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2, "every round has the same order"
    assert found == {name: [1] * 5 for name in "abcd"}


def test_quartiles_and_slope():
    assert clock.quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == [2.0, 3.0, 4.0]
    assert clock.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def allocate(megabytes: int) -> int | None:
    return clock.added_bytes(lambda: None, lambda: torch.ones(megabytes * 2**18).sum())


def test_memory_is_what_a_job_adds_in_a_process_of_its_own():
    few, many = (clock.apart(allocate, megabytes) for megabytes in (32, 288))
    if few is None:
        pytest.skip("this system does not tell a process's peak memory")
    # The difference: what a process needs for its first computation of any size is in both.
    assert many - few == pytest.approx(256 * 2**20, rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_method("spt_sge", SMALL), "no method 'spt_sge'.*Did you mean 'spt_seg'"),
        (lambda: build_method("full_fine_tuning", SMALL, torch.bfloat16), "in name only"),
        (lambda: clock.find_measured("tpu"), "no device 'tpu'.*auto, cpu, cuda"),
        (lambda: plan.measure("tables", None), "no part 'tables'"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert clock.find_measured("auto") == "cpu"
    with pytest.raises(ValueError, match="finds no GPU.*choose 'auto' or 'cpu'"):
        clock.find_measured("cuda")


@pytest.mark.slow
def test_the_script_measures_parts_one_by_one(tmp_path, monkeypatch):
    script = load_script("measure_cost")
    tiny = plan.FORMS["measure"]._replace(
        setup={"size": 32, "batch": 2}, methods=("spt_seg", "dense_clip"), sizes=(32, 48), classes=(16,), memory=(),
        vit_sizes=(64,),
    )  # fmt: skip
    monkeypatch.setattr(plan, "GROWING", ("spt_seg",))
    monkeypatch.setitem(plan.FORMS, "tiny", tiny)
    monkeypatch.setattr(plan, "VIT", {**plan.VIT, "clip": "sptseg-tiny", "weights": None, "size": 32})
    monkeypatch.setattr(script, "FORMS", plan.FORMS)
    path = tmp_path / "results" / "cost.json"
    common = ["--form", "tiny", "--device", "cpu", "--results", str(path)]
    assert script.main([*common, "--part", "parts"]) == 0
    first = json.loads(path.read_text())["parts"]
    assert script.main([*common, "--part", *(part for part in plan.PARTS if part != "parts")]) == 0
    found = json.loads(path.read_text())
    assert list(found) == list(plan.PARTS) and found["parts"] == first
    assert set(found["methods"]["rows"]) == {"spt_seg", "dense_clip"}
    row = found["methods"]["rows"]["spt_seg"]
    assert set(row["seconds"]) == {"float32", "bfloat16"}
    low, middle, high = row["seconds"]["float32"]["training step"]
    assert 0 < low <= middle <= high
    assert row["training_multiply_adds"] > 2 * row["multiply_adds_with_ffts"]
    sizes = [row for row in found["sizes"]["rows"] if row["method"] == "spt_seg"]
    assert [row["size"] for row in sizes] == [32, 48] and sizes[1]["multiply_adds"] > sizes[0]["multiply_adds"]
    training = found["parts"]["spt_seg"]["seconds"]["training step"]
    assert {SPECTRAL, LOSS, BACKWARD} <= set(training) and SPECTRAL not in found["parts"]["zegclip"]["parameters"]
    assert "seconds" not in found["vit"]["rows"]["spt_seg"] and found["vit_parts"]["float32"]["seconds"] == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_is_measured_alike():
    setup = SMALL.model_copy(update={"device": "cuda"})
    found = measure.measure_methods(setup, 2, ("spt_seg",))["rows"]["spt_seg"]
    assert all(took[0] > 0 for jobs in found["seconds"].values() for took in jobs.values())
    assert measure.memory_of("spt_seg", "float32", "training step", setup) > 0
    parts = measure.measure_parts(setup, "spt_seg", 2)["seconds"]["training step"]
    assert parts[BACKWARD][1] > 0 and parts[SPECTRAL][1] > 0

"""The benchmarks run in miniature; their figures mean nothing here."""

import json

import pytest
from PIL import Image
from scripts import load_script


def test_the_loader_is_measured_on_pictures_of_vocs_size(tmp_path, capsys):
    script = load_script("benchmark_loader")
    folder = script.write_pictures(tmp_path, 2)
    for path in [*folder.glob("JPEGImages/*"), *folder.glob("SegmentationClass/*")]:
        assert Image.open(path).size == (500, 375)
    rate = script.main(["--folder", str(folder), "--crops", "6", "--size", "64", "--workers", "1"])
    shown = capsys.readouterr().out
    assert rate > 0 and "augmented 64×64 crops a second and core" in shown and "with 1 workers" in shown
    assert "decode" in shown


@pytest.mark.parametrize("option", [[], ["--checkpointing", "--profile"]], ids=["plain", "recomputed"])
def test_the_gpu_benchmark_runs_in_miniature_on_a_cpu(tmp_path, capsys, option):
    sizes = ["--device", "cpu", "--tiny", "--iterations", "2", "--warmup", "1", "--batch", "2", "--workers", "0"]
    results, script = tmp_path / "results.json", load_script("benchmark_gpu")
    found = script.main([*sizes, "--pictures", "2", "--results", str(results), *option])
    assert found["images_per_second"] > 0 and found["share_per_cent"] > 0 and 0 < found["waiting_per_cent"] < 100
    assert found["peak_gigabytes"] is None
    assert "images/s; peak memory not measured" in capsys.readouterr().out
    kept = json.loads(results.read_text())
    assert kept["size"] == 32 and kept["rows"][0]["checkpointing"] == ("--checkpointing" in option)
    assert kept["rows"][0]["images_per_second"] == pytest.approx(found["images_per_second"], rel=1e-3)
    with pytest.raises(ValueError, match="name another file"):
        script.add_row(results, {"size": 512}, {})


def test_operations_are_those_of_the_matrices():
    """A forward and backward pass of the tiny CLIP's 1.25 M frozen weights: about 4 operations a weight and patch."""
    script = load_script("benchmark_gpu")
    import torch

    from sptseg_lib.model import build_segmenter
    from sptseg_lib.settings import preset

    segmenter = build_segmenter(preset("spt_seg", grid=4, prompt_tokens=2, decoder_layers=1))
    counted = script.operations(segmenter, torch.rand(2, 3, 32, 32), torch.randn(3, 128))
    backbone = sum(p.numel() for name, p in segmenter.encoder.backbone.blocks.named_parameters() if "weight" in name)
    tokens = 2 * (1 + 2 + 16)
    assert 4 * backbone * tokens < counted < 8 * backbone * tokens
    assert all(p.grad is None for p in segmenter.trainable().values())

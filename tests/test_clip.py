"""Loading CLIP, text embeddings and training-free dense CLIP."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import nn

from sptseg_lib.clip.backbone import VisionBackbone
from sptseg_lib.clip.dense import dense_clip
from sptseg_lib.clip.load import load_clip
from sptseg_lib.clip.text import TEMPLATES, class_text
from sptseg_lib.clip.tiny import WEIGHTS_PATH
from sptseg_lib.clip.weights import load_tensors, load_weights
from sptseg_lib.model import build_segmenter
from sptseg_lib.settings import preset
from sptseg_lib.splits import SPLITS


def test_the_tiny_clip_loads_once_and_names_images():
    clip = load_clip()
    assert load_clip() is clip and not clip.model.training
    assert next(clip.model.parameters()).dtype == torch.float32
    with torch.no_grad():
        image_BE = clip.model.encode_image(torch.randn(2, 3, *clip.model.visual.image_size))
        text_BE = clip.model.encode_text(clip.tokenize(["a star", "a ring"]))
    assert image_BE.shape == text_BE.shape and image_BE.isfinite().all() and text_BE.isfinite().all()
    assert WEIGHTS_PATH.stat().st_size <= 12e6


def test_whoever_takes_it_to_a_gpu_takes_a_copy(monkeypatch):
    clip = load_clip()
    there = clip.image_side("meta")  # a device that is not the CPU, and is everywhere
    assert there is clip.image_side("meta") is not clip.model.visual and clip.image_side("cpu") is clip.model.visual
    assert there.proj.device.type == "meta" and clip.model.visual.proj.device.type == "cpu"
    del clip.copies["meta"]
    assert build_segmenter(preset("spt_seg"), clip).encoder.backbone.proj is clip.model.visual.proj
    monkeypatch.setattr("sptseg_lib.model.find_device", lambda: "cuda")
    build_segmenter(preset("spt_seg"), clip).to("meta")
    assert clip.model.visual.proj.device.type == "cpu"


def test_unknown_models_weights_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no CLIP 'ViT-B-61'.*sptseg-tiny"):
        load_clip("ViT-B-61")
    with pytest.raises(ValueError, match="ViT-B-16 has no weights 'opennai'.*openai"):
        load_clip("ViT-B-16", "opennai")
    with pytest.raises(FileNotFoundError, match="no weight file .*nowhere.safetensors"):
        load_clip("sptseg-tiny", str(tmp_path / "nowhere.safetensors"))


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.98])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_weight_file_is_refused(tmp_path, suffix, kept):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    tensors = nn.Linear(40, 40).state_dict()
    save_file(tensors, whole) if suffix == ".safetensors" else torch.save(tensors, whole)
    assert load_tensors(whole).keys() == tensors.keys()
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * kept)])
    with pytest.raises(ValueError, match=f"cut{suffix} .* cannot be read.*truncated"):
        load_tensors(cut)


def test_a_truncated_tiny_clip_is_refused(tmp_path):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(WEIGHTS_PATH.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="tiny.safetensors .100000 bytes. cannot be read"):
        load_clip("sptseg-tiny", str(path))


class Intruder:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_weight_file_is_not_run(tmp_path, zipped):
    path = tmp_path / "weights.pt"
    torch.save({"weight": Intruder(tmp_path / "hacked")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="weights.pt"):
        load_tensors(path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "content", [torch.zeros(3), [torch.zeros(3)], {"epoch": 3, "weight": torch.zeros(3)}], ids=type
)
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights.pt"):
        load_weights(nn.Linear(2, 2), tmp_path / "weights.pt", "a layer")


def test_a_file_of_another_architecture_is_refused_and_nothing_loaded(tmp_path):
    path, model = tmp_path / "weights.safetensors", nn.Linear(3, 2)
    before = model.weight.clone()
    right = nn.Linear(3, 2).state_dict()
    for wrong, named in (
        (nn.Linear(4, 2).state_dict(), r"1 differences, first weight: \(2, 4\), not \(2, 3\)"),
        ({"weight": right["weight"]}, "bias: missing"),
        (right | {"extra": torch.zeros(1)}, "extra: not a part of the model"),
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=f"another architecture than a layer.*{named}"):
            load_weights(model, path, "a layer")
        assert torch.equal(model.weight, before)
    save_file(right, path)
    load_weights(model, path, "a layer")
    assert torch.equal(model.weight, right["weight"])
    torch.save({"state_dict": nn.Linear(3, 2).state_dict()}, tmp_path / "weights.pt")  # as training tools write it
    load_weights(model, tmp_path / "weights.pt", "a layer")
    assert not torch.equal(model.weight, right["weight"])


def test_text_embeddings_are_unit_vectors_kept_for_the_next_call():
    clip, names = load_clip(), ("star", "ring", "waves")
    text_KE = class_text(clip, names)
    assert class_text(clip, names) is text_KE and not text_KE.requires_grad
    assert text_KE.dtype == torch.float32
    torch.testing.assert_close(text_KE.norm(dim=-1), torch.ones(3))
    for name, row in zip(names, text_KE, strict=True):
        with torch.no_grad():
            one = clip.model.encode_text(clip.tokenize([f"a photo of a {name}"]))[0]
        torch.testing.assert_close(row, one / one.norm())
    assert not torch.allclose(class_text(clip, names, "{}"), text_KE, atol=1e-3)
    torch.testing.assert_close(class_text(clip, names[::-1]), text_KE.flip(0))


def test_ensemble_is_the_mean_direction_of_fifteen_templates():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 15
    assert {"a photo of a {}.", "This is a large {}.", "a {} in the scene.", "This is one {} in the scene."} <= {
        *TEMPLATES
    }
    clip = load_clip()
    for k, name in enumerate(("star", "bricks")):
        rows = []
        for template in TEMPLATES:
            with torch.no_grad():
                one = clip.model.encode_text(clip.tokenize([template.replace("{}", name)]))[0]
            rows.append(one / one.norm())
        mean = sum(rows) / 15
        torch.testing.assert_close(class_text(clip, ("star", "bricks"), "ensemble")[k], mean / mean.norm())


def test_texts_that_cannot_tell_classes_apart_are_refused():
    with pytest.raises(ValueError, match="No class names"):
        class_text(load_clip(), ())
    with pytest.raises(ValueError, match=r"'a photo' has no \{\}"):
        class_text(load_clip(), ("star",), "a photo")


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_dense_clip_is_the_value_path_of_the_last_layer(size):
    visual = VisionTransformer(
        image_size=16, patch_size=4, width=24, layers=2, heads=2, mlp_ratio=2.0, output_dim=10
    ).eval()
    backbone, text_KE = VisionBackbone(visual), F.normalize(torch.randn(5, 10), dim=-1)
    image = torch.randn(2, 3, *size)
    actual = dense_clip(backbone, image, text_KE)
    h, w = size[0] // 4, size[1] // 4
    assert actual.shape == (2, 5, h, w) and float(actual.abs().max()) <= 1 + 1e-5
    with torch.no_grad():
        tokens, _ = backbone.embed(image)
        first, last = visual.transformer.resblocks
        tokens = last.ln_1(first(tokens))
        value_weight, value_bias = last.attn.in_proj_weight[48:], last.attn.in_proj_bias[48:]
        for b in range(2):
            for n in range(h * w):
                value = last.attn.out_proj(value_weight @ tokens[b, 1 + n] + value_bias)
                joint = visual.ln_post(value) @ visual.proj
                expected = torch.stack([joint @ text / joint.norm() for text in text_KE])
                torch.testing.assert_close(actual[b, :, n // w, n % w], expected)


def reference(shared, file):
    return torch.from_numpy(np.load(shared / "reference" / f"{file}.npy").astype(np.float32))


@pytest.mark.parametrize(
    ("file", "split", "prompt"),
    [
        ("voc12_single", "voc12", "a photo of a {}"),
        ("coco_single", "coco_stuff", "a photo of a {}"),
        ("coco_multi", "coco_stuff", "ensemble"),
    ],
)
def test_real_clip_reproduces_the_reference_text_embeddings(shared, file, split, prompt):
    """Run with SPTSEG_OPENAI_WEIGHTS=path or tag of OpenAI's ViT-B/16 weights."""
    weights = os.environ.get("SPTSEG_OPENAI_WEIGHTS")
    if not weights:
        pytest.skip("needs OpenAI's ViT-B/16 weights: set SPTSEG_OPENAI_WEIGHTS to their path or to the tag openai")
    expected, names = reference(shared, file), SPLITS[split].classes
    cosine_K = (class_text(load_clip("ViT-B-16-quickgelu", weights), names, prompt) * expected).sum(-1)
    worst = int(cosine_K.argmin())
    assert float(cosine_K.min()) >= 0.999, f"{names[worst]}: cosine {cosine_K[worst]:.4f}"


def test_classes_stand_in_the_order_of_the_reference_embeddings(shared):
    """Without any weights: a name that VOC and COCO share has one embedding, at its place in either list."""
    voc, coco = SPLITS["voc12"].classes, SPLITS["coco_stuff"].classes
    voc_KE, coco_KE, multi_KE = (reference(shared, file) for file in ("voc12_single", "coco_single", "coco_multi"))
    assert (len(voc_KE), len(coco_KE), len(multi_KE)) == (len(voc), len(coco), len(coco))
    common = [name for name in voc if name in coco]
    assert len(common) >= 10
    for name in common:
        similarity_K = coco_KE @ voc_KE[voc.index(name)]
        assert coco[int(similarity_K.argmax())] == name and float(similarity_K.max()) > 0.999
    # Averaging over templates moves no class to another's place.
    assert torch.equal((multi_KE @ coco_KE.T).argmax(1), torch.arange(len(coco)))

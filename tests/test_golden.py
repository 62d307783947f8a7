"""The library against inputs, weights and outputs of the modules that the authors released."""

import numpy as np
import pytest
import torch
from open_clip.model import QuickGELU
from open_clip.transformer import VisionTransformer

from sptseg_lib.clip.backbone import VisionBackbone
from sptseg_lib.decoder import CrossAttention, MaskDecoder, SpectralGuidedAttention
from sptseg_lib.encoder import PromptedEncoder
from sptseg_lib.losses import dice_loss, focal_loss, one_hot_masks, ssim_loss
from sptseg_lib.mixers.pooling import SpectralPoolingFilter
from sptseg_lib.mixers.spam import SPAM
from sptseg_lib.mixers.tokens import HiLo
from sptseg_lib.spectral.prompt import SpectralPrompt

TOLERANCE = 1e-4


def relative(actual, expected) -> float:
    expected = torch.as_tensor(expected)
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


@pytest.fixture
def golden(shared):
    def load(name):
        file = np.load(shared / "golden" / f"{name}.npz")
        tensors = {key: torch.tensor(file[key]) for key in file.files}
        weights = {key.removeprefix("weight/"): t for key, t in tensors.items() if key.startswith("weight/")}
        return {key: t for key, t in tensors.items() if not key.startswith("weight/")}, weights

    return load


def renamed(weights: dict, names: dict[str, str]) -> dict:
    """Weights under our names: the first prefix that fits is replaced; others are left out."""
    result = {}
    for key, value in weights.items():
        for old, new in names.items():
            if key.startswith(old):
                result[new + key.removeprefix(old)] = value
                break
    return result


SPECTRAL_NAMES = {
    "prompt": "gate.task_E",
    "top_down_transform": "gate.mix_EE",
    "l_q.": "frequencies.low.q.",
    "l_kv.": "frequencies.low.kv.",
    "l_proj.": "frequencies.low.project.",
    "h_qkv.": "frequencies.high.qkv.",
    "proj.": "project.",
}
CROSS_NAMES = {"q.": "q.", "k.": "k.", "v.": "v.", "proj.": "project."}
UPDATE_NAMES = {"norm2.": "norm_attention.", "norm3.": "norm_network.", "linear1.": "widen.", "linear2.": "narrow."}


def spectral_attention(last: bool) -> SpectralGuidedAttention:
    return SpectralGuidedAttention(64, 8, 1, 3, gate=True, high_projection=False, dropout=0.0, last=last)


def load_decoder(decoder: MaskDecoder, weights: dict, inner: str, names: dict[str, str]) -> None:
    state = renamed(weights, {"q_proj.": "descriptor.phi."})
    layers = len(decoder.attentions)
    for i in range(layers):
        old = f"decoder_1.layers.{i}."
        kept = {k: v for k, v in names.items() if i < layers - 1 or v not in ("v.", "project.")}
        state |= renamed(weights, {old + inner + k: f"attentions.{i}.{v}" for k, v in kept.items()})
        if i < layers - 1:
            state |= renamed(weights, {old + k: f"updates.{i}.{v}" for k, v in UPDATE_NAMES.items()})
    decoder.load_state_dict(state)  # strict: every parameter of ours is in the released file


def test_spectral_prompt_equals_released_filter(golden):
    data, _ = golden("spt_filter")
    prompt = SpectralPrompt((32, 32), 48)
    prompt.weight_hfD2.data = data["complex_weight"]
    actual = prompt(data["patch_tokens"].unflatten(1, (32, 32)), data["cls_token"][:, 0])
    assert relative(actual.flatten(1, 2), data["spectral_prompt"]) <= TOLERANCE


def test_spectral_layer_equals_released_layer(golden):
    data, weights = golden("sgd_layer_released")
    layer = spectral_attention(last=False).eval()
    layer.load_state_dict(renamed(weights, SPECTRAL_NAMES))
    logits, update = layer(data["class_queries"], data["patch_tokens"].unflatten(1, (32, 32)))
    assert relative(logits, data["mask_logits"]) <= TOLERANCE
    assert relative(update, data["updated_queries"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["sgd_decoder_released", "zegclip_decoder"])
def test_decoder_equals_released_decoder(golden, name):
    data, weights = golden(name)
    if name.startswith("sgd"):
        attentions = [spectral_attention(last=i == 2) for i in range(3)]
        inner, names = "hlfs.", SPECTRAL_NAMES
    else:
        attentions = [CrossAttention(64, 8, last=i == 2) for i in range(3)]
        inner, names = "multihead_attn.", CROSS_NAMES
    decoder = MaskDecoder(64, attentions, dropout=0.0).eval()
    load_decoder(decoder, weights, inner, names)
    logits = decoder(data["patch_embedding"].permute(0, 2, 3, 1), data["global_embedding"], data["text_embedding"])
    score = logits.sigmoid()
    score[:, data["seen"]] -= 0.1
    assert relative(score, data["score_32"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["spt_encoder_released", "zegclip_encoder", "zegclip_encoder_rect"])
def test_encoder_equals_released_encoder(golden, name):
    data, weights = golden(name)
    side = int((len(weights["positional_embedding"]) - 1) ** 0.5)
    visual = VisionTransformer(
        image_size=side * 16, patch_size=16, width=48, layers=4, heads=int(data["heads"]), mlp_ratio=4.0, output_dim=32
    )
    for block in visual.transformer.resblocks:
        block.mlp.gelu = QuickGELU()
    clip_keys = visual.state_dict().keys()
    visual.load_state_dict({key: weights[key] for key in clip_keys})
    spectral = (1, 2) if "complex_weight" in weights else ()
    encoder = PromptedEncoder(
        VisionBackbone(visual),
        prompt_tokens=5,
        spectral_layers=spectral,
        spectral_shared=True,
        spectral_grid=(32, 32),
        class_token_twice=True,
        dropout=0.1,
    ).eval()
    encoder.tokens_LMD.data = torch.cat([weights["prompt_embeddings"], weights["deep_prompt_embeddings"]])
    encoder.project_tokens.load_state_dict(renamed(weights, {"prompt_proj.": ""}))
    encoder.norm.load_state_dict(renamed(weights, {"prompt_norm.": ""}))
    if spectral:
        encoder.spectral[0].weight_hfD2.data = weights["complex_weight"]
    encoded = encoder(data["image"].float())
    assert relative(encoded.patches_BhwE.permute(0, 3, 1, 2), data["patch_embedding"]) <= TOLERANCE
    assert relative(encoded.global_BE, data["global_embedding"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["losses_spt_released", "losses_zegclip"])
def test_losses_equal_released_losses(golden, name):
    data, _ = golden(name)
    target = one_hot_masks(data["label"], 4)
    every_pixel = torch.ones_like(target[:, :1])
    assert relative(100 * focal_loss(data["mask_logits"], target, every_pixel), data["loss_mask"]) <= TOLERANCE
    if "loss_ssim" in data:
        assert relative(ssim_loss(data["mask_logits"], target), data["loss_ssim"]) <= TOLERANCE
    else:
        assert relative(dice_loss(data["mask_logits"], target, every_pixel), data["loss_dice"]) <= TOLERANCE


def test_spectral_pooling_equals_released_filter(golden):
    data, _ = golden("spectral_pooling_filter")
    pool = SpectralPoolingFilter(int(data["radius"]), float(data["low_weight"]), released=True)
    assert relative(pool.mask((20, 20)), data["mask"][0]) <= TOLERANCE
    assert relative(pool(data["features"]), data["output"]) <= TOLERANCE


SPAM_NAMES = {
    "proj_in.": "project_in.",
    "conv.0.": "along_rows.",
    "conv.1.": "along_columns.",
    **{f"pws.{i}.": f"gates.{i}.mix." for i in range(3)},
    "proj_out.": "project_out.",
}


def test_spam_equals_released_mixer(golden):
    data, weights = golden("spam")
    width, kernel = data["features"].shape[1], int(data["kernel_size"])
    mixer = SPAM(width, int(data["radius"]), tuple(data["low_weights"].tolist()), kernel, released=True)
    mixer.load_state_dict(renamed(weights, SPAM_NAMES))
    for i, gate in enumerate(mixer.gates):
        assert relative(gate.filter.mask((20, 20)), weights[f"sps.{i}.filter"][0]) <= TOLERANCE
    assert relative(mixer.context(mixer.features(data["features"])), data["context"]) <= TOLERANCE
    assert relative(mixer(data["features"]), data["output"]) <= TOLERANCE


HILO_NAMES = {
    "l_q.": "low.q.",
    "l_kv.": "low.kv.",
    "l_proj.": "low.project.",
    "h_qkv.": "high.qkv.",
    "h_proj.": "high.project.",
}


def test_hilo_equals_released_attention(golden):
    data, weights = golden("hilo")
    h, w = int(data["height"]), int(data["width"])
    mixer = HiLo(64, int(data["num_heads"]), float(data["alpha"]), int(data["window_size"]))
    mixer.frequencies.load_state_dict(renamed(weights, HILO_NAMES))
    actual = mixer(data["tokens"].transpose(1, 2).unflatten(2, (h, w)))
    assert relative(actual.flatten(2).transpose(1, 2), data["output"]) <= TOLERANCE

"""The decoder's equations against loops, and what training may and may not change."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer

from sptseg_lib.clip.load import Clip
from sptseg_lib.decoder import (
    CrossAttention,
    MaskDecoder,
    RelationshipDescriptor,
    SpectralGuidedAttention,
    TaskGate,
)
from sptseg_lib.model import build_decoder, build_segmenter
from sptseg_lib.settings import PRESETS, ModelSettings, preset
from sptseg_lib.train import parameter_groups


def small_segmenter(settings: ModelSettings):
    visual = VisionTransformer(image_size=16, patch_size=4, width=24, layers=3, heads=2, mlp_ratio=2.0, output_dim=16)
    return build_segmenter(settings, Clip("random", SimpleNamespace(visual=visual), None, (0.5,) * 3, (0.25,) * 3))


def test_descriptor_by_loop():
    descriptor = RelationshipDescriptor(4)
    text_KE, global_BE = torch.randn(3, 4), torch.randn(2, 4)
    actual = descriptor(text_KE, global_BE)
    for b in range(2):
        for k in range(3):
            pair = [*(text_KE[k] * global_BE[b]).tolist(), *text_KE[k].tolist()]  # [t·g; t]
            expected = [
                sum(w * x for w, x in zip(row, pair, strict=True)) + bias
                for row, bias in zip(descriptor.phi.weight.tolist(), descriptor.phi.bias.tolist(), strict=True)
            ]
            torch.testing.assert_close(actual[b, k], torch.tensor(expected))


def test_gate_by_loop_clamps_patches_unlike_the_task():
    gate = TaskGate(5)
    z_BNE = torch.randn(2, 6, 5)
    z_BNE[0, 0], z_BNE[0, 1] = -gate.task_E.detach(), 3 * gate.task_E.detach()
    torch.testing.assert_close(gate(z_BNE)[0, :2], torch.stack([torch.zeros(5), z_BNE[0, 1]]))  # P starts as identity
    gate.mix_EE.data = torch.randn(5, 5)
    actual = gate(z_BNE)
    task, closed = gate.task_E, 0
    for b in range(2):
        for n in range(6):
            z = z_BNE[b, n]
            cosine = (z @ task) / (z @ z).sqrt() / (task @ task).sqrt()
            closed += int(cosine < 0)
            torch.testing.assert_close(actual[b, n], z * cosine.clamp(0, 1) @ gate.mix_EE)
    assert 0 < closed < 12


def test_masks_are_queries_times_gated_patches_and_the_update_their_softmax():
    layer = SpectralGuidedAttention(8, 4, 1, 2, gate=True, high_projection=True, dropout=0.3, last=False).eval()
    query_BKE, patches_BhwE = torch.randn(2, 3, 8), torch.randn(2, 2, 4, 8)
    logits, update = layer(query_BKE, patches_BhwE)
    z_BNE = layer.gate(layer.frequencies(patches_BhwE).flatten(1, 2))
    for b in range(2):
        for k in range(3):
            match = torch.stack([query_BKE[b, k] @ z for z in z_BNE[b]])  # eq. 9: no 1/√d
            torch.testing.assert_close(logits[b, k], match)
            share = match.exp() / match.exp().sum()
            mixed = sum(s * z for s, z in zip(share, z_BNE[b], strict=True))
            torch.testing.assert_close(update[b, k], layer.project(mixed))


def test_cross_attention_masks_are_the_mean_of_the_heads():
    layer = CrossAttention(8, heads=2, last=False)
    query_BKE, patches_BhwE = torch.randn(2, 3, 8), torch.randn(2, 2, 3, 8)
    logits, update = layer(query_BKE, patches_BhwE)
    q, k, v = layer.q(query_BKE), layer.k(patches_BhwE.flatten(1, 2)), layer.v(patches_BhwE.flatten(1, 2))
    expected, mixed = torch.zeros(2, 3, 6), torch.zeros(2, 3, 8)
    for b in range(2):
        for at in (slice(0, 4), slice(4, 8)):
            score = q[b, :, at] @ k[b, :, at].T / 4**0.5
            expected[b] += score / 2
            mixed[b, :, at] = score.softmax(-1) @ v[b, :, at]
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(update, layer.project(mixed))


@pytest.mark.parametrize("kind", ["spectral", "cross"])
def test_each_layer_updates_the_queries_and_the_last_one_gives_the_masks(kind):
    decoder = build_decoder(preset("spt_seg", decoder=kind, decoder_layers=2, heads=4), 8).eval()
    patches_BhwE, global_BE, text_KE = torch.randn(2, 3, 4, 8), torch.randn(2, 8), torch.randn(5, 8)
    query = decoder.descriptor(text_KE, global_BE)
    _, change = decoder.attentions[0](query, patches_BhwE)
    update = decoder.updates[0]
    query = update.norm_attention(query + change)
    query = update.norm_network(query + update.narrow(update.widen(query).relu()))
    expected, nothing = decoder.attentions[1](query, patches_BhwE)
    assert nothing is None
    actual = decoder(patches_BhwE, global_BE, text_KE)
    assert actual.shape == (2, 5, 3, 4)
    torch.testing.assert_close(actual.flatten(2), expected)


def test_classes_do_not_see_each_other():
    """Zero-shot rests on it: adding class texts must not change the masks of the others."""
    decoder = build_decoder(preset("spt_seg", heads=4), 8).eval()
    patches_BhwE, global_BE, text_KE = torch.randn(1, 3, 3, 8), torch.randn(1, 8), torch.randn(5, 8)
    few, many = (decoder(patches_BhwE, global_BE, text_KE[:n]) for n in (2, 5))
    torch.testing.assert_close(few, many[:, :2])


def test_settings_choose_the_decoder():
    released = build_decoder(preset("spt_seg_released"), 16)
    assert len(released.attentions) == 3 and isinstance(released.attentions[0], SpectralGuidedAttention)
    assert released.attentions[0].frequencies.high.heads == 1
    assert released.attentions[0].frequencies.low.heads == 7
    assert isinstance(released.attentions[0].frequencies.high.project, torch.nn.Identity)
    assert isinstance(build_decoder(preset("zegclip"), 16).attentions[0], CrossAttention)
    ungated = build_decoder(preset("spt_seg", gate=False), 16)
    assert isinstance(ungated, MaskDecoder) and not any("gate" in name for name, _ in ungated.named_parameters())
    for decoder in ("spectral", "cross"):
        with pytest.raises(ValueError, match="8 heads do not divide the joint space's 20 dimensions"):
            build_decoder(preset("spt_seg", decoder=decoder), 20)


def open_gates(segmenter) -> None:
    """Point every gate's task at the mean patch: a gate closed to all patches passes no gradient."""

    def aim(gate, inputs):
        gate.task_E.data.copy_(inputs[0].detach().mean((0, 1)))

    for module in segmenter.modules():
        if isinstance(module, TaskGate):
            module.register_forward_pre_hook(aim)


@pytest.mark.parametrize("name", PRESETS)
def test_everything_meant_to_train_does_and_nothing_frozen_changes(name):
    settings = preset(name, grid=4)
    settings = preset(name, grid=4, prompt_tokens=min(2, settings.prompt_tokens))
    segmenter, text_KE = small_segmenter(settings).train(), F.normalize(torch.randn(3, 16), dim=1)
    open_gates(segmenter)
    segmenter.remember(text_KE)
    frozen = {key: t.clone() for key, t in segmenter.state_dict().items() if key not in segmenter.trainable()}
    assert settings.train_backbone != any("backbone" in key for key in frozen)
    trainable = segmenter.trainable()
    before = {key: p.detach().clone() for key, p in trainable.items()}
    if preset(name).spectral_layers:
        assert any("spectral" in key for key in trainable)

    groups = parameter_groups(segmenter, weight_decay=0.01, learning_rate=1e-2)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in trainable.values()}
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for key, p in trainable.items():
        assert (id(p) in decayed) == ("norm" not in key and "ln_" not in key), key
    slower = {id(p) for group in groups if group["lr"] == pytest.approx(1e-3) for p in group["params"]}
    assert slower == {id(p) for key, p in trainable.items() if "backbone" in key}

    optimiser = torch.optim.AdamW(groups)
    label_BHW = torch.randint(0, 3, (2, 16, 16))
    segmenter.loss(torch.rand(2, 3, 16, 16), label_BHW, text_KE)["loss"].backward()
    for key, p in trainable.items():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key
    optimiser.step()
    for key, p in trainable.items():
        assert not torch.equal(p, before[key]), key
    after = segmenter.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    if not settings.train_backbone:
        assert all(p.grad is None and not p.requires_grad for p in segmenter.encoder.backbone.parameters())


def test_the_total_loss_is_the_weighted_sum_of_its_parts():
    text_KE, image, label = torch.randn(3, 16), torch.rand(2, 3, 16, 16), torch.randint(0, 3, (2, 16, 16))
    label[:, :4] = 255
    changes = {"grid": 4, "dropout": 0.0, "dice_weight": 2.0}
    torch.manual_seed(1)
    parts = small_segmenter(preset("spt_seg", **changes)).loss(image, label, text_KE)
    assert parts.keys() == {"focal", "ssim", "dice", "loss"}
    torch.testing.assert_close(parts["loss"], parts["focal"] + parts["ssim"] + parts["dice"])
    torch.manual_seed(1)
    double = small_segmenter(preset("spt_seg", **changes, focal_weight=200, ssim_weight=0)).loss(image, label, text_KE)
    assert "ssim" not in double
    torch.testing.assert_close(double["focal"], 2 * parts["focal"])
    torch.testing.assert_close(double["dice"], parts["dice"])


def test_balanced_decoder_takes_spam_for_the_heads_and_changes_nothing_else():
    decoder = build_decoder(preset("spt_balanced", decoder_layers=2, heads=4, balance=(0.6, 0.9), balance_radius=1), 8)
    layer = decoder.eval().attentions[0]
    balanced = layer.frequencies.branch
    spam = balanced.spam
    assert [gate.filter.low_weight for gate in spam.gates] == [0.6, 0.9] and spam.gates[0].filter.radius == 1
    query, patches = torch.randn(2, 3, 8), torch.randn(2, 5, 4, 8)
    maps = patches.permute(0, 3, 1, 2)
    scale_E = layer.frequencies.scale_E.data = torch.rand(8)
    mixed = scale_E[:, None, None] * maps + spam(balanced.norm(maps))
    z = layer.gate(mixed.flatten(2).transpose(1, 2))
    logits, update = layer(query, patches)
    torch.testing.assert_close(logits, query @ z.mT)
    torch.testing.assert_close(update, layer.project(logits.softmax(-1) @ z))
    assert decoder(patches, torch.randn(2, 8), torch.randn(3, 8)).shape == (2, 3, 5, 4)


@pytest.mark.parametrize("kind", ["spectral", "balanced"])
def test_shortcut_adds_the_patches_and_starts_at_one(kind):
    changes = {"decoder": kind, "decoder_layers": 1, "heads": 4}
    with_it = build_decoder(preset("spt_seg", **changes, shortcut=True), 8).eval().attentions[0].frequencies
    without = build_decoder(preset("spt_seg", **changes), 8).eval().attentions[0].frequencies
    without.load_state_dict(with_it.branch.state_dict())
    patches = torch.randn(2, 6, 6, 8)
    torch.testing.assert_close(with_it(patches), patches + without(patches))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"balance": (0.7, 1.5)}, "low_weight=1.5 is outside"),
        ({"balance": (0.5,) * 7}, "gates left over"),
        ({"balance_radius": 0}, "balance_radius=0"),
        ({"balance": ()}, "balance"),
    ],
)
def test_bad_balances_are_refused_before_training(changes, message):
    with pytest.raises(ValueError, match=message):
        build_decoder(preset("spt_balanced", heads=4, **changes), 8)

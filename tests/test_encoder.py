"""The encoder against open_clip itself, and prompts where the paper puts them."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import nn

from sptseg_lib.clip.backbone import VisionBackbone
from sptseg_lib.encoder import PromptedEncoder

PATCH = 4


def vit(image_size=16, **changes) -> VisionTransformer:
    config = {"patch_size": PATCH, "width": 24, "layers": 3, "heads": 2, "mlp_ratio": 2.0, "output_dim": 10}
    return VisionTransformer(image_size=image_size, **config | changes).eval()


def encoder(visual=None, **changes) -> PromptedEncoder:
    config = {
        "prompt_tokens": 3, "spectral_layers": (1, 2), "spectral_shared": False, "spectral_grid": (4, 4),
        "class_token_twice": False, "dropout": 0.1,
    }  # fmt: skip
    return PromptedEncoder(VisionBackbone(visual or vit()), **config | changes).eval()


@pytest.mark.parametrize(
    "changes",
    [{}, {"image_size": 16, "patch_size": 8}, {"width": 40, "heads": 5, "layers": 2, "ls_init_value": 0.3}],
)
def test_backbone_computes_what_open_clip_computes(changes):
    visual = vit(output_tokens=True, **changes)
    image = torch.randn(2, 3, 16, 16)
    pooled_BE, tokens_BND = visual(image)
    actual = VisionBackbone(visual)(image)
    torch.testing.assert_close(actual[:, 0], pooled_BE)
    torch.testing.assert_close(actual[:, 1:], tokens_BND @ visual.proj)


def test_backbone_takes_rectangular_images_with_resized_positions():
    square, wide = vit(16), vit((12, 20), output_tokens=True)
    backbone = VisionBackbone(square)
    weights = square.state_dict() | {"positional_embedding": backbone.positions((3, 5))}
    wide.load_state_dict(weights)
    image = torch.randn(2, 3, 12, 20)
    pooled_BE, tokens_BND = wide(image)
    actual = backbone(image)
    torch.testing.assert_close(actual[:, 0], pooled_BE)
    torch.testing.assert_close(actual[:, 1:], tokens_BND @ wide.proj)


@pytest.mark.parametrize("grid", [(3, 5), (7, 4), (4, 4)])
def test_positions_are_resized_bilinearly(grid):
    backbone = VisionBackbone(vit())
    old = backbone.positional_embedding[1:].view(4, 4, -1)
    actual = backbone.positions(grid)
    torch.testing.assert_close(actual[0], backbone.positional_embedding[0])

    def around(i: int, new: int) -> tuple[int, int, float]:
        """The two old cells about the centre of new cell i, and the second one's weight."""
        at = min(max((i + 0.5) * 4 / new - 0.5, 0), 3)
        return int(at), min(int(at) + 1, 3), at - int(at)

    for i in range(grid[0]):
        for j in range(grid[1]):
            (top, below, v), (left, right, u) = around(i, grid[0]), around(j, grid[1])
            expected = (1 - v) * ((1 - u) * old[top, left] + u * old[top, right])
            expected = expected + v * ((1 - u) * old[below, left] + u * old[below, right])
            torch.testing.assert_close(actual[1 + i * grid[1] + j], expected)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_prompts_enter_before_each_layer_and_spectra_where_told(size):
    """Equations 2 and 3 one image at a time, through open_clip's own layers."""
    visual = vit()
    model = encoder(visual, spectral_layers=(1, 3))
    image = torch.randn(2, 3, *size)
    encoded = model(image)
    h, w = size[0] // PATCH, size[1] // PATCH
    assert encoded.patches_BhwE.shape == (2, h, w, 10)
    tokens_BND, _ = model.backbone.embed(image)
    for b in range(2):
        g, H = tokens_BND[b, :1], tokens_BND[b, 1:]
        for layer, block in enumerate(visual.transformer.resblocks):
            if layer in (0, 2):
                prompt = model.spectral[layer // 2]
                H = H + prompt(H.view(1, h, w, -1), g)[0].flatten(0, 1)
            V = model.project_tokens(model.tokens_LMD[layer])
            out = block(torch.cat([g, V, H])[None])[0]
            g, H = out[:1], out[1 + len(V) :]
        joint = F.normalize(visual.ln_post(model.norm(torch.cat([g, H]))) @ visual.proj, dim=-1)
        torch.testing.assert_close(encoded.global_BE[b], joint[0])
        torch.testing.assert_close(encoded.patches_BhwE[b].flatten(0, 1), joint[1:])


def test_a_spectral_weight_of_zero_is_no_spectral_prompt():
    visual, image = vit(), torch.randn(2, 3, 16, 16)
    model, plain = encoder(visual), encoder(visual, spectral_layers=())
    plain.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(model(image).patches_BhwE, plain(image).patches_BhwE, atol=1e-4)
    for prompt in model.spectral:
        nn.init.zeros_(prompt.weight_hfD2)
    torch.testing.assert_close(model(image), plain(image), atol=0, rtol=0)


def test_layers_share_a_spectral_weight_or_have_their_own():
    assert len(encoder(spectral_layers=(1, 2, 3), spectral_shared=True).spectral) == 1
    assert len(encoder(spectral_layers=(1, 2, 3)).spectral) == 3
    assert not any(p.requires_grad for p in encoder(spectral_layers=(), prompt_tokens=0).parameters())


def test_the_class_embedding_can_be_added_twice():
    backbone, image = VisionBackbone(vit(no_ln_pre=True)), torch.randn(1, 3, 16, 16)
    once, twice = (backbone.embed(image, flag)[0] for flag in (False, True))
    torch.testing.assert_close(twice[0, 0] - once[0, 0], backbone.class_embedding)
    torch.testing.assert_close(twice[:, 1:], once[:, 1:], atol=0, rtol=0)


def test_embeddings_have_unit_length_and_bfloat16_is_close_to_float32():
    model, image = encoder(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        exact = model(image)
        model.backbone.bfloat16()
        rough = model(image)
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a.norm(dim=-1), torch.ones(a.shape[:-1]))
        assert float((a * b).sum(-1).min()) > 0.998
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_backbone_in_bfloat16_stays_out_of_autocast(monkeypatch):
    """On a GPU autocast resizes positions in float32, which the layers' weights then do not fit."""
    resize = F.interpolate

    def as_on_a_gpu(x, **options):
        resized = resize(x, **options)
        return resized.float() if torch.is_autocast_enabled("cpu") else resized

    model, image = encoder(), torch.randn(2, 3, 24, 16)  # another grid than the backbone's
    model.backbone.bfloat16()
    expected = model(image)
    monkeypatch.setattr(F, "interpolate", as_on_a_gpu)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(image)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32 and float((a * b).sum(-1).min()) > 0.99


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_is_not_there_is_named(layer):
    with pytest.raises(ValueError, match=rf"\[{layer}\] do not exist: the backbone has layers 1 to 3"):
        encoder(spectral_layers=(1, layer))


@pytest.mark.parametrize("size", [(16, 18), (15, 16), (2, 16)])
def test_an_image_that_the_patch_does_not_divide_is_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]}×{size[1]} pixels cannot be cut into 4×4 patches"):
        encoder()(torch.randn(1, 3, *size))


class ModifiedResNet(nn.Module):
    """Stands for every tower that is no vision transformer."""


@pytest.mark.parametrize(
    ("visual", "named"),
    [
        (ModifiedResNet(), "ModifiedResNet"),
        (vit(pool_type="avg"), "VisionTransformer"),
        (vit(pool_type="avg", final_ln_after_pool=True), "VisionTransformer"),
        (vit(attentional_pool=True, attn_pooler_heads=2), "VisionTransformer"),
        (vit(block_type="custom", qk_norm=True), "VisionTransformer"),
    ],
    ids=["resnet", "average pool", "norm after pool", "attentional pool", "custom block"],
)
def test_only_plain_vits_with_a_class_token_are_wrapped(visual, named):
    with pytest.raises(ValueError, match=f"{named} is not a plain ViT with a class token"):
        VisionBackbone(visual)

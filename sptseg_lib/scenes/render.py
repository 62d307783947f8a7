"""ShapeScenes: pictures of things over stuff, rendered by torch in batches.

Every number that a scene needs is drawn from (seed, index) alone, so scene 7 is
scene 7 on any device and in any batch.
"""

from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from . import atlas
from .counter import hash32, stream, uniform

IGNORE = 255
GROUNDS = 2
_SCENE_SLOTS, _GROUND_SLOTS, _THING_SLOTS = 4, 10, 8


class SceneSettings(BaseModel):
    """How hard a scene is. Sizes are shares of the image width unless said otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(128, ge=8, description="image height and width in pixels")
    things: tuple[int, int] = Field((1, 3), description="fewest and most things in a scene")
    radius: tuple[float, float] = Field((0.16, 0.32), description="smallest and largest radius of a thing")
    plain: float = Field(0.3, ge=0, le=1, description="share of grounds without a texture (label 255)")
    split: float = Field(0.5, ge=0, le=1, description="share of scenes whose ground is cut in two")
    period: tuple[float, float] = Field((9.0, 16.0), description="texture period in pixels")
    contrast: tuple[float, float] = Field((0.35, 0.7), description="distance of a texture's two colours")
    noise: float = Field(0.04, ge=0, description="standard deviation of the pixel noise, image in [0, 1]")

    @model_validator(mode="after")
    def _ordered(self):
        for name in ("things", "radius", "period", "contrast"):
            low, high = getattr(self, name)
            if not 0 <= low <= high or (name in ("radius", "period") and low == 0):
                raise ValueError(f"{name}=({low}, {high}) must be 0 <= low <= high; swap or raise the values.")
        return self


DEFAULT = SceneSettings()


class Scenes(NamedTuple):
    """A rendered batch.

    image_B3HW: float32 in [0, 1]; label_BHW: uint8 class ids, 255 where the ground is plain.
    """

    image_B3HW: Tensor
    label_BHW: Tensor

    def visible_BK(self, least: float = 0.01) -> Tensor:
        """Which classes take at least this share of the pixels: (B, K) bool."""
        return class_shares(self.label_BHW) >= least


def class_shares(label_BHW: Tensor, classes: int = len(atlas.CLASSES)) -> Tensor:
    """Share of pixels of each class: (B, H, W) -> (B, K) float32; ignored pixels count in the total."""
    label_BP = label_BHW.flatten(1).long()
    counted_BP = label_BP != IGNORE
    share_BK = torch.zeros(len(label_BP), classes, device=label_BHW.device)
    share_BK.scatter_add_(1, label_BP.where(counted_BP, 0), counted_BP.float())
    return share_BK / label_BP.shape[1]


def _between(u: Tensor, span: tuple[float, float]) -> Tensor:
    return span[0] + u * (span[1] - span[0])


def _turned(x: Tensor, y: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate coordinates by `turn` full turns."""
    cos, sin = torch.cos(2 * torch.pi * turn), torch.sin(2 * torch.pi * turn)
    return x * cos + y * sin, y * cos - x * sin


def _render_grounds(u_BGS: Tensor, cut_BHW: Tensor, x: Tensor, y: Tensor, settings: SceneSettings):
    """Paint each pixel with the ground on its side of the cut: image (B, 3, H, W), label (B, H, W), mean colour."""
    side_BHW = cut_BHW.long()
    tiles = atlas.texture_tiles().to(x.device)
    plain_BG = u_BGS[..., 0] < settings.plain
    kind_BG = (u_BGS[..., 1] * len(atlas.STUFF)).long()
    width_BG = torch.tensor(atlas.TILE_PERIODS, device=x.device)[kind_BG] * _between(u_BGS[..., 2], settings.period)
    amount_BG = torch.where(plain_BG, 0.0, _between(u_BGS[..., 3], settings.contrast))
    mean_BGC = 0.2 + 0.6 * u_BGS[..., 4:7]
    # The two colours of a texture lie on either side of its mean, along a grey-ish direction.
    tint_BGC = torch.ones_like(mean_BGC).lerp(2 * u_BGS[..., [5, 6, 4]] - 1, 0.4)
    tint_BGC = tint_BGC / tint_BGC.abs().amax(-1, keepdim=True)

    def of_side(value_BG: Tensor) -> Tensor:
        return value_BG.gather(1, side_BHW.flatten(1)).view(side_BHW.shape)

    tu, tv = _turned(x, y, of_side(u_BGS[..., 7]))
    width_BHW = of_side(width_BG)
    column = ((tu / width_BHW + of_side(u_BGS[..., 8])) % 1 * atlas.TILE_CELLS).long().clamp_(max=atlas.TILE_CELLS - 1)
    row = ((tv / width_BHW + of_side(u_BGS[..., 9])) % 1 * atlas.TILE_CELLS).long().clamp_(max=atlas.TILE_CELLS - 1)
    value_BHW = tiles.flatten()[(of_side(kind_BG) * atlas.TILE_CELLS + row) * atlas.TILE_CELLS + column]
    signed_BHW = (value_BHW - 0.5) * of_side(amount_BG)
    weight_BGHW = torch.stack([~cut_BHW, cut_BHW], dim=1).float()
    image = torch.einsum("bghw,bgc->bchw", weight_BGHW, mean_BGC)
    image = image + torch.einsum("bghw,bgc->bchw", weight_BGHW * signed_BHW[:, None], tint_BGC)
    label_BG = torch.where(plain_BG, IGNORE, kind_BG + len(atlas.THINGS))
    return image, of_side(label_BG).to(torch.uint8), mean_BGC


def _thing_coverage(u_BTS: Tensor, x: Tensor, y: Tensor, settings: SceneSettings, kind_BT: Tensor) -> Tensor:
    """How much of each pixel each thing covers: (B, T, H, W) in [0, 1]."""
    field = atlas.shape_distances().to(x.device)
    radius_BT = _between(u_BTS[..., 1], settings.radius) * settings.size
    # Centres keep half a radius from the border, so that things are cut but never lost.
    margin = radius_BT * 0.6
    cx, cy = (margin + u_BTS[..., i] * (settings.size - 2 * margin) for i in (2, 3))
    dx, dy = _turned(x - cx[..., None, None], y - cy[..., None, None], u_BTS[..., 4, None, None])
    scale_BT = atlas.SHAPE_CELLS / (2 * atlas.SHAPE_EXTENT * radius_BT)[..., None, None]
    column, row = (
        (d * scale_BT + atlas.SHAPE_CELLS / 2).clamp_(0, atlas.SHAPE_CELLS - 1).to(torch.int32) for d in (dx, dy)
    )
    at = (kind_BT[..., None, None].int() * atlas.SHAPE_CELLS + row) * atlas.SHAPE_CELLS + column
    distance_BTHW = field.flatten()[at] * radius_BT[..., None, None]  # in pixels
    return (0.5 - distance_BTHW).clamp_(0, 1)


def render_scenes(index_B: Tensor, settings: SceneSettings = DEFAULT, seed: int = 0) -> Scenes:
    """Render the scenes with these indices.

    Shapes: (B,) int64 -> image (B, 3, H, W) in [0, 1], label (B, H, W) uint8.
    The result depends on (seed, index, settings) only; the device is that of index_B.
    """
    device, size = index_B.device, settings.size
    slots_T = settings.things[1]
    u = uniform(seed, index_B, _SCENE_SLOTS + GROUNDS * _GROUND_SLOTS + slots_T * _THING_SLOTS)
    u_scene, u_ground, u_thing = u.split([_SCENE_SLOTS, GROUNDS * _GROUND_SLOTS, slots_T * _THING_SLOTS], dim=1)
    axis = torch.arange(size, device=device) + 0.5
    y, x = axis[:, None], axis[None, :]

    across, _ = _turned(x - size / 2, y - size / 2, u_scene[:, 1, None, None])
    cut_BHW = across > ((u_scene[:, 2] - 0.5) * 0.6 * size)[:, None, None]
    cut_BHW = cut_BHW & (u_scene[:, 3] < settings.split)[:, None, None]
    image, label, mean_BGC = _render_grounds(u_ground.view(-1, GROUNDS, _GROUND_SLOTS), cut_BHW, x, y, settings)

    if slots_T:
        u_thing = u_thing.view(-1, slots_T, _THING_SLOTS)
        fewest, most = settings.things
        number_B = fewest + (u_scene[:, 0] * (most - fewest + 1)).long()
        here_BT = torch.arange(slots_T, device=device) < number_B[:, None]
        kind_BT = (u_thing[..., 0] * len(atlas.THINGS)).long()
        cover = _thing_coverage(u_thing, x, y, settings, kind_BT) * here_BT[..., None, None]
        # A thing of the ground's colour could not be seen: move it half a colour circle away.
        colour_BTC = u_thing[..., 5:8]
        near = (colour_BTC[:, :, None] - mean_BGC[:, None]).abs().amax(-1).amin(-1, keepdim=True) < 0.3
        colour_BTC = torch.where(near, (colour_BTC + 0.5) % 1, colour_BTC)
        # Later things lie on top: each is seen through what lies above it.
        above = (1 - cover.flip(1)).cumprod(1).flip(1)
        seen_through = torch.cat([above[:, 1:], torch.ones_like(above[:, :1])], dim=1)
        image = image * above[:, :1] + torch.einsum("bthw,btc->bchw", cover * seen_through, colour_BTC)
        solid = cover >= 0.5
        top = (solid * torch.arange(1, slots_T + 1, device=device)[:, None, None]).amax(1)
        thing = kind_BT.gather(1, (top - 1).clamp(min=0).flatten(1)).view(top.shape)
        label = torch.where(top > 0, thing.to(torch.uint8), label)

    if settings.noise:
        pixel_P = hash32(torch.arange(size * size, dtype=torch.int64, device=device))
        bits_BP = hash32(stream(seed ^ 0x5EED, index_B)[:, None] ^ pixel_P)
        # Two 16-bit uniforms make a triangular number with variance 1/6.
        grain_BP = ((bits_BP & 0xFFFF) + (bits_BP >> 16)).float() / 65536 - 1
        image = image + (settings.noise * 6**0.5) * grain_BP.view(-1, 1, size, size)
    return Scenes(image.clamp_(0, 1), label)

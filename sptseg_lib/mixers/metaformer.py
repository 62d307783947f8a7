"""MetaFormers: one skeleton of stages, blocks and scales for whatever mixes the tokens."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Scale = Literal["none", "res", "layer"]


def map_norm(width: int) -> nn.GroupNorm:
    """Norm over all channels and positions of a map: GroupNorm with one group."""
    return nn.GroupNorm(1, width)


class Residual(nn.Module):
    """A branch beside the map itself, one of the two scaled by a learned number a channel.

    none: x + f(norm x);  res, ResScale: s ⊙ x + f(norm x), s from 1;  layer, LayerScale: x + s ⊙ f(norm x), s from 1e-5

    Shapes: (B, C, h, w) -> the same. Raises: ValueError for another scale.
    """

    def __init__(self, width: int, branch: nn.Module, scale: Scale = "none"):
        super().__init__()
        if scale not in ("none", "res", "layer"):
            raise ValueError(f"scale={scale!r} is not 'none', 'res' or 'layer'; nothing would be scaled. Use one.")
        self.norm, self.branch, self.kind = map_norm(width), branch, scale
        start = 1.0 if scale == "res" else 1e-5
        self.scale_C11 = None if scale == "none" else nn.Parameter(torch.full((width, 1, 1), start))

    def forward(self, x_BChw: Tensor) -> Tensor:
        change_BChw = self.branch(self.norm(x_BChw))
        if self.kind == "res":
            return self.scale_C11 * x_BChw + change_BChw
        return x_BChw + (change_BChw if self.kind == "none" else self.scale_C11 * change_BChw)


def pointwise_network(width: int, hidden: int) -> nn.Sequential:
    """The channel MLP, as 1×1 convolutions: (B, C, h, w) -> the same."""
    return nn.Sequential(nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1))


class MetaFormer(nn.Module):
    """Stages of blocks; a block mixes tokens, then channels.

    Shapes: image (B, 3, H, W) -> one map a stage, (B, C_s, H / 2^(s+2), W / 2^(s+2)), sizes rounded as
    convolutions do. The stem is a 7×7 convolution of stride 4 and padding 2, each later stage begins with 3×3
    of stride 2 and padding 1. `mixer(stage, width)` makes a token mixer; `hidden(width, mixer)` is the
    width inside the channel MLP; `scales` name each stage's `Residual` scale.
    Raises: ValueError where the lists differ in length, or for an image that leaves a stage no pixel.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        mixer: Callable[[int, int], nn.Module],
        hidden: Callable[[int, nn.Module], int],
        scales: Sequence[Scale],
    ):
        super().__init__()
        if not len(widths) == len(blocks) == len(scales) > 0:
            raise ValueError(
                f"{len(widths)} widths, {len(blocks)} numbers of blocks and {len(scales)} scales do not describe the "
                "same stages; some would be left out. Give one of each a stage."
            )
        self.widths = tuple(widths)
        self.reduce, self.stages = nn.ModuleList(), nn.ModuleList()
        for stage, (width, count, scale) in enumerate(zip(widths, blocks, scales)):
            reduce = nn.Conv2d(3, width, 7, 4, 2) if stage == 0 else nn.Conv2d(widths[stage - 1], width, 3, 2, 1)
            self.reduce.append(reduce)
            body = []
            for _ in range(count):
                mix = mixer(stage, width)
                body.append(Residual(width, mix, scale))
                body.append(Residual(width, pointwise_network(width, hidden(width, mix)), scale))
            self.stages.append(nn.Sequential(*body))

    def mixers(self) -> dict[str, nn.Module]:
        """The token mixers by place, "stage.block" counted from 1, from the image on."""
        return {
            f"{s + 1}.{b // 2 + 1}": residual.branch
            for s, stage in enumerate(self.stages)
            for b, residual in enumerate(stage)
            if b % 2 == 0
        }

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        if min(image_B3HW.shape[-2:]) < 3:  # 7 of the stem less 2 · 2 of padding
            raise ValueError(
                f"An image of {image_B3HW.shape[-2]}×{image_B3HW.shape[-1]} pixels is smaller than the stem's kernel; "
                "enlarge it."
            )
        maps, x_BChw = [], image_B3HW
        for reduce, stage in zip(self.reduce, self.stages):
            x_BChw = stage(reduce(x_BChw))
            maps.append(x_BChw)
        return maps


class Classifier(nn.Module):
    """Class logits from the mean of the last stage's normalised map: (B, 3, H, W) -> (B, K)."""

    def __init__(self, backbone: MetaFormer, classes: int):
        super().__init__()
        self.backbone = backbone
        self.norm = map_norm(backbone.widths[-1])
        self.head = nn.Linear(backbone.widths[-1], classes)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        return self.head(self.norm(self.backbone(image_B3HW)[-1]).mean(dim=(-2, -1)))


class DenseClassifier(nn.Module):
    """Class logits a pixel: (B, 3, H, W) -> (B, K, H, W); `head` takes the normalised maps of all stages."""

    def __init__(self, backbone: MetaFormer, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.norms = nn.ModuleList(map_norm(width) for width in backbone.widths)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        maps = [norm(x_BChw) for norm, x_BChw in zip(self.norms, self.backbone(image_B3HW))]
        return nn.functional.interpolate(self.head(maps), size=image_B3HW.shape[-2:], mode="bilinear")

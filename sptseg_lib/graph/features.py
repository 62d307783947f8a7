"""Patch features of any plain ViT: the keys, queries, values or tokens of one of its blocks."""

from dataclasses import dataclass
from typing import Literal

import open_clip
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.backbone import VisionBackbone, attention_inputs, run_block
from ..clip.load import RANDOM, TINY, load_clip
from ..clip.weights import load_weights

Kind = Literal["query", "key", "value", "token"]
_PARTS = ("query", "key", "value")
# The backbones of the paper, by the names that their authors gave them.
DINO = {
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
}


@dataclass(frozen=True, eq=False)
class Featurizer:
    """A frozen ViT that turns images with values in [0, 1] into patch features or into one vector each."""

    name: str
    model: nn.Module  # a VisionBackbone, or a timm VisionTransformer
    patch: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.blocks

    def normalised(self, image_B3HW: Tensor) -> Tensor:
        if not image_B3HW.isfinite().all():
            raise ValueError(
                f"{int((~image_B3HW.isfinite()).sum())} pixel value(s) are NaN or infinite, and so would be all "
                "features; mend the image."
            )
        height, width = image_B3HW.shape[-2:]
        if min(height, width) < self.patch or height % self.patch or width % self.patch:
            raise ValueError(
                f"An image of {height}×{width} pixels cannot be cut into {self.patch}×{self.patch} patches without "
                f"losing a border; resize or pad it to multiples of {self.patch}."
            )
        mean_311, std_311 = (torch.tensor(x, device=image_B3HW.device).view(3, 1, 1) for x in (self.mean, self.std))
        return (image_B3HW - mean_311) / std_311

    @torch.no_grad()
    def __call__(self, image_B3HW: Tensor, kind: Kind = "key", block: int | None = None) -> Tensor:
        """Features of all patches, of unit length: (B, 3, H, W) -> (B, h, w, C).

        block counts from 1; None is the last. "token" is what the block puts out, the others what its attention reads.
        The class token is dropped. Raises: ValueError for an unknown kind or block, or an image that
        patches cannot tile.
        """
        block = len(self.blocks) if block is None else block
        if kind not in (*_PARTS, "token") or not 1 <= block <= len(self.blocks):
            raise ValueError(
                f"There is no kind {kind!r} in block {block} of {self.name}; choose query, key, value or token and a "
                f"block from 1 to {len(self.blocks)}."
            )
        read = self._open_clip if isinstance(self.model, VisionBackbone) else self._timm
        f_BNC = read(self.normalised(image_B3HW), kind, block)
        grid = tuple(side // self.patch for side in image_B3HW.shape[-2:])
        return F.normalize(f_BNC[:, -grid[0] * grid[1] :].float(), dim=-1).unflatten(1, grid)

    def _open_clip(self, image_B3HW: Tensor, kind: Kind, block: int) -> Tensor:
        tokens_BND, _ = self.model.embed(image_B3HW)
        for earlier in self.blocks[: block - 1]:
            tokens_BND = run_block(earlier, tokens_BND)
        if kind == "token":
            return run_block(self.blocks[block - 1], tokens_BND)
        return attention_inputs(self.blocks[block - 1], tokens_BND)[_PARTS.index(kind)].transpose(1, 2).flatten(2)

    def _timm(self, image_B3HW: Tensor, kind: Kind, block: int) -> Tensor:
        source, caught = self.blocks[block - 1], []
        source = source if kind == "token" else source.attn.qkv
        hook = source.register_forward_hook(lambda module, inputs, output: caught.append(output))
        try:
            self.model.forward_features(image_B3HW)
        finally:
            hook.remove()
        return caught[0] if kind == "token" else caught[0].chunk(3, dim=-1)[_PARTS.index(kind)]

    @torch.no_grad()
    def describe(self, image_B3HW: Tensor) -> Tensor:
        """One unit vector an image, from its class token: (B, 3, H, W) -> (B, E)."""
        image_B3HW = self.normalised(image_B3HW)
        if isinstance(self.model, VisionBackbone):
            return F.normalize(self.model(image_B3HW)[:, 0].float(), dim=-1)
        return F.normalize(self.model.forward_features(image_B3HW)[:, 0].float(), dim=-1)


def load_featurizer(name: str = TINY, weights: str | None = None) -> Featurizer:
    """A featurizer by name, in evaluation mode.

    name: "sptseg-tiny" (shipped), any open_clip model, one of DINO, or "timm/" and any timm ViT.
    weights: a path, "random" (the same numbers every time), an open_clip tag, or None: the shipped ones, for a timm ViT
    those of timm's hub, which are downloaded.
    Raises: ValueError for an unknown name or a model that is no ViT; ConnectionError where weights cannot be fetched.
    """
    if name == TINY or name in open_clip.list_models():
        clip = load_clip(name, weights)
        backbone = VisionBackbone(clip.model.visual)
        return Featurizer(name, backbone, backbone.patch, clip.mean, clip.std)
    own = DINO.get(name, name.removeprefix("timm/"))
    if name not in DINO and not (name.startswith("timm/") and own.partition(".")[0] in timm.list_models()):
        raise ValueError(
            f"There is no ViT {name!r}. Nothing was loaded; choose {TINY}, an open_clip model, {', '.join(DINO)}, "
            "or timm/ and the name of a timm ViT."
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(own, pretrained=weights is None, num_classes=0, dynamic_img_size=True)
    except TypeError:
        raise ValueError(
            f"{own} takes no images of other sizes and is no plain ViT. Its patches could not be read; choose one of "
            "timm's vit_ models."
        ) from None
    except Exception as error:  # the hub's client raises errors of several libraries
        raise ConnectionError(
            f"The weights of {name} could not be fetched ({type(error).__name__}: {error}). Features of random weights "
            "would mean nothing; download them elsewhere and pass weights=PATH, or use sptseg-tiny."
        ) from error
    if not (hasattr(model, "blocks") and hasattr(model.blocks[0], "attn") and hasattr(model.blocks[0].attn, "qkv")):
        raise ValueError(f"{own} has no blocks with one qkv map: it is no plain ViT; choose one of timm's vit_ models.")
    if weights not in (None, RANDOM):
        load_weights(model, weights, own)
    data = model.pretrained_cfg
    return Featurizer(name, model.eval(), model.patch_embed.patch_size[0], tuple(data["mean"]), tuple(data["std"]))

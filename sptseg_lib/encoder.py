"""The prompted encoder: a frozen CLIP with visual prompts before every layer and spectral ones before some."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .clip.backbone import VisionBackbone, run_block
from .graph.prompt import GraphPrompt, image_basis
from .spectral.prompt import SpectralPrompt


class Encoded(NamedTuple):
    """patches_BhwE and global_BE, each of unit length in the joint space."""

    patches_BhwE: Tensor
    global_BE: Tensor


class PromptedEncoder(nn.Module):
    """CLIP's image encoder with learned tokens and spectral prompts.

    [g, _, H] = Layer([g, V, H + S])    [SPT-SEG, eq. 2; eq. 3 where there is no S]

    Shapes: image (B, 3, H, W) -> patches (B, h, w, E), global (B, E).
    `spectral_layers` counts from 1, as the paper does. With `graph_modes`, S filters on the image's own graph.
    The backbone is frozen and may be bfloat16; what is learned stays float32, with `train_backbone` the backbone too.
    Without any prompt there is no norm of its own either, and the encoder is CLIP's.
    Raises: ValueError for a layer that the backbone does not have.
    """

    def __init__(
        self,
        backbone: VisionBackbone,
        prompt_tokens: int,
        spectral_layers: tuple[int, ...],
        spectral_shared: bool,
        spectral_grid: tuple[int, int],
        class_token_twice: bool,
        dropout: float,
        graph_modes: int = 0,
        train_backbone: bool = False,
    ):
        super().__init__()
        layers = len(backbone.blocks)
        if outside := [layer for layer in spectral_layers if not 1 <= layer <= layers]:
            raise ValueError(
                f"spectral_layers {outside} do not exist: the backbone has layers 1 to {layers}. "
                "No spectral prompt would enter there; choose among those."
            )
        self.backbone = backbone.requires_grad_(train_backbone)
        self.class_token_twice = class_token_twice
        width = backbone.width
        if prompt_tokens:
            bound = (6 / (3 * backbone.patch**2 + width)) ** 0.5
            self.tokens_LMD = nn.Parameter(torch.empty(layers, prompt_tokens, width).uniform_(-bound, bound))
            self.project_tokens = nn.Linear(width, width)
            nn.init.kaiming_normal_(self.project_tokens.weight, a=0, mode="fan_out")
        else:
            self.tokens_LMD = None
        self.dropout = nn.Dropout(dropout)
        # Layer l uses spectral prompt spectral_index[l]: always 0 when they share one weight.
        chosen = sorted(set(spectral_layers))
        self.spectral_index = {layer - 1: 0 if spectral_shared else i for i, layer in enumerate(chosen)}
        self.graph_modes = graph_modes
        self.spectral = nn.ModuleList(
            GraphPrompt(graph_modes, width) if graph_modes else SpectralPrompt(spectral_grid, width)
            for _ in range(len(set(self.spectral_index.values())))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6) if prompt_tokens or chosen else nn.Identity()
        self.checkpointing = False  # keep each layer's input alone, and compute the layer again for its gradient

    def forward(self, image_B3HW: Tensor) -> Encoded:
        # The frozen backbone computes in its own number type throughout: autocast would mix two in it.
        frozen = partial(torch.autocast, image_B3HW.device.type, enabled=False)
        basis = ()  # Fourier's needs no image
        with frozen():
            tokens_BND, (h, w) = self.backbone.embed(image_B3HW, self.class_token_twice)
            if self.graph_modes and self.spectral_index:
                basis = (image_basis(self.backbone, tokens_BND, (h, w), self.graph_modes),)
        B, dtype = len(tokens_BND), tokens_BND.dtype
        cls_B1D, patches_BND = tokens_BND[:, :1], tokens_BND[:, 1:]
        if self.tokens_LMD is not None:
            prompts_LMD = self.project_tokens(self.tokens_LMD)
        for layer, block in enumerate(self.backbone.blocks):
            if layer in self.spectral_index:
                prompt = self.spectral[self.spectral_index[layer]]
                s_BhwD = prompt(patches_BND.unflatten(1, (h, w)), cls_B1D[:, 0], *basis)
                patches_BND = patches_BND + s_BhwD.flatten(1, 2).to(dtype)
            parts = [cls_B1D, patches_BND]
            if self.tokens_LMD is not None:
                parts.insert(1, self.dropout(prompts_LMD[layer].expand(B, -1, -1)).to(dtype))
            with frozen():
                tokens_BND = torch.cat(parts, dim=1)
                if self.checkpointing and tokens_BND.requires_grad:
                    # No layer draws random numbers: there is no state of theirs to restore.
                    tokens_BND = checkpoint(run_block, block, tokens_BND, use_reentrant=False, preserve_rng_state=False)
                else:
                    tokens_BND = run_block(block, tokens_BND)
            cls_B1D, patches_BND = tokens_BND[:, :1], tokens_BND[:, -h * w :]
        kept_BND = self.norm(torch.cat([cls_B1D, patches_BND], dim=1).float())
        with frozen():
            joint_BNE = F.normalize(self.backbone.project(kept_BND.to(dtype)).float(), dim=-1)
        return Encoded(joint_BNE[:, 1:].unflatten(1, (h, w)), joint_BNE[:, 0])

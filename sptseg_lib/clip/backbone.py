"""An open_clip vision transformer, taken apart so that prompts can enter between its layers."""

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from ..attention import attend, join_heads, split_heads


def attention_inputs(block: ResidualAttentionBlock, tokens_BND: Tensor) -> Tensor:
    """Queries, keys and values of one layer: (B, N, D) -> (3, B, H, N, d)."""
    attention = block.attn
    qkv = F.linear(block.ln_1(tokens_BND), attention.in_proj_weight, attention.in_proj_bias)
    return torch.stack([split_heads(part, attention.num_heads) for part in qkv.chunk(3, dim=-1)])


def activate(activation: nn.Module, hidden: Tensor) -> Tensor:
    """The block's own activation; QuickGELU, x·σ(1.702 x), as a scaled SiLU, which keeps one tensor instead of two."""
    return F.silu(1.702 * hidden) / 1.702 if isinstance(activation, QuickGELU) else activation(hidden)


def run_block(block: ResidualAttentionBlock, tokens_BND: Tensor) -> Tensor:
    """One pre-norm transformer layer: (B, N, D) -> (B, N, D).

    x ← x + Attention(LN x);  x ← x + MLP(LN x)
    """
    mixed_BND = join_heads(attend(*attention_inputs(block, tokens_BND)))
    tokens_BND = tokens_BND + block.ls_1(block.attn.out_proj(mixed_BND))
    hidden_BND = block.mlp.c_fc(block.ln_2(tokens_BND))
    return tokens_BND + block.ls_2(block.mlp.c_proj(activate(block.mlp.gelu, hidden_BND)))


class VisionBackbone(nn.Module):
    """The image side of CLIP: patch embedding, layers, final norm and projection.

    Wraps any plain `open_clip` ViT with a class token. It computes what `encode_image`
    computes, for images of any size that the patch divides, square or not.
    """

    def __init__(self, visual: VisionTransformer):
        super().__init__()
        plain = isinstance(visual, VisionTransformer) and all(
            type(block) is ResidualAttentionBlock for block in getattr(visual.transformer, "resblocks", [])
        )
        if not plain or visual.attn_pool is not None or visual.pool_type != "tok" or visual.final_ln_after_pool:
            raise ValueError(
                f"{type(visual).__name__} is not a plain ViT with a class token. Prompts would enter at the wrong "
                "place; choose a model such as ViT-B-16, ViT-L-14 or sptseg-tiny."
            )
        self.conv1 = visual.conv1
        self.class_embedding = visual.class_embedding
        self.positional_embedding = visual.positional_embedding
        self.ln_pre, self.ln_post, self.proj = visual.ln_pre, visual.ln_post, visual.proj
        self.blocks = visual.transformer.resblocks
        self.grid = visual.grid_size
        self.patch = visual.patch_size[0]
        self.width, self.joint = visual.proj.shape

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings for a grid of h × w patches: (1 + h·w, D), resized bilinearly."""
        if grid == tuple(self.grid):
            return self.positional_embedding
        cls_1D, patches_ND = self.positional_embedding.split([1, self.grid[0] * self.grid[1]])
        patches_1Dhw = patches_ND.T.reshape(1, self.width, *self.grid)
        resized = F.interpolate(patches_1Dhw, size=grid, mode="bilinear", align_corners=False)
        return torch.cat([cls_1D, resized[0].flatten(1).T])

    def embed(self, image_B3HW: Tensor, class_token_twice: bool = False) -> tuple[Tensor, tuple[int, int]]:
        """Tokens that enter the first layer: (B, 3, H, W) -> (B, 1 + h·w, D) and the grid (h, w).

        `class_token_twice` adds the class embedding a second time, as ZegCLIP's and SPT-SEG's
        released encoders do. Raises ValueError where the patch does not divide the image.
        """
        height, width = image_B3HW.shape[-2:]
        if min(height, width) < self.patch or height % self.patch or width % self.patch:
            raise ValueError(
                f"An image of {height}×{width} pixels cannot be cut into {self.patch}×{self.patch} patches without "
                f"losing a border; resize or pad it to multiples of {self.patch}."
            )
        patches_BDhw = self.conv1(image_B3HW.to(self.conv1.weight.dtype))
        grid = tuple(patches_BDhw.shape[-2:])
        patches_BND = patches_BDhw.flatten(2).transpose(1, 2)
        cls_B1D = self.class_embedding.expand(len(patches_BND), 1, -1)
        tokens_BND = torch.cat([cls_B1D, patches_BND], dim=1) + self.positions(grid)
        if class_token_twice:
            tokens_BND = torch.cat([tokens_BND[:, :1] + cls_B1D, tokens_BND[:, 1:]], dim=1)
        return self.ln_pre(tokens_BND), grid

    def project(self, tokens_BND: Tensor) -> Tensor:
        """Final norm and projection to the joint space: (B, N, D) -> (B, N, E)."""
        return self.ln_post(tokens_BND) @ self.proj

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """All tokens in the joint space, class token first: (B, 3, H, W) -> (B, 1 + h·w, E)."""
        tokens_BND, _ = self.embed(image_B3HW)
        for block in self.blocks:
            tokens_BND = run_block(block, tokens_BND)
        return self.project(tokens_BND)

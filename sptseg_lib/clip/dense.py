"""Training-free dense CLIP: the value path of the last layer in the place of its attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbone import VisionBackbone, attention_inputs, run_block


@torch.inference_mode()
def dense_clip(backbone: VisionBackbone, image_B3HW: Tensor, class_text_KE: Tensor) -> Tensor:
    """Cosine similarity of patches to class texts, (B, 3, H, W), (K, E) -> (B, K, h, w).

    In the last layer each patch keeps its own value instead of the mix that attention makes of all
    values, and skips the layer's MLP; class evidence then stays where it was found (MaskCLIP,
    Zhou, Loy and Dai 2022).
    """
    tokens_BND, grid = backbone.embed(image_B3HW)
    for block in backbone.blocks[:-1]:
        tokens_BND = run_block(block, tokens_BND)
    last = backbone.blocks[-1]
    value_BHNd = attention_inputs(last, tokens_BND)[2]
    value_BND = last.attn.out_proj(value_BHNd.transpose(1, 2).flatten(2))
    return _similarity(backbone.project(value_BND), class_text_KE, grid)


@torch.inference_mode()
def patch_tokens(backbone: VisionBackbone, image_B3HW: Tensor, class_text_KE: Tensor) -> Tensor:
    """Cosine similarity of the last layer's patch tokens, as they are: shapes as `dense_clip`.

    For CLIPs trained on the class token alone this is worse than the value path; the tiny CLIP's
    patches were trained on captions too, and it is better.
    """
    grid = tuple(side // backbone.patch for side in image_B3HW.shape[-2:])
    return _similarity(backbone(image_B3HW), class_text_KE, grid)


def _similarity(joint_BNE: Tensor, class_text_KE: Tensor, grid: tuple[int, int]) -> Tensor:
    patches_BNE = F.normalize(joint_BNE.float(), dim=-1)[:, 1:]
    return (patches_BNE @ class_text_KE.T).transpose(1, 2).unflatten(-1, grid)

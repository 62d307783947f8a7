"""The graph spectral prompt: eq. 1 with the image's own Laplacian eigenvectors in the place of Fourier's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clip.backbone import VisionBackbone, attention_inputs, run_block
from .affinity import feature_affinity
from .eigen import laplacian_eigenvectors


@torch.no_grad()
def image_basis(backbone: VisionBackbone, tokens_BND: Tensor, grid: tuple[int, int], modes: int) -> Tensor:
    """Orthonormal modes of each image, from the last block's keys: tokens that enter layer 1 -> (B, modes, N) float32.

    The columns of D^½ Y: eigenvectors of the symmetric Laplacian, smoothest first.
    Raises: ValueError for more modes than patches.
    """
    for block in backbone.blocks[:-1]:
        tokens_BND = run_block(block, tokens_BND)
    key_BND = attention_inputs(backbone.blocks[-1], tokens_BND)[1].transpose(1, 2).flatten(2)[:, 1:].float()
    affinity = feature_affinity(key_BND.unflatten(1, grid), storage="dense")
    vectors_BkN = laplacian_eigenvectors(affinity, modes, tolerance=1e-3).vectors_BkN
    return F.normalize(vectors_BkN * affinity.degrees()[:, None].sqrt(), dim=-1)


class GraphPrompt(nn.Module):
    """Prompt an image with its own patches, filtered on its own graph.

    S = Uᵀ(U(H ⊙ g) ⊙ w)    [SPT-SEG, eq. 1, with U the image's modes in the place of F]

    Shapes: patches (B, h, w, D), class token (B, D), modes U (B, m, N) -> (B, h, w, D), float32.
    The weight (m, D) is drawn from N(0, 0.02²). It counts modes, not frequencies, so any grid will do. Signs of the
    modes cancel: each is met twice.
    """

    def __init__(self, modes: int, width: int, std: float = 0.02):
        super().__init__()
        self.weight_mD = nn.Parameter(torch.randn(modes, width) * std)

    def forward(self, patches_BhwD: Tensor, cls_BD: Tensor, basis_BmN: Tensor) -> Tensor:
        gated_BND = (patches_BhwD.float() * cls_BD.float()[:, None, None, :]).flatten(1, 2)
        spectrum_BmD = basis_BmN @ gated_BND
        return (basis_BmN.transpose(1, 2) @ (spectrum_BmD * self.weight_mD)).unflatten(1, patches_BhwD.shape[1:3])

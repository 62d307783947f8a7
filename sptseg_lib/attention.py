"""Attention, the one place where queries meet keys."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Longest sequence for which two plain products beat the fused kernel on a CPU in bfloat16: with its backward pass,
# which takes 8x their time at 65 tokens and as long at 1,035, and without (data_scripts/benchmark_attention.py).
_PLAIN_WITH_GRADIENT, _PLAIN_WITHOUT = 512, 2048


def attend(q_BHNd: Tensor, k_BHmd: Tensor, v_BHmd: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for each head: (B, H, N, d), (B, H, m, d) twice -> (B, H, N, d)."""
    longest = _PLAIN_WITH_GRADIENT if torch.is_grad_enabled() else _PLAIN_WITHOUT
    small = max(q_BHNd.shape[-2], k_BHmd.shape[-2]) <= longest
    if q_BHNd.device.type == "cpu" and q_BHNd.dtype == torch.bfloat16 and small:
        score_BHNm = (q_BHNd * q_BHNd.shape[-1] ** -0.5) @ k_BHmd.transpose(-1, -2)
        return score_BHNm.softmax(-1) @ v_BHmd
    return F.scaled_dot_product_attention(q_BHNd, k_BHmd, v_BHmd)


def split_heads(x_BNC: Tensor, heads: int) -> Tensor:
    """(B, N, H·d) -> (B, H, N, d)."""
    return x_BNC.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x_BHNd: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H·d)."""
    return x_BHNd.transpose(1, 2).flatten(2)

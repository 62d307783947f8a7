"""Attention, the one place where queries meet keys."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# On a CPU in bfloat16 plain products beat the fused kernel: with its backward pass they take a fifth of its time at
# 65 tokens, and 0.6 of it at 1,035, where two heads at a time stay in the cache (data_scripts/benchmark_attention.py).
_WHOLE_UP_TO, _HEADS_AT_ONCE = 512, 2


def attend(q_BHNd: Tensor, k_BHmd: Tensor, v_BHmd: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v for each head: (B, H, N, d), (B, H, m, d) twice -> (B, H, N, d)."""
    if q_BHNd.device.type != "cpu" or q_BHNd.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q_BHNd, k_BHmd, v_BHmd)
    if max(q_BHNd.shape[-2], k_BHmd.shape[-2]) <= _WHOLE_UP_TO:
        return plain_attention(q_BHNd, k_BHmd, v_BHmd)
    return attend_in_pairs(q_BHNd, k_BHmd, v_BHmd)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, written out: (..., N, d), (..., m, d) twice -> (..., N, d)."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def attend_in_pairs(q_BHNd: Tensor, k_BHmd: Tensor, v_BHmd: Tensor) -> Tensor:
    """`plain_attention`, two heads at a time; for the gradient their weights (N, m) are computed again, not kept."""
    heads = zip(*(x.flatten(0, 1).split(_HEADS_AT_ONCE) for x in (q_BHNd, k_BHmd, v_BHmd)))
    if torch.is_grad_enabled():
        mixed = [checkpoint(plain_attention, *qkv, use_reentrant=False, preserve_rng_state=False) for qkv in heads]
    else:
        mixed = [plain_attention(*qkv) for qkv in heads]
    return torch.cat(mixed).unflatten(0, q_BHNd.shape[:2])


def split_heads(x_BNC: Tensor, heads: int) -> Tensor:
    """(B, N, H·d) -> (B, H, N, d)."""
    return x_BNC.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x_BHNd: Tensor) -> Tensor:
    """(B, H, N, d) -> (B, N, H·d)."""
    return x_BHNd.transpose(1, 2).flatten(2)

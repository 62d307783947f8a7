"""Random numbers that depend on (seed, index, slot) alone.

A stateful generator gives scene 7 different numbers in a batch of 8 and in a
batch of 64. A counter-based one does not: each number is a hash of its address,
so a scene is the same on any device, in any batch, in any order.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def hash32(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64; any shape in, the same shape out.

    Two rounds of xor-shift and multiply (the "lowbias32" constants): every input
    bit flips each output bit with a chance near one half.
    """
    x = x & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def stream(seed: int, index_B: Tensor) -> Tensor:
    """One 32-bit stream number for each (seed, index) pair: (B,) -> (B,) int64."""
    start = hash32(torch.tensor([seed & _MASK], dtype=torch.int64, device=index_B.device))
    start = hash32(start + (seed >> 32))
    high = hash32(start ^ (index_B >> 32))
    return hash32(high + hash32(index_B & _MASK))


def uniform(seed: int, index_B: Tensor, slots: int) -> Tensor:
    """Uniform numbers in [0, 1): (B,) indices -> (B, slots) float32."""
    slot_S = torch.arange(slots, dtype=torch.int64, device=index_B.device)
    bits_BS = hash32(stream(seed, index_B)[:, None] ^ hash32(slot_S + 0x9E3779B9))
    return (bits_BS >> 8).float() * 2.0**-24

"""High- and low-frequency attention heads over a grid of patches."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Few keys each: two plain products beat a fused kernel here, above all backwards.
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


class HighFrequencyHeads(nn.Module):
    """Self-attention inside s × s windows: only what differs within a window can matter.

    Concat_h SA_h(X̂), X̂ cut into non-overlapping windows    [SPT-SEG, eq. 4]

    Shapes: (B, h, w, C) -> (B, h, w, heads·d); s must divide h and w.
    `project` adds the output projection of the equation's text, which the released code leaves out.
    """

    def __init__(self, width: int, heads: int, head_width: int, window: int, project: bool):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.project = nn.Linear(heads * head_width, heads * head_width) if project else nn.Identity()

    def forward(self, x_BhwC: Tensor) -> Tensor:
        B, h, w, _ = x_BhwC.shape
        s = self.window
        rows, columns = h // s, w // s
        qkv = self.qkv(x_BhwC).view(B, rows, s, columns, s, 3, self.heads, -1)
        # -> (3, B, windows, heads, s·s, d): one attention problem for each window and head
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, B, rows * columns, self.heads, s * s, -1)
        out = _attend(q, k, v).view(B, rows, columns, self.heads, s, s, -1)
        return self.project(out.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, h, w, -1))


class LowFrequencyHeads(nn.Module):
    """Every patch attends to the means of s × s windows: the image without its details.

    Concat_h SA_h(AvgPool(X̂))    [SPT-SEG, eq. 5]; queries are all patches, as released.

    Shapes: (B, h, w, C) -> (B, h, w, heads·d); s must divide h and w.
    """

    def __init__(self, width: int, heads: int, head_width: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.q = nn.Linear(width, heads * head_width, bias=False)
        self.kv = nn.Linear(width, 2 * heads * head_width, bias=False)
        self.project = nn.Linear(heads * head_width, heads * head_width)

    def forward(self, x_BhwC: Tensor) -> Tensor:
        B, h, w, C = x_BhwC.shape
        s = self.window
        mean_BPC = x_BhwC.view(B, h // s, s, w // s, s, C).mean(dim=(2, 4)).flatten(1, 2)
        q = self.q(x_BhwC.flatten(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(mean_BPC).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.project(_attend(q, k, v).transpose(1, 2).flatten(2)).view(B, h, w, -1)


class FrequencyAttention(nn.Module):
    """High heads and low heads side by side.

    z = [MSA_α(X̂); MSA_{1-α}(X̂)]    [SPT-SEG, eq. 6]

    Shapes: (B, h, w, C) -> (B, h, w, C). A grid that the window does not divide is padded with
    zeros on the right and at the bottom before queries, keys and values are made, as released.
    Raises: ValueError when the heads do not divide the width or high_heads exceeds them.
    """

    def __init__(self, width: int, heads: int, high_heads: int, window: int, high_projection: bool = True):
        super().__init__()
        if width % heads or not 0 <= high_heads <= heads:
            raise ValueError(
                f"{heads} heads, {high_heads} of them high, do not share out a width of {width}. Channels would be "
                "lost; choose heads that divide the width and at most that many high ones."
            )
        d = width // heads
        self.window = window
        low_heads = heads - high_heads
        self.high = HighFrequencyHeads(width, high_heads, d, window, high_projection) if high_heads else None
        self.low = LowFrequencyHeads(width, low_heads, d, window) if low_heads else None

    def forward(self, x_BhwC: Tensor) -> Tensor:
        h, w = x_BhwC.shape[1:3]
        padded = F.pad(x_BhwC, (0, 0, 0, -w % self.window, 0, -h % self.window))
        parts = [branch(padded) for branch in (self.high, self.low) if branch is not None]
        return torch.cat(parts, dim=-1)[:, :h, :w]

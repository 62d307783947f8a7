"""Semantic FPN: a pyramid of maps to one map of class logits."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class SemanticFPN(nn.Module):
    """Top-down pyramid, then every level brought to the finest one's size and summed    [Panoptic FPN, section 3].

    Shapes: maps (B, C_s, h_s, w_s), finest first -> logits (B, K, h_1, w_1), any sizes.
    A level l steps below the finest is convolved and doubled l times; the finest is convolved once.
    """

    def __init__(self, widths: Sequence[int], classes: int, pyramid: int = 256, width: int = 128, groups: int = 32):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(own, pyramid, 1) for own in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(pyramid, pyramid, 3, padding=1) for _ in widths)
        self.raise_level = nn.ModuleList()
        for level in range(len(widths)):
            steps = [
                nn.Sequential(
                    nn.Conv2d(pyramid if step == 0 else width, width, 3, padding=1, bias=False),
                    nn.GroupNorm(groups, width),
                    nn.ReLU(),
                )
                for step in range(max(1, level))
            ]
            self.raise_level.append(nn.ModuleList(steps))
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        sizes = [tuple(x.shape[-2:]) for x in maps]
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=sizes[i - 1], mode="nearest")
        total = 0
        for level, (smooth, steps) in enumerate(zip(self.smooth, self.raise_level)):
            x = smooth(levels[level])
            for done, step in enumerate(steps):
                x = step(x)
                if level:
                    # The next finer level's own size, not twice this one's: sizes may be odd.
                    x = F.interpolate(x, size=sizes[level - done - 1], mode="bilinear")
            total = total + x
        return self.classify(total)

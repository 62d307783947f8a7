"""The shapes and textures of ShapeScenes as two small look-up tables.

A shape is a signed distance field on [-1.25, 1.25]²: negative inside, in units of the
shape's radius, so that one table gives crisp, antialiased edges at any size. A texture
is a periodic tile with values in [0, 1]. A renderer looks both up with one gather.
"""

import math
from functools import cache

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

THINGS = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent", "arrow", "gear")
STUFF = ("stripes", "checkerboard", "dots", "waves", "bricks", "clouds")
CLASSES = THINGS + STUFF

SHAPE_CELLS = 160
SHAPE_EXTENT = 1.25
TILE_CELLS = 64
# How many basic periods wide a tile is: bricks need two rows, clouds need room.
TILE_PERIODS = (1.0, 1.5, 1.0, 1.5, 2.0, 3.5)


def _inside(x: Tensor, y: Tensor) -> Tensor:
    """(n, n) coordinates, y up -> (10, n, n) bool, one inside test for each thing."""
    r, angle = torch.hypot(x, y), torch.atan2(x, y)

    def polygon(corners: int) -> Tensor:
        """A regular polygon, a corner pointing up."""
        half = math.pi / corners
        return r * torch.cos((angle % (2 * half)) - half) <= math.cos(half)

    def star() -> Tensor:
        # Fold the plane into one half-spike and test against its edge.
        half = math.pi / 5
        fold = (angle % (2 * half) - half).abs()  # 0 in a notch, half at a tip
        tip = torch.tensor([math.sin(half), math.cos(half)])
        notch = torch.tensor([0.0, 0.42])
        edge = tip - notch
        px, py = r * torch.sin(fold), r * torch.cos(fold)
        return edge[0] * (py - notch[1]) - edge[1] * (px - notch[0]) <= 0

    hx, hy = 1.18 * x, 1.18 * y + 0.05
    head = (y >= 0.1) & (y <= 1) & (x.abs() <= (1 - y) * 0.85)
    shaft = (y >= -1) & (y <= 0.1) & (x.abs() <= 0.26)
    return torch.stack([
        r <= 0.9,
        torch.maximum(x.abs(), y.abs()) <= 0.78,
        polygon(3),
        star(),
        (r <= 0.95) & (r >= 0.55),
        ((x.abs() <= 0.3) & (y.abs() <= 0.95)) | ((y.abs() <= 0.3) & (x.abs() <= 0.95)),
        (hx**2 + hy**2 - 1) ** 3 - hx**2 * hy**3 <= 0,
        (r <= 0.95) & (torch.hypot(x - 0.45, y) >= 0.72),
        head | shaft,
        (r <= 0.74 + 0.22 * (torch.cos(8 * angle) > 0)) & (r >= 0.28),
    ])  # fmt: skip


@cache
def shape_distances() -> Tensor:
    """Signed distances of the ten things: (10, 160, 160), in radii, negative inside."""
    axis = (torch.arange(SHAPE_CELLS) + 0.5) / SHAPE_CELLS * 2 * SHAPE_EXTENT - SHAPE_EXTENT
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    inside_Knn = _inside(x, y)
    cell = 2 * SHAPE_EXTENT / SHAPE_CELLS
    # Distance to the nearest cell centre of the other side; one of the two is 0 everywhere.
    fields = [distance_transform_edt(~inside) - distance_transform_edt(inside) for inside in inside_Knn.numpy()]
    return torch.from_numpy(np.stack(fields) * cell).float()


@cache
def texture_tiles() -> Tensor:
    """The six textures: (6, 64, 64) in [0, 1], each periodic in both directions."""
    axis = (torch.arange(TILE_CELLS) + 0.5) / TILE_CELLS
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    turn = 2 * math.pi

    def soft(signal: Tensor, sharpness: float = 4.0) -> Tensor:
        return torch.sigmoid(sharpness * signal)

    du, dv = (u - 0.5).abs(), (v - 0.5).abs()
    row = v * 2 % 1
    column = (u + 0.5 * (v >= 0.5)) % 1
    mortar = torch.minimum(0.5 - (row - 0.5).abs(), 2 * (0.5 - (column - 0.5).abs()))
    noise = torch.randn(TILE_CELLS, TILE_CELLS, generator=torch.Generator().manual_seed(0))
    frequency = torch.fft.fftfreq(TILE_CELLS)
    radius = torch.hypot(frequency[:, None], frequency[None, :]) * TILE_CELLS
    clouds = torch.fft.ifft2(torch.fft.fft2(noise) / (1 + radius) ** 2.2).real
    return torch.stack([
        soft(torch.sin(turn * u)),
        soft(4 * torch.sin(turn * u) * torch.sin(turn * v)),
        soft(12 * (0.3 - torch.hypot(du, dv)), 3.0),
        soft(torch.sin(turn * (2 * u + 0.22 * torch.sin(turn * v)))),
        soft(20 * (mortar - 0.14), 2.0),
        soft(clouds / clouds.std(), 2.0),
    ])  # fmt: skip

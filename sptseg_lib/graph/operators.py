"""Affinity matrices W of a batch of graphs, known by their products W x.

The eigenvectors need nothing but products, so W need not be stored: N² numbers for the 153,600 pixels of a
small photograph would be 94 GB.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import torch
from torch import Tensor


class Affinity:
    """A symmetric W of B graphs with N nodes. Subclasses give `shape` (B, N), `like` and `product`."""

    shape: tuple[int, int]
    like: Tensor  # a tensor of the same device and type

    def product(self, x_BNk: Tensor) -> Tensor:
        """W x: (B, N, k) -> (B, N, k)."""
        raise NotImplementedError

    def degrees(self) -> Tensor:
        """Row sums of W: (B, N)."""
        return self.product(self.like.new_ones(*self.shape, 1))[..., 0]

    def dense(self) -> Tensor:
        """W in full, (B, N, N)."""
        B, N = self.shape
        return self.product(torch.eye(N, device=self.like.device, dtype=self.like.dtype).expand(B, N, N))


@dataclass(eq=False)
class DenseAffinity(Affinity):
    """W stored in full: (B, N, N).

    Products are taken as (xᵀ W)ᵀ, which reads a row-major W along its rows: half the time of W x on a CPU.
    """

    weight_BNN: Tensor

    def __post_init__(self):
        self.shape, self.like = tuple(self.weight_BNN.shape[:2]), self.weight_BNN

    def product(self, x_BNk: Tensor) -> Tensor:
        return (x_BNk.transpose(1, 2).contiguous() @ self.weight_BNN).transpose(1, 2)

    def degrees(self) -> Tensor:
        return self.weight_BNN.sum(-1)

    def dense(self) -> Tensor:
        return self.weight_BNN


@dataclass(eq=False)
class FeatureAffinity(Affinity):
    """W = f fᵀ of features (B, N, C), never stored.

    Clipped at 0 it has full rank, and strips of at most `strip_bytes` are made anew for each product: N² C work.
    Unclipped it has rank C, and f (fᵀ x) takes N C work.
    """

    feature_BNC: Tensor
    clipped: bool = True
    strip_bytes: int = 256 << 20

    def __post_init__(self):
        self.shape, self.like = tuple(self.feature_BNC.shape[:2]), self.feature_BNC

    def product(self, x_BNk: Tensor) -> Tensor:
        f_BNC = self.feature_BNC
        if not self.clipped:
            return f_BNC @ (f_BNC.transpose(1, 2) @ x_BNk)
        B, N = self.shape
        rows = max(1, self.strip_bytes // (B * N * f_BNC.element_size()))
        strips = [(strip @ f_BNC.transpose(1, 2)).relu_() @ x_BNk for strip in f_BNC.split(rows, dim=1)]
        return torch.cat(strips, dim=1)


@dataclass(eq=False)
class SparseAffinity(Affinity):
    """W with few entries: one block-diagonal sparse matrix (B·N, B·N) for the whole batch."""

    matrix: scipy.sparse.csr_array
    shape: tuple[int, int]
    like: Tensor

    def __post_init__(self):
        if self.like.device.type != "cpu":
            entries = self.matrix.tocoo()
            at = torch.from_numpy(np.stack([entries.row, entries.col])).long().to(self.like.device)
            value = torch.from_numpy(entries.data).to(self.like)
            self._on_device = torch.sparse_coo_tensor(at, value, self.matrix.shape, is_coalesced=True)

    def product(self, x_BNk: Tensor) -> Tensor:
        x_Rk = x_BNk.flatten(0, 1)
        if self.like.device.type == "cpu":
            return torch.from_numpy(self.matrix @ x_Rk.numpy()).view_as(x_BNk)
        return torch.sparse.mm(self._on_device.to(x_Rk.dtype), x_Rk).view_as(x_BNk)

    def dense(self) -> Tensor:
        B, N = self.shape
        weight_BNN = self.like.new_zeros(B, N, N)
        entries = self.matrix.tocoo()
        row, column = (torch.from_numpy(i).long() for i in (entries.row, entries.col))
        value = torch.from_numpy(entries.data).to(weight_BNN)
        weight_BNN.view(-1)[(row * N + column % N).to(value.device)] = value
        return weight_BNN


@dataclass(eq=False)
class LiftedAffinity(Affinity):
    """The affinity of coarse nodes carried to fine ones: W = U V Uᵀ with a sparse interpolation U, (B·N, B·n).

    A V ≥ 0 stays ≥ 0. Two fine nodes are as alike as the coarse nodes that they lie between.
    """

    coarse: Affinity
    interpolation: scipy.sparse.csr_array

    def __post_init__(self):
        B = self.coarse.shape[0]
        self.shape, self.like = (B, self.interpolation.shape[0] // B), self.coarse.like
        up = self.interpolation
        if self.like.device.type != "cpu":
            raise ValueError(
                f"Interpolated affinities run on the CPU and these features are on {self.like.device}; move them."
            )
        self._up, self._down = up, up.T.tocsr()

    def product(self, x_BNk: Tensor) -> Tensor:
        B, k = len(x_BNk), x_BNk.shape[-1]
        coarse_Bnk = torch.from_numpy(self._down @ x_BNk.reshape(-1, k).numpy()).view(B, -1, k)
        fine_Rk = self._up @ self.coarse.product(coarse_Bnk).reshape(-1, k).numpy()
        return torch.from_numpy(fine_Rk).view_as(x_BNk)


@dataclass(eq=False)
class SumAffinity(Affinity):
    """W₁ + weight · W₂."""

    first: Affinity
    second: Affinity
    weight: float

    def __post_init__(self):
        self.shape, self.like = self.first.shape, self.first.like

    def product(self, x_BNk: Tensor) -> Tensor:
        return self.first.product(x_BNk) + self.weight * self.second.product(x_BNk)

    def dense(self) -> Tensor:
        return self.first.dense() + self.weight * self.second.dense()

"""The smallest eigenvectors of graph Laplacians: (D − W) y = μ D y, D the diagonal of W's row sums.

With x = D^½ y these are the *largest* eigenvectors of the normalised affinity A = D^-½ W D^-½: A x = (1 − μ) x. The
largest ones are found with products alone; nothing is factorised. The first, y constant and μ = 0, is known and taken
out.
"""

import warnings
from typing import Literal, NamedTuple

import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from .operators import Affinity, DenseAffinity, SparseAffinity

Solver = Literal["auto", "dense", "sparse", "matrix-free"]
# Below this many nodes all eigenvectors at once are faster than a search for a few.
_DENSE_UP_TO = 128


class Eigen(NamedTuple):
    """values_Bk ascending; vectors_BkN with yᵀ D y = 1, signs fixed; residual_Bk, ‖A x − (1 − μ) x‖ of unit x."""

    values_Bk: Tensor
    vectors_BkN: Tensor
    residual_Bk: Tensor


def fix_signs(vectors_BkN: Tensor) -> Tensor:
    """Flip vectors whose share of positive entries lies strictly between 0.5 and 1: (..., N) -> the same.

    The smaller side, more often the object, becomes the positive one.
    """
    share = (vectors_BkN > 0).float().mean(-1, keepdim=True)
    return torch.where((share > 0.5) & (share < 1), -vectors_BkN, vectors_BkN)


def laplacian_eigenvectors(
    affinity: Affinity | Tensor, count: int, solver: Solver = "auto", tolerance: float = 1e-5, most_products: int = 200
) -> Eigen:
    """The `count` smallest eigenvectors of each graph of a batch, on the affinity's device.

    affinity: an Affinity, or W itself as (B, N, N). solver: "dense" takes all eigenvectors of the full matrix; "sparse"
    is scipy's shift-invert Lanczos, one graph at a time, for sparse W; "matrix-free" a block search with products
    alone; "auto" the last but for tiny graphs. All start from fixed numbers: the same input gives the same vectors.
    tolerance: largest residual of the matrix-free search, float32 reaches about 1e-6. It stops after `most_products`
    block products with a warning. A node without edges gets degree 1, as released: its μ is 1.
    The first vector is constant (0 on nodes without edges), also where the graph falls apart and μ = 0 comes again.
    Raises: ValueError for NaN, for count outside 1 to N, or for negative degrees.
    """
    if isinstance(affinity, Tensor):
        affinity = DenseAffinity(affinity)
    B, N = affinity.shape
    if not 1 <= count <= N:
        raise ValueError(
            f"{count} eigenvectors of a graph with {N} node(s) do not exist; ask for 1 to {N}, or use more patches."
        )
    degree_BN = affinity.degrees()
    _check_degrees(degree_BN)
    edged_BN = degree_BN > 1e-12
    root_BN = torch.where(edged_BN, degree_BN, 1.0).sqrt()
    first_BN = torch.where(edged_BN, root_BN, 0.0)
    first_BN = first_BN / first_BN.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if solver == "sparse":
        x_BNk = _sparse(affinity, count, root_BN, first_BN)
    elif solver == "dense" or N <= max(_DENSE_UP_TO, 6 * count):
        x_BNk = _dense(affinity, count, root_BN, first_BN)
    else:
        x_BNk = _search(affinity, count, root_BN, first_BN, tolerance, most_products)
    x_BNk = torch.cat([first_BN[..., None], x_BNk], dim=-1)
    ax_BNk = affinity.product(x_BNk / root_BN[..., None]) / root_BN[..., None]
    value_Bk = (x_BNk * ax_BNk).sum(1)
    residual_Bk = (ax_BNk - value_Bk[:, None] * x_BNk).norm(dim=1)
    vectors_BkN = (x_BNk / root_BN[..., None]).transpose(1, 2).contiguous()
    return Eigen(1 - value_Bk, fix_signs(vectors_BkN), residual_Bk)


def _check_degrees(degree_BN: Tensor) -> None:
    if not degree_BN.isfinite().all():
        raise ValueError(
            "The affinity holds NaN or infinite entries, and so would every eigenvector. Look for them in the features "
            "or the image, and mend those."
        )
    if (degree_BN < 0).any():
        raise ValueError(
            f"{int((degree_BN < 0).sum())} node(s) have a negative sum of affinities, down to "
            f"{float(degree_BN.min()):.3g}: the graph has no normalised Laplacian. Clip the affinity at 0."
        )


def _dense(affinity: Affinity, count: int, root_BN: Tensor, first_BN: Tensor) -> Tensor:
    a_BNN = affinity.dense() / root_BN[:, :, None] / root_BN[:, None, :]
    # The known vector is moved from the top of the spectrum, 1, to below its bottom, -1.
    a_BNN = a_BNN - 3 * first_BN[:, :, None] * first_BN[:, None, :]
    _, x_BNN = torch.linalg.eigh(a_BNN)
    return x_BNN.flip(-1)[..., : count - 1]


def _sparse(affinity: Affinity, count: int, root_BN: Tensor, first_BN: Tensor) -> Tensor:
    if not isinstance(affinity, SparseAffinity):
        raise ValueError(
            f"solver='sparse' factorises a sparse matrix and this is a {type(affinity).__name__}, which would fill the "
            "memory. Use solver='matrix-free'."
        )
    B, N = affinity.shape
    if count >= N - 1:
        return _dense(affinity, count, root_BN, first_BN)
    found = []
    for b, (root_N, first_N) in enumerate(zip(root_BN.cpu().double().numpy(), first_BN.cpu().double().numpy())):
        w = affinity.matrix[b * N : (b + 1) * N, b * N : (b + 1) * N].astype("float64")
        a = w.multiply(1 / root_N[:, None]).multiply(1 / root_N).tocsc()
        start_N = _fixed_block(1, N, 1, torch.ones(())).double().numpy()[0, :, 0]
        # The shift lies just above the spectrum of A, whose top is 1: shift-invert then turns to that end.
        _, x_Nk = eigsh(a, k=count, sigma=1 + 1e-6, v0=start_N)
        x_Nk = torch.from_numpy(x_Nk[:, ::-1].copy())
        # Where μ = 0 comes again, the known vector may be mixed into several: take it out and keep the others.
        x_Nk = x_Nk - torch.from_numpy(first_N)[:, None] * (torch.from_numpy(first_N) @ x_Nk)
        u_Nk, size_k, turn_kk = torch.linalg.svd(x_Nk, full_matrices=False)
        basis_Nk = u_Nk[:, : count - 1]
        small_kk = basis_Nk.T @ torch.from_numpy(a @ basis_Nk.numpy())
        found.append((basis_Nk @ torch.linalg.eigh(small_kk)[1]).flip(-1))
    return torch.stack(found).to(affinity.like)


def _fixed_block(B: int, N: int, width: int, like: Tensor) -> Tensor:
    """The same normal numbers on every call and device: (B, N, width)."""
    block_Nk = torch.randn(N, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return block_Nk.to(like).expand(B, N, width)


def _search(
    affinity: Affinity, count: int, root_BN: Tensor, first_BN: Tensor, tolerance: float, most_products: int
) -> Tensor:
    """Rayleigh-Ritz on a subspace that grows by the residuals of its best vectors (block Lanczos, restarted)."""
    B, N = affinity.shape
    wanted = count - 1
    if not wanted:
        return first_BN.new_zeros(B, N, 0)
    width = wanted + 2
    most = min(max(12 * width, 60), N - 1)  # columns before a restart
    root_BN1, first_BN1 = root_BN[..., None], first_BN[..., None]

    def orthogonal(z_BNk: Tensor, basis_BNm: Tensor) -> Tensor:
        # Twice: residuals are nearly parallel, and QR then magnifies what rounding left along the basis.
        for _ in range(2):
            z_BNk = z_BNk - basis_BNm @ (basis_BNm.transpose(1, 2) @ z_BNk)
            z_BNk = torch.linalg.qr(z_BNk)[0]
        return z_BNk

    q_BNm = orthogonal(_fixed_block(B, N, width, first_BN), first_BN1)
    aq_BNm = affinity.product(q_BNm / root_BN1) / root_BN1
    for _ in range(most_products):
        h_Bmm = q_BNm.transpose(1, 2) @ aq_BNm
        value_Bm, turn_Bmm = torch.linalg.eigh((h_Bmm + h_Bmm.transpose(1, 2)) / 2)
        value_Bk, turn_Bmk = value_Bm.flip(-1)[:, :width], turn_Bmm.flip(-1)[..., :width]
        x_BNk, ax_BNk = q_BNm @ turn_Bmk, aq_BNm @ turn_Bmk
        rest_BNk = ax_BNk - x_BNk * value_Bk[:, None]
        residual = float(rest_BNk[..., :wanted].norm(dim=1).max())
        if residual <= tolerance:
            return x_BNk[..., :wanted]
        if q_BNm.shape[-1] + width > most:
            # Restart with three times the vectors that are wanted: what is kept is not searched for again. A rotation
            # of orthonormal columns needs no new product.
            kept_Bmk = turn_Bmm.flip(-1)[..., : 3 * width]
            q_BNm, aq_BNm = q_BNm @ kept_Bmk, aq_BNm @ kept_Bmk
        new_BNk = orthogonal(rest_BNk, torch.cat([first_BN1, q_BNm], dim=-1))
        q_BNm = torch.cat([q_BNm, new_BNk], dim=-1)
        aq_BNm = torch.cat([aq_BNm, affinity.product(new_BNk / root_BN1) / root_BN1], dim=-1)
    warnings.warn(
        f"After {most_products} products the largest residual is {residual:.1e}, not {tolerance:.1e}: these "
        "eigenvectors are approximate. Raise most_products or the tolerance.",
        stacklevel=3,
    )
    return x_BNk[..., :wanted]

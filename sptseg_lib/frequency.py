"""What a layer does to frequencies: spectra before and after it, its transfer function, energy in bands.

Any module that takes maps (B, C, h, w) and gives maps of the same size can be measured; `on_tokens` and
`on_grid` lend that form to layers on tokens (B, N, C) and on grids (B, h, w, C). Frequencies are radial, in
cycles per sample of the map (0.5: a checkerboard's rows).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .spectral.bands import radial_frequency

TOP = 0.5 * 2**0.5  # the highest radial frequency: both axes at the limit


def on_tokens(layer: Callable[[Tensor], Tensor], first: int = 0) -> Callable[[Tensor], Tensor]:
    """A layer on tokens as one on maps: (B, N, C) in row-major order becomes (B, C, h, w).

    `first` tokens of the result, such as a class token, are left out.
    """

    def mapped(x_BChw: Tensor) -> Tensor:
        out_BNC = layer(x_BChw.flatten(2).transpose(1, 2))[:, first:]
        return out_BNC.transpose(1, 2).unflatten(2, x_BChw.shape[-2:])

    return mapped


def on_grid(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A layer on grids (B, h, w, C) as one on maps (B, C, h, w)."""
    return lambda x_BChw: layer(x_BChw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def bin_edges(bins: int) -> Tensor:
    """Edges of equal bins from 0 to the highest radial frequency: (bins + 1,), cycles per sample."""
    return torch.linspace(0, TOP, bins + 1)


def band_masks(grid: tuple[int, int], edges: Sequence[float] | Tensor) -> Tensor:
    """One mask a band, edges[i] <= frequency < edges[i+1], the last edge included: (bands, h, w), `fft2` order.

    Zero frequency, the mean, is in no band. Raises: ValueError for edges that do not rise from 0 or more.
    """
    edges = torch.as_tensor(edges, dtype=torch.float32)
    if len(edges) < 2 or edges[0] < 0 or (edges.diff() <= 0).any():
        raise ValueError(f"Band edges {edges.tolist()} do not rise from 0 or more; bands would overlap. Sort them.")
    radius_hw = radial_frequency(grid)
    low, high = edges[:-1, None, None], edges[1:, None, None].clone()
    high[-1] += 1e-4
    return ((radius_hw >= low - 1e-7) & (radius_hw < high - 1e-7) & (radius_hw > 0)).float()


def _amplitude(x_BChw: Tensor) -> Tensor:
    return torch.fft.fft2(x_BChw.detach().float(), norm="ortho").abs()


def energy_in_bands(x_BChw: Tensor, edges: Sequence[float]) -> Tensor:
    """Share of a map's energy in each band, the mean left out: (B, C, h, w) -> (B, bands).

    Shares sum to 1 where the edges reach from 0 to `TOP` and the map is not constant; a constant map has 0 everywhere.
    """
    energy_Bhw = _amplitude(x_BChw).square().sum(1)
    energy_Bhw[:, 0, 0] = 0
    in_band = torch.einsum("bhw,khw->bk", energy_Bhw, band_masks(tuple(x_BChw.shape[-2:]), edges).to(x_BChw.device))
    return in_band / energy_Bhw.sum((1, 2))[:, None].clamp(min=1e-20)


def relative_log_amplitude(x_BChw: Tensor, bins: int = 8, to_mean: bool = False) -> Tensor:
    """ln |F| at each radial frequency less ln |F| of a reference, both as means over channels: (B, bins).

    The reference is the lowest bin, so that a curve starts at 0, or with `to_mean` zero frequency, as in the
    literature; that one is of no use after a layer that removes the mean. A bin without a frequency is nan.
    """
    log_Bhw = _amplitude(x_BChw).clamp(min=1e-8).log().mean(1)
    mask_khw = band_masks(tuple(x_BChw.shape[-2:]), bin_edges(bins)).to(x_BChw.device)
    mean_Bk = torch.einsum("bhw,khw->bk", log_Bhw, mask_khw) / mask_khw.sum((1, 2))  # 0 / 0 is nan
    first = int(mask_khw.sum((1, 2)).nonzero()[0])
    return mean_Bk - (log_Bhw[:, 0, :1] if to_mean else mean_Bk[:, first : first + 1])


class Transfer(NamedTuple):
    """What a mixer does to small waves.

    frequency: 0, then the centres of the bins, cycles per sample: (1 + bins,). Zero frequency, the mean, stands alone.
    gain_kk[i, j]: amplitude that comes out in band j for amplitude 1 that goes in in band i. Its diagonal is the
    transfer function; what stands beside it has changed frequency. nan where the grid has no such frequency.
    """

    frequency: Tensor
    gain_kk: Tensor

    @property
    def kept(self) -> Tensor:
        """Gain within each band: |H| for a layer that is linear and shift-invariant."""
        return self.gain_kk.diagonal()

    @property
    def leaked(self) -> Tensor:
        """Amplitude that leaves each band for others, in root mean square."""
        return (self.gain_kk.square().nansum(1) - self.kept.square()).clamp(min=0).sqrt()


@torch.no_grad()
def transfer_function(
    mixer: Callable[[Tensor], Tensor],
    x_BChw: Tensor,
    bins: int = 8,
    size: float = 1e-2,
    seed: int = 0,
    residual: bool = False,
) -> Transfer:
    """The response of a mixer, at the working point x, to noise of one band at a time.

    A random map of band i and `size` times x's standard deviation is added and taken away again; half the
    difference of the two results is the linear response, whatever the mixer. With `residual` the map itself
    is added to it, as blocks do. Put modules into eval() first: dropout would count as response.
    Raises: ValueError where the mixer changes a map's size.
    """
    masks_khw = band_masks(tuple(x_BChw.shape[-2:]), bin_edges(bins))
    masks_khw = torch.cat([torch.zeros_like(masks_khw[:1]), masks_khw]).to(x_BChw.device)
    masks_khw[0, 0, 0] = 1
    generator = torch.Generator().manual_seed(seed)
    step = size * x_BChw.std().clamp(min=1e-12)
    rows = []
    for mask_hw in masks_khw:
        noise = torch.randn(x_BChw.shape, generator=generator).to(x_BChw)
        wave = torch.fft.ifft2(torch.fft.fft2(noise) * mask_hw).real
        wave = wave * (step / wave.std().clamp(min=1e-12))
        answer = (mixer(x_BChw + wave) - mixer(x_BChw - wave)) / 2
        if answer.shape[-2:] != x_BChw.shape[-2:]:
            raise ValueError(
                f"The layer turns maps of {tuple(x_BChw.shape[-2:])} into {tuple(answer.shape[-2:])}: frequencies "
                "before and after it are not the same ones. Measure a layer that keeps the grid."
            )
        answer = answer + wave if residual else answer
        out_k = (_amplitude(answer).square().sum(1) * masks_khw[:, None]).sum((1, 2, 3))
        put_in = _amplitude(wave).square().sum() * answer.shape[1] / wave.shape[1]  # per channel
        rows.append((out_k / put_in).sqrt())
    gain_kk = torch.stack(rows)
    empty = masks_khw.sum((1, 2)) == 0
    gain_kk[empty] = torch.nan
    gain_kk[:, empty] = torch.nan
    centres = bin_edges(bins).unfold(0, 2, 1).mean(1)
    return Transfer(torch.cat([torch.zeros(1), centres]), gain_kk)


@torch.no_grad()
def transfers_inside(
    model: Callable, layers: dict[str, nn.Module], *inputs: Tensor, bins: int = 8, seed: int = 0
) -> dict[str, Transfer]:
    """Transfer functions of layers on grids (B, h, w, C), each at what it gets in `model(*inputs)`.

    Whatever else a layer gets is held still. Raises: ValueError for layers that the model does not call.
    """
    given: dict[str, tuple] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, got, name=name: given.update({name: got}))
        for name, layer in layers.items()
    ]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if missing := layers.keys() - given.keys():
        raise ValueError(
            f"The model does not call {', '.join(sorted(missing))}: there is no input to measure at. Name layers "
            "of its own."
        )

    def measured(layer: nn.Module, x_BhwC: Tensor, *rest) -> Transfer:
        return transfer_function(on_grid(lambda x: layer(x, *rest)), x_BhwC.permute(0, 3, 1, 2), bins, seed=seed)

    return {name: measured(layer, *given[name]) for name, layer in layers.items()}


@contextmanager
def recorded(layers: dict[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and results of named layers during the forward passes inside: {name: (before, after)}, detached.

    A layer that is called more than once keeps its last call.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str):
        def hook(_module, inputs, result):
            seen[name] = (inputs[0].detach(), result.detach())

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()

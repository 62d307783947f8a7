"""Measurements of frequency, on signals and layers whose answer is known."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.testing import assert_close

from sptseg_lib import plots
from sptseg_lib.frequency import (
    TOP,
    band_masks,
    bin_edges,
    energy_in_bands,
    on_grid,
    on_tokens,
    recorded,
    relative_log_amplitude,
    transfer_function,
    transfers_inside,
)
from sptseg_lib.mixers.pooling import SpectralPoolingFilter
from sptseg_lib.spectral.bands import radial_frequency


def wave(grid, down, right):
    """cos of `down` periods over the height and `right` over the width: (1, 1, h, w)."""
    i, j = torch.meshgrid(torch.arange(grid[0]) / grid[0], torch.arange(grid[1]) / grid[1], indexing="ij")
    return torch.cos(2 * torch.pi * (down * i + right * j))[None, None]


@pytest.mark.parametrize("grid", [(16, 16), (9, 14)], ids=str)
def test_bands_share_out_all_frequencies_but_the_mean(grid):
    masks = band_masks(grid, bin_edges(5))
    expected = torch.ones(grid)
    expected[0, 0] = 0
    assert_close(masks.sum(0), expected)


def test_energy_is_found_in_the_bands_it_was_put_into():
    grid = (16, 24)
    x = torch.cat([wave(grid, 2, 0) + 5, wave(grid, 0, 12), wave(grid, 2, 0) + 2 * wave(grid, 0, 9)])
    # Frequencies 2/16 = 0.125; 12/24 = 0.5, at the limit with twice the energy of others; 9/24 = 0.375.
    shares = energy_in_bands(x, [0, 0.2, 0.4, TOP])
    assert_close(shares, torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0.2, 0.8, 0]]), atol=1e-5, rtol=0)
    assert_close(energy_in_bands(torch.ones(1, 2, 8, 8), [0, TOP]), torch.zeros(1, 1))


@pytest.mark.parametrize("edges", [[0.1], [0.2, 0.1], [-0.1, 0.2], [0, 0.1, 0.1]], ids=str)
def test_edges_that_do_not_rise_are_refused(edges):
    with pytest.raises(ValueError, match="do not rise"):
        energy_in_bands(torch.randn(1, 1, 8, 8), edges)


def test_relative_log_amplitude_follows_a_known_spectrum():
    grid, bins = (32, 32), 8
    radius = radial_frequency(grid)
    spectrum = torch.fft.fft2(torch.randn(32, 3, *grid)) * torch.exp(-3 * radius)
    white, coloured = torch.fft.fft2(torch.randn(32, 3, *grid)), torch.fft.ifft2(spectrum).real
    curve = relative_log_amplitude(coloured, bins).mean(0)
    masks = band_masks(grid, bin_edges(bins))
    mean_frequency = torch.stack([radius[mask > 0].mean() for mask in masks])
    assert curve[0] == 0
    assert_close(curve, -3 * (mean_frequency - mean_frequency[0]), atol=0.15, rtol=0)
    assert relative_log_amplitude(torch.fft.ifft2(white).real, bins).mean(0).abs().max() < 0.2


def test_amplitude_relative_to_the_mean_is_that_of_zero_frequency():
    x = wave((8, 8), 0, 2) * 0.5 + 3  # |F| is 3 · 8 at zero and 0.5 · 8 / 2 at ±2 turns, frequency 0.25
    x = x + 1e-3 * torch.randn(1, 1, 8, 8)
    at_two = band_masks((8, 8), bin_edges(6)).nonzero()
    band = int(at_two[(at_two[:, 1] == 0) & (at_two[:, 2] == 2)][0, 0])
    members = at_two[at_two[:, 0] == band][:, 1:]
    amplitude = torch.fft.fft2(x[0, 0], norm="ortho").abs()
    expected = sum(amplitude[i, j].log() for i, j in members) / len(members) - amplitude[0, 0].log()
    assert_close(relative_log_amplitude(x, 6, to_mean=True)[0, band], expected)
    assert relative_log_amplitude(x, 6, to_mean=True)[0, 5] < -2  # noise alone


def test_empty_bins_are_nan_and_batches_stay_apart():
    x = torch.randn(3, 2, 4, 4)
    curves = relative_log_amplitude(x, 12)
    empty = band_masks((4, 4), bin_edges(12)).sum((1, 2)) == 0
    assert empty.any() and torch.equal(curves.isnan(), empty.expand(3, 12))
    assert_close(relative_log_amplitude(x[1:2], 12), curves[1:2], equal_nan=True)


def test_transfer_of_a_circular_convolution_is_the_modulus_of_its_spectrum():
    grid, bins = (16, 16), 6
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular", groups=2, bias=False)
    conv.weight.data = torch.tensor([[0.0, 1, 0], [1, 4, 1], [0, 1, 0]]).expand(2, 1, 3, 3) / 8
    kernel = torch.zeros(grid)
    kernel[[0, 1, -1, 0, 0], [0, 0, 0, 1, -1]] = torch.tensor([4.0, 1, 1, 1, 1]) / 8
    power_hw = torch.fft.fft2(kernel).abs().square()
    masks = band_masks(grid, bin_edges(bins))
    expected = ((masks * power_hw).sum((1, 2)) / masks.sum((1, 2))).sqrt()
    expected = torch.cat([torch.ones(1), expected])  # the kernel's sum is 1: the mean stays
    measured = transfer_function(conv, torch.randn(64, 2, *grid), bins)
    assert_close(measured.kept, expected, atol=0.02, rtol=0.02)
    assert measured.leaked.max() < 1e-3
    assert_close(measured.frequency[1:], bin_edges(bins).unfold(0, 2, 1).mean(1))
    assert measured.frequency[0] == 0


def test_transfer_of_a_spectral_pooling_filter_is_its_mask():
    gain = transfer_function(SpectralPoolingFilter(3.5, 0.9), torch.randn(2, 3, 16, 16), bins=16).kept
    # 3.5 bins of 16 are 0.22 cycles per sample, in the fifth of 16 bins.
    assert_close(gain[[0, 2, 3, 4]], torch.full((4,), 0.9), atol=1e-3, rtol=0)
    assert_close(gain[7:], torch.full((10,), 0.1), atol=1e-3, rtol=0)


def test_response_is_the_linear_part_at_the_working_point():
    x = torch.full((1, 2, 8, 8), 1.5) + 0.01 * torch.randn(1, 2, 8, 8)
    squared = transfer_function(torch.square, x, bins=4)
    assert_close(squared.kept, torch.full((5,), 3.0), atol=0.1, rtol=0)
    nothing = transfer_function(torch.zeros_like, x, bins=4, residual=True)
    assert_close(nothing.kept, torch.ones(5))


def test_what_changes_frequency_is_seen_as_leaking():
    checkers = torch.ones(16, 16)
    checkers[::2, 1::2] = checkers[1::2, ::2] = -1
    moved = transfer_function(lambda x: x * checkers, torch.randn(8, 1, 16, 16), bins=4)
    # A product with a checkerboard turns frequency upside down: what was lowest is highest now.
    assert moved.kept[1] < 0.1 and moved.leaked[1] > 0.9 and moved.gain_kk[0, 4] > 0.9


def test_a_layer_that_changes_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"\(8, 8\) into \(4, 4\)"):
        transfer_function(nn.AvgPool2d(2), torch.randn(1, 1, 8, 8), bins=3)


def test_tokens_and_grids_as_maps():
    x = torch.randn(2, 5, 3, 4)
    with_class = lambda t: torch.cat([t[:, :1] * 0, t * 2], dim=1)  # noqa: E731
    assert_close(on_tokens(with_class, first=1)(x), 2 * x)
    assert_close(on_grid(lambda grid_BhwC: grid_BhwC[..., :1].expand(-1, -1, -1, 5))(x), x[:, :1].expand_as(x))


def test_layers_inside_a_model_are_measured_at_what_they_get():
    class Gate(nn.Module):
        def forward(self, x_BhwC, weight_BC):
            return x_BhwC.square() * weight_BC[:, None, None]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.unused = Gate(), Gate()

        def forward(self, x_BhwC):
            return self.gate(x_BhwC + 1.5, torch.full((1, 2), 2.0))

    model = Model()
    x = 0.01 * torch.randn(1, 8, 8, 2)
    found = transfers_inside(model, {"gate": model.gate}, x, bins=4)
    assert_close(found["gate"].kept, torch.full((5,), 6.0), atol=0.2, rtol=0)  # 2 x · weight, at x = 1.5
    assert not model.gate._forward_pre_hooks
    with pytest.raises(ValueError, match="does not call unused"):
        transfers_inside(model, {"unused": model.unused}, x)


def test_layers_are_recorded_and_released():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    x = torch.randn(1, 1, 4, 4)
    with recorded({"first": net[0], "second": net[1]}) as seen:
        out = net(x)
    assert_close(seen["first"][0], x)
    assert_close(seen["second"][1], out.detach())
    assert not seen["second"][1].requires_grad
    net(2 * x)
    assert_close(seen["first"][0], x)


def test_curves_are_drawn_as_mean_and_band_without_empty_bins():
    axes = Figure().subplots()
    two_seeds = torch.tensor([[1, torch.nan, 2], [3, torch.nan, 6]])
    plots.spread_curves(axes, torch.arange(3.0), {"two seeds": two_seeds, "one": torch.ones(1, 3)})
    assert axes.lines[0].get_xydata().tolist() == [[0, 2], [2, 4]]
    assert len(axes.lines) == 2 and len(axes.collections) == 1  # one seed has no band
    assert axes.collections[0].get_paths()[0].get_extents().bounds == (0, 1, 2, 5)

"""Spectral prompts, high and low heads and frequency bands, against loops over patches, windows and frequencies."""

import pytest
import torch
import torch.nn.functional as F

from sptseg_lib.spectral.bands import band_mask, keep_band, radial_energy, radial_frequency
from sptseg_lib.spectral.hilo import FrequencyAttention, HighFrequencyHeads, LowFrequencyHeads
from sptseg_lib.spectral.prompt import SpectralPrompt, filter_on_grid


def circular_convolution(x_hwD, kernel_hwD):
    """Σ_ij kernel[i, j] · x shifted by (i, j), one position at a time."""
    h, w, _ = x_hwD.shape
    out_hwD = torch.zeros_like(x_hwD)
    for i in range(kernel_hwD.shape[0]):
        for j in range(kernel_hwD.shape[1]):
            for y in range(h):
                for x in range(w):
                    out_hwD[y, x] += kernel_hwD[i, j] * x_hwD[(y - i) % h, (x - j) % w]
    return out_hwD


def softmax_attention(q, k, v):
    """One query at a time, without torch's attention."""
    rows = []
    for query in q:
        weight = torch.stack([query @ key for key in k]).div(len(query) ** 0.5).exp()
        rows.append((weight[:, None] * v).sum(0) / weight.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("grid", [(4, 5), (3, 4), (5, 3)])  # an odd width catches a missing s=
def test_prompt_is_gated_circular_convolution(grid):
    prompt = SpectralPrompt(grid, 3, std=1.0)
    patches_BhwD, cls_BD = torch.randn(2, *grid, 3), torch.randn(2, 3)
    kernel_hwD = torch.fft.irfft2(torch.view_as_complex(prompt.weight_hfD2), s=grid, dim=(0, 1))
    actual = prompt(patches_BhwD, cls_BD)
    for b in range(2):
        torch.testing.assert_close(actual[b], circular_convolution(patches_BhwD[b] * cls_BD[b], kernel_hwD))


def test_prompt_is_the_inverse_of_a_double_sum_over_frequencies():
    """Equation 1 with the transforms written out, so that not even torch.fft is trusted."""
    h, w = 3, 4
    prompt = SpectralPrompt((h, w), 1, std=1.0)
    x_hw = torch.randn(h, w, dtype=torch.float64)
    rows, columns = torch.arange(h)[:, None], torch.arange(w)[None]

    def wave(u, v):
        return torch.exp(-2j * torch.pi * (u * rows / h + v * columns / w))

    weight_hf = torch.view_as_complex(prompt.weight_hfD2.detach().double())[..., 0]
    out_hw = torch.zeros(h, w, dtype=torch.complex128)
    for u in range(h):
        for v in range(w):
            # Real images have conjugate frequencies at (-u, -v); those that are their own column share it evenly.
            if v in (0, w // 2):
                filtered = (weight_hf[u, v] + weight_hf[-u % h, v].conj()) / 2
            else:
                filtered = weight_hf[u, v] if v < w // 2 else weight_hf[-u % h, w - v].conj()
            out_hw += (x_hw * wave(u, v)).sum() * filtered * wave(u, v).conj() / (h * w)
    gate = torch.tensor([[2.0]])
    actual = prompt(x_hw.float()[None, ..., None], gate)[0, ..., 0]
    torch.testing.assert_close(actual, 2 * out_hw.real.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("new", [(7, 9), (4, 4), (3, 3), (8, 3), (5, 12), (4, 5)])
@pytest.mark.parametrize("old", [(5, 5), (4, 6)])
def test_a_filter_keeps_its_kernel_on_another_grid(old, new):
    """Each kernel value stays at its signed offset from the origin, where the new grid has that offset."""
    weight_hfD = torch.fft.rfft2(torch.randn(*old, 2), dim=(0, 1))
    old_kernel = torch.fft.irfft2(weight_hfD, s=old, dim=(0, 1))
    moved = filter_on_grid(weight_hfD, old, new)
    assert moved.shape == (new[0], new[1] // 2 + 1, 2)
    new_kernel = torch.fft.irfft2(moved, s=new, dim=(0, 1))
    expected = torch.zeros(*new, 2)
    offsets = [range(-(min(a, b) // 2), (min(a, b) + 1) // 2) for a, b in zip(old, new, strict=True)]
    for i in offsets[0]:
        for j in offsets[1]:
            expected[i % new[0], j % new[1]] = old_kernel[i % old[0], j % old[1]]
    torch.testing.assert_close(new_kernel, expected)


def test_a_filter_is_untouched_on_its_own_grid_and_comes_back_from_a_larger_one():
    weight_hfD = torch.fft.rfft2(torch.randn(5, 6, 2), dim=(0, 1))
    assert filter_on_grid(weight_hfD, (5, 6), (5, 6)) is weight_hfD
    there_and_back = filter_on_grid(filter_on_grid(weight_hfD, (5, 6), (8, 11)), (8, 11), (5, 6))
    torch.testing.assert_close(there_and_back, weight_hfD)


def test_prompt_on_a_larger_grid_is_convolution_with_the_padded_kernel():
    prompt = SpectralPrompt((3, 3), 2, std=1.0)
    patches_BhwD = torch.randn(1, 5, 4, 2)
    kernel_hwD = torch.fft.irfft2(torch.view_as_complex(prompt.weight_hfD2), s=(3, 3), dim=(0, 1))
    padded = torch.zeros(5, 4, 2)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            padded[i, j] = kernel_hwD[i, j]
    actual = prompt(patches_BhwD, torch.ones(1, 2))[0]
    torch.testing.assert_close(actual, circular_convolution(patches_BhwD[0], padded))


@pytest.mark.parametrize("grid", [(4, 4), (6, 5), (3, 2)])
def test_gradients_reach_every_frequency_of_the_weight(grid):
    prompt = SpectralPrompt((4, 4), 2)
    prompt(torch.randn(2, *grid, 2), torch.randn(2, 2)).square().sum().backward()
    assert prompt.weight_hfD2.grad.isfinite().all()
    assert prompt.weight_hfD2.grad.any(dim=-1).all()  # real or imaginary part


def test_prompt_refuses_another_width_and_gives_float32_for_bfloat16():
    prompt = SpectralPrompt((4, 4), 8)
    with pytest.raises(ValueError, match="Patches are 6 wide and the spectral filter 8"):
        prompt(torch.randn(1, 4, 4, 6), torch.randn(1, 6))
    assert prompt(torch.randn(1, 4, 4, 8).bfloat16(), torch.randn(1, 8).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("project", [True, False])
def test_high_heads_attend_inside_each_window(project):
    width, heads, d, s = 6, 2, 3, 2
    layer = HighFrequencyHeads(width, heads, d, s, project)
    x_BhwC = torch.randn(2, 4, 6, width)
    q, k, v = (x_BhwC @ part.T for part in layer.qkv.weight.chunk(3))
    expected = torch.zeros(2, 4, 6, heads * d)
    for b in range(2):
        for top in range(0, 4, s):
            for left in range(0, 6, s):
                for head in range(heads):
                    at = (b, slice(top, top + s), slice(left, left + s), slice(head * d, head * d + d))
                    one = softmax_attention(*(x[at].reshape(-1, d) for x in (q, k, v)))
                    expected[at] = one.view(s, s, d)
    torch.testing.assert_close(layer(x_BhwC), layer.project(expected))


def test_low_heads_attend_to_window_means():
    width, heads, d, s = 6, 2, 3, 2
    layer = LowFrequencyHeads(width, heads, d, s)
    x_BhwC = torch.randn(2, 4, 6, width)
    expected = torch.zeros(2, 24, heads * d)
    for b in range(2):
        pooled = torch.stack([
            x_BhwC[b, top : top + s, left : left + s].flatten(0, 1).mean(0)
            for top in range(0, 4, s)
            for left in range(0, 6, s)
        ])  # fmt: skip
        k, v = (pooled @ part.T for part in layer.kv.weight.chunk(2))
        q = layer.q(x_BhwC[b].flatten(0, 1))
        for head in range(heads):
            at = slice(head * d, head * d + d)
            expected[b, :, at] = softmax_attention(q[:, at], k[:, at], v[:, at])
    torch.testing.assert_close(layer(x_BhwC), layer.project(expected).view(2, 4, 6, -1))


def test_a_grid_that_the_window_does_not_divide_is_padded_right_and_below():
    layer = FrequencyAttention(8, heads=4, high_heads=1, window=3)
    x_BhwC = torch.randn(2, 4, 5, 8)
    padded = torch.zeros(2, 6, 6, 8)
    padded[:, :4, :5] = x_BhwC
    actual = layer(x_BhwC)
    assert actual.shape == (2, 4, 5, 8)
    torch.testing.assert_close(actual, torch.cat([layer.high(padded), layer.low(padded)], -1)[:, :4, :5])


def test_all_heads_may_be_high_or_low():
    x_BhwC = torch.randn(1, 6, 6, 8)
    high, low = (FrequencyAttention(8, 4, n, 3) for n in (4, 0))
    assert high.low is None and low.high is None
    assert high(x_BhwC).shape == low(x_BhwC).shape == x_BhwC.shape
    # High heads see their window only, low heads see everything.
    changed = x_BhwC.clone()
    changed[:, 0, 0] += 1
    outside = F.pad(torch.zeros(3, 3), (0, 3, 0, 3), value=1).bool()
    torch.testing.assert_close(high(changed)[:, outside], high(x_BhwC)[:, outside], atol=0, rtol=0)
    assert (low(changed) != low(x_BhwC)).any(-1).all()


@pytest.mark.parametrize(("width", "heads", "high"), [(8, 3, 1), (8, 4, 5), (8, 4, -1)])
def test_heads_that_do_not_share_out_the_width_are_refused(width, heads, high):
    with pytest.raises(ValueError, match=f"{heads} heads, {high} of them high, do not share out a width of {width}"):
        FrequencyAttention(width, heads, high, 3)


def test_radial_frequency_by_loop():
    h, w = 4, 5
    radius_hw = radial_frequency((h, w))
    for u in range(h):
        for v in range(w):
            cycles = min(u, h - u) / h, min(v, w - v) / w
            assert float(radius_hw[u, v]) == pytest.approx((cycles[0] ** 2 + cycles[1] ** 2) ** 0.5)


def test_bands_that_share_out_the_spectrum_sum_to_the_signal():
    x_BhwC = torch.randn(2, 6, 7, 3)
    edges = [0.0, 0.1, 0.25, 0.4, 1.0]
    pairs = list(zip(edges, edges[1:], strict=False))
    torch.testing.assert_close(sum(band_mask((6, 7), *pair) for pair in pairs), torch.ones(6, 7))
    torch.testing.assert_close(sum(keep_band(x_BhwC, *pair) for pair in pairs), x_BhwC)
    torch.testing.assert_close(keep_band(x_BhwC, 0, 1e-6), x_BhwC.mean((1, 2), keepdim=True).expand_as(x_BhwC))


def test_a_wave_lies_in_its_own_band():
    wave_hwC = torch.cos(2 * torch.pi * 3 * torch.arange(12) / 12).expand(12, 12)[..., None]  # 0.25 cycles a sample
    torch.testing.assert_close(keep_band(wave_hwC, 0.2, 0.3), wave_hwC, atol=1e-5, rtol=0)
    assert keep_band(wave_hwC, 0.0, 0.2).abs().max() < 1e-5 and keep_band(wave_hwC, 0.3, 1.0).abs().max() < 1e-5


def test_radial_energy_is_shared_out_by_parsevals_theorem():
    x_BhwC = torch.randn(2, 8, 9, 3)
    centres, share = radial_energy(x_BhwC, bins=5)
    torch.testing.assert_close(share.sum(-1), torch.ones(2))
    width = 0.5**0.5 / 5
    for i, centre in enumerate(centres.tolist()):
        top = 1.0 if i == 4 else centre + width / 2
        centred = x_BhwC - x_BhwC.mean((1, 2), keepdim=True)
        band = keep_band(centred, centre - width / 2, top)
        expected = band.square().sum((1, 2, 3)) / centred.square().sum((1, 2, 3))  # in space, not in frequency
        torch.testing.assert_close(share[:, i], expected, atol=1e-5, rtol=1e-4)

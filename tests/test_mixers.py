"""Spectral pooling, SPAM and the other token mixers, against slow versions of themselves."""

import cmath
import math

import pytest
import torch
from torch.testing import assert_close

from sptseg_lib.mixers.pooling import SpectralPoolingFilter, SpectralPoolingGate, bin_distance, pooling_mask
from sptseg_lib.mixers.spam import SPAM
from sptseg_lib.mixers.tokens import GlobalFilter, HiLo, Pooling, SelfAttention, SeparableConvolution
from sptseg_lib.spectral.prompt import filter_on_grid


def slow_pool(x_hw, radius, low, shape):
    """Wave by wave: each is measured, weighed by its own frequency and added."""
    h, w = x_hw.shape
    out = [[0j] * w for _ in range(h)]
    for u in range(-(h // 2), (h + 1) // 2):
        for v in range(-(w // 2), (w + 1) // 2):
            distance = math.sqrt(u * u + v * v) if shape == "circle" else max(abs(u), abs(v))
            weight = low if distance <= radius else 1 - low
            share = 0j
            for i in range(h):
                for j in range(w):
                    share += float(x_hw[i, j]) * cmath.exp(-2j * cmath.pi * (u * i / h + v * j / w)) / (h * w)
            for i in range(h):
                for j in range(w):
                    out[i][j] += weight * share * cmath.exp(2j * cmath.pi * (u * i / h + v * j / w))
    return torch.tensor([[value.real for value in row] for row in out], dtype=torch.float64)


@pytest.mark.parametrize("shape", ["circle", "rectangle"])
@pytest.mark.parametrize("grid", [(4, 7), (7, 4), (5, 5), (6, 6)], ids=str)
def test_pooling_weighs_waves_by_their_frequency(grid, shape):
    x_hw = torch.randn(grid, dtype=torch.float64)
    actual = SpectralPoolingFilter(1.5, 0.8, shape)(x_hw[None, None])[0, 0]
    assert_close(actual, slow_pool(x_hw, 1.5, 0.8, shape), atol=1e-6, rtol=1e-6)  # λ is float32


def test_released_mask_has_two_quirks():
    here, released = (pooling_mask((6, 10), 2, 0.7, released=r) for r in (False, True))
    assert here[3, 5] == here[3, 7] and here[3, 5].item() == pytest.approx(0.7)
    # Zero frequency lies in row 3 and column 5, but the released circle is drawn around row 5 and column 3.
    assert released[3, 5].item() == pytest.approx(0.3)
    assert released[5, 3].item() == pytest.approx(0.7) and released[5, 5].item() == pytest.approx(1 / 3)
    x_hw = torch.randn(6, 10, dtype=torch.float64)
    spectrum = torch.fft.fftshift(torch.fft.fft2(x_hw)) * released
    expected = torch.fft.ifft2(torch.fft.ifftshift(spectrum)).real
    assert_close(SpectralPoolingFilter(2, 0.7, released=True)(x_hw), expected)


def test_half_and_half_keeps_nothing_but_half_the_map():
    x = torch.randn(2, 3, 5, 6)
    assert_close(SpectralPoolingFilter(2, 0.5)(x), x / 2)
    assert_close(SpectralPoolingFilter(0.5, 1.0)(x), x.mean((2, 3), keepdim=True).expand_as(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_passes_in_float32(dtype):
    x = torch.randn(2, 4, 9, 6)
    pool = SpectralPoolingFilter(2, 0.8)
    assert pool(x.to(dtype)).dtype == dtype
    assert_close(pool(x.to(dtype)), pool(x.to(dtype).float()).to(dtype))
    mixer = SPAM(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(mixer(torch.randn(1, 6, 8, 7))).all()


MIXERS = {
    "spam": lambda: SPAM(6, radius=1),
    "learned": lambda: SPAM(6, radius=1, learned=True),
    "gate": lambda: GlobalFilter((4, 7), 6, std=0.5),
    "hilo": lambda: HiLo(6, 2),
    "attention": lambda: SelfAttention(6, 2),
    "conv": lambda: SeparableConvolution(6),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MIXERS)
def test_mixers_may_be_stored_in_half_precision(name, dtype):
    mixer = MIXERS[name]()
    for grid in ((4, 7), (9, 4)):
        x = torch.randn(2, 6, *grid)
        expected = mixer.float()(x)
        out = mixer.to(dtype)(x.to(dtype))
        assert out.dtype == dtype and out.shape == x.shape
        assert_close(out.float(), expected, atol=0.05, rtol=0.05)


def test_learned_filter_starts_near_the_fixed_one_and_learns_both_numbers():
    x = torch.randn(2, 3, 9, 12)
    learned, fixed = SpectralPoolingFilter(2, 0.8, learned=True), SpectralPoolingFilter(2, 0.8)
    assert learned.low_weight == pytest.approx(0.8) and learned.radius == pytest.approx(2)
    away = (bin_distance((9, 12)) - 2.5).abs() >= 0.5  # the edge alone is soft
    assert (learned.mask((9, 12)) - fixed.mask((9, 12)))[away].abs().max() < 0.6 * 0.13
    # Fit a filter of λ = 0.6 and radius 3: both numbers move there.
    target = SpectralPoolingFilter(3, 0.6, learned=True)(x).detach()
    optimiser = torch.optim.Adam(learned.parameters(), lr=0.05)
    for _ in range(150):
        optimiser.zero_grad()
        (learned(x) - target).square().mean().backward()
        optimiser.step()
    assert learned.low_weight == pytest.approx(0.6, abs=0.02) and learned.radius == pytest.approx(3, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0}, "radius=0"),
        ({"radius": -1}, "radius=-1"),
        ({"radius": math.nan}, "radius=nan"),
        ({"low_weight": 1.2}, "low_weight=1.2 is outside"),
        ({"low_weight": -0.1}, "low_weight=-0.1 is outside"),
        ({"shape": "square"}, "shape='square'"),
        ({"low_weight": 1, "learned": True}, "cannot be learned"),
        ({"released": True, "learned": True}, "cannot be learned"),
    ],
)
def test_bad_filters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpectralPoolingFilter(**({"radius": 2, "low_weight": 0.7} | arguments))


def test_radius_beyond_the_grid_is_refused_when_the_grid_is_known():
    pool = SpectralPoolingFilter(3, 0.7)
    pool(torch.randn(1, 2, 6, 6))
    with pytest.raises(ValueError, match=r"radius=3.0 reaches beyond a grid of 4×3.*below 2.236"):
        pool(torch.randn(1, 2, 4, 3))


def test_spam_is_features_times_the_sum_of_gates():
    mixer = SPAM(7, radius=1, low_weights=(0.7, 0.8, 0.9), kernel=3).double()
    x = torch.randn(2, 7, 4, 5, dtype=torch.float64)
    f = torch.einsum("oc,bchw->bohw", mixer.project_in.weight[..., 0, 0], x) + mixer.project_in.bias[:, None, None]
    for conv, axis in ((mixer.along_rows, 3), (mixer.along_columns, 2)):
        kernel_C3 = conv.weight.reshape(7, 3)
        padded = torch.cat([torch.zeros_like(f.narrow(axis, 0, 1)), f, torch.zeros_like(f.narrow(axis, 0, 1))], axis)
        size = f.shape[axis]
        f = conv.bias[:, None, None] + sum(kernel_C3[:, k, None, None] * padded.narrow(axis, k, size) for k in range(3))
    assert mixer.shares == [3, 3, 1]
    context = 0
    for gate, (start, stop), low in zip(mixer.gates, ((0, 3), (3, 6), (6, 7)), (0.7, 0.8, 0.9)):
        for c in range(start, stop):
            pooled = torch.stack([slow_pool(f[b, c].detach(), 1, low, "circle") for b in range(2)])
            context = context + gate.mix.weight[:, c - start, 0, 0][:, None, None] * pooled[:, None]
        context = context + gate.mix.bias[:, None, None]
    assert_close(mixer.context(mixer.features(x)), context, atol=1e-6, rtol=1e-6)
    out = torch.einsum("oc,bchw->bohw", mixer.project_out.weight[..., 0, 0], f * context)
    assert_close(mixer(x), out + mixer.project_out.bias[:, None, None], atol=1e-6, rtol=1e-6)


def test_a_new_size_at_each_call():
    mixer = SPAM(6).eval()
    x = {grid: torch.randn(2, 6, *grid) for grid in ((8, 8), (5, 9), (16, 7))}
    first = {grid: mixer(x[grid]) for grid in x}
    for grid in reversed(x):
        assert first[grid].shape == x[grid].shape
        assert_close(mixer(x[grid]), first[grid])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 2}, r"2 channels.*2 group\(s\) for 3 gates"),
        ({"width": 4}, r"4 channels.*2 group\(s\) for 3 gates"),
        ({"low_weights": ()}, "no context"),
        ({"low_weights": (0.7, 1.7)}, "low_weight=1.7"),
        ({"kernel": 4}, "kernel=4 has no middle"),
        ({"radius": -2}, "radius=-2"),
    ],
)
def test_bad_spams_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SPAM(**({"width": 6} | arguments))


def test_gate_spreads_few_channels_over_all():
    gate = SpectralPoolingGate(2, 5, 1, 0.9)
    x = torch.randn(1, 2, 4, 6)
    assert_close(gate(x), gate.mix(gate.filter(x)))
    assert gate(x).shape == (1, 5, 4, 6)


def test_pooling_is_the_mean_of_neighbours_less_the_token():
    x = torch.randn(1, 1, 4, 3)
    for i in range(4):
        for j in range(3):
            neighbours = x[0, 0, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
            assert_close(Pooling()(x)[0, 0, i, j], neighbours.mean() - x[0, 0, i, j])


def test_global_filter_is_a_circular_convolution_on_any_grid():
    gate = GlobalFilter((4, 5), 2, std=1.0).double()
    weight_hfC = torch.view_as_complex(gate.prompt.weight_hfD2)
    for grid in ((4, 5), (6, 7)):
        kernel_hwC = torch.fft.irfft2(filter_on_grid(weight_hfC, (4, 5), grid), s=grid, dim=(0, 1)).detach()
        x = torch.randn(1, 2, *grid)
        expected = sum(
            kernel_hwC[i, j, :, None, None] * x.roll((i, j), (2, 3)) for i in range(grid[0]) for j in range(grid[1])
        )
        assert_close(gate(x), expected.to(x.dtype), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [lambda: GlobalFilter((4, 6), 6), lambda: SPAM(6), lambda: HiLo(6, 2)])
def test_mixers_may_be_stored_channels_last(make):
    mixer, x = make(), torch.randn(2, 6, 4, 6)
    expected = mixer(x)
    mixer = mixer.to(memory_format=torch.channels_last)
    assert_close(mixer(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-5, rtol=1e-4)


def test_self_attention_by_hand():
    mixer = SelfAttention(6, heads=2).double()
    x = torch.randn(1, 6, 2, 3, dtype=torch.float64)
    tokens = x[0].flatten(1).T
    q, k, v = mixer.qkv(tokens).detach().split(6, dim=-1)
    heads = []
    for own in (slice(0, 3), slice(3, 6)):
        score = torch.tensor([[float(a @ b) / 3**0.5 for b in k[:, own]] for a in q[:, own]])
        heads.append(score.double().softmax(-1) @ v[:, own])
    expected = mixer.project(torch.cat(heads, -1)).T.view(1, 6, 2, 3)
    assert_close(mixer(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mixer", [SeparableConvolution(8, 3), HiLo(8, 4, 0.25), SelfAttention(8, 2)], ids=repr)
def test_mixers_keep_odd_and_rectangular_maps(mixer):
    x = torch.randn(2, 8, 5, 7)
    assert mixer(x).shape == x.shape


def test_bad_mixers_are_refused():
    with pytest.raises(ValueError, match="3 heads do not share out a width of 8"):
        SelfAttention(8, 3)
    with pytest.raises(ValueError, match="low_share=1.5 is no share"):
        HiLo(8, 2, 1.5)
    assert HiLo(8, 4, 0.5).frequencies.high.heads == 2 and HiLo(8, 4, 1.0).frequencies.high is None

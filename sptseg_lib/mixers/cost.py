"""What a network costs: parameters and multiply-adds, with and without Fourier transforms."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .pooling import SpectralPoolingFilter


class Cost(NamedTuple):
    """parameters: learned numbers; filter_values: entries of fixed masks; multiply_adds without and with FFTs.

    Published tables of SPANet count parameters + filter_values, and multiply_adds without FFTs. A table's
    "FLOPs" are multiply-adds.
    """

    parameters: int
    filter_values: int
    multiply_adds: float
    multiply_adds_with_ffts: float


def transform_operations(transformed: int, points: int, real: bool) -> float:
    """Real additions and multiplications of FFTs: 5 N log₂ N for complex data, half of it for real data."""
    return (2.5 if real else 5.0) * transformed * points * math.log2(max(points, 2))


def _count_fft(real: bool, axes_of: int):
    def count(x_shape, dim, *_, out_shape=None, **__):
        whole = out_shape if axes_of else x_shape  # irfft's result is whole, its input half
        points = math.prod(whole[d] for d in dim)
        return transform_operations(math.prod(whole) // points, points, real)

    return count


_FFTS = {
    torch.ops.aten._fft_r2c: _count_fft(True, 0),
    torch.ops.aten._fft_c2r: _count_fft(True, 1),
    torch.ops.aten._fft_c2c: _count_fft(False, 0),
}


def count_cost(module: nn.Module, *shapes: tuple[int, ...]) -> Cost:
    """Costs of one forward pass of inputs of these shapes, for instance `count_cost(model, (1, 3, 224, 224))`.

    Runs on the meta device where the module lives there, so that no number is computed. Convolutions, matrix
    products and attention are counted; norms, activations and other elementwise steps are not.
    """
    device = next(module.parameters()).device
    values = 0

    def see(filter_module, inputs, _):
        nonlocal values
        values += math.prod(inputs[0].shape[-2:])

    hooks = [m.register_forward_hook(see) for m in module.modules() if isinstance(m, SpectralPoolingFilter)]
    counter = FlopCounterMode(display=False, custom_mapping=_FFTS)
    was_training = module.training
    try:
        with counter, torch.no_grad():
            module.eval()(*(torch.zeros(shape, device=device) for shape in shapes))
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    counts = counter.get_flop_counts()["Global"]
    ffts = sum(count for op, count in counts.items() if op in _FFTS)
    total = sum(counts.values())
    parameters = sum(p.numel() for p in module.parameters())
    return Cost(parameters, values, (total - ffts) / 2, total / 2)

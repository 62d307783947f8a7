"""What a network costs on paper: parameters and multiply-adds, with and without Fourier transforms."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..mixers.pooling import SpectralPoolingFilter


class Cost(NamedTuple):
    """parameters: all numbers that are learned somewhere, `trained` those of them that training changes; filter_values:
    entries of fixed masks; multiply_adds without and with FFTs.

    Published tables of SPANet count parameters + filter_values, and multiply_adds without FFTs. A table's
    "FLOPs" are multiply-adds.
    """

    parameters: int
    trained: int
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


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """torch's counter of operations, two to a multiply-add, that knows FFTs too.

    Convolutions, matrix products and attention are counted; norms, activations and other elementwise steps are not.
    """
    # Plain attention: which fused kernel a device takes, and whether the counter knows it, then changes no count.
    with FlopCounterMode(display=False, custom_mapping=_FFTS) as counter, sdpa_kernel(SDPBackend.MATH):
        yield counter


def multiply_adds(counter: FlopCounterMode) -> tuple[float, float]:
    """What was counted, in multiply-adds: without FFTs, and with them."""
    counts = counter.get_flop_counts().get("Global", {})
    ffts = sum(count for op, count in counts.items() if op in _FFTS)
    total = sum(counts.values())
    return (total - ffts) / 2, total / 2


def count_cost(module: nn.Module, *shapes: tuple[int, ...]) -> Cost:
    """Costs of one forward pass of inputs of these shapes, for instance `count_cost(model, (1, 3, 224, 224))`.

    Runs on the meta device where the module lives there, so that no number is computed; counts as `counted` does.
    """
    device = next(module.parameters()).device
    values = 0

    def see(filter_module, inputs, _):
        nonlocal values
        values += math.prod(inputs[0].shape[-2:])

    hooks = [m.register_forward_hook(see) for m in module.modules() if isinstance(m, SpectralPoolingFilter)]
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), counted() as counter:
            module(*(torch.zeros(shape, device=device) for shape in shapes))
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    numbers = [p.numel() for p in module.parameters()]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Cost(sum(numbers), trained, values, *multiply_adds(counter))

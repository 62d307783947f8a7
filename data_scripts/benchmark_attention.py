"""Time the kinds of attention against each other on this machine, forward alone and with its backward pass.

    python data_scripts/benchmark_attention.py

All run in turn within each round, so that a busy machine slows all; medians are printed.
The rule in sptseg_lib/attention.py rests on these figures.
"""

import statistics
import time
from itertools import product

import torch
import torch.nn.functional as F

from sptseg_lib.attention import attend_in_pairs, plain_attention

SHAPES = ((64, 4, 65, 32), (16, 4, 267, 32), (8, 4, 513, 32), (2, 12, 1035, 64), (1, 12, 2048, 64))
ROUNDS = 9


def milliseconds(function, tensors, backward: bool) -> float:
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        total = function(*tensors).sum()
    if backward:
        total.backward()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {ROUNDS} interleaved rounds")
    sides = {"fused": F.scaled_dot_product_attention, "plain": plain_attention, "in pairs": attend_in_pairs}
    for dtype, backward, shape in product((torch.float32, torch.bfloat16), (False, True), SHAPES):
        tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
        times = {name: [] for name in sides}
        for _ in range(ROUNDS):
            for name, function in sides.items():
                times[name].append(milliseconds(function, tensors, backward))
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(
            f"{str(dtype)[6:]:8s} {'forward + backward' if backward else 'forward':18s} B, H, N, d = {shape}: "
            + ", ".join(f"{n} {t:.1f} ms ({t / medians['fused']:.2f})" for n, t in medians.items())
        )


if __name__ == "__main__":
    main()

"""Time plain attention against the fused kernel on this machine, forward and backward.

    python data_scripts/benchmark_attention.py

Both sides run in turn within each round, so that a busy machine slows both; medians are printed.
The rule in sptseg_lib/attention.py rests on these figures.
"""

import statistics
import time

import torch
import torch.nn.functional as F

SHAPES = ((64, 4, 65, 32), (16, 4, 267, 32), (8, 4, 513, 32), (2, 12, 1035, 64))
ROUNDS = 9


def plain(q, k, v):
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def milliseconds(function, tensors) -> float:
    start = time.perf_counter()
    function(*tensors).sum().backward()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {ROUNDS} rounds, forward + backward"
    )
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            tensors = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            sides = {"plain": plain, "fused": F.scaled_dot_product_attention}
            times = {name: [] for name in sides}
            for _ in range(ROUNDS):
                for name, function in sides.items():
                    times[name].append(milliseconds(function, tensors))
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratio = medians["plain"] / medians["fused"]
            print(
                f"{dtype} B, H, N, d = {shape}: " + ", ".join(f"{n} {t:.1f} ms" for n, t in medians.items()),
                f"({ratio:.2f})",
            )


if __name__ == "__main__":
    main()

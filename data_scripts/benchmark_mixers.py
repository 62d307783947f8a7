"""Time token mixers of blocks of equal size on this machine, forward and backward.

    python data_scripts/benchmark_mixers.py

All mixers run in turn within each round, so that a busy machine slows each of them; medians are printed, a whole
block (mixer and channel MLP) beside its mixer alone.
"""

import argparse
import statistics
import time

import torch

from sptseg_lib.mixers.equal import MIXERS, equal_metaformer

GRIDS = ((56, 56), (28, 28), (14, 14))


def milliseconds(module, x) -> float:
    start = time.perf_counter()
    module(x).sum().backward()
    return 1000 * (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--grids", type=int, nargs="*", help="sides of square grids; default 56 28 14")
    options = parser.parse_args(arguments)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians of {options.rounds} rounds")
    for grid in [(side, side) for side in options.grids] if options.grids else GRIDS:
        x = torch.randn(options.batch, options.width, *grid, requires_grad=True)
        blocks = {}
        for name in MIXERS:
            body = equal_metaformer(name, grid, widths=(options.width,), blocks=(1,)).stages[0]
            blocks[name] = {"mixer": body[0].branch, "block": body}
        times = {(name, part): [] for name, parts in blocks.items() for part in parts}
        for _ in range(options.rounds + 1):
            for (name, part), values in times.items():
                values.append(milliseconds(blocks[name][part], x))
        for name in MIXERS:
            mixer, block = (statistics.median(times[name, part][1:]) for part in ("mixer", "block"))  # 1: warm-up
            print(f"{grid[0]}×{grid[1]}, {options.width} wide, {name:10} mixer {mixer:8.1f} ms, block {block:8.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

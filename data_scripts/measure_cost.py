"""Measure what every method costs: parameters, multiply-adds, time, memory, growth, and where the time goes.

    python data_scripts/measure_cost.py                    # everything, ten minutes on a CPU that is otherwise idle
    python data_scripts/measure_cost.py --part methods     # one part alone; the others stay in the file as they are

Parts: `methods` (all methods in one interleaved run), `memory`, `sizes` and `classes` (growth), `parts` (profiler), and
the same on a ViT-B/16 with random weights: `vit`, `vit_parts`, `vit_sizes`. On a GPU where one is at hand; name a
results file of its own then (--results), so that the CPU's figures stay.
"""

import argparse
import time
from pathlib import Path

import torch

from sptseg_lib.cost.plan import FORMS, PARTS, measure

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results" / "cost.json"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS), nargs="*", default=tuple(PARTS))
    parser.add_argument("--form", choices=tuple(FORMS), default="full")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    for part in options.part:
        begun = time.perf_counter()
        found = measure(part, options.results, options.form, options.device)
        print(f"{part}: {time.perf_counter() - begun:.0f} s", flush=True)
    return 0 if set(options.part) <= set(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())

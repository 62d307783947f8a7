"""Time the graph eigenvectors against the published way, interleaved in one run.

Published: a dense affinity and scipy's shift-invert `eigsh` on dense matrices, one image at a time.
Here: `feature_affinity` and `laplacian_eigenvectors` for a batch in one call, to the published residual.

    python data_scripts/benchmark_graph.py                      # 28 × 28 and 60 × 80 patches, medians and ratios
    python data_scripts/benchmark_graph.py --grids 14x14,20x20,28x28,40x40,60x80 --out graph_times.json
    python data_scripts/benchmark_graph.py --pixels 320x480     # all pixels of a photograph, with time and peak memory

Results are added to what --out holds. Each time is given twice: as passed on the clock, and as spent by all threads of
this process, which other work on the machine changes less.
"""

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import eigsh
from skimage import data
from torch import Tensor

from sptseg_lib.graph.affinity import colour_affinity, combine, feature_affinity
from sptseg_lib.graph.eigen import laplacian_eigenvectors
from sptseg_lib.graph.features import load_featurizer
from sptseg_lib.graph.matting import soft_segments
from sptseg_lib.hardware import hardware
from sptseg_lib.precision import find_device

COUNT = 5


def features(images: int, grid: tuple[int, int], width: int) -> Tensor:
    """Smooth groups, a direction that all patches share, and noise: (B, h, w, C)."""
    torch.manual_seed(0)
    groups = F.interpolate(torch.randn(images, width, 6, 8), grid, mode="bilinear")
    noisy = groups + 0.5 * torch.randn(images, width, *grid) + 0.5 * torch.randn(images, width, 1, 1)
    return noisy.permute(0, 2, 3, 1).contiguous()


def published(feature_BhwC: Tensor, image_B3hw: Tensor, colour_weight: float) -> float:
    """The published way; returns its largest residual, as `laplacian_eigenvectors` measures it."""
    worst = 0.0
    for feature_hwC, image_3hw in zip(feature_BhwC, image_B3hw):
        f_NC = F.normalize(feature_hwC.flatten(0, 1), dim=-1)
        w_NN = f_NC @ f_NC.T
        w_NN = w_NN * (w_NN > 0)
        w_NN = (w_NN / w_NN.max()).numpy()
        if colour_weight:
            w_NN = w_NN + colour_weight * colour_affinity(image_3hw[None]).dense()[0].numpy()
        d_N = w_NN.sum(1)
        mu_k, y_Nk = eigsh(np.diag(d_N) - w_NN, k=COUNT, sigma=0, which="LM", M=np.diag(d_N))
        rest_Nk = (d_N[:, None] * y_Nk - w_NN @ y_Nk - d_N[:, None] * y_Nk * mu_k) / np.sqrt(d_N)[:, None]
        worst = max(worst, float(np.linalg.norm(rest_Nk, axis=0).max()))
    return worst


def ours(feature_BhwC: Tensor, image_B3hw: Tensor, colour_weight: float, tolerance: float) -> float:
    colours = colour_affinity(image_B3hw) if colour_weight else None
    affinity = combine(feature_affinity(feature_BhwC), colours, colour_weight)
    return float(laplacian_eigenvectors(affinity, COUNT, tolerance=tolerance).residual_Bk.max())


def compare(grid: tuple[int, int], images: int, width: int, colour_weight: float, repeats: int, device: str) -> dict:
    feature_BhwC, image_B3hw = features(images, grid, width), torch.rand(images, 3, *grid)
    # Smooth colours, as a picture has: noise alone has no small eigenvalues.
    image_B3hw = F.interpolate(F.avg_pool2d(image_B3hw, 3, 1, 1), grid, mode="bilinear")
    tolerance = published(feature_BhwC, image_B3hw, colour_weight)  # warms up, and says what is to be reached
    on_device = feature_BhwC.to(device), image_B3hw.to(device)
    residual = ours(*on_device, colour_weight, tolerance)
    times = {name: [] for name in ("published", "ours", "published_cpu", "ours_cpu")}
    for _ in range(repeats):
        for name, run in (
            ("published", lambda: published(feature_BhwC, image_B3hw, colour_weight)),
            ("ours", lambda: ours(*on_device, colour_weight, tolerance)),
        ):
            start, busy = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - start) / images)
            times[name + "_cpu"].append((time.process_time() - busy) / images)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "grid": list(grid), "nodes": grid[0] * grid[1], "images": images, "width": width,
        "colour_weight": colour_weight, "device": device, "threads": torch.get_num_threads(), "hardware": hardware(),
        **{f"{name}_s": value for name, value in medians.items()},
        "ratio": medians["ours"] / medians["published"], "ratio_cpu": medians["ours_cpu"] / medians["published_cpu"],
        "residual_published": tolerance, "residual_ours": residual,
    }  # fmt: skip


def full_resolution(size: tuple[int, int], colour_weight: float, tolerance: float) -> dict:
    """Eigenvectors of all pixels: the clipped affinity of patches, interpolated, and the pixels' own colours."""
    pixels_13HW = torch.tensor(data.coffee()).permute(2, 0, 1)[None] / 255
    image_13HW = F.interpolate(pixels_13HW, size, mode="bilinear", antialias=True)
    featurizer = load_featurizer()
    start, busy = time.perf_counter(), time.process_time()
    key_1hwC = featurizer(image_13HW)
    eigen = soft_segments(key_1hwC, image_13HW, COUNT, colour_weight, tolerance=tolerance, most_products=500)
    return {
        "pixels": list(size), "picture": "coffee", "features": featurizer.name, "nodes": size[0] * size[1],
        "affinity": "clipped on patches, interpolated",
        "colour_weight": colour_weight, "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy, "threads": torch.get_num_threads(), "hardware": hardware(),
        "tolerance": tolerance, "residual": float(eigen.residual_Bk.max()),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip


def sizes(text: str) -> list[tuple[int, int]]:
    return [tuple(map(int, grid.split("x"))) for grid in text.split(",") if grid]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grids", default="28x28,60x80", help="patches, rows x columns; empty for none")
    parser.add_argument("--pixels", default="", help="full-resolution sizes, rows x columns")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--colour-weights", default="0,10")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the full resolution")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default=find_device())
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    rows = []
    for grid in sizes(arguments.grids) if not arguments.pixels else []:
        for weight in map(float, arguments.colour_weights.split(",")):
            rows.append(compare(grid, arguments.images, arguments.width, weight, arguments.repeats, arguments.device))
            print(
                "{grid[0]}x{grid[1]}, λ = {colour_weight:g}: published {published_s:.4f} s, ours {ours_s:.4f} s, "
                "ratio {ratio:.2f}, of CPU time {ratio_cpu:.2f}; "
                "residuals {residual_published:.1e} and {residual_ours:.1e}".format(**rows[-1])
            )
    for size in sizes(arguments.pixels):
        weight = float(arguments.colour_weights.split(",")[-1])
        rows.append(full_resolution(size, weight, arguments.tolerance))
        print(
            "{nodes:,} nodes: {seconds:.1f} s, of CPU time {cpu_seconds:.1f} s, peak {peak_gib:.2f} GiB, "
            "residual {residual:.1e}".format(**rows[-1])
        )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else []
        arguments.out.write_text(json.dumps(known + rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Measure Deep Spectral Methods: location, masks, classes and self-training on ShapeScenes, and photographs.

    python data_scripts/measure_deep_spectral.py

Every row is written to the results file as soon as it is measured; the same command measures what is still missing.
One thing at a time is varied around the default: keys of the last block, λ = 0, one eigenvector fewer than segments.
Rows:

    location/<things>/<choice>    CorLoc and mask IoU of the sign in per cent, a value for each set of scenes; for the
                                  default also after the CRF
    classes/<things>/<choice>     mIoU of the pseudo labels in per cent, a value for each seed of k-means; for the
                                  default also with segments that the CRF has refined
    selftrain/<things>            mIoU on held-out scenes, clustered themselves and by the network that was taught, and
                                  of its teacher on learning scenes, a value for each seed
    photograph/<name>/λ<weight>   eigenvalues, residual, seconds; how far the mask stays when the photograph is
                                  mirrored or noisy; whether its box hits one drawn by eye
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from skimage import data
from sklearn.datasets import load_sample_image
from torch import Tensor

from sptseg_lib.graph import clusters, crf, objects, regions
from sptseg_lib.graph.affinity import image_affinity
from sptseg_lib.graph.eigen import Eigen, laplacian_eigenvectors
from sptseg_lib.graph.features import Featurizer, load_featurizer
from sptseg_lib.graph.selftrain import predict, self_train
from sptseg_lib.metrics import class_iou, confusion_matrix
from sptseg_lib.scenes.atlas import THINGS
from sptseg_lib.scenes.render import SceneSettings, render_scenes

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results" / "deep_spectral.json"
CLASSES = len(THINGS) + 1  # the background is 0
SEED = 5
SETS = 5  # of scenes, for the spread of what has no seed
# The first index of scenes that nothing is learned from. Steps and width were chosen on scenes from 1,000,000 on.
HELD_OUT = 2_000_000
SEGMENTS = {(1, 1): 2, (1, 3): 3}  # by the fewest and most things of a scene

# Photographs that scikit-image and scikit-learn bring along, and boxes of their objects drawn by eye, as shares of
# width and height: (left, top, right, bottom). A coffee cup counts with its saucer or without.
PHOTOGRAPHS = {
    "chelsea": (data.chelsea, [(0.0, 0.0, 0.92, 1.0)]),
    "astronaut": (data.astronaut, [(0.03, 0.03, 0.72, 1.0)]),
    "coffee": (data.coffee, [(0.13, 0.03, 0.82, 0.95), (0.29, 0.03, 0.68, 0.6)]),
    "rocket": (data.rocket, [(0.48, 0.31, 0.55, 0.96)]),
    "motorcycle": (lambda: data.stereo_motorcycle()[0], [(0.16, 0.17, 0.9, 0.9)]),
    "china": (lambda: load_sample_image("china.jpg"), [(0.1, 0.07, 0.55, 1.0)]),
    "flower": (lambda: load_sample_image("flower.jpg"), [(0.26, 0.2, 0.7, 0.84)]),
}


class Choice(NamedTuple):
    """What features, and how many eigenvectors for the segments (None: one fewer than segments)."""

    kind: str = "key"
    block: int = 6
    colour_weight: float = 0.0
    vectors: int | None = None


DEFAULT = Choice()
OTHERS = {
    **{kind: Choice(kind=kind) for kind in ("query", "value", "token")},
    **{f"block {block}": Choice(block=block) for block in (5, 4, 3, 2)},
    **{f"λ = {weight:g}": Choice(colour_weight=weight) for weight in (1.0, 3.0, 10.0)},
}
EIGENVECTORS = (1, 2, 3, 5)


class Scenes:
    """Pictures and their labels; segments and mIoU of what is found in them."""

    def __init__(self, featurizer: Featurizer, first: int, pictures: int, things: tuple[int, int]):
        drawn = render_scenes(torch.arange(first, first + pictures), SceneSettings(things=things), seed=SEED)
        self.featurizer, self.segments = featurizer, SEGMENTS[things]
        self.image_B3HW, self.thing_BHW = drawn.image_B3HW, drawn.label_BHW < len(THINGS)
        self.label_BHW = torch.where(self.thing_BHW, drawn.label_BHW.long() + 1, 0)
        self.boxes = objects.true_boxes(drawn.label_BHW, range(len(THINGS)))
        self.grid = tuple(side // featurizer.patch for side in self.image_B3HW.shape[-2:])

    def eigenvectors(self, choice: Choice, count: int) -> Tensor:
        feature_BhwC = self.featurizer(self.image_B3HW, choice.kind, choice.block)
        affinity = image_affinity(feature_BhwC, self.image_B3HW, choice.colour_weight)
        return laplacian_eigenvectors(affinity, count, tolerance=1e-4).vectors_BkN

    def found(self, choice: Choice) -> tuple[Tensor, clusters.Segments]:
        """Segments on pixels, and their descriptions."""
        vectors_BkN = self.eigenvectors(choice, 1 + (choice.vectors or self.segments - 1))
        segment_Bhw = regions.segment(vectors_BkN, self.grid, self.segments, 0, choice.vectors, unit_rows=True)
        described = clusters.embed_segments(self.featurizer, self.image_B3HW, segment_Bhw, erode=0, dilate=1, crop=96)
        scale = self.featurizer.patch
        return segment_Bhw.repeat_interleave(scale, 1).repeat_interleave(scale, 2), described

    def refined(self, segment_BHW: Tensor) -> Tensor:
        return crf.refine(segment_BHW, self.image_B3HW, method="cells")

    def names(self, predicted_BHW: Tensor) -> Tensor:
        return clusters.match_clusters(confusion_matrix(predicted_BHW, self.label_BHW, CLASSES), fixed=(0,))

    def miou(self, predicted_BHW: Tensor, names_K: Tensor | None = None) -> float:
        names_K = self.names(predicted_BHW) if names_K is None else names_K
        matrix_KK = confusion_matrix(names_K[predicted_BHW], self.label_BHW, CLASSES)
        return 100 * float(class_iou(matrix_KK).nanmean())


def painted(segment_BHW: Tensor, described: clusters.Segments, seed: int) -> Tensor:
    """Pseudo labels by k-means with one seed."""
    cluster_R = clusters.cluster_segments(described.feature_RE, len(THINGS), seed=seed)
    return clusters.paint(segment_BHW, described, cluster_R)


def location(scenes: Scenes, choice: Choice, with_crf: bool) -> dict:
    vectors_BkN = scenes.eigenvectors(choice, 2)
    box_B4 = objects.localise(vectors_BkN, scenes.grid, scenes.featurizer.patch).box_B4
    mask_BHW = objects.object_masks(vectors_BkN, scenes.grid, scenes.image_B3HW.shape[-2:])
    sets = torch.arange(len(box_B4)).tensor_split(SETS)
    found = {"corloc": [100 * objects.corloc(box_B4[own], [scenes.boxes[i] for i in own]) for own in sets]}
    masks = {"iou": mask_BHW} | ({"iou_crf": scenes.refined(mask_BHW.long()).bool()} if with_crf else {})
    for name, mask in masks.items():
        iou_B = 100 * objects.mask_iou(mask, scenes.thing_BHW)
        found[name] = [float(iou_B[own].mean()) for own in sets]
    return found


def classes(scenes: Scenes, choice: Choice, with_crf: bool, seeds: int) -> dict:
    segment_BHW, described = scenes.found(choice)
    on_pixels = {"miou": segment_BHW} | ({"miou_crf": scenes.refined(segment_BHW)} if with_crf else {})
    return {
        name: [scenes.miou(painted(own_BHW, described, seed)) for seed in range(seeds)]
        for name, own_BHW in on_pixels.items()
    }


def selftraining(featurizer: Featurizer, things: tuple[int, int], pictures: int, steps: int, seeds: int) -> dict:
    """Before: held-out scenes clustered among themselves. After: the network, clusters named on learning scenes.

    Learned at half the resolution, in a quarter of the time, from the tokens of the last block, which know more of
    classes than its keys do.
    """
    learning, held_out = (Scenes(featurizer, first, pictures, things) for first in (0, HELD_OUT))
    segments, small, tokens = [], [], []
    for own in (learning, held_out):
        segment_BHW, described = own.found(DEFAULT)
        segments.append((own.refined(segment_BHW), described))
        small.append(F.interpolate(own.image_B3HW, scale_factor=0.5, mode="area"))
        tokens.append(featurizer(own.image_B3HW, "token"))
    found = {"miou_teacher": [], "miou_before": [], "miou_after": []}
    for seed in range(seeds):
        teacher_BHW, before_BHW = (painted(*own, seed) for own in segments)
        half_Bhw = teacher_BHW[:, ::2, ::2].contiguous()
        network = self_train(small[0], tokens[0], half_Bhw, CLASSES, steps, 8, 5e-3, width=16, seed=seed)
        after_BHW = predict(network, small[1], tokens[1]).repeat_interleave(2, 1).repeat_interleave(2, 2)
        found["miou_teacher"].append(learning.miou(teacher_BHW))
        found["miou_before"].append(held_out.miou(before_BHW))
        found["miou_after"].append(held_out.miou(after_BHW, learning.names(teacher_BHW)))
    return found


def photograph(featurizer: Featurizer, name: str, colour_weight: float) -> dict:
    read, shares = PHOTOGRAPHS[name]
    raw = torch.tensor(read()).permute(2, 0, 1)[None] / 255
    size = 24 * featurizer.patch, int(24 * raw.shape[3] / raw.shape[2]) * featurizer.patch
    image_B3HW = F.interpolate(raw, size, mode="bilinear", antialias=True)

    def solve(image_B3HW: Tensor) -> tuple[Eigen, tuple[int, int]]:
        feature_BhwC = featurizer(image_B3HW)
        eigen = laplacian_eigenvectors(image_affinity(feature_BhwC, image_B3HW, colour_weight), 5)
        return eigen, tuple(feature_BhwC.shape[1:3])

    start = time.process_time()
    eigen, grid = solve(image_B3HW)
    seconds = time.process_time() - start
    mask_Bhw = (eigen.vectors_BkN[:, 1] > 0).unflatten(1, grid)
    noise = 0.02 * torch.randn(image_B3HW.shape, generator=torch.Generator().manual_seed(0))
    mirrored_BN = solve(image_B3HW.flip(3))[0].vectors_BkN[:, 1]
    noisy_BN = solve((image_B3HW + noise).clamp(0, 1))[0].vectors_BkN[:, 1]
    box_B4 = objects.localise(eigen.vectors_BkN, grid, featurizer.patch).box_B4
    truth_T4 = torch.tensor(shares) * torch.tensor([size[1], size[0], size[1], size[0]])
    return {
        "nodes": grid[0] * grid[1],
        "mu": [round(float(value), 4) for value in eigen.values_Bk[0]],
        "residual": float(eigen.residual_Bk.max()),
        "cpu_seconds": seconds,
        "share": 100 * float(mask_Bhw.float().mean()),
        "iou_mirrored": 100 * float(objects.mask_iou(mask_Bhw, (mirrored_BN > 0).unflatten(1, grid).flip(2))),
        "iou_noisy": 100 * float(objects.mask_iou(mask_Bhw, (noisy_BN > 0).unflatten(1, grid))),
        "hit": 100 * objects.corloc(box_B4, [truth_T4]),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of self-training; 0 for none")
    parser.add_argument("--rows", default="", help="only rows whose names begin so, such as location/1-1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = {"pictures": options.pictures, "sets": SETS, "seeds": options.seeds, "steps": options.steps}
    result = {"about": about, "rows": {}}
    if options.results.is_file():
        result = json.loads(options.results.read_text(encoding="utf-8"))
        if result["about"] != about:
            raise ValueError(
                f"{options.results.name} was measured with {result['about']}, not {about}. Its rows could not be "
                "compared; give those settings or another --results."
            )

    def measure(name: str, run) -> None:
        if name in result["rows"] or not name.startswith(options.rows):
            return
        result["rows"][name] = {score: rounded(value) for score, value in run().items()}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result, indent=1, ensure_ascii=False)
        options.results.write_text(text + "\n", encoding="utf-8")
        print(name, {score: told(value) for score, value in result["rows"][name].items()}, flush=True)

    featurizer = load_featurizer()
    for name in PHOTOGRAPHS:
        for weight in (0.0, 10.0):
            measure(f"photograph/{name}/λ{weight:g}", partial(photograph, featurizer, name, weight))
    for things, segments in SEGMENTS.items():
        text = f"{things[0]}-{things[1]}"
        scenes = Scenes(featurizer, 0, options.pictures, things)
        counts = {f"{v} eigenvectors": Choice(vectors=v) for v in EIGENVECTORS if v != segments - 1}
        for name, choice in ({"default": DEFAULT} | OTHERS).items():
            measure(f"location/{text}/{name}", partial(location, scenes, choice, choice == DEFAULT))
        for name, choice in ({"default": DEFAULT} | OTHERS | counts).items():
            measure(f"classes/{text}/{name}", partial(classes, scenes, choice, choice == DEFAULT, options.seeds))
        if options.steps:
            run = partial(selftraining, featurizer, things, options.pictures, options.steps, options.seeds)
            measure(f"selftrain/{text}", run)
    return 0


def rounded(value: float | list[float]) -> float | list[float]:
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}")


def told(value: float | list[float]) -> str:
    return f"{statistics.fmean(value):.1f}" if isinstance(value, list) else f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())

"""Measure Deep Spectral Methods on ShapeScenes: location, masks, classes, self-training, each with its spread.

    python data_scripts/measure_deep_spectral.py

Every row is written to the results file as soon as it is measured; the same command measures what is still missing.
Held-out scenes have indices that the learning scenes do not have. Rows:

    location/<things>/<kind>/<block>/λ<weight>     CorLoc, mask IoU of the sign, and after the CRF (both in per cent)
    classes/<things>/<segments>/<vectors>/seed<s>  mIoU of the pseudo labels, and after the CRF, on the learning scenes
    selftrain/<things>/seed<s>                     mIoU on held-out scenes: pseudo labels with the CRF, and the network
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sptseg_lib.graph import clusters, crf, objects, regions
from sptseg_lib.graph.affinity import feature_affinity, image_affinity
from sptseg_lib.graph.eigen import laplacian_eigenvectors
from sptseg_lib.graph.features import load_featurizer
from sptseg_lib.graph.selftrain import predict, self_train
from sptseg_lib.metrics import class_iou, confusion_matrix
from sptseg_lib.scenes.atlas import THINGS
from sptseg_lib.scenes.render import SceneSettings, render_scenes

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results" / "deep_spectral.json"
CLASSES = len(THINGS) + 1  # the background is 0
SEED = 5


class Scenes:
    """Pictures, their keys, the eigenvectors of their graphs, and their labels."""

    def __init__(self, featurizer, first: int, pictures: int, things: tuple[int, int]):
        drawn = render_scenes(torch.arange(first, first + pictures), SceneSettings(things=things), seed=SEED)
        self.image_B3HW, self.thing_BHW = drawn.image_B3HW, drawn.label_BHW < len(THINGS)
        self.label_BHW = torch.where(self.thing_BHW, drawn.label_BHW.long() + 1, 0)
        self.boxes = objects.true_boxes(drawn.label_BHW, range(len(THINGS)))
        self.featurizer, self.key_BhwC = featurizer, featurizer(self.image_B3HW)
        self.grid = tuple(self.key_BhwC.shape[1:3])
        self.vectors_BkN = laplacian_eigenvectors(feature_affinity(self.key_BhwC), 8).vectors_BkN

    def enlarge(self, label_Bhw: Tensor) -> Tensor:
        size = self.image_B3HW.shape[-2:]
        return F.interpolate(label_Bhw[:, None].float(), size=size, mode="nearest")[:, 0].long()

    def miou(self, predicted_BHW: Tensor, names_K: Tensor | None = None) -> float:
        if names_K is None:
            names_K = self.names(predicted_BHW)
        matrix_KK = confusion_matrix(names_K[predicted_BHW], self.label_BHW, CLASSES)
        return round(100 * float(class_iou(matrix_KK).nanmean()), 2)

    def names(self, predicted_BHW: Tensor) -> Tensor:
        return clusters.match_clusters(confusion_matrix(predicted_BHW, self.label_BHW, CLASSES), fixed=(0,))

    def pseudo_labels(self, segments: int, vectors: int, seed: int) -> Tensor:
        segment_Bhw = regions.segment(self.vectors_BkN, self.grid, segments, seed, vectors, unit_rows=True)
        found = clusters.embed_segments(self.featurizer, self.image_B3HW, segment_Bhw, erode=0, dilate=1, crop=96)
        cluster_R = clusters.cluster_segments(found.feature_RE, len(THINGS), seed=seed)
        return self.enlarge(clusters.paint(segment_Bhw, found, cluster_R))


def location(scenes: Scenes, kind: str, block: int, weight: float) -> dict:
    feature_BhwC = scenes.featurizer(scenes.image_B3HW, kind, block)
    eigen = laplacian_eigenvectors(image_affinity(feature_BhwC, scenes.image_B3HW, weight), 2)
    box_B4 = objects.localise(eigen.vectors_BkN, scenes.grid, scenes.featurizer.patch).box_B4
    mask_BHW = objects.object_masks(eigen.vectors_BkN, scenes.grid, scenes.image_B3HW.shape[-2:])
    refined_BHW = crf.refine(mask_BHW.long(), scenes.image_B3HW, method="cells").bool()
    iou, refined = (float(objects.mask_iou(mask, scenes.thing_BHW).mean()) for mask in (mask_BHW, refined_BHW))
    return {"corloc": 100 * objects.corloc(box_B4, scenes.boxes), "iou": 100 * iou, "iou_crf": 100 * refined}


def classes(scenes: Scenes, segments: int, vectors: int, seed: int) -> dict:
    pseudo_BHW = scenes.pseudo_labels(segments, vectors, seed)
    refined_BHW = crf.refine(pseudo_BHW, scenes.image_B3HW, method="cells")
    return {"miou": scenes.miou(pseudo_BHW), "miou_crf": scenes.miou(refined_BHW)}


def selftrain(scenes: Scenes, held_out: Scenes, segments: int, seed: int, steps: int) -> dict:
    """Before: held-out pictures clustered among themselves. After: the network, clusters named on learning scenes."""
    teacher_BHW = crf.refine(scenes.pseudo_labels(segments, segments - 1, seed), scenes.image_B3HW, method="cells")
    network = self_train(scenes.image_B3HW, scenes.key_BhwC, teacher_BHW, CLASSES, steps=steps, batch=16, seed=seed)
    before_BHW = crf.refine(held_out.pseudo_labels(segments, segments - 1, seed), held_out.image_B3HW, method="cells")
    after_BHW = predict(network, held_out.image_B3HW, held_out.key_BhwC)
    return {"miou_before": held_out.miou(before_BHW), "miou_after": held_out.miou(after_BHW, scenes.names(teacher_BHW))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000, help="of self-training; 0 for none")
    parser.add_argument("--kinds", default="key,query,value,token")
    parser.add_argument("--blocks", default="6,5,4,2")
    parser.add_argument("--weights", default="0,1,3,10", help="λ")
    parser.add_argument("--vectors", default="1,2,3,5", help="eigenvectors for the segments")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = {"pictures": options.pictures, "steps": options.steps}
    result = {"about": about, "rows": {}}
    if options.results.is_file():
        result = json.loads(options.results.read_text())
        if result["about"] != about:
            raise ValueError(
                f"{options.results.name} was measured with {result['about']}, not {about}. Its rows could not be "
                "compared; give those settings or another --results."
            )
    featurizer = load_featurizer()

    def measure(name: str, run) -> None:
        if name not in result["rows"]:
            result["rows"][name] = {key: round(value, 2) for key, value in run().items()}
            options.results.parent.mkdir(parents=True, exist_ok=True)
            options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(name, result["rows"][name], flush=True)

    weights, vectors = [float(w) for w in options.weights.split(",")], [int(v) for v in options.vectors.split(",")]
    for things, segments in (((1, 1), 2), ((1, 3), 3)):
        text = f"{things[0]}-{things[1]}"
        scenes = Scenes(featurizer, 0, options.pictures, things)
        held_out = Scenes(featurizer, 1_000_000, options.pictures, things)
        for kind in options.kinds.split(","):
            for block in map(int, options.blocks.split(",")):
                for weight in weights:
                    run = lambda k=kind, b=block, w=weight: location(scenes, k, b, w)  # noqa: B023, E731
                    measure(f"location/{text}/{kind}/{block}/λ{weight:g}", run)
        for seed in range(options.seeds):
            for count in vectors:
                run = lambda s=seed, v=count: classes(scenes, segments, v, s)  # noqa: B023, E731
                measure(f"classes/{text}/{segments}/{count}/seed{seed}", run)
            if options.steps:
                run = lambda s=seed: selftrain(scenes, held_out, segments, s, options.steps)  # noqa: B023, E731
                measure(f"selftrain/{text}/seed{seed}", run)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

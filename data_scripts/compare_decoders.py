"""Split against balanced frequencies: SPT-SEG's decoder, the same with a shortcut, and the one with SPANet's mixer.

    python data_scripts/compare_decoders.py --budget 60

Trains `spt_seg`, `spt_shortcut` and `spt_balanced` alike on ShapeScenes, seeds outermost, then scores all finished
runs on held-out scenes and writes scores and cost to the results file. Training goes on where it was stopped when
the command is given again; the settings are those of 05_train unless given.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from sptseg_lib.checkpoint import WEIGHTS
from sptseg_lib.clip.load import load_clip
from sptseg_lib.cost.count import count_cost
from sptseg_lib.evaluate import evaluate
from sptseg_lib.model import build_segmenter
from sptseg_lib.settings import EvaluateSettings, TrainSettings, project_root
from sptseg_lib.train import fit

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results" / "balanced_decoder.json"
METHODS = ("spt_seg", "spt_shortcut", "spt_balanced")
SCORES = ("mIoU_seen", "mIoU_unseen", "hIoU")


def decoder_cost(method: str) -> dict:
    """Parameters and multiply-adds of a preset's decoder, for one image and 16 classes."""
    settings = TrainSettings(method=method).model()
    segmenter = build_segmenter(settings, load_clip())
    joint, grid, classes = segmenter.encoder.backbone.joint, settings.grid, 16
    cost = count_cost(segmenter.decoder, (1, grid, grid, joint), (1, joint), (classes, joint))
    return {
        "trained_parameters": sum(p.numel() for p in segmenter.trainable().values()),
        "decoder_parameters": cost.parameters,
        "decoder_multiply_adds": cost.multiply_adds,
        "decoder_multiply_adds_with_ffts": cost.multiply_adds_with_ffts,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60, help="minutes after which no further training is begun")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=TrainSettings().iterations)
    parser.add_argument("--batch", type=int, default=TrainSettings().batch)
    parser.add_argument("--scenes", type=int, default=500, help="held-out scenes to score")
    parser.add_argument("--run-dir", default="runs/decoders")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    begun = time.monotonic()
    for seed in range(options.seeds):
        for method in METHODS:
            settings = TrainSettings(
                method=method, seed=seed, iterations=options.iterations, batch=options.batch, run_dir=options.run_dir
            )
            finished = (settings.folder / "train" / settings.name / WEIGHTS).is_file()
            if not finished and time.monotonic() - begun > 60 * options.budget:
                print("The budget is used up; the same command goes on from here.")
                break
            fit(settings, progress=False)
            print(f"{method}, seed {seed}: trained", flush=True)
    if not list((project_root() / options.run_dir).glob(f"train/*/{WEIGHTS}")):
        print("No run is finished; nothing to score.")
        return 0
    found = evaluate(EvaluateSettings(run_dir=options.run_dir, scenes=options.scenes))["runs"]
    kept = ("method", "seed", "gamma", "pAcc", *SCORES)
    runs = [{name: run[name] for name in kept} for run in found if run["reported"] and run["method"] in METHODS]
    result = {
        "iterations": options.iterations, "batch": options.batch, "scenes": options.scenes,
        "cost": {method: decoder_cost(method) for method in METHODS}, "runs": runs,
    }  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

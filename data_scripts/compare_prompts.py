"""Fourier's basis against the picture's own: SPT-SEG with FFT prompts and with graph spectral prompts.

    python data_scripts/compare_prompts.py --budget 60

Trains both alike on ShapeScenes, seeds outermost, then scores all finished runs on held-out scenes. Training goes on
where it was stopped when the command is given again; the settings are those of 05_train unless given.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from sptseg_lib.checkpoint import WEIGHTS
from sptseg_lib.evaluate import evaluate
from sptseg_lib.model import build_segmenter
from sptseg_lib.settings import EvaluateSettings, TrainSettings
from sptseg_lib.train import fit

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results" / "graph_prompts.json"
BASES = ("fourier", "graph")
SCORES = ("pAcc", "mIoU_seen", "mIoU_unseen", "hIoU")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60, help="minutes after which no further training is begun")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=TrainSettings().iterations)
    parser.add_argument("--batch", type=int, default=TrainSettings().batch)
    parser.add_argument("--scenes", type=int, default=500, help="held-out scenes to score")
    parser.add_argument("--run-dir", default="runs/prompts")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    begun, finished, parameters = time.monotonic(), set(), {}
    for seed in range(options.seeds):
        for basis in BASES:
            settings = TrainSettings(
                method="spt_seg", overrides={"prompt_basis": basis}, seed=seed, iterations=options.iterations,
                batch=options.batch, run_dir=f"{options.run_dir}/{basis}",
            )  # fmt: skip
            done = (settings.folder / "train" / settings.name / WEIGHTS).is_file()
            if not done and time.monotonic() - begun > 60 * options.budget:
                print("The budget is used up; the same command goes on from here.")
                break
            fit(settings, progress=False)
            finished.add(basis)
            spectral = build_segmenter(settings.model()).encoder.spectral
            parameters[basis] = sum(p.numel() for p in spectral.parameters())
            print(f"{basis}, seed {seed}: trained", flush=True)
    runs = []
    for basis in sorted(finished):
        scored = evaluate(EvaluateSettings(run_dir=f"{options.run_dir}/{basis}", scenes=options.scenes))["runs"]
        own = [run for run in scored if run["reported"] and run["method"] == "spt_seg"]
        runs += [{"basis": basis, "seed": run["seed"], **{name: run[name] for name in SCORES}} for run in own]
    if not runs:
        print("No run is finished; nothing to score.")
        return 0
    result = {
        "iterations": options.iterations, "batch": options.batch, "scenes": options.scenes,
        "prompt_parameters": parameters, "runs": runs,
    }  # fmt: skip
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

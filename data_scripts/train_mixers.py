"""Train small MetaFormers that differ in their token mixer alone, score them and measure their frequencies.

    python data_scripts/train_mixers.py --part mixers --budget 60 --threads 1

Parts: `mixers` (six mixers), `ablation` (SPAM's λ, radius, region, gates, kernel and scale), `learned` (λ and
radius as parameters, from several starts). Every part runs on classification (which classes are in a scene) and
on segmentation. One run after the other, seeds outermost, is added to the results file; a run that is in it
already is not repeated, so that the command can be stopped and given again. Steps and batch
are part of a run's identity.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multilabel_average_precision

from sptseg_lib.cost.count import count_cost
from sptseg_lib.data import TEST_SEED, TRAIN_SEED, VALIDATION_SEED
from sptseg_lib.frequency import bin_edges, energy_in_bands, recorded, relative_log_amplitude, transfer_function
from sptseg_lib.metrics import class_iou, confusion_matrix
from sptseg_lib.mixers.equal import MIXERS, equal_metaformer
from sptseg_lib.mixers.fpn import SemanticFPN
from sptseg_lib.mixers.metaformer import Classifier, DenseClassifier
from sptseg_lib.mixers.pooling import SpectralPoolingFilter
from sptseg_lib.scenes.atlas import CLASSES
from sptseg_lib.scenes.render import SceneSettings, render_scenes

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results" / "frequency_mixers.json"
SIZE, BINS = 64, 8
LOW_EDGES = (0, 0.125, 0.25, bin_edges(1)[1].item())  # cycles per sample
TASKS = ("segmentation", "classification")
ABLATIONS = {
    "λ": [{"low_weights": low} for low in ((0.5, 0.5, 0.5), (0.9, 0.9, 0.9), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))],
    "radius": [{"radius": radius} for radius in (1, 3)],
    "region": [{"shape": "rectangle"}],
    "gates": [{"low_weights": low} for low in ((0.8,), (0.7, 0.9), (0.6, 0.7, 0.8, 0.9))],
    "kernel": [{"kernel": kernel} for kernel in (3, 5, 11)],
    "scale": [{"scale": scale} for scale in ("res", "layer")],
}
STARTS = ((0.7, 0.8, 0.9), (0.5, 0.5, 0.5), (0.1, 0.2, 0.3))


class Run(NamedTuple):
    """part, the question within it, and what differs from the plain mixer."""

    part: str
    question: str
    task: str
    mixer: str
    options: dict
    seed: int
    steps: int
    batch: int


def planned(part: str, tasks: Sequence[str], seeds: int, steps: int, batch: int) -> list[Run]:
    """All runs of a part; seeds outermost, so that an unfinished file still compares like with like."""
    if part == "mixers":
        kinds = [("mixer", name, {}) for name in MIXERS]
    elif part == "ablation":
        kinds = [("plain", "spam", {})]
        kinds += [(question, "spam", options) for question, listed in ABLATIONS.items() for options in listed]
    else:
        kinds = [("start", "spam", {"low_weights": start, "learned": True}) for start in STARTS]
    return [
        Run(part, question, task, mixer, options, seed, steps, batch)
        for seed in range(seeds)
        for task in tasks
        for question, mixer, options in kinds
    ]


def scenes(first: int, count: int, stream: int):
    rendered = render_scenes(torch.arange(first, first + count), SceneSettings(size=SIZE), stream)
    return rendered.image_B3HW * 4 - 2, rendered.label_BHW.long(), rendered.visible_BK()


def build(run: Run) -> torch.nn.Module:
    backbone = equal_metaformer(run.mixer, (SIZE // 4, SIZE // 4), **run.options)
    if run.task == "classification":
        return Classifier(backbone, len(CLASSES))
    return DenseClassifier(backbone, SemanticFPN(backbone.widths, len(CLASSES), pyramid=32, width=32, groups=4))


def loss_of(model, task: str, image, label, present):
    if task == "classification":
        return F.binary_cross_entropy_with_logits(model(image), present.float())
    return F.cross_entropy(model(image), label, ignore_index=255)


@torch.no_grad()
def score(model, task: str, count: int, stream: int) -> float:
    """Mean average precision over classes, or mIoU; per cent."""
    image, label, present = scenes(0, count, stream)
    logits = torch.cat([model(part) for part in image.split(64)])
    if task == "classification":
        return 100 * float(multilabel_average_precision(logits.sigmoid(), present.long(), num_labels=len(CLASSES)))
    return 100 * float(class_iou(confusion_matrix(logits.argmax(1), label, len(CLASSES))).nanmean())


def rounded(values) -> list:
    return [None if value != value else round(value, 4) for value in values.tolist()]


@torch.no_grad()
def spectra(model, images) -> dict:
    """For each token mixer: its transfer function, and spectra before and after its half block."""
    mixers = model.backbone.mixers()
    half_blocks = {
        f"{s + 1}.{b // 2 + 1}": half
        for s, stage in enumerate(model.backbone.stages)
        for b, half in enumerate(stage)
        if b % 2 == 0
    }
    with recorded(
        {f"mixer {k}": m for k, m in mixers.items()} | {f"block {k}": b for k, b in half_blocks.items()}
    ) as x:
        model(images)
    found = {}
    for place, mixer in mixers.items():
        transfer = transfer_function(mixer, x[f"mixer {place}"][0], BINS)
        before, after = x[f"block {place}"]
        found[place] = {
            "kept": rounded(transfer.kept),
            "leaked": rounded(transfer.leaked),
            "before": rounded(relative_log_amplitude(before, BINS).mean(0)),
            "after": rounded(relative_log_amplitude(after, BINS).mean(0)),
            "energy_before": rounded(energy_in_bands(before, LOW_EDGES).mean(0)),
            "energy_after": rounded(energy_in_bands(after, LOW_EDGES).mean(0)),
        }
    return found


def train(run: Run, held_out: int, rate: float = 3e-3) -> dict:
    """One run: AdamW, a tenth of the steps as warm-up, then a cosine down to 0."""
    torch.manual_seed(run.seed)
    model = build(run)
    probe = scenes(0, 8, VALIDATION_SEED)[0]
    untrained = spectra(model.eval(), probe)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=run.steps + 1, pct_start=0.1)
    start, last = time.perf_counter(), []
    model.train()
    for step in range(run.steps):
        loss = loss_of(model, run.task, *scenes(step * run.batch, run.batch, TRAIN_SEED + 1000 * run.seed))
        if not torch.isfinite(loss):
            raise RuntimeError(f"{run}: the loss is {loss.item()} at step {step}; lower the rate, now {rate}.")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        last = (last + [loss.item()])[-20:]
    seconds = time.perf_counter() - start
    model.eval()
    cost = count_cost(model, (1, 3, SIZE, SIZE))
    filters = [m for m in model.modules() if isinstance(m, SpectralPoolingFilter) and m.learned]
    return run._asdict() | {
        "loss": round(sum(last) / len(last), 4), "seconds": round(seconds, 1),
        "test": round(score(model, run.task, held_out, TEST_SEED), 2),
        "validation": round(score(model, run.task, held_out, VALIDATION_SEED), 2),
        "parameters": cost.parameters, "multiply_adds": cost.multiply_adds,
        "multiply_adds_with_ffts": cost.multiply_adds_with_ffts,
        "untrained": untrained, "trained": spectra(model, probe),
        "found": [{"low_weight": round(m.low_weight, 4), "radius": round(m.radius, 4)} for m in filters],
    }  # fmt: skip


def identity(run: dict) -> str:
    return json.dumps({name: run[name] for name in Run._fields}, sort_keys=True)


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []


def write(path: Path, runs: list[dict]) -> None:
    """Whole or not at all: an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"size": SIZE, "bins": bin_edges(BINS).tolist(), "band_edges": LOW_EDGES, "classes": CLASSES}
    text = json.dumps(about)[:-1] + ',\n"runs": [\n' + ",\n".join(json.dumps(run) for run in runs) + "\n]}\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["mixers", "ablation", "learned"], default="mixers")
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=TASKS)
    parser.add_argument("--budget", type=float, default=60, help="minutes after which no further run is begun")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=512, help="scenes a score is taken on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    begun = time.monotonic()
    done = {identity(json.loads(json.dumps(run))) for run in read(options.results)}
    runs = planned(options.part, options.tasks, options.seeds, options.steps, options.batch)
    for run in runs:
        if identity(json.loads(json.dumps(run._asdict()))) in done:
            continue
        if time.monotonic() - begun > 60 * options.budget:
            print("The budget is used up; the same command goes on from here.")
            break
        result = train(run, options.held_out)
        write(options.results, [*read(options.results), json.loads(json.dumps(result))])
        said = f"{run.task} {run.mixer} {run.options} seed {run.seed}"
        print(f"{said}: test {result['test']}, {result['seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

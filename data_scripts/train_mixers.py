"""Train small MetaFormers that differ in their token mixer alone, score them and measure their frequencies.

    python data_scripts/train_mixers.py --part mixers --budget 60 --threads 1

Parts: `mixers` (six mixers), `ablation` (SPAM's λ, radius, region, gates, kernel and scale; the plain SPAM is that of
`mixers`), `learned` (λ and radius as parameters, from several starts). Tasks are classification (which classes are in
a scene) and segmentation. One run after the other, seeds outermost, is added to the results file; a run that is in it
already is not repeated, so that the command can be stopped and given again. Steps and batch are part of a run's
identity.

The recipe is short: two stages of one block; scenes of one large thing on one fine texture, each less its mean
colour; weights that keep a map's variance; a high rate. It was chosen on validation scenes, but for one trial
with the mixer `pool`, so that little is tuned to the others.
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multilabel_average_precision

from sptseg_lib.cost.count import count_cost
from sptseg_lib.data import TEST_SEED, TRAIN_SEED, VALIDATION_SEED
from sptseg_lib.frequency import (
    bin_edges,
    energy_in_bands,
    on_grid,
    recorded,
    relative_log_amplitude,
    transfer_function,
)
from sptseg_lib.metrics import class_iou, confusion_matrix
from sptseg_lib.mixers.equal import MIXERS, equal_metaformer
from sptseg_lib.mixers.fpn import SemanticFPN
from sptseg_lib.mixers.metaformer import Classifier, DenseClassifier
from sptseg_lib.mixers.pooling import SpectralPoolingFilter
from sptseg_lib.mixers.tokens import HiLo
from sptseg_lib.scenes.atlas import CLASSES
from sptseg_lib.scenes.render import SceneSettings, render_scenes

RESULTS = Path(__file__).resolve().parents[1] / "notebooks" / "results" / "frequency_mixers.json"
SCENES = SceneSettings(size=48, things=(1, 1), radius=(0.3, 0.4), plain=0, split=0, period=(5, 8), noise=0.02)
BLOCKS, BINS = (1, 1), 8
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
STARTS = ((0.7, 0.8, 0.9), (0.1, 0.2, 0.3))


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
        kinds = [(question, "spam", options) for question, listed in ABLATIONS.items() for options in listed]
    else:
        kinds = [("start", "spam", {"low_weights": start, "learned": True}) for start in STARTS]
    return [
        Run(part, question, task, mixer, options, seed, steps, batch)
        for seed in range(seeds)
        for task in tasks
        for question, mixer, options in kinds
    ]


@lru_cache(maxsize=1000)  # runs of one seed see the same scenes; half precision keeps them small
def _rendered(first: int, count: int, stream: int):
    rendered = render_scenes(torch.arange(first, first + count), SCENES, stream)
    image_B3HW = rendered.image_B3HW - rendered.image_B3HW.mean((2, 3), keepdim=True)
    image_B3HW = image_B3HW / image_B3HW.std((1, 2, 3), keepdim=True)
    return image_B3HW.half(), rendered.label_BHW, rendered.visible_BK()


def scenes(first: int, count: int, stream: int):
    """Images less their own mean colour over their own deviation, labels, and which classes are there."""
    image_B3HW, label_BHW, present_BK = _rendered(first, count, stream)
    return image_B3HW.float().contiguous(memory_format=torch.channels_last), label_BHW.long(), present_BK


def build(run: Run) -> torch.nn.Module:
    """The network, its weights drawn anew so that a layer keeps its input's variance; biases 0."""
    backbone = equal_metaformer(run.mixer, (SCENES.size // 4, SCENES.size // 4), blocks=BLOCKS, **run.options)
    if run.task == "classification":
        model = Classifier(backbone, len(CLASSES))
    else:
        model = DenseClassifier(backbone, SemanticFPN(backbone.widths, len(CLASSES), pyramid=32, width=32, groups=4))
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    return model.to(memory_format=torch.channels_last)


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
    return [None if value != value else round(value, 3) for value in values.tolist()]


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
        if isinstance(mixer, HiLo):
            for branch in ("high", "low"):
                heads = on_grid(getattr(mixer.frequencies, branch))
                kept = transfer_function(heads, x[f"mixer {place}"][0], BINS).kept
                found[place][f"{branch} heads"] = rounded(kept)
    return found


def optimiser_of(model: torch.nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW; norms, biases, scales, and the λ and radius of learned filters are not drawn to 0."""
    several = [p for p in model.parameters() if p.ndim > 1 and p.shape[0] < p.numel()]
    single = [p for p in model.parameters() if not (p.ndim > 1 and p.shape[0] < p.numel())]
    groups = [{"params": several, "weight_decay": 0.05}, {"params": single, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def train(run: Run, held_out: int, rate: float = 1e-2) -> dict:
    """One run: AdamW, a tenth of the steps as warm-up, then a cosine down to 0."""
    torch.manual_seed(run.seed)
    model = build(run)
    probe = scenes(0, 8, VALIDATION_SEED)[0]
    measured = {"untrained": spectra(model.eval(), probe)} if run.part == "mixers" else {}
    optimiser = optimiser_of(model, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=run.steps + 1, pct_start=0.1)
    start, losses = time.process_time(), []
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
        losses.append(loss.item())
    seconds = time.process_time() - start
    model.eval()
    if run.part == "mixers":
        measured["trained"] = spectra(model, probe)
    cost = count_cost(model, (1, 3, SCENES.size, SCENES.size))
    filters = [m for m in model.modules() if isinstance(m, SpectralPoolingFilter) and m.learned]
    return run._asdict() | {
        "loss": round(sum(losses[-20:]) / len(losses[-20:]), 4), "cpu_seconds": round(seconds, 1),
        "test": round(score(model, run.task, held_out, TEST_SEED), 2),
        "validation": round(score(model, run.task, held_out, VALIDATION_SEED), 2),
        "parameters": cost.parameters, "multiply_adds": cost.multiply_adds,
        "multiply_adds_with_ffts": cost.multiply_adds_with_ffts,
        "found": [{"low_weight": round(m.low_weight, 3), "radius": round(m.radius, 3)} for m in filters],
    } | measured  # fmt: skip


def identity(run: dict) -> str:
    return json.dumps({name: run[name] for name in Run._fields}, sort_keys=True)


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []


def write(path: Path, runs: list[dict]) -> None:
    """Whole or not at all: an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"scenes": SCENES.model_dump(), "blocks": BLOCKS, "bins": bin_edges(BINS).tolist(), "band_edges": LOW_EDGES}
    text = json.dumps(about)[:-1] + ',\n"runs": [\n' + ",\n".join(json.dumps(run) for run in runs) + "\n]}\n"
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["mixers", "ablation", "learned"], default="mixers")
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=TASKS)
    parser.add_argument("--budget", type=float, default=60, help="minutes of CPU after which no further run is begun")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=512, help="scenes a score is taken on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    runs = planned(options.part, options.tasks, options.seeds, options.steps, options.batch)
    for run in runs:
        # Read anew each time: another process may work on the same plan.
        if identity(run._asdict()) in map(identity, read(options.results)):
            continue
        if time.process_time() > 60 * options.budget:
            print("The budget is used up; the same command goes on from here.")
            break
        result = train(run, options.held_out)
        write(options.results, [*read(options.results), json.loads(json.dumps(result))])
        said = f"{run.task} {run.mixer} {run.options} seed {run.seed}"
        print(f"{said}: test {result['test']}, {result['cpu_seconds']} s", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

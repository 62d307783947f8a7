"""Every peer built, scored, drawn over all shifts and timed, in one call that goes on where it was stopped."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .clip.dense import dense_clip
from .clip.load import Clip, load_clip
from .clip.text import class_text
from .cost.clock import interleave, quartiles
from .data import held_out_loader, train_loader
from .evaluate import FLOORS, Predictor, clip_score, floor_predictor, score_images, windowed
from .metrics import scores
from .peers import PEERS, Peer
from .precision import find_device
from .results import write_results
from .settings import TrainSettings, one_of, project_root
from .study import FORMS, Form, run_key, run_predictor, run_study, score_once, score_predictor, scorers
from .two_stage import TwoStage, TwoStageSettings
from .zs3 import Zs3, Zs3Settings, clip_patches, fit_zs3

OPTIONS = {"zs3": Zs3Settings, "two_stage": TwoStageSettings}  # what a builder's options are checked by
TIMED = (
    "MaskCLIP",
    "two stages, spectral",
    "two stages, superpixels",
    "two stages, ZegCLIP's pixels",
    "ZegCLIP",
    "SPT-SEG",
)
# Shifts of the seen-unseen curve: beyond ±1 one kind of class is left. Close at both ends, where softmax decides.
_HALF = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.001)
CURVE = [*(-g for g in reversed(_HALF)), 0.0, *_HALF]


def _folder(row: Peer, settings: TrainSettings, root: Path) -> Path:
    """Where a peer's scores are kept: a run's folder, or one named by builder, options and what they take of a run."""
    if not row.build:
        return root / run_key(settings)
    text = json.dumps([row.build, row.options, run_key(settings)], sort_keys=True)
    return root / hashlib.sha256(text.encode()).hexdigest()[:12]


def _zs3(clip: Clip, text_KE: Tensor, settings: TrainSettings, form: Form, folder: Path, options: dict) -> Zs3:
    """Trained if that is not done yet, on what a run with these settings would be trained on."""
    split, _ = scorers(settings, form)
    encode = clip_patches(clip, text_KE.device)
    path = folder / "zs3.safetensors"
    classifier = nn.Linear(*text_KE.T.shape).to(text_KE.device)
    if path.is_file():
        classifier.load_state_dict(load_file(path, str(text_KE.device)))
        return Zs3(encode, classifier)
    batches = train_loader(settings, split)
    classifier = fit_zs3(encode, batches, text_KE, split, Zs3Settings(**options), settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), path)
    return Zs3(encode, classifier)


def build_predictor(row: Peer, settings: TrainSettings, form: Form, root: Path, precision: str = "") -> Predictor:
    """A peer's predictor; what it needs of trained runs must be in `root` (`measure_peers` sees to that).

    settings: the run's, or for a predictor of another kind those that say which CLIP, seed and pictures it takes.
    Raises: ValueError for a peer that was not run, or an unknown option.
    """
    if not row.measured:
        raise ValueError(
            f"{row.name} stands in the table with its published numbers alone: there is no predictor of it here. "
            f"Choose one of {', '.join(p.name for p in PEERS if p.measured)}."
        )
    if not row.build:
        return run_predictor(settings, form, root, precision)
    split, parts = scorers(settings, form)
    held_out, device = next(iter(parts.values())), find_device()
    model = settings.model()
    clip = load_clip(*model.clip_source)
    if row.build in FLOORS:
        prompt = {"prompt": "a photo of a {}"} | row.options
        return floor_predictor(FLOORS[row.build], clip, split, held_out, device, **prompt)
    text_KE = class_text(clip, split.classes, model.prompt).to(device)
    if row.build == "zs3":
        score = _zs3(clip, text_KE, settings, form, _folder(row, settings, root), row.options)
    else:
        pixels = clip_score(dense_clip, clip, text_KE)
        if row.changes is not None:
            pixels = run_predictor(settings, form, root, precision)
        score = TwoStage(clip, text_KE, pixels, TwoStageSettings(**row.options), settings.seed)
    return windowed(score, clip.model.visual.patch_size[0], held_out, device)


def _wanted(row: Peer, settings: TrainSettings, form: Form) -> dict:
    told = {"dataset": settings.dataset, "split": settings.split, "size": settings.size, "seed": settings.seed}
    kind = OPTIONS.get(row.build)
    options = kind(**row.options).model_dump(mode="json") if kind else row.options
    return told | {"build": row.build, "options": options, "form": form._asdict()}


def trade_off(row: Peer, settings: TrainSettings, form: Form, root: Path) -> dict:
    """mIoU of seen and unseen classes on test pictures at every shift of CURVE: {"test": {γ: {both scores}}}, kept."""

    def score() -> dict:
        split, parts = scorers(settings, form)
        loader = held_out_loader(parts["test"], split)
        confusion_GKK, _, _ = score_images(build_predictor(row, settings, form, root), loader, split, CURVE, row.name)
        cards = [scores(matrix, split) for matrix in confusion_GKK]
        kept = ("mIoU_seen", "mIoU_unseen")
        return {"test": {str(gamma): {name: card[name] for name in kept} for gamma, card in zip(CURVE, cards)}}

    return score_once(_folder(row, settings, root) / "curve.json", _wanted(row, settings, form), score)


def measure_peers(
    peers: Iterable[Peer], seeds: Sequence[int], form: Form, root: Path, workers: int = 0, **shared
) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """Train and score every peer that runs: what `run_study` returns, and `trade_off`'s answers of those with a curve.

    A peer that no seed changes is scored once. shared: settings of all runs, such as dataset and split.
    Interrupted at any point, it goes on from there when called again.
    """
    rows = [row for row in peers if row.measured]
    trained = [row.variant for row in rows if row.changes is not None]
    found = run_study(trained, seeds, form, root, workers, **shared) if trained else {}
    curves = {}
    for row in rows:
        plan = [row.variant.settings(form, seed, **shared) for seed in (seeds if row.random else seeds[:1])]
        if row.build:
            found[row.name] = [_score(row, settings, form, root) for settings in plan]
        if row.curve:
            curves[row.name] = [trade_off(row, settings, form, root) for settings in plan]
    return {row.name: found[row.name] for row in rows}, curves


def _score(row: Peer, settings: TrainSettings, form: Form, root: Path) -> dict:
    def score() -> dict:
        return score_predictor(build_predictor(row, settings, form, root), settings, form)

    return score_once(_folder(row, settings, root) / "scores.json", _wanted(row, settings, form), score)


@torch.inference_mode()
def encoder_images(predict: Predictor, image_B3HW: Tensor) -> int:
    """How many images a predictor hands to an image encoder, crops among them: each enters by the patch embedding."""
    handed = []

    def count(module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            handed.append(len(inputs[0]))

    hook = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        predict(image_B3HW)
    finally:
        hook.remove()
    return sum(handed)


def time_peers(
    peers: Iterable[Peer], seed: int, form: Form, root: Path, images: int = 16, rounds: int = 5, **shared
) -> dict[str, dict]:
    """For each peer, all of them measured before: {name: {"encoder_images": an image, "seconds": quartiles an image}}.

    In float32, on the first test pictures at once, on this machine as it is: `seconds` means little beside other work.
    """
    predictors = {}
    for row in peers:
        settings = row.variant.settings(form, seed, **shared)
        predictors[row.name] = build_predictor(row, settings, form, root, "float32")
        split, parts = scorers(settings, form)
    data = held_out_loader(parts["test"], split).dataset
    pictures = [data[i].image_B3HW for i in range(images)]
    # Photographs differ in size: one at a time.
    batches = [torch.stack(pictures)] if settings.dataset == "shapescenes" else [image[None] for image in pictures]
    jobs = {name: lambda p=p: [p(batch) for batch in batches] for name, p in predictors.items()}
    took = interleave(jobs, rounds, find_device())
    return {
        name: {
            "encoder_images": sum(encoder_images(predict, batch) for batch in batches) / images,
            "seconds": [q / images for q in quartiles(took[name])],
        }
        for name, predict in predictors.items()
    }


def measured_peers(form: str, seeds: Sequence[int], cache: str, run_dir: str, **shared) -> dict:
    """`results.measured` for PEERS: scores of all, curves and costs of some; written as <run_dir>/peers_<form>.json.

    "curves": {name: {"gamma": [...], "mIoU_seen": [[...] a seed], "mIoU_unseen": the same}}; "cost": `time_peers`.
    Raises: ValueError for an unknown form, and as `run_study`.
    """
    shared = {setting: value for setting, value in shared.items() if value}
    chosen, root = FORMS[one_of("form", form, FORMS)], project_root() / cache
    study, curves = measure_peers(PEERS, seeds, chosen, root, **shared)
    kept = {
        name: {"gamma": CURVE}
        | {s: [[run["test"][str(g)][s] for g in CURVE] for run in runs] for s in ("mIoU_seen", "mIoU_unseen")}
        for name, runs in curves.items()
    }
    cost = time_peers([row for row in PEERS if row.name in TIMED], seeds[0], chosen, root, **shared)
    return write_results(project_root() / run_dir / f"peers_{form}.json", study, form, curves=kept, cost=cost)

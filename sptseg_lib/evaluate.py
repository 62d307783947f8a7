"""Evaluation: every trained run and the training-free floors, on the same held-out pictures."""

import csv
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoint import WEIGHTS, load_segmenter, read_settings
from .clip.backbone import VisionBackbone
from .clip.dense import dense_clip, patch_tokens
from .clip.load import Clip, load_clip
from .clip.text import class_text
from .data import held_out_loader, split_for, training_split
from .diagnose import HEALTHY, diagnose
from .distributed import Place, launch
from .inference import label_maps, scaled_probabilities
from .metrics import confusion_matrix, scores
from .precision import backbone_dtype
from .scenes.render import SceneSettings
from .settings import EvaluateSettings, TrainSettings
from .splits import Split, transfer_split

Predictor = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [0, 1] -> probabilities (B, K, H, W)
FLOORS = {"dense_clip": dense_clip, "patch_tokens": patch_tokens}  # what needs no training


def score_images(
    predict: Predictor, loader: Iterable, split: Split, gammas: list[float], title: str = ""
) -> tuple[Tensor, list[dict], float]:
    """Run a predictor over a test set once, for all seen-class shifts.

    predict: (B, 3, H, W) in [0, 1] -> probabilities (B, K, H, W).
    Returns: confusion matrices (G, K, K); per picture, at the first shift, its index, pAcc and mean IoU
    over the classes in it (per cent); seconds in the predictor.
    """
    classes = len(split.classes)
    total = torch.zeros(len(gammas), classes, classes, dtype=torch.int64)
    rows, seconds = [], 0.0
    for image, label, index in tqdm(loader, desc=title, leave=False):
        start = time.perf_counter()
        predicted_GBHW = label_maps(predict(image), split.seen_ids, gammas).cpu()
        seconds += time.perf_counter() - start
        for g, predicted_BHW in enumerate(predicted_GBHW):
            total[g] += confusion_matrix(predicted_BHW, label, classes)
        rows += picture_scores(predicted_GBHW[0], label, index, split)
    return total, rows, seconds


def picture_scores(predicted_BHW: Tensor, label_BHW: Tensor, index_B: Tensor, split: Split) -> list[dict]:
    """pAcc and mean IoU of each picture over the classes in it, in per cent."""
    rows = []
    counted = label_BHW != 255
    right_B = ((predicted_BHW == label_BHW) & counted).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)
    K = len(split.classes)
    hot = [
        torch.nn.functional.one_hot(x.where(counted, K).flatten(1), K + 1)[..., :K] for x in (predicted_BHW, label_BHW)
    ]
    both_BK = (hot[0] * hot[1]).sum(1)
    union_BK = hot[0].sum(1) + hot[1].sum(1) - both_BK
    there_BK = hot[1].any(1)
    mean_B = (both_BK / union_BK.clamp(min=1) * there_BK).sum(1) / there_BK.sum(1).clamp(min=1)
    for i, right, mean in zip(index_B.tolist(), right_B.tolist(), mean_B.tolist()):
        rows.append({"picture": i, "pAcc": round(100 * right, 2), "mIoU": round(100 * mean, 2)})
    return rows


def windowed(score: Callable[[Tensor], Tensor], patch: int, settings: EvaluateSettings, device: str) -> Predictor:
    """What `score_images` takes, from what scores one window: images (B, 3, h', w') -> probabilities (B, K, ·, ·)."""

    def predict(image_B3HW: Tensor) -> Tensor:
        image_B3HW = image_B3HW.to(device)
        return scaled_probabilities(score, image_B3HW, settings.size, patch, settings.stride, settings.short_side)

    return predict


def trained_predictor(
    folder: Path, split: Split, settings: EvaluateSettings, device: str
) -> tuple[Predictor, TrainSettings]:
    """What `score_images` takes, from a training run's folder, for the classes of a split; and that run's settings."""
    segmenter, trained = load_segmenter(folder, dtype=backbone_dtype(settings.precision, device))
    model = trained.model()
    text_KE = class_text(load_clip(*model.clip_source), split.classes, model.prompt).to(device)
    segmenter = segmenter.to(device)

    def score(piece_B3HW: Tensor) -> Tensor:
        return segmenter.probabilities(segmenter(piece_B3HW, text_KE))

    return windowed(score, segmenter.patch, settings, device), trained


def clip_score(dense: Callable, clip: Clip, class_text_KE: Tensor) -> Predictor:
    """Probabilities of patches from CLIP alone, on the texts' device: (B, 3, H, W) in [0, 1] -> (B, K, h, w).

    dense: one of FLOORS. Cosines become probabilities as between images and captions: softmax of s · cos, s CLIP's.
    """
    device = class_text_KE.device
    backbone = VisionBackbone(clip.image_side(device)).eval()
    mean_311, std_311 = (torch.tensor(x, device=device).view(3, 1, 1) for x in (clip.mean, clip.std))
    scale = clip.model.logit_scale.exp().item()
    return lambda image: (dense(backbone, (image - mean_311) / std_311, class_text_KE) * scale).softmax(1)


def floor_predictor(
    dense: Callable, clip: Clip, split: Split, settings: EvaluateSettings, device: str, prompt: str = "a photo of a {}"
) -> Predictor:
    """What `score_images` takes, from CLIP alone: one of FLOORS, for the classes of a split."""
    text_KE = class_text(clip, split.classes, prompt).to(device)
    return windowed(clip_score(dense, clip, text_KE), clip.model.visual.patch_size[0], settings, device)


def evaluate(settings: EvaluateSettings, scenes: SceneSettings | None = None) -> dict:
    """Score all finished runs below `<run_dir>/train` and the floors; write metrics.json and pictures.csv.

    Returns {"runs": [...]}: for each run and each γ one entry with dataset, split, setting, method, seed,
    gamma, pAcc, mIoU_seen, mIoU_unseen, hIoU, things and stuff apart (per cent), per_class, seconds,
    images_per_second, "diagnosis" (a known disaster's name; also printed), and "reported": true for the entry at
    `settings.gamma`. The floors, which need no shift, are scored at γ = 0.
    The runs are then scored on each data set of `settings.transfer`, where a class is seen if training saw its name.
    With several devices each scores its own pictures, none twice, and the confusion matrices are added up.
    Raises: FileNotFoundError where nothing has been trained.
    """
    return launch(settings, _evaluate, settings, scenes)


def _target(settings: EvaluateSettings, split: Split, name: str, dataset: str) -> tuple[EvaluateSettings, Split]:
    """Settings and classes for scoring on another data set than that of training."""
    target = transfer_split(split, split_for(dataset, name))
    return settings.model_copy(update={"dataset": dataset}), target


def _evaluate(place: Place, settings: EvaluateSettings, scenes: SceneSettings | None) -> dict:
    run_dir, device = settings.folder, place.device
    split = split_for(settings.dataset, settings.split)
    folders = sorted(path.parent for path in run_dir.glob(f"train/*/{WEIGHTS}"))
    if not folders:
        raise FileNotFoundError(
            f"No finished run below {run_dir / 'train'}. There is nothing to score; run 05_train first."
        )
    gammas = [settings.gamma, *(g for g in settings.gammas if g != settings.gamma)]
    runs, pictures = [], []
    own, others = (settings, split), [_target(settings, split, *pair) for pair in settings.transfer.items()]
    jobs: list[tuple[str, Path | None, tuple]] = [
        *((name, None, own) for name in FLOORS),
        *((folder.name, folder, own) for folder in folders),
        *((f"{folder.name} on {other[1].name}", folder, other) for other in others for folder in folders),
    ]
    for name, folder, (settings, split) in jobs:
        loader = held_out_loader(settings, split, scenes, place.rank, place.world)
        if folder is None:
            model = read_settings(folders[0]).model()
            predict = floor_predictor(FLOORS[name], load_clip(*model.clip_source), split, settings, device)
            method, setting, seed, own_gammas = name, "training-free", settings.seed, [0.0]
        else:
            predict, trained = trained_predictor(folder, split, settings, device)
            method, setting, seed = trained.method, trained.setting, trained.seed
            if trained.split != settings.split:
                raise ValueError(
                    f"{name} was trained on split {trained.split!r}, not {settings.split!r}. Classes that it saw "
                    "would be scored as unseen; evaluate with its own split."
                )
            if trained.seen_classes:  # a class counts as seen where this run saw it
                split = transfer_split(training_split(trained), split)
            own_gammas = gammas if setting == "inductive" else [0.0]
        shares = place.gather(score_images(predict, loader, split, own_gammas, name))
        confusion_GKK = sum(share[0] for share in shares)
        rows = sorted((row for share in shares for row in share[1]), key=lambda row: row["picture"])
        seconds = max(share[2] for share in shares)
        pictures += [{"run": name, **row} for row in rows]
        diagnosis = diagnose(confusion_GKK[0], split)
        if diagnosis is not HEALTHY:
            tqdm.write(f"{name}: {diagnosis}")
        for gamma, confusion_KK in zip(own_gammas, confusion_GKK):
            runs.append({
                "dataset": settings.dataset, "split": split.name, "setting": setting, "method": method, "seed": seed,
                "gamma": gamma, "reported": gamma == own_gammas[0], **scores(confusion_KK, split),
                "diagnosis": diagnosis.name,
                "seconds": round(seconds, 2), "images_per_second": round(len(rows) / seconds, 2),
            })  # fmt: skip
    metrics = {"runs": runs}
    if place.rank:
        return metrics
    (run_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
    with (run_dir / "pictures.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(pictures[0]))
        writer.writeheader()
        writer.writerows(pictures)
    return metrics

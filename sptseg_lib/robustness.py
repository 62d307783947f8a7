"""Where a trained run breaks, and how it grows: corrupted pictures, more training, more names, and pictures to look at.

Runs are those of the studies, kept under the same keys; what is measured on one lies beside its scores.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .clip.load import load_clip
from .corruptions import CORRUPTIONS, RADIUS, SEVERITIES, corrupt
from .data import held_out_loader
from .evaluate import FLOORS, Predictor, floor_predictor, trained_predictor
from .inference import label_maps
from .metrics import confusion_matrix, harmonic_mean, scores
from .panels import compare_pictures
from .precision import find_device
from .results import choose_gamma, write_results
from .settings import TrainSettings, one_of, project_root
from .splits import Split, fewer_seen
from .study import FORMS, GAMMAS, Form, Variant, run_key, run_study, scorers
from .vocabulary import FOREIGN, foreign_names, score_names, with_foreign

METHODS = ("spt_seg", "zegclip_sgd", "zegclip")  # ours, ours without spectral prompts, the paper's baseline
GROWN = ("spt_seg", "zegclip")
FLOOR = "patch_tokens"
IMAGES, SEEN_CLASSES = (32, 128, 512), (2, 4, 7)  # beside all there are
PANEL_PICTURES = 200
SPOILT_SCENES = 128  # of the test scenes at most: each is looked at 29 times
SCORES = ("mIoU_seen", "mIoU_unseen", "hIoU")
HIDDEN_TOO = "occlusion, hidden pixels too"


def score_corrupted(
    predict: Predictor, pictures: Iterable, split: Split, gamma: float, seed: int = 0
) -> dict[str, dict[str, list]]:
    """Scores by corruption and severity, each picture rendered or read once: {corruption: {score: [a severity each]}}.

    Pixels under an occluder do not count: what they hold cannot be seen, and a score of them would fall with the
    area covered, however well the rest is found. HIDDEN_TOO counts them, with the class that lies behind.
    """
    K = len(split.classes)
    found: dict[tuple, Tensor] = defaultdict(lambda: torch.zeros(K, K, dtype=torch.int64))
    for image_B3HW, label_BHW, index_B in tqdm(pictures, desc="corruptions", leave=False):
        for name in CORRUPTIONS:
            for severity in SEVERITIES:
                if severity == 0 and name != "occlusion":
                    continue  # untouched: the same for all
                spoilt = corrupt(image_B3HW, name, severity, index_B, seed)
                predicted_BHW = label_maps(predict(spoilt.image_B3HW), split.seen_ids, [gamma])[0].cpu()
                visible_BHW = label_BHW.masked_fill(spoilt.covered_BHW, 255)
                found[name, severity] += confusion_matrix(predicted_BHW, visible_BHW, K)
                if name == "occlusion":
                    found[HIDDEN_TOO, severity] += confusion_matrix(predicted_BHW, label_BHW, K)
    card = {key: scores(matrix, split) for key, matrix in found.items()}
    untouched = card["occlusion", 0]
    return {
        name: {score: [card.get((name, severity), untouched)[score] for severity in SEVERITIES] for score in SCORES}
        for name in (*CORRUPTIONS, HIDDEN_TOO)
    }


def kept(path: Path, asked: dict, find: Callable[[], dict]) -> dict:
    """What `find` returns, from a file where the same was asked before; asked otherwise, it is found anew."""
    asked = json.loads(json.dumps(asked))
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["asked"] == asked:
            return held["found"]
    found = json.loads(json.dumps(find()))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps({"asked": asked, "found": found}), encoding="utf-8")
    partial.replace(path)
    return found


class Trained:
    """A method's run, or CLIP's patch tokens where method is FLOOR: predictors and held-out pictures of its form."""

    def __init__(self, method: str, settings: TrainSettings, form: Form, root: Path, gamma: float):
        self.settings, self.gamma, self.floor = settings, gamma, method == FLOOR
        self.split, self.parts = scorers(settings, form)
        # The floor is not trained, but for the form's CLIP and pictures: under the first run's key.
        self.folder = root / (f"{FLOOR}-{run_key(settings)}" if self.floor else run_key(settings))

    def predictor(self, split: Split) -> Predictor:
        part, device = next(iter(self.parts.values())), find_device()
        if self.floor:
            clip = load_clip(*self.settings.model().clip_source)
            return floor_predictor(FLOORS[FLOOR], clip, split, part, device)
        return trained_predictor(self.folder / "train" / self.settings.name, split, part, device)[0]

    def pictures(self, part: str, most: int | None = None) -> Iterable:
        """A part's batches; of ShapeScenes the first `most`."""
        asked = self.parts[part]
        return held_out_loader(asked.model_copy(update={"scenes": min(most or asked.scenes, asked.scenes)}), self.split)

    def asked(self, **more) -> dict:
        parts = {name: part.model_dump(mode="json") for name, part in self.parts.items()}
        return {"gamma": self.gamma, "parts": parts, **more}

    def corrupted(self) -> dict:
        levels = {name: corruption.levels for name, corruption in CORRUPTIONS.items()}
        return kept(
            self.folder / "corrupted.json",
            self.asked(levels=levels, radius=RADIUS, most=SPOILT_SCENES),
            lambda: score_corrupted(
                self.predictor(self.split), self.pictures("test", SPOILT_SCENES), self.split, self.gamma
            ),
        )

    def named(self) -> dict:
        foreign = foreign_names(self.split, FOREIGN[-1], self.settings.seed)
        gammas = [0.0] if self.floor else GAMMAS

        def find() -> dict:
            predict = self.predictor(with_foreign(self.split, foreign))
            batches = {part: self.pictures(part) for part in self.parts}
            found = score_names(predict, self.split, foreign, batches, self.gamma, gammas, self.settings.seed)
            by_count = {
                kind: {count: {score: card[score] for score in SCORES} for count, card in getattr(found, kind).items()}
                for kind in ("absent", "foreign")
            }
            return {"open": {name: value._asdict() for name, value in found.open.items()}, **by_count}

        return kept(self.folder / "names.json", self.asked(foreign=foreign), find)


def variants(grown: Sequence[str] = GROWN) -> list[Variant]:
    """METHODS as they are, then those of `grown` with fewer training pictures or fewer seen classes."""
    few = [("images", n) for n in IMAGES] + [("seen_classes", n) for n in SEEN_CLASSES]
    return [Variant(method, {"method": method}) for method in METHODS] + [
        Variant(f"{method}, {name}={n}", {"method": method, name: n}) for name, n in few for method in grown
    ]


def common_scores(runs: list[dict], split: Split) -> dict[str, list | float]:
    """Scores of the same classes, however many a run saw: {"gamma", and for each of SCORES one value a seed}.

    Seen: those of the fewest in SEEN_CLASSES, drawn by the run's seed; unseen: the split's. All names compete and all
    pixels count in every run, so that runs differ in their training alone. γ is chosen on validation for these classes.
    """

    def means(card: dict, seed: int) -> tuple[float, float]:
        names = (fewer_seen(split, SEEN_CLASSES[0], seed).seen, split.unseen)
        ious = [[card["per_class"][name]["iou"] for name in group] for group in names]
        present = [[iou for iou in group if iou is not None] for group in ious]
        return tuple(sum(group) / len(group) if group else 0.0 for group in present)

    def of(part: str, gamma: str) -> list[tuple[float, float]]:
        return [means(run[part][gamma], run["settings"]["seed"]) for run in runs]

    gamma = str(choose_gamma(runs))
    if "validation" in runs[0]:
        gamma = max(runs[0]["validation"], key=lambda g: sum(harmonic_mean(*pair) for pair in of("validation", g)))
    found = [(seen, unseen, harmonic_mean(seen, unseen)) for seen, unseen in of("test", gamma)]
    return {"gamma": float(gamma)} | {
        score: [round(v, 2) for v in column] for score, column in zip(SCORES, zip(*found))
    }


def measure(form: str, seeds: Sequence[int], cache: str, run_dir: str, grown: Sequence[str] = GROWN, **shared) -> dict:
    """All of it in a form, trained and scored as far as the cache does not hold it; also left in the run folder.

    Returns and writes <run_dir>/robustness_<form>.json: `write_results` of `variants`, with "corrupted" and "names",
    {method: [what was found, a seed each]}, "common", {variant: `common_scores`}, and "panels". cache, run_dir and
    shared as in `results.measured`.
    Raises: ValueError for an unknown form, and as `run_study`.
    """
    shared = {setting: value for setting, value in shared.items() if value}
    plan, root = FORMS[one_of("form", form, FORMS)], project_root() / cache
    study = run_study(variants(grown), seeds, plan, root, **shared)
    gammas = {method: choose_gamma(study[method]) for method in METHODS} | {FLOOR: 0.0}
    trained = {
        method: [
            Trained(method, Variant("", changes).settings(plan, seed, **shared), plan, root, gammas[method])
            for seed in own
        ]
        for method, changes, own in (
            *((name, {"method": name}, seeds) for name in METHODS), (FLOOR, {}, seeds[:1])
        )
    }  # fmt: skip
    ours, baseline = trained["spt_seg"][0], trained["zegclip"][0]
    split = ours.split
    panels = compare_pictures(
        ours.predictor(split), baseline.predictor(split), (ours.gamma, baseline.gamma),
        ours.pictures("test"), split, PANEL_PICTURES,
    )  # fmt: skip
    return write_results(
        project_root() / run_dir / f"robustness_{form}.json",
        study,
        form,
        dataset=ours.settings.dataset,
        split=ours.settings.split,
        gammas=gammas,
        radius=RADIUS,
        levels={name: {"unit": c.unit, "levels": c.levels} for name, c in CORRUPTIONS.items()},
        corrupted={method: [run.corrupted() for run in runs] for method, runs in trained.items()},
        names={method: [run.named() for run in runs] for method, runs in trained.items()},
        common={name: common_scores(runs, split) for name, runs in study.items() if "images" not in name},
        panels={"seed": seeds[0], **panels},
    )

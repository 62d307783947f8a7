"""Studies: variants of a method, each trained with several seeds and scored alike.

A run is kept under a key made of its settings. What two tables share is trained once, and a study that was stopped
goes on where it was. Scores are taken for every seen-class shift γ, on validation scenes, where γ is chosen for each
variant, and on test scenes, where it is not.
"""

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from tqdm.auto import tqdm

from .clip.load import TINY
from .data import held_out_loader, training_split
from .disk import check_room
from .evaluate import Predictor, score_images, trained_predictor
from .hardware import hardware
from .metrics import scores
from .precision import find_device
from .settings import HOW, EvaluateSettings, TrainSettings, project_root
from .splits import Split
from .train import fit

GAMMAS = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]
# Linux's allocator hands large blocks back when they are freed, and a training step asks for the same ones again.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": 2**32, "MALLOC_TRIM_THRESHOLD_": 2**32, "MALLOC_TOP_PAD_": 2**28}
WORKER_BYTES = 1_500_000_000  # what one training process of the tiny CLIP takes, torch and all, rounded up
TINY_RUNS_A_GPU = 14  # one keeps a GPU idle most of the time; so many at once were tried (docs/many_gpus.md)
Scorecard = dict[str, dict[str, dict]]  # part -> γ -> scores


class Form(NamedTuple):
    """How long a study's runs are: changes to TrainSettings' defaults, scenes to score them, EvaluateSettings' changes.

    A data set of photographs is scored on its whole test set and has no validation part.
    """

    train: dict
    validation: int = 1
    test: int = 1
    score: dict = {}


def _recipe(split: str, iterations: int, **overrides) -> Form:
    """The paper's setting for a data set of photographs, as in notebooks/pipelines/<split>_inductive.yaml.

    The prepared folder is data/<split> unless a study says otherwise.
    """
    clip = {"clip": "ViT-B-16-quickgelu", "weights": "openai", "normalisation": "imagenet", "grid": 32}
    schedule = {"iterations": iterations, "learning_rate": 2e-4, "warmup": 1500, "save_every": 1000}
    pictures = {"dataset": f"data/{split}", "split": split, "size": 512, "batch": 16, "num_workers": 8}
    return Form({**pictures, **schedule, "overrides": clip | overrides}, score={"short_side": 512, "stride": 426})


FORMS = {
    "smoke": Form(  # every step in miniature: scores mean nothing
        {"size": 64, "batch": 2, "iterations": 2, "warmup": 1, "overrides": {"grid": 8}}, validation=4, test=8
    ),
    "brief": Form(  # all rows of the ablations in half an hour, on two cores without special instructions
        {"size": 96, "batch": 4, "iterations": 120, "warmup": 20, "overrides": {"grid": 12}}, validation=96, test=192
    ),
    "short": Form(
        {"size": 96, "batch": 8, "iterations": 150, "warmup": 20, "overrides": {"grid": 12}}, validation=128, test=256
    ),
    "long": Form(
        {"size": 96, "batch": 8, "iterations": 800, "warmup": 50, "overrides": {"grid": 12}}, validation=200, test=500
    ),
    "voc12": _recipe("voc12", 20_000, prompt_tokens=10),
    "coco_stuff": _recipe("coco_stuff", 96_000, prompt_tokens=100, prompt="ensemble"),
}


class Variant(NamedTuple):
    """One row of a table: TrainSettings that differ from the form's. `overrides` of both are put together.

    seeds: its own, where they are not the study's.
    """

    name: str
    changes: dict
    seeds: tuple[int, ...] = ()

    def settings(self, form: Form, seed: int, **shared) -> TrainSettings:
        """The variant's run with one seed. Raises: ValueError (pydantic's) for settings that cannot be."""
        overrides = {**form.train.get("overrides", {}), **self.changes.get("overrides", {})}
        return TrainSettings(**{**form.train, **shared, **self.changes, "overrides": overrides, "seed": seed})


def run_key(settings: TrainSettings) -> str:
    """A name for what a run computes: its settings that are not the default, hashed.

    A preset and the same model written as overrides are one run, and a new setting of later versions renames none.
    """
    own = settings.model_dump(
        mode="json", exclude_defaults=True, exclude=HOW | {"run_dir", "start", "method", "overrides"}
    )
    model = settings.model().model_dump(mode="json", exclude_defaults=True, exclude={"seen_shift"})
    text = json.dumps([own, model], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def scorers(settings: TrainSettings, form: Form) -> tuple[Split, dict[str, EvaluateSettings]]:
    """What a run is scored on: its split, and for each part, validation and test, the settings of `held_out_loader`."""
    scenes = {"validation": form.validation, "test": form.test}
    if settings.dataset != "shapescenes":
        del scenes["validation"]
    shared = {name: getattr(settings, name) for name in ("dataset", "split", "size", "precision", "num_workers")}
    return training_split(settings), {
        part: EvaluateSettings(part=part, scenes=count, batch=32, **shared, **form.score)
        for part, count in scenes.items()
    }


def score_predictor(predict, settings: TrainSettings, form: Form, gammas: list[float] = GAMMAS) -> Scorecard:
    """Scores of any predictor, (B, 3, H, W) -> probabilities (B, K, H, W), on a run's validation and test pictures.

    Returns {"validation": {γ: scores}, "test": {γ: scores}}; a data set other than ShapeScenes has no validation part.
    """
    split, parts = scorers(settings, form)
    card: Scorecard = {}
    for part, held_out in parts.items():
        confusion_GKK, _, _ = score_images(predict, held_out_loader(held_out, split), split, gammas, part)
        card[part] = {str(gamma): scores(matrix, split) for gamma, matrix in zip(gammas, confusion_GKK)}
    return card


def score_once(path: Path, wanted: dict, score: Callable[[], Scorecard]) -> dict:
    """What `path`, scores.json in a folder named by a key, holds; if it is not there, what `score` makes, kept there.

    wanted: settings that the scores belong to. Returns {"key", "settings", "seconds", "cpu_seconds", "hardware"} and
    the scores.
    Raises: ValueError where the file holds scores of other settings.
    """
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        told = {name: value for name, value in found["settings"].items() if name in wanted}
        same = {name: wanted[name] for name in told}
        for known in (told, same):  # a preset and the same model written out are one run
            known.pop("method", None), known.pop("overrides", None)
        if told != json.loads(json.dumps(same)):
            raise ValueError(
                f"{path} holds scores of other settings under the same key: {told}, not {same}. "
                "Two runs would be taken for one; delete that folder."
            )
        return found
    begun, busy = time.perf_counter(), time.process_time()
    card = score()
    result = {"key": path.parent.name, "settings": wanted}
    result["seconds"] = round(time.perf_counter() - begun, 1)
    result["cpu_seconds"] = round(time.process_time() - busy, 1)  # of all threads: other work on the machine adds none
    result["hardware"] = hardware()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result | card), encoding="utf-8")
    partial.replace(path)
    return result | card


def run_predictor(settings: TrainSettings, form: Form, root: Path, precision: str = "") -> Predictor:
    """The predictor of a study's finished run; precision: another than the run's own."""
    folder = project_root() / root / run_key(settings) / "train" / settings.name
    split, parts = scorers(settings, form)
    held_out = next(iter(parts.values()))
    if precision:
        held_out = held_out.model_copy(update={"precision": precision})
    return trained_predictor(folder, split, held_out, find_device())[0]


def train_and_score(settings: TrainSettings, form: Form, root: Path) -> dict:
    """One run of a study, trained and scored if that is not done yet; what <root>/<key>/scores.json holds.

    A transductive run goes on from the inductive one of the same variant, which must be there.
    Raises: ValueError where the folder holds scores of other settings.
    """
    folder = root / run_key(settings)
    wanted = settings.model_dump(mode="json", exclude=HOW | {"run_dir", "start"}) | {"form": form._asdict()}

    def score() -> Scorecard:
        fit(settings.model_copy(update={"run_dir": str(folder)}), progress=False)
        predict = run_predictor(settings, form, root)
        return score_predictor(predict, settings, form, GAMMAS if settings.setting == "inductive" else [0.0])

    return score_once(folder / "scores.json", wanted, score)


def workers_for(jobs: Sequence[TrainSettings]) -> int:
    """How many of these runs this machine takes at once: as many as it has cores and free memory for.

    On GPUs, one each, or TINY_RUNS_A_GPU where all are of the tiny CLIP.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = min(len(jobs), cores, psutil.virtual_memory().available // WORKER_BYTES)
    if torch.cuda.is_available():
        tiny = all(job.model().clip == TINY for job in jobs)
        most = min(most, torch.cuda.device_count() * (TINY_RUNS_A_GPU if tiny else 1))
    return max(1, most)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _begin_worker(devices, threads: int) -> None:
    # A worker waits for its next run for ever, also where whoever would send it has been killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(devices.get())
    torch.set_num_threads(threads)


def _all_at_once(jobs: Sequence[TrainSettings], form: Form, root: Path, workers: int, title: str) -> list[dict]:
    if workers == 1:
        return [train_and_score(job, form, root) for job in tqdm(jobs, desc=title)]
    context = multiprocessing.get_context("spawn")
    devices = None
    if torch.cuda.is_available():
        devices = context.Queue()
        for i in range(workers):
            devices.put(i % torch.cuda.device_count())
    threads = max(1, torch.get_num_threads() // workers)
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, str(value))  # read by the workers when they start
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (devices, threads))
    try:
        waiting = [pool.submit(train_and_score, job, form, root) for job in jobs]
        return [done.result() for done in tqdm(as_completed(waiting), total=len(jobs), desc=title)]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():  # each goes on from its last checkpoint next time
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_study(
    variants: Iterable[Variant], seeds: Sequence[int], form: Form, root: Path, workers: int = 0, **shared
) -> dict[str, list[dict]]:
    """Train and score every variant with every seed; {variant: what `train_and_score` returns, a seed each}.

    root: where runs are kept. workers: runs at once; 0: as many as `workers_for` allows. shared: settings of all runs,
    such as dataset and split. Interrupted at any point, it goes on from there when called again.
    Raises: ValueError for settings that cannot be, before anything is trained.
    """
    variants = list(variants)
    plan = {v.name: [v.settings(form, seed, **shared) for seed in v.seeds or seeds] for v in variants}
    inductive, transductive = {}, {}
    for runs in plan.values():
        for i, run in enumerate(runs):
            if run.start_folder is not None:
                first = {"setting": "inductive", "pseudo": "own", "iterations": form.train["iterations"]}
                first = run.model_copy(update=first)
                inductive[run_key(first)] = first
                start = root / run_key(first) / "train" / first.name
                runs[i] = run = run.model_copy(update={"start": str(start)})
                transductive[run_key(run)] = run
            else:
                inductive[run_key(run)] = run
    check_room(root, 200_000_000)
    found = {}
    for title, jobs in (("training", inductive), ("self-training", transductive)):
        if jobs:
            # Seeds outermost: a study that is stopped early has every variant rather than every seed.
            ordered = sorted(jobs.values(), key=lambda job: job.seed)
            count = min(workers or workers_for([*jobs.values()]), len(jobs))
            found |= {run["key"]: run for run in _all_at_once(ordered, form, root, count, title)}
    return {name: [found[run_key(run)] for run in runs] for name, runs in plan.items()}

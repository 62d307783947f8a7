"""What a study leaves: a small file of scores, from which notebooks draw every table and figure."""

import json
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

from .settings import one_of, project_root
from .study import FORMS, Variant, run_study

PUBLISHED_GAMMA = 0.1  # for data sets that have no validation pictures apart from their test set
KEPT = ("pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "things_seen", "things_unseen", "stuff_seen", "stuff_unseen")


def choose_gamma(runs: list[dict]) -> float:
    """The γ with the highest hIoU on validation scenes, averaged over a variant's seeds; without any, the published."""
    if "validation" not in runs[0]:
        return PUBLISHED_GAMMA if str(PUBLISHED_GAMMA) in runs[0]["test"] else 0.0
    parts = [run["validation"] for run in runs]
    return max((float(g) for g in parts[0]), key=lambda g: sum(part[str(g)]["hIoU"] or 0.0 for part in parts))


def summarise(study: dict[str, list[dict]]) -> dict[str, dict]:
    """What is kept of `run_study`'s answer: for each variant the chosen γ, and test scores by γ, a seed each.

    {variant: {"gamma", "seeds": [...], "seconds": [...], "cpu_seconds": [...], "validation_hIoU": [...] at γ,
    "test": [{γ: {score: value}}, ...], "per_class": [{class: IoU}, ...] at γ}}.
    """
    kept = {}
    for name, runs in study.items():
        gamma = choose_gamma(runs)
        kept[name] = {
            "gamma": gamma,
            "seeds": [run["settings"]["seed"] for run in runs],
            "seconds": [run["seconds"] for run in runs],
            "cpu_seconds": [run["cpu_seconds"] for run in runs],
            "validation_hIoU": [run["validation"][str(gamma)]["hIoU"] for run in runs if "validation" in run],
            "test": [{g: {k: card[k] for k in KEPT if k in card} for g, card in run["test"].items()} for run in runs],
            "per_class": [
                {
                    c: value["iou"] and round(value["iou"], 2)
                    for c, value in run["test"][str(gamma)]["per_class"].items()
                }
                for run in runs
            ],
        }
    return kept


def write_results(path: Path, study: dict[str, list[dict]], form: str, **about) -> dict:
    """Write a study's results with the form, the machines and the day; returns what `read_results` would."""
    runs = {run["key"]: run for runs in study.values() for run in runs}.values()
    machines = dict.fromkeys(run.get("hardware", "a machine not noted") for run in runs)
    found = {
        "form": form, **FORMS[form]._asdict(), "hardware": "; ".join(machines), "day": date.today().isoformat(),
        "runs": len(runs), "cpu_hours": round(sum(run["cpu_seconds"] for run in runs) / 3600, 2), **about,
        "variants": summarise(study),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return found


def read_results(name: str) -> dict:
    """Results that are kept with the project: notebooks/results/<name>.json. Raises: FileNotFoundError."""
    path = project_root() / "notebooks" / "results" / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, so there are no results to show. Choose a form that trains what is missing: "
            f"{', '.join(FORMS)}."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def measured(
    name: str,
    form: str,
    variants: Iterable[Variant],
    seeds: Sequence[int],
    cache: str,
    run_dir: str,
    **shared,
) -> dict:
    """Results of a study in a form, trained as far as the cache does not hold them; also left in the run folder.

    cache: where runs are kept, run_dir: where <name>_<form>.json is written; relative paths count from the checkout.
    shared: settings of all runs, such as dataset and split, where they are not empty and the form's own are meant.
    Raises: ValueError for an unknown form, and as `run_study`.
    """
    shared = {setting: value for setting, value in shared.items() if value}
    study = run_study(variants, seeds, FORMS[one_of("form", form, FORMS)], project_root() / cache, **shared)
    return write_results(project_root() / run_dir / f"{name}_{form}.json", study, form)


def at_gamma(variant: dict, score: str, gamma: float | None = None) -> Sequence[float]:
    """A test score of each seed of a variant, in per cent, at the γ chosen on validation scenes or at another."""
    return [cards[str(variant["gamma"] if gamma is None else gamma)][score] for cards in variant["test"]]

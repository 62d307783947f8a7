"""Make a trained run the package's own checkpoint: `segment` uses it where no other is named.

    python data_scripts/ship_checkpoint.py runs/demo
    python data_scripts/ship_checkpoint.py runs/demo --run zegclip-inductive-seed0

Copies the run's prompts and decoder to sptseg_lib/shipped/, with the settings (γ as in the reported scores) and a
card made from the run folder's metrics.json. Nothing is changed where something about the run is wrong.
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from safetensors import safe_open

from sptseg_lib.checkpoint import WEIGHTS, load_segmenter, read_settings, write_settings
from sptseg_lib.clip.load import TINY
from sptseg_lib.clip.tiny import WEIGHTS_PATH
from sptseg_lib.settings import TrainSettings
from sptseg_lib.shipped import FOLDER

MOST_BYTES = 5_000_000
CARD = "CARD.md"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reported_scores(run_folder: Path, name: str, settings: TrainSettings) -> dict:
    """The reported entry of metrics.json for one run; raises ValueError where there is not exactly one."""
    path = run_folder / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the run was not scored, and its card would be empty; evaluate it.")
    runs = json.loads(path.read_text())["runs"]
    wanted = {"method": settings.method, "setting": settings.setting, "seed": settings.seed, "reported": True}
    found = [run for run in runs if all(run.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{path} reports {len(found)} scores of {name}, not one; evaluate the run folder again.")
    return found[0]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def card(settings: TrainSettings, scores: dict, weights: Path) -> str:
    """What the checkpoint is, how it was trained, how good it is and what it cannot do, in Markdown."""
    with safe_open(weights, "pt") as file:
        numbers = sum(file.get_tensor(name).numel() for name in file.keys())
    classes = "\n".join(
        f"| {name} | {'yes' if entry['seen'] else 'no'} | {percent(entry['iou'])} |"
        for name, entry in scores["per_class"].items()
    )
    return f"""# The shipped checkpoint

Prompts and decoder of `{settings.method}`, {settings.setting}, on the `{TINY}` CLIP: {numbers:,} numbers,
{weights.stat().st_size / 1e6:.1f} MB. `sptseg_lib.segment` uses it where no `checkpoint` is named.

## How it was trained
{settings.iterations:,} iterations of {settings.batch} {settings.size}-px pictures of `{settings.dataset}`, split
`{settings.split}`, seed {settings.seed}, peak rate {settings.learning_rate:g}. Labels of seen classes only. Again:
`make demo`, then `python data_scripts/ship_checkpoint.py runs/demo`.

It belongs to the CLIP weights with SHA-256
`{sha256(WEIGHTS_PATH)}`; on others it means nothing.

## How good it is
Held-out pictures, γ = {scores["gamma"]:g}, per cent, one run: mIoU(S) {percent(scores["mIoU_seen"])},
mIoU(U) {percent(scores["mIoU_unseen"])}, hIoU {percent(scores["hIoU"])}, pAcc {percent(scores["pAcc"])}.

| class | seen | IoU |
|---|---|---|
{classes}

## Limits
Its CLIP has seen drawings of these shapes and textures and no photograph. Other names have embeddings without meaning,
and what it answers to a photograph is a guess by colour and pattern.
"""


def ship(run_folder: Path, name: str, target: Path = FOLDER) -> Path:
    """Copy one run of a scored run folder to `target`; returns it."""
    source = run_folder / "train" / name
    settings = read_settings(source)
    if settings.model().clip != TINY:
        raise ValueError(f"{name} needs {settings.model().clip}, which is not in the package; ship a run on {TINY}.")
    load_segmenter(source)  # it is whole, and fits this version
    if (size := (source / WEIGHTS).stat().st_size) > MOST_BYTES:
        raise ValueError(f"{source / WEIGHTS} has {size:,} bytes; more than {MOST_BYTES:,} are not shipped.")
    scores = reported_scores(run_folder, name, settings)
    shipped = settings.model_copy(update={
        "overrides": settings.overrides | {"seen_shift": scores["gamma"]},
        "run_dir": TrainSettings.model_fields["run_dir"].default,  # where it was trained matters to nobody
    })  # fmt: skip
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    write_settings(target, shipped)
    (target / CARD).write_text(card(shipped, scores, target / WEIGHTS), encoding="utf-8")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, help="a run folder with train/ and metrics.json")
    parser.add_argument("--run", default="spt_seg-inductive-seed0", help="which run in its train/ folder")
    arguments = parser.parse_args()
    try:
        target = ship(arguments.run_folder, arguments.run)
    except (OSError, ValueError) as error:
        parser.exit(2, f"Error: {error}\n")
    for path in sorted(target.glob("*.*")):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

"""Checkpoints: what was trained, as safetensors, beside the settings that say what it was trained on."""

import json
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from .clip.load import Clip, load_clip
from .clip.weights import load_tensors
from .model import Segmenter, build_segmenter
from .settings import TrainSettings, explain

WEIGHTS, SETTINGS = "checkpoint.safetensors", "settings.json"


def save_checkpoint(folder: Path, segmenter: Segmenter, settings: TrainSettings) -> None:
    """Write what was trained and the settings; a frozen backbone is named in the settings, not copied."""
    write_settings(folder, settings)
    partial = folder / (WEIGHTS + ".part")
    save_file({name: t.contiguous() for name, t in segmenter.kept().items()}, partial)
    partial.replace(folder / WEIGHTS)


def write_settings(folder: Path, settings: TrainSettings) -> None:
    """Write settings.json whole or not at all; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (SETTINGS + ".part")
    partial.write_text(settings.model_dump_json(indent=2))
    partial.replace(folder / SETTINGS)


def read_settings(folder: Path) -> TrainSettings:
    """The settings that a run folder was trained with; raises FileNotFoundError or ValueError."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {folder} is no training run. Train first, or choose its folder.")
    try:
        return TrainSettings.model_validate(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}). What was trained cannot be told; train again.") from None
    except ValidationError as error:
        raise ValueError(f"{path} does not fit this version: {explain(error)}. Train again.") from None


def load_trained(segmenter: Segmenter, path: Path) -> None:
    """Load trained parameters strictly; raises ValueError that names the first that does not fit."""
    tensors = load_tensors(path)
    if "decoder.text_SE" in tensors:
        segmenter.remember(tensors["decoder.text_SE"])
    own = segmenter.kept()
    odd = [
        f"{name}: {tuple(tensors[name].shape) if name in tensors else 'missing'}, not {tuple(p.shape)}"
        for name, p in own.items()
        if name not in tensors or tensors[name].shape != p.shape
    ] + [f"{name}: not a part of the model" for name in tensors if name not in own]
    if odd:
        raise ValueError(
            f"{path} was trained with another architecture ({len(odd)} differences, first {odd[0]}). "
            "Parts would stay random; use the settings.json that lies beside it."
        )
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


def load_segmenter(
    folder: str | Path, clip: Clip | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Segmenter, TrainSettings]:
    """A trained segmenter in evaluation mode, from the folder that training wrote."""
    folder = Path(folder)
    settings = read_settings(folder)
    model = settings.model()
    segmenter = build_segmenter(model, clip or load_clip(*model.clip_source), dtype)
    load_trained(segmenter, folder / WEIGHTS)
    return segmenter.eval(), settings

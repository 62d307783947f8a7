"""Load CLIP: the tiny one in the package, or any plain open_clip ViT."""

import json
import pickle
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .tiny import CONFIG_PATH, MEAN, STD, WEIGHTS_PATH

TINY = CONFIG_PATH.stem


@dataclass(frozen=True, eq=False)
class Clip:
    """An open_clip model, its tokenizer, the pixel statistics that it was trained with, and texts once encoded."""

    name: str
    model: nn.Module
    tokenize: object
    mean: tuple[float, ...]
    std: tuple[float, ...]
    text: dict = field(default_factory=dict)


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file or of a torch file, without running any code that it may hold.

    Raises: FileNotFoundError; ValueError for a truncated or damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weight file {path}. Nothing was loaded; check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path.name} ({path.stat().st_size} bytes) cannot be read: {error}. It is truncated or damaged; "
            "fetch or write it again."
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if state is None or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path.name} holds no table of tensors by name. Nothing was loaded; give a state dict.")
    return state


def load_weights(model: nn.Module, path: str | Path, what: str) -> None:
    """Load a whole model strictly; raises ValueError that names what does not fit."""
    tensors = load_tensors(path)
    own = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.endswith("attn_mask")}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    odd = [
        f"{name}: {found.get(name, 'missing')}, not {shape}" for name, shape in own.items() if found.get(name) != shape
    ]
    odd += [f"{name}: not a part of the model" for name in found if name not in own and not name.endswith("attn_mask")]
    if odd:
        raise ValueError(
            f"{Path(path).name} holds another architecture than {what} ({len(odd)} differences, first {odd[0]}). "
            "Its weights would be partly random; choose the architecture that it was saved from."
        )
    model.load_state_dict(tensors, strict=False)


@cache
def load_clip(name: str = TINY, weights: str | None = None) -> Clip:
    """Load a CLIP in evaluation mode, float32; the same one for the same arguments.

    name: "sptseg-tiny" (shipped) or any open_clip model. weights: None for the shipped weights (for
    another model: none, drawn at random), a path, or an open_clip pretrained tag, which is downloaded.
    Raises: ValueError for an unknown name or tag, or a file that does not fit; FileNotFoundError.
    """
    if name == TINY:
        model = open_clip.CLIP(**json.loads(CONFIG_PATH.read_text()))
        load_weights(model, weights or WEIGHTS_PATH, TINY)
        tokenize = open_clip.SimpleTokenizer(context_length=model.context_length)
        return Clip(name, model.eval(), tokenize, MEAN, STD)
    if name not in open_clip.list_models():
        raise ValueError(
            f"There is no CLIP {name!r}. Nothing was loaded; choose {TINY} or one of open_clip.list_models()."
        )
    local = weights is not None and (Path(weights).suffix or Path(weights).exists())
    tag = None if local else weights
    if tag and tag not in open_clip.list_pretrained_tags_by_model(name):
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"{name} has no weights {tag!r}. Nothing was loaded; choose a path or one of: {known}.")
    model = open_clip.create_model(name, pretrained=tag)
    if local:
        load_weights(model, weights, name)
    visual = model.visual
    mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return Clip(name, model.eval(), open_clip.get_tokenizer(name), tuple(mean), tuple(std))

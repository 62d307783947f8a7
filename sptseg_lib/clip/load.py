"""Load CLIP: the tiny one in the package, or any plain open_clip ViT."""

import copy
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import open_clip
import torch
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from torch import nn

from .activation import check_activation, named, settle, twin
from .backbone import VisionBackbone
from .tiny import CONFIG_PATH, MEAN, STD, WEIGHTS_PATH
from .weights import described, fill, read_weights

TINY = CONFIG_PATH.stem
RANDOM = "random"


@dataclass(frozen=True, eq=False)
class Clip:
    """An open_clip model, its tokenizer, the pixel statistics that it was trained with, and texts once encoded."""

    name: str
    model: nn.Module
    tokenize: object
    mean: tuple[float, ...]
    std: tuple[float, ...]
    text: dict = field(default_factory=dict)
    copies: dict = field(default_factory=dict)

    def image_side(self, device: torch.device | str = "cpu") -> nn.Module:
        """The image encoder on a device, to be left there: on a GPU a copy, made once.

        `load_clip` hands out one CLIP to all who ask; moved in place, it would be moved for everyone.
        """
        kind = torch.device(device).type
        if kind == "cpu":
            return self.model.visual
        if kind not in self.copies:
            self.copies[kind] = copy.deepcopy(self.model.visual).to(device)
        return self.copies[kind]


def load_clip(name: str = TINY, weights: str | None = None, activation: str | None = None) -> Clip:
    """Load a CLIP in evaluation mode, float32; the same one for the same arguments.

    name: "sptseg-tiny" (shipped) or any open_clip ViT. weights: a path to OpenAI's .pt, open_clip's .pt or
    .safetensors; an open_clip pretrained tag, which is downloaded; "random", the same numbers every time; None for the
    shipped weights, which only the tiny CLIP has.

    activation: "quickgelu" or "gelu", what the weights were trained with. Tags, OpenAI's files and files beside their
    open_clip_config.json say it themselves; a bare state dict does not, and then it must be stated.

    Raises: ValueError for an unknown name or tag, no weights, a file that does not fit, or another activation than
    the model's; FileNotFoundError; ConnectionError where a tag cannot be downloaded.
    """
    return _load(name, weights, activation)


@cache
def _load(name: str, weights: str | None, activation: str | None) -> Clip:
    config = _config(name)
    computed = named(config.get("quick_gelu", False))
    about = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    if name == TINY:
        # The workbook's own architecture: whatever was saved from it was trained with its activation.
        about, weights = {"mean": MEAN, "std": STD, "activation": computed}, weights or str(WEIGHTS_PATH)
    if weights is None:
        raise ValueError(
            f"{name} without weights is a random network: every mask would be noise. Give weights: a path, a tag "
            f"({_tags(name)}), or {RANDOM!r} if that is meant."
        )
    if weights == RANDOM:
        # A checkpoint does not hold the backbone, so it must be the same one when the checkpoint is scored.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _build(config)
    elif Path(weights).suffix or Path(weights).exists():
        source = Path(weights).name
        tensors, told = read_weights(weights)
        about |= described(weights)
        check_activation(name, computed, settle(activation, told or about.get("activation"), source), source)
        model = _build(config)
        fill(model, tensors, source, name)
    else:
        about = _entry(name, weights)
        told = named(about.get("quick_gelu", False))
        check_activation(name, computed, settle(activation, told, repr(weights)), repr(weights))
        model = _build(config)
        fill(model, read_weights(_download(name, weights, about)).tensors, repr(weights), name)
    tokenize = (
        open_clip.get_tokenizer(name)
        if name != TINY
        else open_clip.SimpleTokenizer(context_length=model.context_length)
    )
    return Clip(name, model.eval(), tokenize, tuple(about["mean"]), tuple(about["std"]))


def _config(name: str) -> dict:
    """A model's open_clip config; raises ValueError for an unknown name."""
    if name == TINY:
        return json.loads(CONFIG_PATH.read_text())
    if name not in open_clip.list_models():
        raise ValueError(
            f"There is no CLIP {name!r}. Nothing was loaded; choose {TINY} or one of open_clip.list_models()."
        )
    return open_clip.get_model_config(name)


def image_layers(name: str = TINY) -> int:
    """How many layers a model's image encoder has, without loading it. Raises: ValueError for an unknown name."""
    return _config(name)["vision_cfg"]["layers"]


def _build(config: dict) -> nn.Module:
    """The model with random weights; raises ValueError where its image side is not a plain ViT."""
    custom = config.pop("custom_text", False)
    kind = open_clip.CustomTextCLIP if custom else open_clip.CoCa if "multimodal_cfg" in config else open_clip.CLIP
    model = kind(**config)
    VisionBackbone(model.visual)
    return model


def _tags(name: str) -> str:
    return ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "it has none"


def _entry(name: str, tag: str) -> dict:
    """What open_clip knows of a pretrained tag: address, activation, pixel statistics; raises ValueError if nothing."""
    # Its models with and without -quickgelu share their weights, and a tag is listed with one of them only.
    entry = get_pretrained_cfg(name, tag) or get_pretrained_cfg(twin(name), tag)
    if not entry:
        raise ValueError(f"{name} has no weights {tag!r}. Nothing was loaded; choose a path or a tag: {_tags(name)}.")
    return entry


def _download(name: str, tag: str, entry: dict) -> str:
    """The path of a tag's weight file, downloaded if need be; raises ConnectionError."""
    try:
        return download_pretrained(entry)
    except (OSError, RuntimeError) as error:  # urllib's and the hub's errors are OSErrors
        raise ConnectionError(
            f"Weights {tag!r} of {name} cannot be downloaded: {error}. Nothing was loaded; fetch the file "
            "elsewhere and give its path as weights."
        ) from None

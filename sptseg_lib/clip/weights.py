"""Weight files: OpenAI's TorchScript archives, torch files and safetensors, read without running code in them."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .activation import PLAIN, QUICK, named
from .torchscript import is_torchscript, read_torchscript

# Three numbers that OpenAI's files hold among the weights; no later CLIP writes them.
OPENAI_NUMBERS = {"input_resolution", "context_length", "vocab_size"}
CONFIG = "open_clip_config.json"
DAMAGED = (
    SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


class Weights(NamedTuple):
    """Tensors by name, and the activation that the file itself tells: "quickgelu", "gelu", or None."""

    tensors: dict[str, Tensor]
    activation: str | None


def read_weights(path: str | Path) -> Weights:
    """A weight file in any of its forms, with the names that open_clip uses.

    OpenAI's .pt (a TorchScript archive, float16) names its activation by its classes, or has OpenAI's three
    numbers among the weights. A torch file or .safetensors holds tensors alone, and nothing in it tells the activation.
    "module.", which data-parallel training puts before every name, is taken off.
    Raises: FileNotFoundError; ValueError for a truncated or damaged file, or one that holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weight file {path}. Nothing was loaded; check the path.")
    classes: set[str] = set()
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif is_torchscript(path):
            state, classes = read_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise ValueError(
            f"{path.name} ({path.stat().st_size} bytes) cannot be read: {error}. It is truncated or damaged; "
            "fetch or write it again."
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if state is None or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path.name} holds no table of tensors by name. Nothing was loaded; give a state dict.")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    openai = OPENAI_NUMBERS <= state.keys()
    activation = None
    if openai or any("QuickGELU" in name for name in classes):
        activation = QUICK
    elif any("GELU" in name for name in classes):
        activation = PLAIN
    return Weights({name: value for name, value in state.items() if name not in OPENAI_NUMBERS}, activation)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file; raises what `read_weights` does."""
    return read_weights(path).tensors


def described(path: str | Path) -> dict:
    """What open_clip_config.json beside a weight file says: "activation", "mean", "std", as far as it goes.

    Raises: ValueError for a file that is no JSON.
    """
    beside = Path(path).with_name(CONFIG)
    if not beside.is_file():
        return {}
    try:
        config = json.loads(beside.read_text())
        model, pixels = config["model_cfg"], config.get("preprocess_cfg", {})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{beside.name} is damaged ({error!r}). Its model cannot be told; fetch it again.") from None
    found = {key: tuple(pixels[key]) for key in ("mean", "std") if key in pixels}
    return {"activation": named(model.get("quick_gelu", False)), **found}


def fill(model: nn.Module, tensors: dict[str, Tensor], source: str, what: str) -> None:
    """Copy tensors into a whole model, strictly; raises ValueError that names what does not fit."""
    own = {name: tuple(t.shape) for name, t in model.state_dict().items() if not name.endswith("attn_mask")}
    found = {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith("attn_mask")}
    odd = [
        f"{name}: {found.get(name, 'missing')}, not {shape}" for name, shape in own.items() if found.get(name) != shape
    ]
    odd += [f"{name}: not a part of the model" for name in found if name not in own]
    if odd:
        raise ValueError(
            f"{source} holds another architecture than {what} ({len(odd)} differences, first {odd[0]}). "
            "Its weights would be partly random; choose the architecture that it was saved from."
        )
    model.load_state_dict({name: tensors[name] for name in own}, strict=False)


def load_weights(model: nn.Module, path: str | Path, what: str) -> None:
    """Load a whole model from a file, strictly; raises what `read_weights` and `fill` do."""
    fill(model, load_tensors(path), Path(path).name, what)

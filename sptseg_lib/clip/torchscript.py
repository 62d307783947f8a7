"""Read the tensors of a TorchScript archive, the form of OpenAI's CLIP files, without running any code in it.

Such an archive is a zip: data.pkl is a pickled tree of modules, data/0, data/1, … are the storages of its tensors and
code/ their programs. torch.jit.load would compile the programs; here only the tree is walked, with stand-ins for
every class that it names.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor as the tree describes it; its values lie in the record `data/<key>`."""

    key: str
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Module:
    """Stands for every class of the archive: keeps the attributes and does nothing."""

    def __setstate__(self, attributes: dict):
        if not isinstance(attributes, dict):
            raise pickle.UnpicklingError(f"a module's attributes are a {type(attributes).__name__}, not a table")
        self.attributes = attributes


def _tensor(storage, offset, size, stride, *_) -> Stored:
    return Stored(*storage, offset, tuple(size), tuple(stride))


class _Tree(pickle.Unpickler):
    """Unpickles modules and tensors as the stand-ins above and refuses every other name."""

    def __init__(self, file):
        super().__init__(file)
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] == "__torch__":
            self.classes.add(name)
            return Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.jit._pickle":  # typed lists of numbers: no weights in them
            return lambda *_: None
        known = {("torch._utils", "_rebuild_tensor_v2"): _tensor, ("collections", "OrderedDict"): dict}
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")
        return known[module, name]

    def persistent_load(self, described):
        _, dtype, key, *_ = described  # the device, often a GPU that is not here, does not matter
        return str(key), dtype


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with constants.pkl."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript(path: Path) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors by name, as `state_dict` gives them, and the names of the classes in the archive.

    Raises: pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError, TypeError or RuntimeError for an archive
    that is damaged or made to do something else.
    """
    with zipfile.ZipFile(path) as archive:
        folder = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).rpartition("/")[0]
        most = path.stat().st_size

        def record(name: str) -> bytes:
            if archive.getinfo(f"{folder}/{name}").file_size > most:
                raise ValueError(f"{name} unpacks to more bytes than the whole file has")
            return archive.read(f"{folder}/{name}")

        tree = _Tree(io.BytesIO(record("data.pkl")))
        root = tree.load()
        storages: dict[str, Tensor] = {}
        tensors = {}
        for name, stored in _walk(root):
            if stored.key not in storages:
                values = bytearray(record(f"data/{stored.key}"))
                storages[stored.key] = torch.frombuffer(values, dtype=stored.dtype) if values else torch.empty(0)
            tensors[name] = storages[stored.key].as_strided(stored.size, stored.stride, stored.offset)
    return tensors, tree.classes


def _walk(module: Module, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    for name, value in module.attributes.items():
        if isinstance(value, Module):
            yield from _walk(value, f"{prefix}{name}.")
        elif isinstance(value, Stored):
            yield prefix + name, value

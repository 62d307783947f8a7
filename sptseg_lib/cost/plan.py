"""What is measured for notebooks/results/cost.json, and a form of it that takes a minute."""

import json
from pathlib import Path
from typing import NamedTuple

from ..settings import one_of
from .clock import find_measured
from .measure import DTYPES, measure_growth, measure_memory, measure_methods, measure_parts
from .methods import METHODS, Setup

VIT = {"clip": "ViT-B-16-quickgelu", "weights": "random", "size": 512, "classes": 20, "batch": 1}  # PASCAL VOC's
PROFILED = ("zegclip", "spt_seg")
GROWING = ("dense_clip", "two_stage", "zegclip", "spt_seg")


class Form(NamedTuple):
    """How much is measured: of the tiny CLIP, then of ViT-B/16, which without rounds is only counted."""

    setup: dict
    methods: tuple[str, ...]
    rounds: int
    memory: tuple[str, ...]
    repeats: int
    growth_rounds: int
    sizes: tuple[int, ...]
    classes: tuple[int, ...]
    vit_rounds: int
    vit_sizes: tuple[int, ...]


FORMS = {
    "full": Form(
        setup={"batch": 8}, methods=METHODS, rounds=7, memory=METHODS, repeats=3,
        growth_rounds=3, sizes=(64, 96, 128, 192, 256, 384, 512), classes=(16, 50, 150, 500, 2000),
        vit_rounds=3, vit_sizes=(224, 320, 512, 768, 1024),
    ),
    "measure": Form(
        setup={"size": 64, "batch": 4}, methods=METHODS, rounds=2, memory=("zegclip", "spt_seg"), repeats=1,
        growth_rounds=2, sizes=(64, 96, 128), classes=(16, 100, 400),
        vit_rounds=0, vit_sizes=(224, 512),
    ),
}  # fmt: skip


def _methods(form: Form, device: str) -> dict:
    return measure_methods(Setup(**form.setup, device=device), form.rounds, form.methods)


def _memory(form: Form, device: str) -> dict:
    return measure_memory(Setup(**form.setup, device=device), form.repeats, form.memory)


def _sizes(form: Form, device: str) -> dict:
    return measure_growth([Setup(size=size, device=device) for size in form.sizes], GROWING, form.growth_rounds)


def _classes(form: Form, device: str) -> dict:
    return measure_growth([Setup(classes=K, device=device) for K in form.classes], GROWING, form.growth_rounds)


def _parts(form: Form, device: str) -> dict:
    return {name: measure_parts(Setup(**form.setup, device=device), name, form.rounds) for name in PROFILED}


def _vit(form: Form, device: str) -> dict:
    return measure_methods(Setup(**VIT, device=device), form.vit_rounds, GROWING, tuple(DTYPES), ("image",))


def _vit_parts(form: Form, device: str) -> dict:
    setup = Setup(**VIT, device=device)
    return {dtype: measure_parts(setup, "spt_seg", form.vit_rounds, dtype, training=False) for dtype in DTYPES}


def _vit_sizes(form: Form, device: str) -> dict:
    setups = [Setup(**{**VIT, "size": size}, device=device) for size in form.vit_sizes]
    return measure_growth(setups, PROFILED, 0)


PARTS = {
    "methods": _methods, "memory": _memory, "sizes": _sizes, "classes": _classes, "parts": _parts, "vit": _vit,
    "vit_parts": _vit_parts, "vit_sizes": _vit_sizes,
}  # fmt: skip


def measure(part: str, path: Path, form: str = "full", device: str = "auto") -> dict:
    """Measure one part and add it to the results file; returns all that is in it.

    Raises: ValueError for an unknown part, form or device.
    """
    one_of("part", part, PARTS)
    one_of("form", form, FORMS)
    measured = PARTS[part](FORMS[form], find_measured(device))
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found[part] = _short(measured)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(
        json.dumps({name: found[name] for name in PARTS if name in found}, indent=1) + "\n", encoding="utf-8"
    )
    partial.replace(path)
    return found


def _short(value):
    """The same with four digits of everything that was measured; whole numbers were counted and stay whole."""
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_short(one) for one in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.4g}")
    return value

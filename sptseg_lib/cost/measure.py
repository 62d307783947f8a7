"""Tables of costs: of all methods, of growing images and class lists, and of the parts of one model.

Each function returns what notebooks/results/cost.json keeps of it. Times are in seconds: first quartile, median and
third quartile over the rounds.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import date
from functools import partial
from unittest.mock import patch

import torch
from torch import nn

from ..hardware import hardware
from ..precision import has_fast_bfloat16
from ..settings import PRESETS
from .clock import added_bytes, apart, clock_for, interleave, quartiles
from .count import count_cost, counted, multiply_adds
from .methods import (
    METHODS,
    SPLIT,
    TWO_STAGE,
    Method,
    Setup,
    TrainingStep,
    build_method,
    class_texts,
    has_half,
    label_pixels,
    scenes,
)
from .parts import multiply_adds_by_part, parameters_by_part, seconds_by_part

JOBS = ("image", "batch", "training step")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def about(setup: Setup, **more) -> dict:
    """What a measurement belongs to: setup, machine, day, and how busy the machine has been for a minute."""
    name = torch.cuda.get_device_name() if setup.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    return {
        "setup": setup.model_dump(), "device": name, "hardware": hardware(), "clock": clock_for(setup.device)[0],
        "day": date.today().isoformat(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "bfloat16_in_hardware": has_fast_bfloat16(setup.device), **more,
    }  # fmt: skip


@contextmanager
def weightless(network: nn.Module) -> Iterator[nn.Module]:
    """A copy on the meta device: it has shapes and no numbers, so that the largest model is counted at once."""
    # torch's counter follows gradients of parameters that are handed to modules, and there are none without training;
    # and torch knows no autocast on the meta device, which in float32 would do nothing.
    with patch.object(torch, "autocast", lambda *_, **__: nullcontext()):
        yield copy.deepcopy(network).requires_grad_(False).to("meta")


def count_method(method: Method, setup: Setup) -> dict:
    """Parameters, and multiply-adds for one image; of two stages, whose work depends on the image, a mean over two."""
    numbers = [p.numel() for p in method.network.parameters()]
    found = {"parameters": sum(numbers), "trained": 0}
    if method.segmenter is not None:
        found["trained"] = sum(p.numel() for p in method.segmenter.trainable().values())
    if method.name == TWO_STAGE:
        image_B3HW, text_KE = scenes(setup, 2)[0], class_texts(setup)
        with counted() as counter:
            label_pixels(method.network, image_B3HW, text_KE)
        adds = [total / len(image_B3HW) for total in multiply_adds(counter)]
    else:
        shapes = (1, 3, setup.size, setup.size), tuple(class_texts(setup).shape)
        with weightless(method.network) as network:
            adds = count_cost(network, *shapes)[-2:]
    found["multiply_adds"], found["multiply_adds_with_ffts"] = (round(x) for x in adds)
    if method.segmenter is not None and method.segmenter.encoder.spectral:
        found["spectral"] = {
            "parameters": sum(p.numel() for p in method.segmenter.encoder.spectral.parameters()),
            "multiply_adds": parts_of(method, setup)["multiply_adds"]["spectral prompt"],
        }
    return found


def parts_of(method: Method, setup: Setup) -> dict[str, dict]:
    """Parameters and multiply-adds of each part of a segmenter, for one image."""
    image_B3HW = torch.zeros(1, 3, setup.size, setup.size, device="meta")
    with weightless(method.network) as network:
        run = partial(label_pixels, network, image_B3HW, class_texts(setup).to("meta"))
        adds = multiply_adds_by_part(network.segmenter, run)
    return {"parameters": parameters_by_part(method.segmenter), "multiply_adds": adds}


def training_step(method: Method, setup: Setup, count: int) -> TrainingStep:
    """A training step on `count` scenes, of seen classes alone."""
    return TrainingStep(method.segmenter, *scenes(setup, count), class_texts(setup)[: len(SPLIT.seen)])


def count_training(method: Method, setup: Setup) -> float:
    """Multiply-adds of one image's training step, losses and backward pass with it, FFTs counted."""
    step = training_step(method, setup, 1)
    with counted() as counter:
        step()
    return multiply_adds(counter)[1]


def measure_methods(
    setup: Setup,
    rounds: int,
    names: Iterable[str] = METHODS,
    dtypes: Sequence[str] = tuple(DTYPES),
    jobs: Sequence[str] = JOBS,
) -> dict:
    """Counts of every method, and in one interleaved run the time of one image, of a batch and of a training step."""
    rows, timed = {name: {} for name in names}, {}
    image_B3HW, text_KE = scenes(setup, setup.batch)[0], class_texts(setup)
    for name, row in rows.items():
        for dtype in dtypes:
            if dtype != "float32" and not has_half(name):
                continue
            method = build_method(name, setup, DTYPES[dtype])
            own = {
                "image": partial(label_pixels, method.network, image_B3HW[:1], text_KE),
                "batch": partial(label_pixels, method.network, image_B3HW, text_KE),
            }
            if method.segmenter is not None and "training step" in jobs:
                own["training step"] = training_step(method, setup, setup.batch)
            if dtype == "float32":
                row |= count_method(method, setup)
                if "training step" in own:
                    row["training_multiply_adds"] = count_training(method, setup)
            timed |= {(name, dtype, job): run for job, run in own.items() if job in jobs}
    if rounds:
        for (name, dtype, job), took in interleave(timed, rounds, setup.device).items():
            rows[name].setdefault("seconds", {}).setdefault(dtype, {})[job] = quartiles(took)
    return about(setup, rounds=rounds, rows=rows)


def memory_of(name: str, dtype: str, job: str, setup: Setup) -> int | None:
    """Bytes that a batch ("batch") or a training step takes at its peak, beyond weights and pictures."""
    method = build_method(name, setup, DTYPES[dtype])
    if job == "batch":
        image_B3HW, text_KE = scenes(setup, setup.batch)[0], class_texts(setup)
        warm, whole = (partial(label_pixels, method.network, image_B3HW[:n], text_KE) for n in (1, setup.batch))
    else:
        warm, whole = (training_step(method, setup, n) for n in (1, setup.batch))
    return added_bytes(warm, whole, setup.device)


def measure_memory(
    setup: Setup, repeats: int, names: Iterable[str] = METHODS, dtypes: Sequence[str] = tuple(DTYPES)
) -> dict:
    """Peak memory of every method in bytes, several times, lowest first; None where the system does not tell it.

    On a CPU each in a process of its own, where it depends on what the system's allocator keeps for later; on a GPU
    what torch allocates.
    """
    call = apart if setup.device == "cpu" else (lambda function, *given: function(*given))
    rows = {name: {} for name in names}
    for _ in range(repeats):
        for name, row in rows.items():
            for dtype in dtypes:
                if dtype == "float32" or has_half(name):
                    for job in ("batch", "training step") if name in PRESETS else ("batch",):
                        found = row.setdefault(dtype, {}).setdefault(job, [])
                        found.append(call(memory_of, name, dtype, job, setup))
                        found.sort(key=lambda size: size or 0)
    return about(setup, repeats=repeats, rows=rows)


def measure_growth(setups: Sequence[Setup], names: Sequence[str], rounds: int) -> dict:
    """Multiply-adds and the time of one image for every setup; without rounds, only what is counted."""
    rows = []
    for setup in setups:
        found = measure_methods(setup, rounds, names, ("float32",), ("image",))["rows"]
        for name, row in found.items():
            took = {"seconds": row.pop("seconds")["float32"]["image"]} if rounds else {}
            rows.append({"method": name, "size": setup.size, "classes": setup.classes, **row, **took})
    return about(setups[0], rounds=rounds, rows=rows)


def measure_parts(setup: Setup, name: str, rounds: int, dtype: str = "float32", training: bool = True) -> dict:
    """Where one method's parameters, multiply-adds and seconds go, for a batch and for a training step.

    Parameters and multiply-adds are for one image; without rounds there are no seconds.
    """
    method = build_method(name, setup, DTYPES[dtype])
    image_B3HW, text_KE = scenes(setup, setup.batch)[0], class_texts(setup)
    jobs = {"batch": partial(label_pixels, method.network, image_B3HW, text_KE)}
    if training:
        jobs["training step"] = training_step(method, setup, setup.batch)
    found = about(setup, rounds=rounds, method=name, dtype=dtype, **parts_of(method, setup))
    found["trained"] = sum(p.numel() for p in method.segmenter.trainable().values())
    found["seconds"] = {
        job: {
            part: quartiles(took) for part, took in seconds_by_part(method.segmenter, run, setup.device, rounds).items()
        }
        for job, run in (jobs.items() if rounds else ())
    }
    return found

"""Time and memory of computations, measured so that they can be compared."""

import ctypes
import gc
import multiprocessing
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

Job = Callable[[], object]


def find_measured(device: str) -> str:
    """The device that "auto" or a name means; raises ValueError for one that is unknown or not there."""
    there = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if there else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"There is no device {device!r}; nothing would be measured. Known: auto, cpu, cuda.")
    if device == "cuda" and not there:
        raise ValueError(
            "device='cuda' was asked for, and torch finds no GPU. Nothing would be measured; choose 'auto' or 'cpu'."
        )
    return device


def synchronise(device: str) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device == "cuda":
        torch.cuda.synchronize()


def clock_for(device: str) -> tuple[str, Callable[[], float]]:
    """What times are taken by, in words, and the clock.

    One thread of a CPU is timed by the processor time that it gets: what an idle machine's clock would show, and other
    programs do not lengthen it.
    """
    if device == "cpu" and torch.get_num_threads() == 1:
        return "processor time of one thread", time.process_time
    return "wall clock", time.perf_counter


def seconds(job: Job, device: str = "cpu") -> float:
    """How long a job takes, to the end of its last kernel, by `clock_for` the device."""
    _, clock = clock_for(device)
    synchronise(device)
    start = clock()
    job()
    synchronise(device)
    return clock() - start


def interleave(jobs: dict[str, Job], rounds: int, device: str = "cpu", seed: int = 0) -> dict[str, list[float]]:
    """Seconds of every job in each of several rounds: {name: [seconds, ...]}.

    Every round runs all jobs once, in an order drawn anew: what slows the machine for a while slows all of them. One
    round before warms up and is not kept.
    """
    drawn, kept = random.Random(seed), {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name in drawn.sample(list(jobs), len(jobs)):
            took = seconds(jobs[name], device)
            if turn:
                kept[name].append(took)
    return kept


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile."""
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist()


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y ∝ xᵖ, by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _resident(field: str) -> int | None:
    """VmRSS (now) or VmHWM (the most so far) of this process, in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return 1024 * int(found[1]) if found else None


def added_bytes(warm: Job, job: Job, device: str = "cpu") -> int | None:
    """The most memory that a job holds at once beyond what was held before it; `warm` is a small job like it.

    On a GPU: what torch allocates there. On a CPU: resident memory of this process, which should do nothing else
    (`apart`); None where the system does not tell it.
    """
    warm()
    gc.collect()
    if device == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, and is not reused unseen
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is held now
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    job()
    return max(0, _resident("VmHWM") - before)


def apart(call: Callable, *arguments):
    """call(*arguments) in a process of its own, one after the other; what it raises is raised here.

    The process starts from one that has only imported the library, so that it has no memory of others' work.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__package__ + ".measure"])
    with context.Pool(1) as pool:
        return pool.apply(call, arguments)

"""Which part of a segmenter takes it: parameters, multiply-adds and time by part.

The model itself knows no clock and no counter: its modules and functions are wrapped from outside, while it is
measured. Parts do not overlap: what lies inside a named part is taken out of the part around it.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from unittest.mock import patch

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from .. import encoder, model
from ..model import Segmenter
from .clock import synchronise
from .count import counted

SPECTRAL, LAYERS, LOSS = "spectral prompt", "CLIP's layers", "losses"
REST, BACKWARD, OPTIMISER = "upsampling and the rest", "backward pass", "optimiser"
# Names of modules and parameters, the more particular first: the first that fits says the part.
_PLACES = {
    r"encoder\.backbone\.blocks\.\d+": LAYERS,
    r"encoder\.backbone\.(ln_post|proj)": "projection",
    r"encoder\.backbone": "patch embedding",
    r"encoder\.spectral\.\d+": SPECTRAL,
    r"encoder\.(project_tokens|tokens_LMD)": "prompt tokens",
    r"encoder": "joining tokens, norm",
    r"decoder\.descriptor": "relationship descriptor",
    r"decoder\.attentions\.\d+\.frequencies\.(branch\.)?high": "high heads",
    r"decoder\.attentions\.\d+\.frequencies\.(branch\.)?low": "low heads",
    r"decoder\.attentions\.\d+\.frequencies": "frequencies",  # another mixer than heads, or what joins the heads
    r"decoder\.attentions\.\d+\.gate": "task gate",
    r"decoder\.updates\.\d+": "class update",
    r"decoder": "classes meet patches",
}
PARTS = (*dict.fromkeys(_PLACES.values()), LOSS, REST, BACKWARD, OPTIMISER)
# What is called as a function, or as a method with another name than forward.
_FUNCTIONS = {
    encoder: {"run_block": LAYERS},
    model: dict.fromkeys(("one_hot_masks", "focal_loss", "ssim_loss", "dice_loss", "cross_entropy"), LOSS),
}
_METHODS = {"embed": "patch embedding", "project": "projection"}
_LABEL = "sptseg: "  # before a part's name among the profiler's events
Scope = Callable[[str], AbstractContextManager]


def part_of(name: str) -> str:
    """The part that a module or a parameter of a segmenter belongs to, by its name."""
    return next((part for place, part in _PLACES.items() if re.match(place, name)), REST)


def _within(scope: Scope, part: str, call: Callable) -> Callable:
    @wraps(call)
    def wrapped(*args, **kwargs):
        with scope(part):
            return call(*args, **kwargs)

    return wrapped


@contextmanager
def watched(segmenter: Segmenter, scope: Scope) -> Iterator[None]:
    """Meanwhile every part of the segmenter runs inside `scope(part)`."""
    with ExitStack() as stack:

        def watch(owner, name: str, part: str) -> None:
            stack.enter_context(patch.object(owner, name, _within(scope, part, getattr(owner, name))))

        for name, module in segmenter.named_modules():
            if any(re.fullmatch(place, name) for place in _PLACES):
                watch(module, "forward", part_of(name))
        for name, part in _METHODS.items():
            watch(segmenter.encoder.backbone, name, part)
        for owner, functions in _FUNCTIONS.items():
            for name, part in functions.items():
                watch(owner, name, part)
        yield


class Tally:
    """A scope that adds up, by part, how much a reading grew inside it; inner scopes are taken out of outer ones."""

    def __init__(self, read: Callable[[], float]):
        self.read, self.spent, self._inner = read, defaultdict(float), [0.0]

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        before = self.read()
        self._inner.append(0.0)
        yield
        grown = self.read() - before
        self.spent[part] += grown - self._inner.pop()
        self._inner[-1] += grown


def in_order(spent: dict[str, float]) -> dict[str, float]:
    """Parts in the order in which an image passes them; those that took nothing are left out."""
    return {part: spent[part] for part in PARTS if spent.get(part)}


def parameters_by_part(segmenter: Segmenter) -> dict[str, int]:
    """Numbers in each part, frozen ones too."""
    spent = defaultdict(int)
    for name, parameter in segmenter.named_parameters():
        spent[part_of(name)] += parameter.numel()
    return in_order(spent)


def multiply_adds_by_part(segmenter: Segmenter, run: Callable[[Scope], object]) -> dict[str, float]:
    """Multiply-adds of each part, FFTs counted. `run` is given the scope, for parts that are not the segmenter's."""
    with counted() as counter:
        tally = Tally(lambda: counter.get_total_flops() / 2)
        with watched(segmenter, tally):
            run(tally)
    return in_order(tally.spent)


def seconds_by_part(
    segmenter: Segmenter, run: Callable[[Scope], object], device: str = "cpu", rounds: int = 5
) -> dict[str, list[float]]:
    """Seconds of each part in each of several rounds, by torch's profiler, after a round that warms up.

    On a GPU they are seconds of its kernels. What autograd's own thread starts belongs to the backward pass.
    """
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    found: list[dict[str, float]] = []
    with watched(segmenter, _labelled):
        for _ in range(rounds + 1):
            with profile(activities=kinds) as profiler:
                run(_labelled)
                synchronise(device)
            events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
            found.append(_kernel_seconds(events) if device == "cuda" else _own_seconds(events))
    return {part: [spent.get(part, 0.0) for spent in found[1:]] for part in in_order(found[-1])}


def _labelled(part: str) -> record_function:
    return record_function(_LABEL + part)


def _label(event) -> str | None:
    """The part whose label is the nearest one around an event, the event's own not counted."""
    while (event := event.cpu_parent) is not None:
        if event.name.startswith(_LABEL):
            return event.name.removeprefix(_LABEL)
    return None


def _own_seconds(events: list) -> dict[str, float]:
    spent = defaultdict(float)
    for event in events:
        if event.name.startswith(_LABEL):
            seconds = event.time_range.elapsed_us() / 1e6
            spent[event.name.removeprefix(_LABEL)] += seconds
            if (around := _label(event)) is not None:
                spent[around] -= seconds
    return spent


def _kernel_seconds(events: list) -> dict[str, float]:
    spent = defaultdict(float)
    for event in events:
        if event.kernels and not event.name.startswith(_LABEL):
            spent[_label(event) or BACKWARD] += sum(kernel.duration for kernel in event.kernels) / 1e6
    return spent

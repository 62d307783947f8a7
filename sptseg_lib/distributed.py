"""Several processes: starting them for evaluation, and what each must know of the others."""

import atexit
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .precision import find_device
from .settings import RunSettings


@dataclass(frozen=True)
class Place:
    """One process among others."""

    rank: int
    world: int
    device: str

    def gather(self, value: Any) -> list:
        """The value of every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values


def launch(settings: RunSettings, function: Callable, *inputs) -> Any:
    """Call function(place, *inputs) in devices × num_nodes processes; return what it returned.

    In a notebook, processes are forked and the first one's value comes back; from the command line, torchrun or
    SLURM, every process returns its own.
    """
    device = find_device()
    if settings.devices * settings.num_nodes == 1:
        return function(Place(0, 1, device), *inputs)
    from lightning.fabric import Fabric

    fabric = Fabric(
        accelerator="gpu" if device == "cuda" else "cpu", devices=settings.devices, num_nodes=settings.num_nodes,
        strategy=settings.strategy,
    )  # fmt: skip
    return fabric.launch(lambda own: function(Place(own.global_rank, own.world_size, str(own.device)), *inputs))


def present_pairs(label_BHW: Tensor, classes: int) -> Tensor:
    """How many (image, present class) pairs masks hold; 255 is no class. Focal and dice loss are divided by it."""
    present_BK = torch.zeros(len(label_BHW), 256, device=label_BHW.device)
    return present_BK.scatter_(1, label_BHW.long().flatten(1), 1.0)[:, :classes].sum()


def labelled_pixels(label_BHW: Tensor, classes: int) -> Tensor:
    """How many pixels masks give a class; cross-entropy is divided by it."""
    return (label_BHW < classes).sum().float()


def same_everywhere(module: nn.Module) -> None:
    """Give every process the trained parameters of the first."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for p in module.parameters():
            if p.requires_grad:
                torch.distributed.broadcast(p.data, 0)


@atexit.register
def _leave() -> None:
    """Leave the process group while Python still stands.

    Gloo's threads may hold tensors of the last collective. Freed by a Python that is being taken down, they abort a
    process whose work is done, and torchrun calls the run failed. Whatever else holds the group must go first.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()

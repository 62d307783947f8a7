"""Captions that name all or some of what is in a scene, and which of them are true of which scene."""

import torch
from torch import Tensor

from .atlas import CLASSES, THINGS
from .counter import uniform

ONE = (
    "a photo of a {}",
    "{}",
    "a picture of {}",
    "there is a {} in the scene.",
    "this is a photo of the {}",
    "one {} in the scene.",
    "a small {}",
    "a large {}",
)
SEVERAL = ("a photo of {}", "{}", "a picture of {}", "there is {} in the scene.", "a scene with {}")


def _joined(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "nothing"


def write_captions(present_BK: Tensor, index_B: Tensor, seed: int = 0) -> tuple[list[str], Tensor, list[str], Tensor]:
    """Two captions a scene: one names a single class that is there, one names all of them.

    Args: present_BK, (B, K) bool, what is visible; index_B and seed choose the words.
    Returns: captions naming one class (B strings), the classes they name (B, K) bool,
    captions naming all (B strings), and theirs (B, K) bool.
    """
    u_BS = uniform(seed ^ 0xCA97, index_B, 3 + len(CLASSES))
    order_BK = u_BS[:, 3:]
    # People name things before grounds: a thing is chosen more often than a texture beside it.
    liking_K = torch.tensor([1.0 if name in THINGS else 0.5 for name in CLASSES], device=present_BK.device)
    chosen_B = torch.where(present_BK, order_BK * liking_K, -1.0).argmax(1)
    some_BK = torch.nn.functional.one_hot(chosen_B, len(CLASSES)).bool() & present_BK
    one_B = (u_BS[:, 0] * len(ONE)).long().tolist()
    several_B = (u_BS[:, 1] * len(SEVERAL)).long().tolist()
    ranked = torch.where(present_BK, order_BK, 2.0).argsort(1).tolist()
    count_B = present_BK.sum(1).tolist()
    single, full = [], []
    for chosen, one, several, order, count in zip(chosen_B.tolist(), one_B, several_B, ranked, count_B):
        single.append(ONE[one].format(CLASSES[chosen]) if count else SEVERAL[several].format("nothing"))
        full.append(SEVERAL[several].format(_joined([CLASSES[k] for k in order[:count]])))
    return single, some_BK, full, present_BK


def truth(named_CK: Tensor, present_BK: Tensor) -> Tensor:
    """Which captions are true of which scenes: (C, K), (B, K) bool -> (B, C) bool.

    A caption is true of a scene when everything that it names is there; one that names
    nothing is true only where nothing is.
    """
    missing_BC = (~present_BK).float() @ named_CK.float().T
    empty_BC = ~named_CK.any(1)[None, :] & present_BK.any(1)[:, None]
    return (missing_BC == 0) & ~empty_BC

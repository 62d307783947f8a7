"""QuickGELU or GELU: the activation that a CLIP computes must be the one that its weights were trained with.

The two differ by 0.02 at most, so the wrong one raises no error anywhere: every layer is a little off, and the scores
fall by points.
"""

import open_clip

QUICK, PLAIN = "quickgelu", "gelu"
NAMES = {QUICK: "QuickGELU", PLAIN: "GELU"}
_SUFFIX = "-quickgelu"


def named(quick: bool) -> str:
    """ "quickgelu" or "gelu", from an open_clip config's `quick_gelu`."""
    return QUICK if quick else PLAIN


def twin(name: str) -> str:
    """The open_clip model that differs in its activation alone: ViT-B-16 <-> ViT-B-16-quickgelu."""
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else name + _SUFFIX


def settle(stated: str | None, told: str | None, source: str) -> str | None:
    """What weights were trained with, from what the caller states and what they tell themselves; None: unknown.

    Raises: ValueError where the two contradict each other.
    """
    if stated and told and stated != told:
        raise ValueError(
            f"activation={stated!r} contradicts {source}, which was trained with {NAMES[told]}. One of the two is "
            "wrong; leave activation out, or check the file."
        )
    return told or stated


def check_activation(name: str, computed: str, trained: str | None, source: str) -> None:
    """See that model `name`, which computes one activation, fits the weights `source`, trained with another or not.

    trained: "quickgelu", "gelu", or None where neither the weights nor the caller say.
    Raises: ValueError for a mismatch, and where it cannot be known.
    """
    if trained is None:
        raise ValueError(
            f"{source} does not say which activation it was trained with, and {name} computes {NAMES[computed]}. "
            "The wrong one would lower every score without a word; state it: activation='quickgelu' for OpenAI's "
            "weights and those of open_clip's -quickgelu models, else activation='gelu'."
        )
    if trained != computed:
        other = twin(name)
        remedy = (
            f"choose {other}."
            if other in open_clip.list_models()
            else f"choose a model whose open_clip config has quick_gelu={trained == QUICK}."
        )
        raise ValueError(
            f"{name} computes {NAMES[computed]}, but {source} was trained with {NAMES[trained]}. Every layer would "
            f"be a little off and every score lower, without a word; {remedy}"
        )

"""Class names as people type them, checked before anything is computed."""

import re
import unicodedata
from collections.abc import Sequence

MOST_NAMES = 10_000


def split_names(text: str) -> tuple[str, ...]:
    """The names of a text in which commas, semicolons or new lines part them: "cat, dog" -> ("cat", "dog")."""
    return tuple(filter(None, (name.strip() for name in re.split(r"[,;\n]", text))))


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names without the spaces around them.

    Raises: ValueError for no names, more than 10,000, an empty one, one that comes twice (a capital letter makes no
    difference), or an emoji; TypeError for a single text or what is no text.
    """
    if isinstance(names, str):
        raise TypeError(
            f"class_names is the one text {names[:60]!r}. Each of its letters would become a class; give a list, or "
            "split_names(text)."
        )
    if odd := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"{odd[0]!r} is no class name but a {type(odd[0]).__name__}; give texts.")
    names = tuple(" ".join(name.split()) for name in names)
    if not names:
        raise ValueError("No class names. There would be nothing to choose from; name at least one class.")
    if len(names) > MOST_NAMES:
        raise ValueError(f"{len(names)} class names would take hours; name at most {MOST_NAMES:,}.")
    if not all(names):
        raise ValueError(
            f"Class name {names.index('') + 1} of {len(names)} is empty. CLIP would be asked for nothing; name it or "
            "leave it out."
        )
    folded = [name.casefold() for name in names]
    if len(set(folded)) < len(names):
        twice = dict.fromkeys(name for name in folded if folded.count(name) > 1)
        raise ValueError(
            f"{', '.join(twice)}: named more than once. All its pixels would go to the first of them; name each class "
            "once."
        )
    for name in names:
        if emoji := next((sign for sign in name if unicodedata.category(sign) == "So"), None):
            word = unicodedata.name(emoji, "its name").lower()
            raise ValueError(
                f"Class name {name!r} holds an emoji or another sign. CLIP reads words, and no figure could show it; "
                f"write it out: {word!r}."
            )
    return names

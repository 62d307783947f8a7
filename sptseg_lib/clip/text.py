"""Class names as unit vectors of CLIP's joint space, computed once and kept."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .load import Clip

# The 15 templates over which COCO-Stuff's text embeddings are averaged.
TEMPLATES = (
    *(f"{start} {a} {{}}." for start in ("a photo of", "This is") for a in ("a", "a small", "a medium", "a large")),
    "a {} in the scene.",
    "a photo of a {} in the scene.",
    "There is a {} in the scene.",
    "There is the {} in the scene.",
    "This is a {} in the scene.",
    "This is the {} in the scene.",
    "This is one {} in the scene.",
)  # fmt: skip

BATCH = 256  # texts encoded at once


@torch.no_grad()
def class_text(clip: Clip, names: tuple[str, ...], prompt: str = "a photo of a {}") -> Tensor:
    """Text embeddings of class names: K names -> (K, E) float32, unit length.

    prompt: a template with {} for the name, or "ensemble": the mean of 15 templates' unit embeddings.
    Raises: ValueError for no names, or a template without {}.
    """
    if not names:
        raise ValueError("No class names. There would be nothing to choose from; name at least one class.")
    templates = TEMPLATES if prompt == "ensemble" else (prompt,)
    if any("{}" not in template for template in templates):
        raise ValueError(
            f"Template {prompt!r} has no {{}}. Every class would get the same text; put {{}} for the name."
        )
    key = (tuple(names), templates)
    if key not in clip.text:
        texts = [template.replace("{}", name) for name in names for template in templates]
        device = next(clip.model.parameters()).device
        # Thousands of names would not fit the memory at once.
        parts = [clip.tokenize(texts[first : first + BATCH]).to(device) for first in range(0, len(texts), BATCH)]
        text_RE = F.normalize(torch.cat([clip.model.encode_text(part) for part in parts]).float(), dim=-1)
        mean_KE = text_RE.unflatten(0, (len(names), len(templates))).mean(1)
        clip.text[key] = F.normalize(mean_KE, dim=-1)
    return clip.text[key]

"""The workbook's own small CLIP: its open_clip model config, its weights and how good they are."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multilabel_average_precision

from ...scenes.atlas import CLASSES, STUFF, THINGS
from ...scenes.render import SceneSettings, render_scenes
from ..backbone import VisionBackbone

CONFIG_PATH = Path(__file__).with_name("sptseg-tiny.json")
WEIGHTS_PATH = Path(__file__).with_name("sptseg-tiny.safetensors")
UNSEEN = ("star", "ring", "arrow", "checkerboard", "waves")
HELD_OUT_SEED = 77
# A class counts as there when it shows two patches' worth of pixels: less cannot hold a shape.
LEAST_VISIBLE = 0.015
# Pixel statistics of ShapeScenes, near enough.
MEAN, STD = (0.5,) * 3, (0.25,) * 3
SIZE = 96  # pixels along a side of the images that it was trained for


@torch.inference_mode()
def zero_shot_scores(model, tokenize, device: str = "cpu", scenes: int = 2000) -> dict[str, float]:
    """Zero-shot scores of a CLIP on held-out scenes of 96 px, in per cent.

    things, textures: top-1 accuracy on scenes that hold one of them, among all names of its
    kind; *_unseen: on the names that segmentation will not see; map: mean average precision
    of "which things are in this scene" on scenes of one to three things.
    """
    tokens = tokenize([f"a photo of a {name}" for name in CLASSES]).to(device)
    text_KE = F.normalize(model.encode_text(tokens).float(), dim=-1)

    vision = VisionBackbone(model.visual)

    def similarity(settings: SceneSettings):
        # Batches of 250, a size that any machine holds.
        parts = []
        for first in range(0, scenes, 250):
            index = torch.arange(first, min(first + 250, scenes), device=device)
            drawn = render_scenes(index, settings, seed=HELD_OUT_SEED)
            image_BE = F.normalize(vision((drawn.image_B3HW - MEAN[0]) / STD[0])[:, 0].float(), dim=-1)
            parts.append((image_BE @ text_KE.T, drawn.visible_BK(LEAST_VISIBLE)))
        return (torch.cat(part) for part in zip(*parts))

    def accuracy(kinds: tuple[str, ...], settings: SceneSettings, prefix: str) -> dict[str, float]:
        first = CLASSES.index(kinds[0])
        score_BK, present_BK = (x[:, first : first + len(kinds)] for x in similarity(settings))
        answer, right = present_BK.float().argmax(1), present_BK.any(1)
        hit = (score_BK.argmax(1) == answer) & right
        unseen = torch.tensor([name in UNSEEN for name in kinds], device=device)[answer] & right
        return {
            prefix: 100 * float(hit.sum() / right.sum()),
            f"{prefix}_unseen": 100 * float((hit & unseen).sum() / unseen.sum()),
        }

    one = SceneSettings(size=SIZE, things=(1, 1), radius=(0.25, 0.46))
    ground = SceneSettings(size=SIZE, things=(0, 0), plain=0.0, split=0.0)
    several = SceneSettings(size=SIZE, things=(1, 3), radius=(0.15, 0.34))
    score_BK, present_BK = (x[:, : len(THINGS)] for x in similarity(several))
    precision = multilabel_average_precision(score_BK, present_BK.long(), num_labels=len(THINGS))
    return accuracy(THINGS, one, "things") | accuracy(STUFF, ground, "textures") | {"map": 100 * float(precision)}

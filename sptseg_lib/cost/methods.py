"""Every method by its name, ready to be counted and timed: labels for images, and one training step."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ..clip.backbone import VisionBackbone
from ..clip.load import TINY, Clip, load_clip
from ..data import TEST_SEED
from ..evaluate import FLOORS
from ..model import Segmenter, build_segmenter
from ..scenes.render import SceneSettings, render_scenes
from ..settings import PRESETS, Settings, one_of, preset
from ..splits import SPLITS, hide_unseen
from ..train import parameter_groups
from ..two_stage import TwoStage, TwoStageSettings
from .parts import BACKWARD, OPTIMISER, REST, Scope

SPLIT = SPLITS["default"]
TWO_STAGE = "two_stage"
METHODS = (*FLOORS, TWO_STAGE, *PRESETS)


class Setup(Settings):
    """On what a cost is taken. Pictures are ShapeScenes; class texts are drawn, which costs what real ones cost."""

    clip: str = TINY
    weights: str | None = None
    size: int = Field(128, ge=8, description="side of an image in pixels")
    classes: int = Field(len(SPLIT.classes), ge=len(SPLIT.seen), description="class texts that are asked for")
    batch: int = Field(16, ge=1, description="images of a training step, and at once for images a second")
    device: str = "cpu"


class Probabilities(nn.Module):
    """A segmenter as it is used: (B, 3, H, W), (K, E) -> class probabilities (B, K, h, w)."""

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.segmenter = segmenter

    def forward(self, image_B3HW: Tensor, class_text_KE: Tensor) -> Tensor:
        return self.segmenter.probabilities(self.segmenter(image_B3HW, class_text_KE))


class TrainingFree(nn.Module):
    """A floor, such as dense CLIP; shapes as `Probabilities`."""

    def __init__(self, dense: Callable, backbone: VisionBackbone, clip: Clip):
        super().__init__()
        self.dense, self.backbone = dense, backbone.requires_grad_(False)
        self.register_buffer("mean_311", torch.tensor(clip.mean).view(3, 1, 1))
        self.register_buffer("std_311", torch.tensor(clip.std).view(3, 1, 1))
        self.scale = clip.model.logit_scale.exp().item()

    def forward(self, image_B3HW: Tensor, class_text_KE: Tensor) -> Tensor:
        normalised_B3HW = (image_B3HW - self.mean_311) / self.std_311
        return (self.dense(self.backbone, normalised_B3HW, class_text_KE) * self.scale).softmax(1)


class TwoStages(nn.Module):
    """Regions first, then CLIP on each; dense CLIP scores the pixels beside. -> probabilities (B, K, H, W)."""

    def __init__(self, pixels: TrainingFree, clip: Clip):
        super().__init__()
        self.pixels, self.clip = pixels, clip

    def forward(self, image_B3HW: Tensor, class_text_KE: Tensor) -> Tensor:
        score = TwoStage(self.clip, class_text_KE, lambda x: self.pixels(x, class_text_KE), TwoStageSettings())
        return score(image_B3HW)


class Method(NamedTuple):
    """name; network: image and class texts to probabilities; segmenter: what is trained, None where nothing is."""

    name: str
    network: nn.Module
    segmenter: Segmenter | None


def has_half(name: str) -> bool:
    """Whether a method has a frozen backbone that may be held in bfloat16."""
    return name != TWO_STAGE and not (name in PRESETS and preset(name).train_backbone)


def build_method(name: str, setup: Setup, dtype: torch.dtype = torch.float32) -> Method:
    """A method with fresh weights, in evaluation mode on the setup's device; filters have the images' own grid.

    Raises: ValueError for an unknown method, or one that has no frozen backbone to be held in bfloat16.
    """
    one_of("method", name, METHODS)
    if dtype != torch.float32 and not has_half(name):
        raise ValueError(
            f"{name} holds everything in float32, so {dtype} would be measured in name only; leave it out there."
        )
    clip = load_clip(setup.clip, setup.weights)
    patch = VisionBackbone(clip.model.visual).patch
    changes = {"clip": setup.clip, "weights": setup.weights, "grid": max(1, setup.size // patch)}
    torch.manual_seed(0)
    # Floors use a segmenter's backbone, which is held in `dtype`, and nothing else of it.
    segmenter = build_segmenter(preset(name if name in PRESETS else "spt_seg", **changes), clip, dtype)
    if name in PRESETS:
        network = Probabilities(segmenter).to(setup.device).eval()
        segmenter.remember(class_texts(setup, clip)[: len(SPLIT.seen)])
        return Method(name, network, segmenter)
    dense = FLOORS["dense_clip" if name == TWO_STAGE else name]
    network = TrainingFree(dense, segmenter.encoder.backbone, clip)
    network = TwoStages(network, clip) if name == TWO_STAGE else network
    return Method(name, network.to(setup.device).eval(), None)


def class_texts(setup: Setup, clip: Clip | None = None) -> Tensor:
    """Unit vectors in the place of class texts: (K, E)."""
    clip = clip or load_clip(setup.clip, setup.weights)
    generator = torch.Generator().manual_seed(0)
    drawn_KE = torch.randn(setup.classes, clip.model.visual.proj.shape[1], generator=generator)
    return F.normalize(drawn_KE, dim=-1).to(setup.device)


def scenes(setup: Setup, count: int) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) and the labels that training sees of them, (B, H, W)."""
    image_B3HW, label_BHW = render_scenes(torch.arange(count), SceneSettings(size=setup.size), TEST_SEED)
    return image_B3HW.to(setup.device), hide_unseen(label_BHW, SPLIT).to(setup.device)


def unwatched(part: str) -> nullcontext:
    """A scope that does nothing."""
    return nullcontext()


@torch.inference_mode()
def label_pixels(network: nn.Module, image_B3HW: Tensor, class_text_KE: Tensor, scope: Scope = unwatched) -> Tensor:
    """What is done with an image: probabilities, enlarged to its pixels, and the best class: (B, H, W)."""
    with scope(REST):
        probability = network(image_B3HW, class_text_KE)
        if probability.shape[-2:] != image_B3HW.shape[-2:]:
            probability = F.interpolate(probability, size=image_B3HW.shape[-2:], mode="bilinear")
        return probability.argmax(1)


class TrainingStep:
    """Loss, gradients, clipping and one step of AdamW, as training does them; call it as often as you like."""

    def __init__(self, segmenter: Segmenter, image_B3HW: Tensor, label_BHW: Tensor, class_text_KE: Tensor):
        self.segmenter, self.given = segmenter, (image_B3HW, label_BHW, class_text_KE)
        self.optimiser = torch.optim.AdamW(parameter_groups(segmenter, weight_decay=0.01, learning_rate=1e-6))

    def __call__(self, scope: Scope = unwatched) -> None:
        self.segmenter.train()
        with scope(REST):
            loss = self.segmenter.loss(*self.given)["loss"]
        with scope(BACKWARD):
            loss.backward()
        with scope(OPTIMISER):
            torch.nn.utils.clip_grad_norm_(self.segmenter.trainable().values(), 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()
        self.segmenter.eval()

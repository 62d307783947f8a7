"""The segmenter: prompted encoder, mask decoder, loss and prediction."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip.backbone import VisionBackbone
from .clip.load import Clip, load_clip
from .decoder import BalancedAttention, CrossAttention, MaskDecoder, SpectralGuidedAttention, TaskGate
from .encoder import Encoded, PromptedEncoder
from .heads import CosineHead, LinearProbe, SemanticProjection
from .losses import cross_entropy, dice_loss, focal_loss, one_hot_masks, ssim_loss
from .precision import find_device
from .settings import ModelSettings

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Segmenter(nn.Module):
    """Images and class texts to masks.

    Shapes: image (B, 3, H, W) in [0, 1], class texts (K, E) -> mask logits (B, K, h, w) on the patch grid.
    Any class texts will do: the same weights serve the classes of training and others.
    """

    def __init__(self, settings: ModelSettings, encoder: PromptedEncoder, decoder: nn.Module, mean, std):
        super().__init__()
        self.settings = settings
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("mean_311", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_311", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def patch(self) -> int:
        return self.encoder.backbone.patch

    def trainable(self) -> dict[str, nn.Parameter]:
        """What training changes, by name: everything but a frozen backbone."""
        return {name: p for name, p in self.named_parameters() if self._own(name)}

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by name: all that is trained, and what it belongs to."""
        return {name: t for name, t in self.state_dict().items() if self._own(name)}

    def _own(self, name: str) -> bool:
        return self.settings.train_backbone or not name.startswith("encoder.backbone.")

    def remember(self, class_text_KE: Tensor) -> None:
        """Tell the classes of training, (K, E), to a decoder that learns something for each; others need not know."""
        if isinstance(self.decoder, LinearProbe):
            self.decoder.remember(class_text_KE)

    def forward(self, image_B3HW: Tensor, class_text_KE: Tensor) -> Tensor:
        return self.decode(self.encode(image_B3HW), class_text_KE)

    def _mixed(self, device: torch.device) -> torch.autocast:
        half = self.encoder.backbone.conv1.weight.dtype == torch.bfloat16
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)

    def encode(self, image_B3HW: Tensor) -> Encoded:
        """What does not depend on the classes: (B, 3, H, W) in [0, 1] -> patches and global embedding."""
        with self._mixed(image_B3HW.device):
            return self.encoder(self.normalise(image_B3HW))

    def normalise(self, image_B3HW: Tensor) -> Tensor:
        """Pixels as the backbone knows them."""
        return (image_B3HW - self.mean_311) / self.std_311

    def decode(self, encoded: Encoded, class_text_KE: Tensor) -> Tensor:
        """Mask logits (B, K, h, w). No class knows of another: they may be decoded in any parts."""
        with self._mixed(class_text_KE.device):
            return self.decoder(encoded.patches_BhwE, encoded.global_BE, class_text_KE).float()

    def normaliser(self, encoded: Encoded, class_texts: list[Tensor]) -> Tensor | None:
        """log Σ exp of all classes' logits, decoded in parts: (B, 1, h, w); None where `probabilities` needs none."""
        if self.settings.scores == "sigmoid" or len(class_texts) == 1:
            return None
        parts = [self.decode(encoded, text_KE).logsumexp(1, keepdim=True) for text_KE in class_texts]
        return torch.cat(parts, dim=1).logsumexp(1, keepdim=True)

    def probabilities(self, logits_BKhw: Tensor, normaliser_B1hw: Tensor | None = None) -> Tensor:
        """Probabilities of classes from their mask logits, both (B, K, h, w): `scores` says in which sense.

        normaliser_B1hw: log Σ exp of the logits of all classes asked for, where these are only a part of them.
        """
        if self.settings.scores == "sigmoid":
            return logits_BKhw.sigmoid()
        if normaliser_B1hw is None:
            normaliser_B1hw = logits_BKhw.logsumexp(1, keepdim=True)
        return (logits_BKhw - normaliser_B1hw).exp()

    @torch.no_grad()
    def open_gates(self, image_B3HW: Tensor) -> None:
        """Point each gate's ξ at the mean direction of the patches of a first batch.

        Patches share a common direction, so a random ξ is near all of them or opposite to all of them.
        In the second case the clamp in eq. 7 gives zero everywhere, and with it a gradient of exactly
        zero: nothing would ever be learned. Training calls this once, before its first step.
        """
        patches_BhwE = self.encoder(self.normalise(image_B3HW)).patches_BhwE
        for attention in self.decoder.modules():
            if isinstance(getattr(attention, "gate", None), TaskGate):
                z_BhwE = attention.frequencies(patches_BhwE)
                attention.gate.task_E.copy_(F.normalize(z_BhwE, dim=-1).mean(dim=(0, 1, 2)))

    def loss(self, image_B3HW: Tensor, label_BHW: Tensor, class_text_KE: Tensor) -> dict[str, Tensor]:
        """Weighted losses by name, and "loss", their sum [SPT-SEG, eq. 10].

        label_BHW: indices into class_text_KE, 255 where there is no label.
        Raises: ValueError when image and mask differ in size, or for a label outside the classes.
        """
        if image_B3HW.shape[-2:] != label_BHW.shape[-2:]:
            raise ValueError(
                f"Images are {tuple(image_B3HW.shape[-2:])} and masks {tuple(label_BHW.shape[-2:])} pixels. "
                "Labels would fall on other pixels than their own; crop and resize both together."
            )
        settings = self.settings
        target_BKHW = one_hot_masks(label_BHW, len(class_text_KE))
        logits_BKHW = F.interpolate(self(image_B3HW, class_text_KE), size=label_BHW.shape[-2:], mode="bilinear")
        counted_B1HW = (label_BHW != 255)[:, None].float()
        if settings.ignored == "negative":
            counted_B1HW = torch.ones_like(counted_B1HW)
        parts = {}
        if settings.focal_weight:
            parts["focal"] = settings.focal_weight * focal_loss(logits_BKHW, target_BKHW, counted_B1HW)
        if settings.ssim_weight:
            mask = logits_BKHW if settings.ssim_on == "logits" else logits_BKHW.sigmoid()
            parts["ssim"] = settings.ssim_weight * ssim_loss(mask * counted_B1HW, target_BKHW)
        if settings.dice_weight:
            parts["dice"] = settings.dice_weight * dice_loss(logits_BKHW, target_BKHW, counted_B1HW)
        if settings.cross_entropy_weight:
            parts["cross_entropy"] = settings.cross_entropy_weight * cross_entropy(logits_BKHW, label_BHW)
        return parts | {"loss": sum(parts.values())}


def build_decoder(settings: ModelSettings, joint: int) -> nn.Module:
    """The decoder that the settings name; raises ValueError where the heads do not divide the joint width."""
    if settings.decoder == "cosine":
        return CosineHead(threshold=settings.scores == "sigmoid")
    if settings.decoder == "probe":
        return LinearProbe(joint, threshold=settings.scores == "sigmoid")
    if settings.decoder == "projection":
        return SemanticProjection(joint)
    if joint % settings.heads:
        raise ValueError(
            f"{settings.heads} heads do not divide the joint space's {joint} dimensions; choose a divisor of {joint}."
        )

    def attention(last: bool) -> nn.Module:
        if settings.decoder == "cross":
            return CrossAttention(joint, settings.heads, last)
        if settings.decoder == "balanced":
            return BalancedAttention(
                joint, settings.balance_radius, settings.balance, settings.gate, settings.dropout, last,
                settings.shortcut,
            )  # fmt: skip
        return SpectralGuidedAttention(
            joint, settings.heads, settings.high_heads, settings.window, settings.gate,
            settings.high_projection, settings.dropout, last, settings.shortcut,
        )  # fmt: skip

    layers = settings.decoder_layers
    return MaskDecoder(joint, [attention(i == layers - 1) for i in range(layers)], settings.dropout)


def build_segmenter(settings: ModelSettings, clip: Clip | None = None, dtype: torch.dtype = torch.float32) -> Segmenter:
    """Assemble a segmenter around a CLIP; a frozen backbone is held in `dtype`, a trained one in float32.

    The backbone is shared with `clip` unless dtype converts it, it is to be trained, or there is a GPU to move it to;
    `clip` defaults to the one in the settings.
    """
    clip = clip or load_clip(*settings.clip_source)
    visual, dtype = clip.model.visual, torch.float32 if settings.train_backbone else dtype
    if settings.train_backbone or dtype != torch.float32 or find_device() != "cpu":
        visual = copy.deepcopy(visual).to(dtype)  # the text side and other users of this CLIP keep it as it was
    backbone = VisionBackbone(visual)
    encoder = PromptedEncoder(
        backbone,
        prompt_tokens=settings.prompt_tokens,
        spectral_layers=settings.spectral_layers,
        spectral_shared=settings.spectral_shared,
        spectral_grid=(settings.grid, settings.grid),
        class_token_twice=settings.class_token_twice,
        dropout=settings.dropout,
        graph_modes=settings.graph_modes if settings.prompt_basis == "graph" else 0,
        train_backbone=settings.train_backbone,
    )
    mean, std = (clip.mean, clip.std) if settings.normalisation == "model" else (IMAGENET_MEAN, IMAGENET_STD)
    return Segmenter(settings, encoder, build_decoder(settings, backbone.joint), mean, std)

"""Two stages: first regions of any kind, then CLIP on each of them.

The family of zsseg (Xu et al. 2021) and ZegFormer (Ding et al. 2022), with regions that need no training: spectral
segments in the place of MaskFormer's proposals, or superpixels. Besides the package's suffixes, S counts the regions of
an image, R those of a batch, and s is the side of a crop.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from skimage.segmentation import slic
from torch import Tensor
from torchvision.ops import roi_align

from .clip.backbone import VisionBackbone
from .clip.load import Clip
from .graph.affinity import image_affinity
from .graph.eigen import laplacian_eigenvectors
from .graph.features import Featurizer
from .graph.objects import mask_boxes
from .graph.regions import segment, segment_masks
from .settings import Settings


class TwoStageSettings(Settings):
    """How an image is cut and what is made of the pieces."""

    proposals: Literal["spectral", "superpixels"] = Field(
        "spectral", description="regions by eigenvectors of the patch graph, or by colour and place (SLIC)"
    )
    regions: int = Field(3, ge=2, description="regions an image; SLIC starts with so many and merges small ones")
    colour_weight: float = Field(10.0, ge=0, description="λ of colours in the patch graph of spectral regions")
    crop: Literal["masked", "box"] = Field(
        "masked", description="what CLIP sees of a region: its pixels alone on the mean colour, or all in its box"
    )
    weight: float = Field(0.5, ge=0, le=1, description="λ, share of the crop's class beside the pixel's own")
    chunk: int = Field(256, ge=1, description="crops encoded at once")


def spectral_regions(featurizer: Featurizer, image_B3HW: Tensor, count: int, colour_weight: float, seed: int) -> Tensor:
    """Regions by k-means on eigenvectors of each image's patch graph: (B, 3, H, W) in [0, 1] -> (B, H, W) int64.

    Raises: ValueError for more regions than patches.
    """
    key_BhwC = featurizer(image_B3HW)
    grid = tuple(key_BhwC.shape[1:3])
    affinity = image_affinity(key_BhwC, image_B3HW, colour_weight)
    vectors_BkN = laplacian_eigenvectors(affinity, count, tolerance=1e-3).vectors_BkN
    region_Bhw = segment(vectors_BkN, grid, count, seed, unit_rows=True)
    region_B1HW = F.interpolate(region_Bhw[:, None].float(), size=image_B3HW.shape[-2:], mode="nearest")
    return region_B1HW[:, 0].long().to(image_B3HW.device)


def superpixel_regions(image_B3HW: Tensor, count: int) -> Tensor:
    """SLIC superpixels: (B, 3, H, W) in [0, 1] -> (B, H, W) int64. skimage cuts one image at a time.

    Smoothed a little, and more compact than skimage's default: by that, superpixels of textures fall to pieces, which
    are then merged into one.
    """
    image_BHW3 = image_B3HW.permute(0, 2, 3, 1).cpu().double().numpy()
    cut = partial(slic, n_segments=count, compactness=30, sigma=1, start_label=0, channel_axis=-1)
    region = [torch.from_numpy(cut(image_HW3)) for image_HW3 in image_BHW3]
    return torch.stack(region).to(image_B3HW.device)


def region_crops(
    image_B3HW: Tensor, region_BHW: Tensor, side: int, masked: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """A square crop around every region of a batch: (R, 3, s, s), and which image and region each shows: (R,) twice.

    image_B3HW: normalised, so that 0 is the mean colour, which also fills what a square has outside the image.
    masked: fill what is outside the region too. The box of a ground holds the things on it, and CLIP would name those.
    All boxes are cut at once, bilinearly, averaged where they shrink.
    """
    mask_BSHW = segment_masks(region_BHW)
    image_R, id_R = mask_BSHW.flatten(2).any(2).nonzero(as_tuple=True)
    mask_RHW = mask_BSHW[image_R, id_R]
    box_R22 = mask_boxes(mask_RHW).view(-1, 2, 2)
    half_R1 = (box_R22[:, 1] - box_R22[:, 0]).amax(1, keepdim=True) / 2
    middle_R2 = box_R22.mean(1)
    square_R4 = torch.cat([middle_R2 - half_R1, middle_R2 + half_R1], dim=1).to(image_B3HW)

    def cut(x_BCHW: Tensor, of_R: Tensor) -> Tensor:
        return roi_align(x_BCHW, torch.cat([of_R[:, None].to(square_R4), square_R4], dim=1), side, aligned=True)

    crop_R3ss = cut(image_B3HW, image_R)
    if masked:
        crop_R3ss = crop_R3ss * cut(mask_RHW[:, None].to(image_B3HW), torch.arange(len(image_R), device=image_R.device))
    return crop_R3ss, image_R, id_R


def spread_over_regions(value_RK: Tensor, image_R: Tensor, id_R: Tensor, region_BHW: Tensor) -> Tensor:
    """What each region got, at all of its pixels: (R, K), (R,) twice, (B, H, W) -> (B, K, H, W)."""
    B = len(region_BHW)
    value_BSK = value_RK.new_zeros(B, int(region_BHW.max()) + 1, value_RK.shape[1])
    value_BSK[image_R, id_R] = value_RK
    image_B11 = torch.arange(B, device=region_BHW.device)[:, None, None]
    return value_BSK[image_B11, region_BHW].permute(0, 3, 1, 2)


def fuse(region_BKHW: Tensor, pixel_BKhw: Tensor, weight: float) -> Tensor:
    """p ∝ p_region^λ · p_pixel^(1−λ), λ the weight, of sum 1 over classes: (B, K, H, W), (B, K, h, w) -> (B, K, H, W).

    The geometric mean by which zsseg puts CLIP's view of a crop beside the segmenter's own.
    """
    pixel_BKHW = F.interpolate(pixel_BKhw, size=region_BKHW.shape[-2:], mode="bilinear")
    fused_BKHW = region_BKHW.clamp(min=1e-12) ** weight * pixel_BKHW.clamp(min=1e-12) ** (1 - weight)
    return fused_BKHW / fused_BKHW.sum(1, keepdim=True)


class TwoStage:
    """Class probabilities by regions: (B, 3, H, W) in [0, 1] -> (B, K, H, W).

    pixel_score: probabilities (B, K, h, w) of the same images on any grid, from dense CLIP or a trained segmenter.
    With weight 1 it is never called. Every crop of a batch passes CLIP's encoder once, `chunk` at a time.
    """

    def __init__(
        self,
        clip: Clip,
        class_text_KE: Tensor,
        pixel_score: Callable[[Tensor], Tensor],
        settings: TwoStageSettings,
        seed: int = 0,
    ):
        self.backbone = VisionBackbone(clip.image_side(class_text_KE.device)).eval()
        self.featurizer = Featurizer(clip.name, self.backbone, self.backbone.patch, clip.mean, clip.std)
        self.class_text_KE, self.pixel_score = class_text_KE, pixel_score
        self.scale = clip.model.logit_scale.exp().item()
        self.settings, self.seed = settings, seed

    def regions(self, image_B3HW: Tensor) -> Tensor:
        """The first stage: (B, 3, H, W) -> (B, H, W) int64."""
        settings = self.settings
        if settings.proposals == "superpixels":
            return superpixel_regions(image_B3HW, settings.regions)
        return spectral_regions(self.featurizer, image_B3HW, settings.regions, settings.colour_weight, self.seed)

    @torch.inference_mode()
    def classify(self, crop_R3ss: Tensor) -> Tensor:
        """CLIP's word on each crop, by its class token: (R, 3, s, s) -> probabilities (R, K)."""
        parts = [self.backbone(part)[:, 0] for part in crop_R3ss.split(self.settings.chunk)]
        return (F.normalize(torch.cat(parts).float(), dim=-1) @ self.class_text_KE.T * self.scale).softmax(1)

    @torch.inference_mode()
    def __call__(self, image_B3HW: Tensor) -> Tensor:
        region_BHW = self.regions(image_B3HW)
        side = self.backbone.grid[0] * self.backbone.patch
        masked = self.settings.crop == "masked"
        crop_R3ss, image_R, id_R = region_crops(self.featurizer.normalised(image_B3HW), region_BHW, side, masked)
        region_BKHW = spread_over_regions(self.classify(crop_R3ss), image_R, id_R, region_BHW)
        if self.settings.weight == 1:
            return region_BKHW
        return fuse(region_BKHW, self.pixel_score(image_B3HW), self.settings.weight)

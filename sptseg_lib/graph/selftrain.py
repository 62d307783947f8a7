"""Self-training: a small segmentation network learns the pseudo labels, and averages out their errors."""

import logging
import warnings

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# Lightning greets every run with a list of the accelerators that are not there.
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)


def _convolve(inside: int, outside: int, side: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, side, padding=side // 2, bias=False), nn.GroupNorm(8, outside), nn.ReLU(inplace=True)
    )


class SmallSegmenter(nn.Module):
    """A linear classifier of frozen patch features, and a U-shaped network that mends it: three halvings, three
    doublings with the finer features beside them.

    Shapes: image (B, 3, H, W) in [0, 1], any size; frozen patch features (B, h, w, C), where the paper has a
    self-supervised ResNet -> logits (B, K, H, W). The linear classifier learns within a hundred steps.
    About 0.5 million weights at width 24 and C = 128.
    """

    def __init__(self, classes: int, features: int, width: int = 24):
        super().__init__()
        widths = [width, 2 * width, 3 * width, 4 * width]
        self.features = _convolve(features, widths[-1], 1)
        self.down = nn.ModuleList(_convolve(a, b) for a, b in zip([3, *widths], widths))
        self.up = nn.ModuleList(_convolve(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1]))
        self.classify_features, self.classify = nn.Conv2d(features, classes, 1), nn.Conv2d(width, classes, 1)

    def forward(self, image_B3HW: Tensor, feature_BhwC: Tensor) -> Tensor:
        x, finer = image_B3HW - 0.5, []
        for i, layer in enumerate(self.down):
            x = layer(F.max_pool2d(x, 2, ceil_mode=True) if i else x)
            finer.append(x)
        # Unit features of 128 numbers are small numbers; their mean square becomes 1.
        known_BChw = feature_BhwC.permute(0, 3, 1, 2) * feature_BhwC.shape[-1] ** 0.5
        x = x + F.interpolate(self.features(known_BChw), size=x.shape[-2:], mode="bilinear")
        for layer, beside in zip(self.up, finer[-2::-1]):
            x = layer(torch.cat([F.interpolate(x, size=beside.shape[-2:], mode="bilinear"), beside], dim=1))
        coarse_BKhw = self.classify_features(known_BChw)
        return self.classify(x) + F.interpolate(coarse_BKhw, size=image_B3HW.shape[-2:], mode="bilinear")


class _SelfTraining(lightning.LightningModule):
    def __init__(self, network: SmallSegmenter, weight_K: Tensor, steps: int, learning_rate: float):
        super().__init__()
        self.register_buffer("weight_K", weight_K)
        self.network, self.steps, self.learning_rate = network, steps, learning_rate

    def training_step(self, batch, _):
        image_B3HW, feature_BhwC, pseudo_BHW = batch
        flip = torch.rand(len(image_B3HW), device=image_B3HW.device) < 0.5
        image_B3HW = torch.where(flip[:, None, None, None], image_B3HW.flip(3), image_B3HW)
        feature_BhwC = torch.where(flip[:, None, None, None], feature_BhwC.flip(2), feature_BhwC)
        pseudo_BHW = torch.where(flip[:, None, None], pseudo_BHW.flip(2), pseudo_BHW)
        return F.cross_entropy(self.network(image_B3HW, feature_BhwC), pseudo_BHW, self.weight_K, ignore_index=255)

    def configure_optimizers(self):
        optimiser = torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def self_train(
    image_B3HW: Tensor,
    feature_BhwC: Tensor,
    pseudo_BHW: Tensor,
    classes: int,
    steps: int = 1000,
    batch: int = 16,
    learning_rate: float = 2e-3,
    width: int = 24,
    seed: int = 0,
) -> SmallSegmenter:
    """Train a network on pseudo labels.

    Shapes: images (B, 3, H, W) in [0, 1], patch features (B, h, w, C), labels (B, H, W) int64, 255 ignored. width:
    channels of the network's finest level, a multiple of 8.

    Returns the network in evaluation mode, on the CPU. The same seed gives the same weights on one device.
    Raises: ValueError where sizes differ, or labels lie outside the classes.
    """
    if pseudo_BHW.shape != (len(image_B3HW), *image_B3HW.shape[-2:]):
        raise ValueError(
            f"Images {tuple(image_B3HW.shape)} and pseudo labels {tuple(pseudo_BHW.shape)} differ in size. Labels "
            "would fall on other pixels than their own; interpolate the labels (nearest) first."
        )
    outside = pseudo_BHW[((pseudo_BHW < 0) | (pseudo_BHW >= classes)) & (pseudo_BHW != 255)]
    if len(outside):
        raise ValueError(
            f"Pseudo labels {sorted(set(outside.tolist()))} are outside the {classes} classes; count the "
            "background and all clusters."
        )
    lightning.seed_everything(seed, verbose=False)
    network = SmallSegmenter(classes, feature_BhwC.shape[-1], width).to(memory_format=torch.channels_last)  # faster
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(image_B3HW, feature_BhwC, pseudo_BHW), batch, shuffle=True, generator=order)
    trainer = lightning.Trainer(
        max_steps=steps,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Rare classes weigh more, by the root of their rarity: else background alone is learned first, and for long.
    share_K = torch.bincount(pseudo_BHW[pseudo_BHW != 255], minlength=classes).float() / pseudo_BHW.numel()
    weight_K = share_K.clamp(min=1e-4).rsqrt()
    training = _SelfTraining(network, weight_K / weight_K.mean(), steps, learning_rate)
    with warnings.catch_warnings():
        # Lightning's own use of a torch function that torch is retiring: nothing that a user could change.
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
        trainer.fit(training, loader)
    return network.cpu().eval()


@torch.no_grad()
def predict(network: SmallSegmenter, image_B3HW: Tensor, feature_BhwC: Tensor, batch: int = 32) -> Tensor:
    """Label maps: images (B, 3, H, W) in [0, 1], patch features (B, h, w, C) -> (B, H, W) int64."""
    parts = zip(image_B3HW.split(batch), feature_BhwC.split(batch))
    return torch.cat([network(*part).argmax(1) for part in parts])

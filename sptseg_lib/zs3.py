"""ZS3: learn what a class's patches look like to CLIP, imagine those of unseen classes, train a classifier on both.

Bucher, Vu, Cord and Pérez, Zero-Shot Semantic Segmentation, NeurIPS 2019; the features here are those of a frozen CLIP.
Besides the package's suffixes, n counts the patches drawn of a class, R those of many pictures, and S seen classes.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from .clip.backbone import VisionBackbone
from .clip.load import Clip
from .settings import Settings
from .splits import Split

Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [0, 1] -> patches (B, h, w, E) of unit length


def clip_patches(clip: Clip, device: torch.device | str = "cpu") -> Encode:
    """CLIP's patch tokens as its last layer leaves them, for images whose sides are multiples of the patch."""
    backbone = VisionBackbone(clip.image_side(device)).eval()
    mean_311, std_311 = (torch.tensor(x, device=device).view(3, 1, 1) for x in (clip.mean, clip.std))

    @torch.no_grad()
    def encode(image_B3HW: Tensor) -> Tensor:
        h, w = (side // backbone.patch for side in image_B3HW.shape[-2:])
        joint_BNE = backbone((image_B3HW.to(device) - mean_311) / std_311)
        return F.normalize(joint_BNE[:, 1:].float(), dim=-1).unflatten(1, (h, w))

    return encode


class Zs3Settings(Settings):
    """A generator and a classifier, both small: well below a minute on one core."""

    pictures: int = Field(512, ge=1, description="training pictures whose patches are looked at")
    patches: int = Field(64, ge=1, description="patches kept of a picture at most, on average over a batch")
    hidden: int = Field(256, ge=1, description="width of the generator's hidden layer")
    bandwidths: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0, 2.0), min_length=1, description="σ of the kernels, in units of real patches' usual distance"
    )
    drawn: int = Field(32, ge=2, description="n, patches of each class in a step")
    generator_steps: int = Field(400, ge=1)
    generator_rate: float = Field(1e-3, gt=0, description="Adam's learning rate")
    classifier_steps: int = Field(400, ge=1)
    classifier_rate: float = Field(1e-2, gt=0, description="Adam's learning rate")


class Patches(NamedTuple):
    """Real patches sorted by class: feature_RE, and where each seen class begins and how many it has: (S,) twice."""

    feature_RE: Tensor
    first_S: Tensor
    count_S: Tensor

    @property
    def present_C(self) -> Tensor:
        """The seen classes that have patches, as places among all seen ones."""
        return self.count_S.nonzero()[:, 0]

    def draw(self, class_C: Tensor, n: int) -> Tensor:
        """n random patches of each of these classes, with replacement: (C,) -> (C, n, E)."""
        share_Cn = torch.rand(len(class_C), n, device=class_C.device)
        at_Cn = self.first_S[class_C, None] + (share_Cn * self.count_S[class_C, None]).long()
        return self.feature_RE[at_Cn]


@torch.no_grad()
def seen_patches(encode: Encode, batches: Iterable, classes: int, settings: Zs3Settings) -> Patches:
    """Patches all of whose pixels bear one seen label.

    batches: (image_B3HW, label_BHW, ...) as the inductive setting gives them: seen classes from 0 to `classes` − 1,
    and 255 for all other pixels, of which no patch is kept.
    Raises: ValueError where there is no such patch at all, or a label is another than those.
    """
    features, labels, pictures = [], [], 0
    for image_B3HW, label_BHW, *_ in batches:
        feature_BhwE = encode(image_B3HW)
        label_BHW = label_BHW.to(feature_BhwE.device)
        h, w = feature_BhwE.shape[1:3]
        cell_BhwP = label_BHW.unflatten(2, (w, -1)).unflatten(1, (h, -1)).transpose(2, 3).flatten(3)
        low_R, high_R = cell_BhwP.amin(-1).flatten(), cell_BhwP.amax(-1).flatten()
        kept_R = ((low_R == high_R) & (high_R != 255)).nonzero()[:, 0]
        kept_R = kept_R[torch.randperm(len(kept_R), device=kept_R.device)[: settings.patches * len(image_B3HW)]]
        features.append(feature_BhwE.flatten(0, 2)[kept_R])
        labels.append(low_R[kept_R])
        pictures += len(image_B3HW)
        if pictures >= settings.pictures:
            break
    label_R = torch.cat(labels)
    if not len(label_R):
        raise ValueError(
            f"No patch of {pictures} pictures lies within one seen class. There would be nothing to learn from; look "
            "at more or larger pictures."
        )
    if int(label_R.max()) >= classes:
        raise ValueError(
            f"A patch is labelled {int(label_R.max())} and there are {classes} seen classes. Labels of unseen classes "
            "would reach training; give masks as splits.hide_unseen leaves them."
        )
    count_S = torch.bincount(label_R, minlength=classes)
    return Patches(torch.cat(features)[label_R.argsort(stable=True)], count_S.cumsum(0) - count_S, count_S)


def mmd(real_CnE: Tensor, made_CmE: Tensor, bandwidths: Tensor) -> Tensor:
    """MMD² of two samples for each class: (C, n, E), (C, m, E) -> (C,)    [Gretton et al. 2012, eq. 5]

    mean k(x, x′) + mean k(y, y′) − 2 mean k(x, y),  k(a, b) = Σ_σ exp(−‖a − b‖² / 2σ²).
    """

    def kernel(a_CnE: Tensor, b_CmE: Tensor) -> Tensor:
        # Not cdist, whose gradient is not finite where two points are one.
        square_Cnm = (a_CnE[:, :, None] - b_CmE[:, None]).square().sum(-1)
        return (-square_Cnm[..., None] / (2 * bandwidths.square())).exp().sum(-1).mean((1, 2))

    return kernel(real_CnE, real_CnE) + kernel(made_CmE, made_CmE) - 2 * kernel(real_CnE, made_CmE)


class Generator(nn.Module):
    """Patches of a class from its text and noise: texts (C, E) -> (C, n, E) of unit length.

    One hidden layer, as in ZS3, but without its dropout, which made little difference on validation scenes.
    """

    def __init__(self, joint: int, settings: Zs3Settings):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * joint, settings.hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(settings.hidden, joint),
        )

    def forward(self, text_CE: Tensor, n: int) -> Tensor:
        text_CnE = text_CE[:, None].expand(-1, n, -1)
        return F.normalize(self.layers(torch.cat([text_CnE, torch.randn_like(text_CnE)], dim=-1)), dim=-1)


def train_generator(patches: Patches, seen_text_SE: Tensor, settings: Zs3Settings) -> Generator:
    """The GMMN: made and real patches of every seen class become alike in distribution. No unseen class takes part."""
    generator = Generator(seen_text_SE.shape[1], settings).to(seen_text_SE.device)
    optimiser = torch.optim.Adam(generator.parameters(), lr=settings.generator_rate)
    class_C = patches.present_C
    pair_2CnE = torch.stack([patches.draw(class_C, settings.drawn) for _ in range(2)])
    usual = (pair_2CnE[0] - pair_2CnE[1]).square().sum(-1).mean().sqrt()
    bandwidths = usual * torch.tensor(settings.bandwidths, device=usual.device)
    for _ in range(settings.generator_steps):
        made_CnE = generator(seen_text_SE[class_C], settings.drawn)
        loss = mmd(patches.draw(class_C, settings.drawn), made_CnE, bandwidths).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return generator


def train_classifier(
    generator: Generator, patches: Patches, class_text_KE: Tensor, split: Split, settings: Zs3Settings
) -> nn.Linear:
    """A linear classifier of all classes, from real patches where there are any, made ones of all other classes."""
    K, E = class_text_KE.shape
    real_C = torch.tensor(split.seen_ids, device=class_text_KE.device)[patches.present_C]
    made_U = torch.tensor([k for k in range(K) if k not in real_C.tolist()], device=class_text_KE.device)
    classifier = nn.Linear(E, K).to(class_text_KE.device)
    optimiser = torch.optim.Adam(classifier.parameters(), lr=settings.classifier_rate)
    target_Kn = torch.cat([real_C, made_U])[:, None].expand(-1, settings.drawn)
    for _ in range(settings.classifier_steps):
        with torch.no_grad():
            real_CnE = patches.draw(patches.present_C, settings.drawn)
            made_UnE = generator(class_text_KE[made_U], settings.drawn)
        logits_RK = classifier(torch.cat([real_CnE, made_UnE]).flatten(0, 1))
        loss = F.cross_entropy(logits_RK, target_Kn.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return classifier.requires_grad_(False)


def fit_zs3(
    encode: Encode, batches: Iterable, class_text_KE: Tensor, split: Split, settings: Zs3Settings, seed: int
) -> nn.Linear:
    """Generator, then classifier, from training pictures with seen labels alone; the caller's random numbers stay.

    Shapes: as `seen_patches`; class texts (K, E) in the split's order -> a linear map from E to K.
    Raises: ValueError for a split without unseen classes, and as `seen_patches`.
    """
    if not split.unseen:
        raise ValueError(
            f"Split {split.name!r} has no unseen class. There would be nothing to imagine; choose another split."
        )
    device = class_text_KE.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        patches = seen_patches(encode, batches, len(split.seen), settings)
        generator = train_generator(patches, class_text_KE[list(split.seen_ids)], settings)
        return train_classifier(generator, patches, class_text_KE, split, settings)


class Zs3:
    """Class probabilities of patches: (B, 3, H, W) in [0, 1] -> (B, K, h, w)."""

    def __init__(self, encode: Encode, classifier: nn.Linear):
        self.encode, self.classifier = encode, classifier

    @torch.inference_mode()
    def __call__(self, image_B3HW: Tensor) -> Tensor:
        return self.classifier(self.encode(image_B3HW)).softmax(-1).permute(0, 3, 1, 2)

"""SPANet in its five published sizes, as a classifier and as a segmenter with Semantic FPN."""

from typing import NamedTuple

from .fpn import SemanticFPN
from .metaformer import Classifier, DenseClassifier, MetaFormer
from .spam import SPAM


class Size(NamedTuple):
    """Blocks and widths of the four stages."""

    blocks: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]


_NARROW, _WIDE = (64, 128, 320, 512), (96, 192, 384, 768)
SIZES = {
    "S": Size((4, 4, 12, 4), _NARROW),
    "M": Size((6, 6, 18, 6), _NARROW),
    "MX": Size((8, 8, 24, 8), _NARROW),
    "B": Size((6, 6, 18, 6), _WIDE),
    "BX": Size((8, 8, 24, 8), _WIDE),
}
RADII = (2, 2, 1, 1)  # bins, a stage


def spanet_backbone(size: str, released: bool = False) -> MetaFormer:
    """The four stages of SPANet-S, M, MX, B or BX; `released` as in `pooling_mask`.

    Raises: ValueError for another size.
    """
    if size not in SIZES:
        raise ValueError(f"There is no SPANet {size!r}; nothing could be built. Choose among {', '.join(SIZES)}.")
    return MetaFormer(
        SIZES[size].widths,
        SIZES[size].blocks,
        mixer=lambda stage, width: SPAM(width, RADII[stage], released=released),
        hidden=lambda width, _: 4 * width,
        scales=("none", "none", "res", "res"),
    )


def spanet(size: str, classes: int = 1000, released: bool = False) -> Classifier:
    """SPANet as a classifier: (B, 3, H, W) -> (B, K)."""
    return Classifier(spanet_backbone(size, released), classes)


def spanet_segmenter(size: str, classes: int, released: bool = False) -> DenseClassifier:
    """SPANet under Semantic FPN: (B, 3, H, W) -> (B, K, H, W)."""
    backbone = spanet_backbone(size, released)
    return DenseClassifier(backbone, SemanticFPN(backbone.widths, classes))

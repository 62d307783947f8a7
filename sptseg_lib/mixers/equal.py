"""Small MetaFormers of equal size that differ in their token mixer alone."""

from collections.abc import Callable, Sequence

from torch import nn

from .metaformer import MetaFormer, Scale
from .spam import SPAM
from .tokens import GlobalFilter, HiLo, Pooling, SelfAttention, SeparableConvolution

HEAD_WIDTH = 16  # channels an attention head
# Each takes the width and the grid of its stage, and what is asked of it.
MIXERS: dict[str, Callable[..., nn.Module]] = {
    "pool": lambda width, grid: Pooling(),
    "conv": lambda width, grid, **options: SeparableConvolution(width, **options),
    "attention": lambda width, grid: SelfAttention(width, width // HEAD_WIDTH),
    "hilo": lambda width, grid, **options: HiLo(width, width // HEAD_WIDTH, **options),
    "gate": lambda width, grid: GlobalFilter(grid, width),
    "spam": lambda width, grid, **options: SPAM(width, **options),
}


def block_parameters(width: int) -> int:
    """What a block of attention and a 4× channel MLP holds, without norms and scales."""
    return 12 * width**2 + 9 * width


def equal_hidden(width: int, mixer: nn.Module) -> int:
    """The MLP width that brings a block with this mixer to `block_parameters`: what a mixer saves, the MLP gets."""
    left = block_parameters(width) - sum(p.numel() for p in mixer.parameters()) - width
    if left < 2 * width + 1:
        raise ValueError(
            f"{type(mixer).__name__} alone takes all of the {block_parameters(width)} parameters of a block of width "
            f"{width}; nothing would mix channels. Use a smaller grid or a wider block."
        )
    return round(left / (2 * width + 1))


def equal_metaformer(
    mixer: str,
    grid: tuple[int, int],
    widths: Sequence[int] = (32, 64),
    blocks: Sequence[int] = (2, 2),
    scale: Scale = "none",
    **options,
) -> MetaFormer:
    """A MetaFormer whose blocks hold equally many parameters, whatever the mixer.

    grid: of the first stage; each later one is half of it, rounded up. options: keywords of the mixer.
    Raises: ValueError for an unknown mixer, and where a mixer leaves nothing for the MLP.
    """
    if mixer not in MIXERS:
        raise ValueError(f"There is no mixer {mixer!r}; nothing could be built. Choose among {', '.join(MIXERS)}.")
    grids = [tuple(-(-side // 2**stage) for side in grid) for stage in range(len(widths))]
    return MetaFormer(
        widths,
        blocks,
        mixer=lambda stage, width: MIXERS[mixer](width, grids[stage], **options),
        hidden=equal_hidden,
        scales=(scale,) * len(widths),
    )

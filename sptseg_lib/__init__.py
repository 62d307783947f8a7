"""sptseg: frequency-aware prompting for zero-shot semantic segmentation.

Shape suffixes, used on tensor names throughout:

    B  images of a batch          h w  the patch grid          D  width of CLIP's image encoder
    C  channels                   f    rfft bins, w // 2 + 1   E  width of CLIP's joint space
    H W  pixels                   N    patches, h · w          K  classes
    M  learned prompt tokens      L    encoder layers          P  pixels of an image, H · W

So `patches_BhwD` are a batch of patch grids, and `mask_logits_BKHW` are one mask a class and image.
Class names are seen or unseen. Layers count from 1, as in the paper.
"""

__version__ = "0.1.0"
__all__ = ["Segmentation", "segment"]


def __getattr__(name: str):
    # Imported on first use: torch and open_clip take seconds, and most modules need only a part of them.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(".segmentation", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

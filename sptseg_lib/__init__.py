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

"""Colours of label masks."""

import numpy as np


def palette() -> list[int]:
    """PASCAL VOC's colours, 256 × RGB: the bits of an id, dealt out to the three channels."""
    ids, channel = np.arange(256)[:, None], np.arange(3)
    bits = [((ids >> (3 * place + channel)) & 1) << (7 - place) for place in range(3)]
    return sum(bits).flatten().tolist()

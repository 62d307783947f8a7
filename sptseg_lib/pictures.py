"""Pictures from anywhere, upright and in RGB: files, bytes, PIL images, arrays and tensors."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# A telephone's photograph passes whole. Of larger ones a reduced copy is made: labels and scores would fill the memory.
MOST_PIXELS = 16_000_000

Source = str | Path | bytes | Image.Image | np.ndarray | Tensor


def read_rgb(source: str | Path | bytes | Image.Image, most_pixels: int | None = None) -> Image.Image:
    """A picture as 8-bit RGB, turned as its EXIF entry says.

    Grey, palette, CMYK and 16-bit pictures are converted; what is transparent becomes white. A picture of
    more than `most_pixels` is reduced and a warning says so; JPEGs are then not even decoded at full size.
    Raises: FileNotFoundError; ValueError for a file that is truncated, no picture or too large to decode.
    """
    name = str(source) if isinstance(source, str | Path) else "the picture"
    try:
        if isinstance(source, Image.Image):
            return _reduced(_eight_bit_rgb(ImageOps.exif_transpose(source)), source.size, most_pixels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # what is done about it stands below
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with opened as image:
            size = image.size
            if most_pixels:
                image.draft(None, reduced_size(*size, most_pixels))  # decodes a JPEG at 1/2, 1/4 or 1/8
            ImageOps.exif_transpose(image, in_place=True)
            return _reduced(_eight_bit_rgb(image), size, most_pixels)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no picture {name}. Nothing was read; check the path.") from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{name} is no picture that can be read. Nothing was decoded; save it as JPEG or PNG."
        ) from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} would fill the memory ({error}) Reduce it with an image editor.") from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(
            f"{name} cannot be decoded: {error}. It is truncated or damaged, and a part would be missing; fetch or "
            "save it again."
        ) from None


def read_picture(source: Source, most_pixels: int = MOST_PIXELS, least_side: int = 1) -> Tensor:
    """Any picture as a tensor (3, H, W), float32 in [0, 1].

    source: a path, a file's bytes, a PIL image, an array (H, W) or (H, W, 1, 3 or 4), or a tensor (H, W) or
    (1, 3 or 4, H, W), unsigned integers of 8 or 16 bits or floating-point numbers in [0, 1].
    Raises: as `read_rgb`; TypeError for anything else; ValueError for another shape, values outside
    [0, 1], and a side shorter than `least_side`.
    """
    if isinstance(source, Tensor | np.ndarray):
        array = _channels_last(source)
        if array.dtype == np.uint16:
            array = (array >> 8).astype(np.uint8)
        if array.dtype != np.uint8:
            return _large_enough(_float_rgb(array, most_pixels), least_side)
        source = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    elif not isinstance(source, str | Path | bytes | Image.Image):
        raise TypeError(
            f"A {type(source).__name__} is no picture; give a path, a file's bytes, a PIL image, an array or a tensor."
        )
    rgb_HW3 = torch.from_numpy(np.array(read_rgb(source, most_pixels)))
    return _large_enough(rgb_HW3.permute(2, 0, 1), least_side).float().div_(255)


def reduced_size(width: int, height: int, most_pixels: int) -> tuple[int, int]:
    """Width and height of the same shape with at most `most_pixels`; never enlarged."""
    scale = min(1.0, math.sqrt(most_pixels / (width * height)))
    return max(1, int(width * scale)), max(1, int(height * scale))


def _reduced(image: Image.Image, size: tuple[int, int], most_pixels: int | None) -> Image.Image:
    if most_pixels is None or size[0] * size[1] <= most_pixels:
        return image
    image.thumbnail(reduced_size(*image.size, most_pixels), reducing_gap=2.0)
    _say_reduced(size, image.size)
    return image


def _say_reduced(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    warnings.warn(
        f"A picture of {size[0]}×{size[1]} pixels is reduced to {new_size[0]}×{new_size[1]}, so that it fits the "
        "memory; labels have that size, too.",
        stacklevel=4,
    )


def _eight_bit_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which convert() would cut off at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"The picture's values reach from {values.min()} to {values.max()}, beyond 16 bits. It would turn out "
                "black or white; save it with 8 or 16 bits."
            )
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError(
            "The picture holds floating-point values, whose white is unknown. It would turn out black or white; pass "
            "it as an array with values in [0, 1]."
        )
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")  # no second copy of a large picture


def _channels_last(source: np.ndarray | Tensor) -> np.ndarray:
    """(H, W, C) with C = 1, 3 or 4 from an array (H, W[, C]) or a tensor ([C,] H, W)."""
    is_tensor = isinstance(source, Tensor)
    array = source.detach().cpu().numpy() if is_tensor else source
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and is_tensor:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise ValueError(
            f"{'A tensor' if is_tensor else 'An array'} of shape {tuple(shape)} is no picture. Its channels could not "
            f"be told from its pixels; give {'(3, H, W)' if is_tensor else '(H, W, 3)'} or (H, W)."
        )
    if array.dtype not in (np.uint8, np.uint16) and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"Pixels of type {array.dtype} have no known white. The picture could turn out black; convert them to "
            "uint8, or to floating-point numbers in [0, 1]."
        )
    return np.ascontiguousarray(array)


def _float_rgb(array_HWC: np.ndarray, most_pixels: int) -> Tensor:
    low, high = float(array_HWC.min()), float(array_HWC.max())
    if not (0 <= low and high <= 1):  # false for NaN, too
        raise ValueError(
            f"Floating-point pixels reach from {low:g} to {high:g}, not within [0, 1]. Colours would be cut off; "
            "divide by the value of white."
        )
    image_CHW = torch.from_numpy(array_HWC).permute(2, 0, 1).float()
    height, width = image_CHW.shape[1:]
    if height * width > most_pixels:
        new_width, new_height = reduced_size(width, height, most_pixels)
        image_CHW = F.interpolate(image_CHW[None], size=(new_height, new_width), mode="area")[0]
        _say_reduced((width, height), (new_width, new_height))
    if len(image_CHW) == 4:
        image_CHW = image_CHW[:3] * image_CHW[3:] + 1 - image_CHW[3:]
    return image_CHW.expand(3, -1, -1)


def _large_enough(image_3HW: Tensor, least_side: int) -> Tensor:
    height, width = image_3HW.shape[1:]
    if min(height, width) < least_side:
        raise ValueError(
            f"A picture of {width}×{height} pixels is smaller than one {least_side}×{least_side} patch. There would be "
            "nothing to classify; give a larger one."
        )
    return image_3HW

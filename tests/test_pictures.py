"""Photographs as they come: grey, CMYK, 16 bits, transparent, rotated, truncated, tiny and huge."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sptseg_lib.pictures import MOST_PIXELS, read_picture, read_rgb, reduced_size

ORIENTATION = 0x0112


@pytest.fixture
def scene() -> np.ndarray:
    """12 × 20 smooth RGB pixels, so that JPEG changes them little."""
    y, x = np.mgrid[0:12, 0:20]
    return np.stack([x * 12, y * 20, 255 - x * 6 - y * 10], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_near(image_3HW: torch.Tensor, scene: np.ndarray, most: float = 0.0) -> None:
    expected = torch.from_numpy(scene.astype(np.float32) / 255).permute(2, 0, 1)
    torch.testing.assert_close(image_3HW, expected, atol=most, rtol=0)


def test_paths_bytes_images_arrays_and_tensors_are_the_same_picture(scene, tmp_path):
    path = tmp_path / "scene.png"
    Image.fromarray(scene).save(path)
    tensor = torch.from_numpy(scene).permute(2, 0, 1)
    for source in (path, str(path), path.read_bytes(), Image.open(path), scene, tensor, tensor.float() / 255,
                   scene.astype(np.uint16) * 257, scene / 255):  # fmt: skip
        assert_near(read_picture(source), scene, 1e-6)


def test_floating_point_tensors_are_not_rounded():
    image_3HW = torch.rand(3, 9, 7)
    assert torch.equal(read_picture(image_3HW), image_3HW)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_becomes_three_equal_channels(mode, scene):
    grey = Image.fromarray(scene).convert("L")
    image = read_picture(encoded(grey.convert(mode), "PNG"))
    assert image.shape == (3, 12, 20) and torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    if mode == "L":
        assert_near(image, np.repeat(np.asarray(grey)[..., None], 3, axis=2))


def test_cmyk_is_converted(scene):
    assert_near(read_picture(encoded(Image.fromarray(scene).convert("CMYK"), "TIFF")), scene, 0.02)
    assert read_picture(encoded(Image.fromarray(scene).convert("CMYK"), "JPEG")).shape == (3, 12, 20)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_cut_off(kind):
    ramp = np.linspace(0, 65535, 240).reshape(12, 20).astype(np.uint16)
    image = read_picture(encoded(Image.fromarray(ramp), kind))
    np.testing.assert_allclose(image[0].numpy(), ramp / 65535, atol=1 / 255)


def test_what_is_transparent_becomes_white(scene):
    alpha = np.full((12, 20, 1), 255, np.uint8)
    alpha[:, :10] = 0
    rgba = np.concatenate([scene, alpha], axis=-1)
    expected = np.where(alpha == 255, scene, 255)
    tensor = torch.from_numpy(rgba).permute(2, 0, 1)
    for source in (encoded(Image.fromarray(rgba), "PNG"), rgba, tensor, tensor.float() / 255):
        assert_near(read_picture(source), expected, 1e-6)
    palette = Image.fromarray(scene).convert("P")
    hidden = palette.getpixel((0, 0))
    assert read_picture(encoded(palette, "PNG", transparency=hidden))[:, 0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_undone(scene, orientation, turns):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    jpeg = encoded(Image.fromarray(scene), "JPEG", exif=exif, quality=100, subsampling=0)
    assert_near(read_picture(jpeg), np.rot90(scene, turns), 0.03)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_truncated_file_is_named(kind, tmp_path):
    noise = np.random.randint(0, 256, (80, 80, 3), dtype=np.uint8)
    path = tmp_path / f"half.{kind.lower()}"
    whole = encoded(Image.fromarray(noise), kind)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half.*(truncated|damaged|no picture).*save it"):
        read_picture(path)


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match=r"notes\.txt is no picture"):
        read_picture(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"no picture .*gone\.jpg"):
        read_picture(tmp_path / "gone.jpg")
    with pytest.raises(TypeError, match="A list is no picture"):
        read_picture([1, 2])


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (np.zeros((3, 20, 30), np.uint8), r"array of shape \(3, 20, 30\).*give \(H, W, 3\)"),
        (torch.zeros(20, 30, 3), r"tensor of shape \(20, 30, 3\).*give \(3, H, W\)"),
        (np.zeros((0, 4, 3)), "is no picture"),
        (np.zeros((4, 4, 3), np.int64), "int64 have no known white"),
        (np.full((4, 4, 3), 200.0), "from 200 to 200, not within"),
        (np.full((4, 4, 3), np.nan), "from nan to nan"),
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "floating-point values, whose white is unknown"),
        (Image.fromarray(np.full((4, 4), 70_000, np.int32)), "beyond 16 bits"),
    ],
)
def test_other_shapes_and_values_are_refused(source, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_picture(source)


def test_a_side_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="picture of 1×1 pixels is smaller than one 8×8 patch"):
        read_picture(Image.new("RGB", (1, 1)), least_side=8)
    assert read_picture(Image.new("RGB", (1, 1))).shape == (3, 1, 1)


@pytest.mark.parametrize(
    "as_source", [Image.fromarray, np.copy, lambda a: a / 255, lambda a: encoded(Image.fromarray(a), "PNG")]
)
def test_large_pictures_are_reduced_and_it_is_said(as_source, scene):
    large = np.kron(scene, np.ones((4, 4, 1), np.uint8))
    with pytest.warns(UserWarning, match="80×48 pixels is reduced to 20×12"):
        assert_near(read_picture(as_source(large), most_pixels=240), scene, 0.02)


@pytest.mark.parametrize("size", [(12_000, 9000), (40, 10**7), (7, 5)])
def test_reduced_sizes_keep_the_shape_and_the_limit(size):
    width, height = reduced_size(*size, MOST_PIXELS)
    assert width * height <= MOST_PIXELS and width >= 1 and height >= 1
    assert size != (7, 5) or (width, height) == size
    assert size != (12_000, 9000) or abs(width / height - 4 / 3) < 0.01


def test_reading_leaves_the_callers_picture_alone(scene, tmp_path):
    path = tmp_path / "scene.jpg"
    Image.fromarray(np.kron(scene, np.ones((8, 8, 1), np.uint8))).save(path)
    picture = Image.open(path)
    with pytest.warns(UserWarning, match="reduced"):
        read_rgb(picture, most_pixels=240)
    assert picture.size == (160, 96)


@pytest.mark.slow
def test_a_picture_of_108_million_pixels_fits_the_memory(tmp_path):
    """12,000 × 9,000 as JPEG, in a process of its own: 324 MB decoded, ten times that as numbers."""
    path = tmp_path / "huge.jpg"
    Image.new("RGB", (12_000, 9000), (200, 30, 30)).save(path)
    code = (
        "import resource, sys, warnings; warnings.simplefilter('ignore')\n"
        "from sptseg_lib.pictures import read_picture\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = peak(); image = read_picture(sys.argv[1]); print(*image.shape, peak() - before)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, cwd=root, check=True)
    channels, height, width, grown_mb = map(int, done.stdout.split())
    assert (channels, round(width / height, 2)) == (3, 1.33) and height * width <= MOST_PIXELS
    assert grown_mb < 600

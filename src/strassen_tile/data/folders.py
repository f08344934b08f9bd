"""Images in files of their own, or rows of a table, read lazily: only their list is in memory, so that ImageNet fits.

Needs Pillow. Images are decoded to RGB; 16-bit and float ones are refused, because Pillow would clip them to white.
Crop and resize are one bicubic resampling of a box of the decoded image.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from strassen_tile.data.idx import need
from strassen_tile.data.images import Sample, byte_histogram, channel_statistics, normalise
from strassen_tile.errors import ConfigError, DataError
from strassen_tile.files import opened, too_large

# Of what Pillow can read only what `listing.SUFFIXES` promise: a file called .png may be PostScript, which it would run.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
_CROP_TRIES = 10
MAX_BYTES = 256 << 20  # while decoding: 8192 × 8192 pixels at four bytes each, as most photographs take
# Bytes a pixel, copies included, where a decoder takes more than the image that comes out of it: the canvases of an
# animation (WEBP), a strip as large as the image and of up to six samples (TIFF).
_DECODER = {"WEBP": 20, "TIFF": 16}
_COEFFICIENTS = 12  # of a progressive JPEG, whose coefficients are kept until all scans are in
# Statistics come from this many training images: enough for a mean to within 0.01, and seconds even at ImageNet's size.
_STATISTICS_IMAGES = 256

Box = tuple[float, float, float, float]


class Stored(Protocol):
    """An image that is no file of its own. As text it is what errors call it."""

    def opened(self, max_bytes: int) -> contextlib.AbstractContextManager[BinaryIO]:
        """Its encoded bytes, to be read. Raises OSError: they cannot be had, or are more than `max_bytes`."""


Source = str | Stored  # a path, or what opens itself


class FolderImages(Dataset[Sample]):
    """Images decoded when fetched: "pixel_values" float32 (3, size, size), "labels" int64 ().

    Args:
        paths: n files, or what else can be opened.
        labels: int64 (n,).
        image_size: side of what comes out, in pixels.
        mean: per channel, of pixels scaled to 0..1, (3,).
        std: per channel, likewise (3,), positive.
        augment: random resized crop and horizontal flip, from torch's global RNG; otherwise the central crop.
        max_bytes: the most that a file, or decoding it, may take.
        change: made of each image, uint8 (3, size, size) before and after, once it is cropped. None: nothing.

    Raises:
        DataError: on fetching an image that cannot be decoded, which it names.
    """

    def __init__(
        self,
        paths: Sequence[Source],
        labels: Tensor,
        *,
        image_size: int,
        mean: Tensor,
        std: Tensor,
        augment: bool,
        max_bytes: int = MAX_BYTES,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.paths, self.labels, self.image_size = paths, labels, image_size
        self.mean, self.std, self.augment, self.max_bytes = mean, std, augment, max_bytes
        self.change = change

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`: "pixel_values" float32 (3, size, size), "labels" int64 ()."""
        pixels = read_pixels(self.paths[index], self.image_size, augment=self.augment, max_bytes=self.max_bytes)
        pixels = pixels if self.change is None else self.change(pixels)
        return {"pixel_values": normalise(pixels, self.mean, self.std), "labels": self.labels[index]}

    def __repr__(self) -> str:
        return f"FolderImages({len(self)} files, image_size={self.image_size}, augment={self.augment})"


def read_pixels(path: Source, size: int, *, augment: bool, max_bytes: int = MAX_BYTES) -> Tensor:
    """Decode one image, cropped at random (and perhaps mirrored) or centrally: uint8 (3, size, size).

    Raises:
        DataError: the file is missing, is not an image, is cut short, is not 8 bits a channel, or takes more than
            `max_bytes`, of which nothing is then decoded.
    """
    # Drawn before decoding, and as many whatever the image is: one bad or odd file does not change the others' crops.
    draws = torch.rand(2 * _CROP_TRIES + 3).tolist() if augment else []
    with _image(path, max_bytes) as image:
        if (needed := _bytes_a_pixel(image) * image.width * image.height) > max_bytes:
            raise DataError(f"{path}: decoded, it {too_large(needed, max_bytes)}")
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{path}: is of Pillow mode {image.mode}; expected 8 bits a channel")
        box = random_box(image.width, image.height, size, draws) if augment else central_box(*image.size)
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        resized = rgb.resize((size, size), need("PIL.Image").Resampling.BICUBIC, box=box)
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(size, size, 3).movedim(-1, 0)
    return pixels.flip(-1) if augment and draws[-1] < 0.5 else pixels


@contextlib.contextmanager
def _image(path: Source, max_bytes: int) -> Iterator[Any]:
    """The file as Pillow has it, its header read; what goes wrong within is a DataError that names the file."""
    image_module = need("PIL.Image")
    try:
        with contextlib.ExitStack() as held:
            file = held.enter_context(opened(path, max_bytes) if isinstance(path, str) else path.opened(max_bytes))
            yield held.enter_context(image_module.open(file, formats=_FORMATS))
    except (DataError, ConfigError):
        raise
    except image_module.UnidentifiedImageError as error:
        raise DataError(f"{path}: cannot be decoded: it is none of {', '.join(_FORMATS)}") from error
    except image_module.DecompressionBombError as error:
        raise DataError(
            f"{path}: too large for Pillow ({error}); raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    # Pillow's decoders raise anything at malformed bytes: OSError, SyntaxError, ValueError, struct.error and others.
    except Exception as error:
        raise DataError(f"{path}: cannot be decoded ({error}); expected an image that Pillow reads") from error


def _bytes_a_pixel(image: Any) -> int:
    """What decoding the image, and making it RGB, takes at most."""
    if image.format == "JPEG" and "progressive" in image.info:
        return _COEFFICIENTS
    return _DECODER.get(image.format, 4 if image.mode == "RGB" else 8)


def central_box(width: int, height: int) -> Box:
    """The central square of 224/256 of the shorter side: resize that side to size·256/224, then crop size × size."""
    side = min(width, height) * 224 / 256
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, size: int, draws: Sequence[float]) -> Box:
    """A box of random area, aspect ratio in 3/4..4/3 and place (random resized crop, Szegedy et al. 2015, §6).

    The area is 0.08 to 1 of the image's for outputs of 64 pixels and more; 0.6 to 1 for smaller ones, where an eighth
    of a thumbnail shows nothing of its class.
    """
    smallest = 0.08 if size >= 64 else 0.6
    across, down = draws[2 * _CROP_TRIES : 2 * _CROP_TRIES + 2]
    for area_draw, ratio_draw in zip(draws[:_CROP_TRIES], draws[_CROP_TRIES : 2 * _CROP_TRIES], strict=True):
        area = width * height * (smallest + (1 - smallest) * area_draw)
        ratio = math.exp((2 * ratio_draw - 1) * math.log(4 / 3))
        box_width, box_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if box_width <= width and box_height <= height:
            break
    else:  # a banner, in which no such box fits: the largest one of an allowed ratio
        box_width, box_height = min(width, height * 4 / 3), min(height, width * 4 / 3)
    left, top = across * (width - box_width), down * (height - box_height)
    # min: rounding must not put the far edge outside, which Pillow refuses.
    return left, top, min(left + box_width, width), min(top + box_height, height)


def folder_statistics(paths: Sequence[Source], size: int, *, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) of pixels scaled to 0..1, over up to 256 images spread over `paths`."""
    histogram = torch.zeros(3, 256, dtype=torch.int64)
    for path in _sample(paths):
        histogram += byte_histogram(read_pixels(path, size, augment=False, max_bytes=max_bytes)[None])
    return channel_statistics(histogram)


def stored_size(paths: Sequence[Source], *, max_bytes: int = MAX_BYTES) -> int:
    """The median of the shorter sides, in pixels, over up to 256 images spread over `paths`; they are not decoded."""
    sides: list[int] = []
    for path in _sample(paths):
        with _image(path, max_bytes) as image:
            sides.append(min(image.size))
    return statistics.median_low(sides)


def _sample(paths: Sequence[Source]) -> list[Source]:
    count = min(len(paths), _STATISTICS_IMAGES)
    return [paths[i * len(paths) // count] for i in range(count)]

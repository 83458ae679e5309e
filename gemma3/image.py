"""Images to the uint8 pixels that the vision tower reads, bit for bit as in Hugging Face's Gemma3ImageProcessorPil.

It rests on Pillow: the model was trained with Pillow's resizing. Scaling to [-1, 1] is done in vision.py, so that
images travel as bytes. The aspect ratio is not kept: an image is squashed to a square.
"""

import io
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# A file of a few kilobytes can declare gigabytes of pixels. The limit is below the 89 megapixels where Pillow warns.
MAX_PIXELS = 80_000_000

# Only decoders inside Pillow itself: the one for EPS, for example, starts Ghostscript on whatever the file says.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# Pan-and-scan settings of the published processor.
_MIN_CROP_SIZE = 256
MAX_CROPS = 4
_MIN_RATIO = 1.2


class Readable(Protocol):
    """Anything whose `read_bytes` returns the content of a file."""

    def read_bytes(self) -> bytes: ...


def _open(source: Path | str | Readable | bytes | Image.Image) -> AbstractContextManager[Image.Image]:
    """Open without decoding: the size is known afterwards, the pixels are not read."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, Path | str):
        return Image.open(source, formats=FORMATS)
    return Image.open(io.BytesIO(source if isinstance(source, bytes) else source.read_bytes()), formats=FORMATS)


def _check_size(width: int, height: int) -> None:
    if not width * height:
        raise ValueError(f"it is {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it is {width} x {height} pixels, more than the limit of {MAX_PIXELS}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, blending alpha with white: `convert("RGB")` alone would drop the alpha."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _resize(image: Image.Image, size: int) -> np.ndarray:
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def load_image(
    source: Path | str | Readable | bytes | Image.Image, size: int | None, name: str = "the image"
) -> np.ndarray:
    """Read one image as uint8[h, w, 3], RGB on white, squashed to `size` x `size` unless `size` is None.

    `source` is a path, the bytes of a file (PNG, JPEG, WebP, GIF, BMP, TIFF or PPM; only an animation's first frame is
    read), anything that returns such bytes from `read_bytes()`, or a Pillow image. A file is turned upright by its EXIF
    orientation, as in Hugging Face's loaders; a Pillow image is taken as it is. 16-bit grey is clipped to 255, as in
    Pillow and therefore in the published processor.

    Raises ValueError naming the file, or `name` where there is none, if the image is missing, empty, truncated,
    corrupt, in another format, or larger than MAX_PIXELS (known from its header, before anything is decoded).
    """
    if isinstance(source, Path | str):
        name = str(source)
    try:
        with _open(source) as image:
            _check_size(*image.size)
            rgb = _to_rgb(image if image is source else ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} cannot be read: its content is none of {', '.join(FORMATS)}") from error
    except Exception as error:  # a damaged file makes Pillow raise OSError, SyntaxError, struct.error, EOFError, ...
        raise ValueError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return np.array(rgb) if size is None else _resize(rgb, size)


def _num_crops(long: int, short: int) -> int:
    """How many crops pan-and-scan cuts along the longer side: 0, or 2 to 4."""
    if long / short < _MIN_RATIO:
        return 0
    crops = min(math.floor(long / short + 0.5), long // _MIN_CROP_SIZE)
    crops = min(max(crops, 2), MAX_CROPS)
    return crops if min(math.ceil(long / crops), short) >= _MIN_CROP_SIZE else 0


def pan_and_scan(image: np.ndarray, size: int) -> list[np.ndarray]:
    """Cut a long image along its longer side, so that squashing loses less of it.

    `image` is uint8[h, w, 3] at its own size, as `load_image(source, None)` returns it. The result is the whole image
    and then its 0, 2, 3 or 4 crops from left to right or top to bottom, each uint8[size, size, 3]. The prompt needs the
    number of crops, one less than the length of the list: see Tokenizer.encode_chat.
    """
    height, width = image.shape[:2]
    long = max(height, width)
    crops = []
    if count := _num_crops(long, min(height, width)):
        step = math.ceil(long / count)  # the last crop may be shorter: nothing is padded
        crops = np.split(image, range(step, long, step), axis=0 if height > width else 1)
    return [_resize(Image.fromarray(view), size) for view in [image, *crops]]

"""Pictures from bytes or files: of known formats, bounded, verified, turned upright and put on a background."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from cmaclip_fast.untrusted import UnfitFile, open_regular

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded, whatever a file's name: Pillow's other decoders start programs or hold pictures within pictures."""

MAX_IMAGE_PIXELS = 50_000_000
"""The default bound on width x height of a picture."""

MAX_IMAGE_BYTES = 512 * 2**20
"""The bound on the size of a picture's file."""

_LARGE_PIXELS = 16_000_000
_LARGE = threading.Lock()
"""Pictures of more pixels than these are decoded one at a time, since each takes up to 12 bytes a pixel."""

_PIL_BOUND = threading.Lock()
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF 6.0, section 15


class ImageProblem(Exception):
    """A picture that cannot be used: `kind` is `unreadable_image` or `oversized_image`; the message has the remedy."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def image_suffixes() -> set[str]:
    """The endings of names of files of `FORMATS`, such as `.png`."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def read_image(source: bytes | Path, max_pixels: int = MAX_IMAGE_PIXELS, background: str = "white") -> Image.Image:
    """The picture as RGB, upright by its EXIF tag, its transparent parts on `background`.

    Raises:
        ImageProblem: the picture is missing, unreadable, truncated, or has more than `max_pixels` pixels.
    """
    with _opened(source, max_pixels) as image:
        return to_rgb(image, background)


def verify_image(source: bytes | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Reads the picture to its last byte without keeping it; raises as `read_image` does."""
    with _opened(source, max_pixels) as image:
        image.draft("RGB", (1, 1))  # a JPEG is then decoded at an eighth of its size, to its end all the same
        image.load()


@contextmanager
def _opened(source: bytes | Path, max_pixels: int) -> Iterator[Image.Image]:
    """An open picture of which only the header is read; what decoding it raises becomes an ImageProblem."""
    try:
        with _file(source) as file, _open_unbounded(file) as image:
            width, height = image.size
            _check_pixels(width, height, max_pixels)
            if isinstance(tags := getattr(image, "tag_v2", None), Mapping):  # a tile may be larger than its TIFF
                _check_pixels(int(tags.get(_TILE_WIDTH, 0)), int(tags.get(_TILE_LENGTH, 0)), max_pixels)
            with _LARGE if width * height > _LARGE_PIXELS else contextlib.nullcontext():
                yield image
    except ImageProblem:
        raise
    except FileNotFoundError:
        raise ImageProblem("unreadable_image", "does not exist; fix the path or name image_dir") from None
    except UnfitFile as error:
        raise ImageProblem("unreadable_image", f"{error}; replace it") from None
    except Exception as error:  # a decoder may raise anything at all on bytes it does not expect
        raise ImageProblem("unreadable_image", f"cannot be read ({_one_line(error)}); replace it") from error


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageProblem(
            "oversized_image",
            f"has {width} x {height} = {width * height:,} pixels, over the bound of {max_pixels:,}; "
            "shrink it, or raise max_image_pixels",
        )


def _file(source: bytes | Path) -> BinaryIO:
    if not isinstance(source, bytes):
        return open_regular(source, MAX_IMAGE_BYTES)
    if len(source) > MAX_IMAGE_BYTES:
        raise UnfitFile(f"has {len(source):,} bytes, over the limit of {MAX_IMAGE_BYTES:,}")
    return io.BytesIO(source)


def _open_unbounded(file: BinaryIO) -> Image.Image:
    # Pillow's bound is one number for the whole process; it is lifted only while a header is read.
    with _PIL_BOUND:
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]
        kept = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(file, formats=known)
        finally:
            Image.MAX_IMAGE_PIXELS = kept


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """An opened picture as RGB, upright by its EXIF tag, its transparent parts on `background`."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        drawing = image.convert("RGBA")
        canvas = Image.new("RGBA", drawing.size, background)
        return Image.alpha_composite(canvas, drawing).convert("RGB")
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    return image.convert("RGB")


def _one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not a picture of {', '.join(FORMATS)}"
    return " ".join(str(error).split())[:200] or type(error).__name__

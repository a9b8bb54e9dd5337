"""Pictures from bytes or files: bounded, verified, turned upright and put on a background."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_IMAGE_PIXELS = 50_000_000
"""The default bound on width x height of a picture."""

_PIL_BOUND = threading.Lock()


class ImageProblem(Exception):
    """A picture that cannot be used: `kind` is `unreadable_image` or `oversized_image`; the message has the remedy."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


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
        with _open_unbounded(source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageProblem(
                    "oversized_image",
                    f"has {width} x {height} = {width * height:,} pixels, over the bound of {max_pixels:,}; "
                    "shrink it, or raise max_image_pixels",
                )
            yield image
    except ImageProblem:
        raise
    except FileNotFoundError:
        raise ImageProblem("unreadable_image", "does not exist; mend the path or name image_dir") from None
    except Exception as error:  # a decoder may raise anything at all on bytes it does not expect
        raise ImageProblem("unreadable_image", f"cannot be read ({_one_line(error)}); replace it") from error


def _open_unbounded(source: bytes | Path) -> Image.Image:
    # Pillow's bound is one number for the whole process; it is lifted only while a header is read.
    with _PIL_BOUND:
        kept = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
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
        return "not a picture in a known format"
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Pairs of a picture and a text, in the forms that users have them in."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from numbers import Number
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmaclip_fast.data.files import near
from cmaclip_fast.data.images import MAX_IMAGE_PIXELS, ImageProblem, read_image, to_rgb
from cmaclip_fast.errors import InputError, listed

Form = Literal["one", "list", "stream", "frame"]

FORMS = (
    "give sequences of equal length, one pair, a pandas.DataFrame, a datasets.Dataset, or an iterator of "
    "(picture, text) pairs"
)
KINDS = "a PIL image, a path, encoded bytes, an array, a tensor, a binary file, or None"

_PIL_LOCKS = [threading.Lock() for _ in range(64)]
"""A picture that Pillow has opened, but not read, must be read by one thread at a time."""

_ROUNDING = 1e-3
"""How far floats may leave the range from 0 to 1."""


@dataclass
class Pairs:
    """What `Classifier.predict` was given, one pair after the other.

    Attributes:
        items: the pairs, in order.
        form: what the answer is to look like: one, a list, a stream, or a DataFrame.
        index: of the DataFrame.
    """

    items: Iterable[tuple[Any, Any]]
    form: Form
    index: Any = None


def as_pairs(images: Any, texts: Any, image: str | None, text: str | None) -> Pairs:
    """The pairs of what `Classifier.predict` was given.

    Args:
        images, texts: see `Classifier.predict`.
        image, text: the columns of tables; None where there is none.

    Raises:
        InputError: unequal numbers of images and texts, or no pairs at all.
    """
    if texts is None:
        table = _table(images, image, text)
        if table is not None:
            return table
    elif _library("pandas", "DataFrame", images) or _library("datasets", "Dataset", images):
        raise InputError(f"{_kind(images)} and texts: name the column of texts by text=, instead of giving texts")
    forms = _form(images, is_picture), _form(texts, is_text)
    # data sets of PyTorch may have items by number alone
    images, texts = (
        side if form != "list" or hasattr(side, "__iter__") else _Indexed(side)
        for side, form in ((images, forms[0]), (texts, forms[1]))
    )
    if None in forms:
        side, given = ("images", images) if forms[0] is None else ("texts", texts)
        raise InputError(f"{side}: a {_kind(given)} holds no pairs: {FORMS}")
    if texts is None and (forms[0] == "stream" or (forms[0] == "list" and _holds_pairs(images))):
        pairs = (_pair(number, item, image, text) for number, item in enumerate(images))
        return Pairs(pairs, "stream" if forms[0] == "stream" else "list")
    if images is None and texts is None:
        raise InputError(f"neither images nor texts: {FORMS}")
    # one side may be left out as a whole
    if texts is None and forms[0] == "list":
        return Pairs(zip(images, repeat(None), strict=False), "list")
    if images is None and forms[1] != "one":
        return Pairs(zip(repeat(None), texts, strict=False), forms[1])  # type: ignore[arg-type]
    if forms == ("one", "one"):
        return Pairs([(images, texts)], "one")
    if "one" in forms:
        raise InputError("several of one side and a single one of the other: give one of each for every pair")
    if forms == ("list", "list"):
        if len(images) != len(texts):
            raise InputError(
                f"{len(images)} images but {len(texts)} texts: give one of each for every pair, None if absent"
            )
        return Pairs(zip(images, texts, strict=True), "list")
    return Pairs(_side_by_side(iter(images), iter(texts)), "stream")


def _form(value: Any, is_one: Any) -> Form | None:
    if is_one(value):
        return "one"
    # a dict, a set or a table of another library is no sequence of pictures, nor is a single number
    if _is_table(value) or isinstance(value, Mapping | set | frozenset) or getattr(value, "ndim", 1) == 0:
        return None
    if hasattr(value, "__len__") and hasattr(value, "__getitem__"):
        return "list"
    return "stream" if hasattr(value, "__iter__") else None


class _Indexed:
    """A sequence of which only the length and the items by number are known."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        return (self._items[number] for number in range(len(self)))


def is_absent(value: Any) -> bool:
    """None, NaN, pandas' NA and NaT, and what is empty."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, bytes | bytearray):
        return not value
    return isinstance(value, Number) and bool(value != value)


def is_text(value: Any) -> bool:
    """Whether a value stands for one text, be it one that cannot be used."""
    return is_absent(value) or isinstance(value, str | bytes | bytearray | Number)


def is_picture(value: Any) -> bool:
    """Whether a value stands for one picture, be it one that cannot be used."""
    if isinstance(value, Mapping):
        return _is_undecoded(value)
    one = str | bytes | bytearray | memoryview | os.PathLike | Image.Image | Number
    if is_absent(value) or isinstance(value, one) or hasattr(value, "read"):
        return True
    return hasattr(value, "__array__") and not _is_table(value) and np.ndim(value) in (2, 3)


def _is_undecoded(value: Mapping[Any, Any]) -> bool:
    """Whether it is a picture as Hugging Face keeps it."""
    return bool({"bytes", "path"} & value.keys())


def _is_table(value: Any) -> bool:
    return hasattr(value, "columns") or hasattr(value, "column_names")


def _holds_pairs(images: Any) -> bool:
    """Whether a sequence is one of pairs: no picture is a tuple."""
    if isinstance(images, np.ndarray | Tensor) or len(images) == 0:
        return False
    first = images[0] if isinstance(images, list | tuple) else next(iter(images))
    return isinstance(first, tuple | list) or (isinstance(first, Mapping) and not is_picture(first))


def _pair(number: int, item: Any, image: str | None, text: str | None) -> tuple[Any, Any]:
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, Mapping) and {image, text} & item.keys():
        return item.get(image), item.get(text)
    raise InputError(f"pair {number}: a {_kind(item)} is no pair: give (picture, text), None for what is absent")


def _side_by_side(images: Iterator[Any], texts: Iterator[Any]) -> Iterator[tuple[Any, Any]]:
    nothing = object()
    number = 0
    while True:
        image, text = next(images, nothing), next(texts, nothing)
        if image is nothing and text is nothing:
            return
        if image is nothing or text is nothing:
            side, other = ("images", "texts") if image is nothing else ("texts", "images")
            raise InputError(f"pair {number}: the {side} end before the {other}: give one of each for every pair")
        yield image, text
        number += 1


def _library(name: str, kind: str, value: Any) -> bool:
    """Whether a value is of a class of a library that is imported only if the user has done so."""
    library = sys.modules.get(name)
    return library is not None and isinstance(value, getattr(library, kind))


def _table(table: Any, image: str | None, text: str | None) -> Pairs | None:
    """The pairs of a DataFrame or a data set of Hugging Face; None if it is neither."""
    if _library("pandas", "DataFrame", table):
        image, text = _columns(list(table.columns), image, text)
        sides = ([None] * len(table) if name is None else table[name].tolist() for name in (image, text))
        return Pairs(zip(*sides, strict=True), "frame", table.index)
    if _library("datasets", "DatasetDict", table) or _library("datasets", "IterableDatasetDict", table):
        raise InputError(f"a {_kind(table)} has several splits ({', '.join(table)}): give one of them")
    streams = _library("datasets", "IterableDataset", table)
    if not streams and not _library("datasets", "Dataset", table):
        return None
    if table.column_names is not None:
        image, text = _columns(table.column_names, image, text)
    import datasets

    table = table.with_format(None)
    if image is not None and isinstance((table.features or {}).get(image), datasets.Image):
        # decoded here, so that the bound on pixels holds
        table = table.cast_column(image, datasets.Image(decode=False))
    pairs = ((row.get(image), row.get(text)) for row in table)
    return Pairs(pairs, "stream" if streams else "list")


def _columns(names: list[Any], image: str | None, text: str | None) -> tuple[str | None, str | None]:
    there = listed(list(map(str, names)))
    if image is None and text is None:
        raise InputError(f"name the columns by image= and text=; columns: {there}")
    for role, name in (("image", image), ("text", text)):
        if name is not None and name not in names:
            close = near(name, [str(known) for known in names])
            raise InputError(f"no column '{name}' for {role}{close}; columns: {there}; name another by {role}=")
        if name is not None and names.count(name) > 1:
            raise InputError(f"column '{name}' is there twice: rename one")
    return image, text


def read_text(number: int, value: Any) -> str | None:
    """The text of a pair, or None where it is absent.

    Raises:
        InputError: it is no text.
    """
    if is_absent(value) and not isinstance(value, bytes | bytearray):
        return None
    if not isinstance(value, str):
        remedy = "decode it" if isinstance(value, bytes | bytearray) else "give a str, or None"
        raise InputError(f"pair {number}: the text is of type {_kind(value)}: {remedy}")
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"pair {number}: the text is no valid Unicode ({error.reason}): fix it") from None
    return text


def read_picture(number: int, value: Any, background: str, folder: Path | None = None) -> Image.Image | None:
    """The picture of a pair as RGB, or None where it is absent.

    Args:
        background: colour under transparent parts.
        folder: that paths start from.

    Raises:
        InputError: it is no picture, or one that cannot be read.
    """
    name = "picture"
    try:
        if isinstance(value, Mapping) and _is_undecoded(value):
            value = value.get("bytes") or value.get("path")
        if is_absent(value):
            return None
        if isinstance(value, str | os.PathLike):
            path = Path(os.fsdecode(value)).expanduser()
            path = path if folder is None else folder / path
            name = f"picture '{path}'"
            return read_image(path, MAX_IMAGE_PIXELS, background)
        if isinstance(value, bytes | bytearray | memoryview):
            return read_image(bytes(value), MAX_IMAGE_PIXELS, background)
        if isinstance(value, Image.Image):
            return _loaded(value, background)
        if isinstance(value, Tensor):
            return to_rgb(_from_tensor(value), background)
        if isinstance(value, np.ndarray) or (hasattr(value, "__array__") and not isinstance(value, Number)):
            return to_rgb(_from_array(np.asarray(value), channels_first=False), background)
        if hasattr(value, "read"):
            return read_image(_read_all(value), MAX_IMAGE_PIXELS, background)
    except ImageProblem as problem:
        raise InputError(f"pair {number}: {name} {problem}") from problem
    raise InputError(f"pair {number}: the picture is of type {_kind(value)}: give {KINDS}")


def _loaded(image: Image.Image, background: str) -> Image.Image:
    _check_size(*image.size)
    try:
        with _PIL_LOCKS[id(image) // 64 % len(_PIL_LOCKS)]:
            image.load()
        return to_rgb(image, background)
    except Exception as error:  # a decoder may raise anything at all
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageProblem("unreadable_image", f"cannot be read ({reason}); replace it") from error


def _read_all(file: Any) -> bytes:
    try:
        content = file.read()
    except (OSError, ValueError, io.UnsupportedOperation) as error:
        raise ImageProblem("unreadable_image", f"cannot be read from its file ({error}); open it again") from error
    if not isinstance(content, bytes | bytearray | memoryview):
        raise ImageProblem("unreadable_image", f"file gives {_kind(content)}, not bytes; open it in binary mode")
    return bytes(content)


def _from_tensor(tensor: Tensor) -> Image.Image:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ImageProblem("unreadable_image", "is no dense tensor; give one")
    tensor = tensor.detach().cpu()
    return _from_array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), channels_first=True)


def _from_array(values: np.ndarray, channels_first: bool) -> Image.Image:
    """`[H, W]`, `[H, W, C]` or `[C, H, W]` with C = 1, 3 or 4; whichever is usual where both would do."""
    shape = values.shape
    if values.ndim == 3:
        first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
        if first and (channels_first or not last):
            values = values.transpose(1, 2, 0)
        elif not last:
            values = values[..., :0]
    if values.ndim not in (2, 3) or values.size == 0:
        raise ImageProblem(
            "unreadable_image",
            f"has the shape {list(shape)}; give [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels",
        )
    _check_size(values.shape[1], values.shape[0])
    pixels = np.ascontiguousarray(_eight_bits(values))
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    if values.dtype.kind in "iuf":
        low, high, most = values.min(), values.max(), 1 if values.dtype.kind == "f" else 255
        if not (low >= -_ROUNDING and high <= most + _ROUNDING):  # NaN is neither
            raise ImageProblem(
                "unreadable_image",
                f"of {values.dtype} has values from {low} to {high}; give uint8 from 0 to 255, or floats from 0 to 1",
            )
        return np.rint(values.clip(0, most) * (255 // most)).astype(np.uint8)
    raise ImageProblem("unreadable_image", f"is an array of {values.dtype}; give uint8, or floats from 0 to 1")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ImageProblem(
            "oversized_image",
            f"has {width} x {height} = {width * height:,} pixels, over the bound of {MAX_IMAGE_PIXELS:,}; shrink it",
        )
    if width * height == 0:
        raise ImageProblem("unreadable_image", f"has {width} x {height} pixels; replace it")


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"

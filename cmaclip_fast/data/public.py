"""Readers of public data sets that a user has downloaded: `NAME:FOLDER` instead of a file.

UPMC-Food101 (Wang et al., ICME 2015), Fashion-Gen (arXiv 1806.08317) and GLAMI-1M (arXiv 2211.14451), in the form in
which they are distributed.
"""

from __future__ import annotations

import csv
import importlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from cmaclip_fast.data.files import Rows, read_files
from cmaclip_fast.data.named import Columns
from cmaclip_fast.errors import InputError, listed

_FASHION_GEN = {"train": "fashiongen_256_256_train.h5", "test": "fashiongen_256_256_validation.h5"}
_ENCODING = "ISO-8859-9"
_GLAMI = {"train": "GLAMI-1M-train.csv", "test": "GLAMI-1M-test.csv"}


def read_upmc_food101(folder: str) -> Rows:
    """`images/SPLIT/CLASS/NAME.jpg` and `texts/SPLIT_titles.csv`, whose lines are file name, title and class.

    A picture without a title has no text; a title without a picture is left out. Columns: image, text, label, split.
    """
    root = _root(folder, "images")
    texts: dict[tuple[str, str], str] = {}
    for split in ("train", "test"):
        path = _needed(root / "texts" / f"{split}_titles.csv")
        for number, line in enumerate(_lines(path), 1):
            if len(line) < 3:
                raise InputError(f"{path}, row {number}: {len(line)} values instead of file name, title and class")
            texts[split, line[0].strip()] = ",".join(line[1:-1])
    rows: dict[str, list[Any]] = {"image": [], "text": [], "label": [], "split": []}
    for split in ("train", "test"):
        pictures = sorted(_needed(root / "images" / split).glob("*/*"))
        for picture in pictures:
            rows["image"].append(str(picture.relative_to(root)))
            rows["text"].append(texts.get((split, picture.name)))
            rows["label"].append(picture.parent.name)
            rows["split"].append(split)
    if not rows["image"]:
        raise InputError(f"{root / 'images'}: holds no pictures in train/CLASS and test/CLASS")
    table = _table(rows)
    return Rows(table, [root], [len(table)], Columns("image", "text", ("label",), ("image",), "split"))


def read_fashion_gen(folder: str) -> Rows:
    """`fashiongen_256_256_train.h5` and `..._validation.h5`; the latter is the test split, as
    no other is distributed with labels.

    Pictures are read when they are asked for. Columns: image (file and row), text (the description), name, category,
    subcategory, gender, product, split; the task is `category`.
    """
    root = _root(folder, _FASHION_GEN["train"])
    h5py = _h5py()
    rows: dict[str, list[Any]] = {name: [] for name in ("image", "product", "split", *_FASHION_GEN_TEXTS)}
    files, lengths = [], []
    for split, name in _FASHION_GEN.items():
        path = _needed(root / name)
        try:
            with h5py.File(path) as file:
                length = len(file["input_image"])
                for column, key in _FASHION_GEN_TEXTS.items():
                    rows[column] += [_decoded(value) for value in file[key][:].reshape(length)]
                rows["product"] += [str(int(value)) for value in file["input_productID"][:].reshape(length)]
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{path}: is not Fashion-Gen's HDF5 ({_one_line(error)}); download it again") from error
        rows["image"] += [f"{name}#{row}" for row in range(length)]
        rows["split"] += [split] * length
        files.append(path)
        lengths.append(length)
    columns = Columns("image", "text", ("category",), ("image", "product"), "split")
    return Rows(_table(rows), files, lengths, columns, _PicturesInHdf5(files, lengths))


_FASHION_GEN_TEXTS = {
    "text": "input_description",
    "name": "input_name",
    "category": "input_category",
    "subcategory": "input_subcategory",
    "gender": "input_gender",
}


class _PicturesInHdf5:
    """Row number to the bytes of a picture, from `input_image [N, H, W, 3] uint8` of several files in order."""

    def __init__(self, files: list[Path], lengths: list[int]) -> None:
        self._files, self._lengths = files, lengths
        self._open: list[Any] = []
        self._process: int | None = None

    def __call__(self, row: int) -> bytes:
        if self._process != os.getpid():  # an HDF5 file that is open must not be shared with a loader's process
            self._open = [_h5py().File(file) for file in self._files]
            self._process = os.getpid()
        for file, length in zip(self._open, self._lengths, strict=True):
            if row < length:
                stream = io.BytesIO()
                Image.fromarray(file["input_image"][row]).save(stream, "BMP")
                return stream.getvalue()
            row -= length
        raise IndexError("row is past the last picture")


def read_glami_1m(folder: str) -> Rows:
    """`GLAMI-1M-train.csv`, `GLAMI-1M-test.csv` and `images/IMAGE_ID.jpg`.

    Columns: those of the CSV, image, text (name and description) and split; the task is `category_name`, and `geo` is
    the country, which is the language.
    """
    root = _root(folder, _GLAMI["train"])
    files, lengths, parts = [], [], []
    for split, name in _GLAMI.items():
        path = _needed(root / name)
        table = read_files([path]).table
        missing = {"image_id", "name", "description", "category_name", "geo", "item_id"} - set(table.column_names)
        if missing:
            raise InputError(f"{path}: no column '{sorted(missing)[0]}'; columns: {listed(table.column_names)}")
        columns = table.select(["image_id", "name", "description"]).to_pydict()
        texts = [
            " ".join(filter(None, pair)) or None for pair in zip(columns["name"], columns["description"], strict=True)
        ]
        parts.append(
            table.append_column("image", pa.array([f"images/{image}.jpg" for image in columns["image_id"]]))
            .append_column("text", pa.array(texts, pa.string()))
            .append_column("split", pa.array([split] * len(table)))
        )
        files.append(path)
        lengths.append(len(table))
    used = Columns("image", "text", ("category_name",), ("item_id", "geo"), "split")
    return Rows(pa.concat_tables(parts, promote_options="default"), files, lengths, used)


READERS: dict[str, Callable[[str], Rows]] = {
    "upmc-food101": read_upmc_food101,
    "fashion-gen": read_fashion_gen,
    "glami-1m": read_glami_1m,
}


def _root(folder: str, holds: str) -> Path:
    """The folder itself, or its only sub-folder that holds what is looked for, as archives unpack."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"{folder}: no such folder; name the one that the data set was unpacked in")
    inside = [entry for entry in sorted(root.iterdir()) if (entry / holds).exists()]
    return inside[0] if len(inside) == 1 and not (root / holds).exists() else root


def _table(rows: dict[str, list[Any]]) -> pa.Table:
    return pa.table({name: pa.array(values, pa.string()) for name, values in rows.items()})


def _needed(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"{path}: is missing; name the folder that the whole data set was unpacked in")
    return path


def _lines(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        yield from csv.reader(file)


def _h5py() -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError as error:
        raise InputError("fashion-gen: h5py is needed; install cmaclip_fast[readers]") from error


def _decoded(value: Any) -> str | None:
    text = value.decode(_ENCODING) if isinstance(value, bytes) else str(value)
    return text.strip() or None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

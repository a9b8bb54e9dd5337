"""A table of image-text pairs: any file or folder in, texts, pictures, labels and keys out."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL.Image import Image as Picture

from cmaclip_fast.data import public
from cmaclip_fast.data.emoji import read_emoji
from cmaclip_fast.data.files import SPLITS, Rows, list_files, near, read_files, read_folder
from cmaclip_fast.data.images import MAX_IMAGE_PIXELS, ImageProblem, read_image, verify_image
from cmaclip_fast.data.named import NAMED, Columns, named
from cmaclip_fast.errors import InputError


@dataclass(frozen=True)
class _Source:
    """What the views of one table share: the rows as read, and where each came from."""

    dataset: datasets.Dataset
    columns: Columns
    name: str
    files: tuple[Path, ...]
    first_rows: tuple[int, ...]
    image_dir: Path | None
    max_image_pixels: int
    picture: Callable[[int], bytes] | None
    values: dict[str, list[Any]]

    def column(self, name: str) -> list[Any]:
        if name not in self.values:
            self.values[name] = self.dataset.data.column(name).to_pylist()
        return self.values[name]


class Table:
    """Rows of text, picture, labels and keys; pictures stay undecoded until asked for.

    Made by `read_table`. Rows are counted from 0 here and from 1, within their file, in messages.
    """

    def __init__(self, source: _Source, rows: np.ndarray, masked: frozenset[int] = frozenset()) -> None:
        self._source = source
        self._rows = rows
        self._masked = masked

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def name(self) -> str:
        """The file, folder, pattern or data set that was read."""
        return self._source.name

    @property
    def image_dir(self) -> Path | None:
        """The folder that paths of pictures start from, where it is not the table's."""
        return self._source.image_dir

    @property
    def columns(self) -> Columns:
        return self._source.columns

    @property
    def column_names(self) -> list[str]:
        """Every column of the source, used or not."""
        return list(self._source.dataset.column_names)

    def select(self, indices: Sequence[int] | np.ndarray) -> Table:
        """The rows `indices`, in that order."""
        return Table(self._source, self._rows[np.asarray(indices, dtype=np.int64)], self._masked)

    def mask_images(self, indices: Sequence[int]) -> Table:
        """The same rows, with the pictures of `indices` taken for absent."""
        return Table(self._source, self._rows, self._masked | {int(self._rows[i]) for i in indices})

    def text(self, index: int) -> str | None:
        """The text of a row, or None where it is absent or blank."""
        if self.columns.text is None:
            return None
        value = _scalar(self._source.column(self.columns.text)[self._rows[index]])
        return None if value is None or not value.strip() else value

    def texts(self) -> list[str | None]:
        """The text of every row."""
        return [self.text(index) for index in range(len(self))]

    def image(self, index: int, background: str = "white") -> Picture | None:
        """The picture of a row as RGB, on `background` where it is transparent, or None where it is absent.

        Raises:
            InputError: the picture is missing, unreadable, truncated or over `max_image_pixels`.
        """
        source = self._image_source(index)
        if source is None:
            return None
        try:
            self._check_inside(index, source)
            return read_image(source, self._source.max_image_pixels, background)
        except ImageProblem as problem:
            raise InputError(self.describe_image_problem(index, problem)) from problem

    def has_image(self, index: int) -> bool:
        """Whether the row names a picture; the picture is not read."""
        if self._source.picture is not None:
            return int(self._rows[index]) not in self._masked
        return self._image_source(index) is not None

    def image_problem(self, index: int) -> ImageProblem | None:
        """What is wrong with the picture of a row, found by reading it to its end; None where nothing is."""
        source = self._image_source(index)
        if source is None:
            return None
        try:
            self._check_inside(index, source)
            verify_image(source, self._source.max_image_pixels)
        except ImageProblem as problem:
            return problem
        return None

    def describe_image_problem(self, index: int, problem: ImageProblem) -> str:
        """One line for an `InputError`: file, row, column, picture, cause, remedy."""
        value = self._image_value(index)
        path = value.get("path") if isinstance(value, dict) else value
        picture = f"picture '{path}'" if isinstance(path, str) and path else "the picture"
        return f"{self.where(index)}, column '{self.columns.image}': {picture} {problem}"

    def labels(self, task: str) -> list[str | None]:
        """The class name of every row, None where it is unlabelled; numbers are written as text."""
        if task not in self.column_names:
            raise InputError(self._missing(task, "task"))
        feature = self._source.dataset.features[task]
        values = self._source.column(task)
        chosen = [values[row] for row in self._rows]
        if isinstance(feature, datasets.ClassLabel):
            return [None if value is None or value < 0 else feature.names[value] for value in chosen]
        return [_label(value) for value in chosen]

    def keys(self, index: int) -> dict[str, Any]:
        """The values of the key columns of a row."""
        return {name: self._source.column(name)[self._rows[index]] for name in self.columns.keys}

    def splits(self, column: str | None = None) -> list[str | None]:
        """The value of the split column (or `column`) for every row, as it stands."""
        name = column or self.columns.split
        if name is None or name not in self.column_names:
            raise InputError(self._missing(name or "split", "split_column"))
        values = self._source.column(name)
        return [_label(values[row]) for row in self._rows]

    def row_number(self, index: int) -> int:
        """The row in its file, counted from 1, the row of column names not counted."""
        row = int(self._rows[index])
        return row - self._source.first_rows[self._file(row)] + 1

    def where(self, index: int) -> str:
        """`file, row N`, as messages give it."""
        return f"{self._source.files[self._file(int(self._rows[index]))]}, row {self.row_number(index)}"

    def _file(self, row: int) -> int:
        return bisect.bisect_right(self._source.first_rows, row) - 1

    def _image_value(self, index: int) -> Any:
        column = self.columns.image
        return None if column is None else self._source.dataset.data.column(column)[int(self._rows[index])].as_py()

    def _image_source(self, index: int) -> bytes | Path | None:
        row = int(self._rows[index])
        if row in self._masked:
            return None
        if self._source.picture is not None:
            return self._source.picture(row)
        value = self._image_value(index)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value.strip():
            return self._folder(row) / os.path.expanduser(value)
        return value or None

    def _check_inside(self, index: int, source: bytes | Path) -> None:
        """No relative path leads out of the folder it starts from, and no path out of a folder that was named.

        Raises:
            ImageProblem: this one does.
        """
        folder = self._folder(int(self._rows[index]))
        if isinstance(source, bytes) or Path(os.path.normpath(source)).is_relative_to(os.path.normpath(folder)):
            return
        value = self._image_value(index)
        path = value["path"] if isinstance(value, dict) else value
        if self._source.image_dir is not None or not os.path.isabs(os.path.expanduser(path)):
            raise ImageProblem("unreadable_image", f"leads out of '{folder}'; name the folder above as image_dir")

    def _folder(self, row: int) -> Path:
        if self._source.image_dir is not None:
            return self._source.image_dir
        file = self._source.files[self._file(row)]
        return file if file.is_dir() else file.parent

    def _missing(self, column: str, role: str) -> str:
        names = self.column_names
        return f"{self.name}: no column '{column}' for {role}{near(column, names)}; columns: {', '.join(names)}"


def read_table(
    source: str | os.PathLike[str],
    columns: Columns | None = None,
    *,
    image_dir: str | os.PathLike[str] | None = None,
    split: str | None = None,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    any_columns: bool = False,
) -> Table:
    """Reads a named data set, a CSV, TSV, JSONL or Parquet file, a glob of them, or a folder of pictures.

    A named data set (`emoji:de` names a part of one) and a folder of pictures have columns of their own: their image
    and text are used where `columns` names neither, their tasks, keys and split where it names none. Nothing is
    decoded here; see `check_rows`.

    Args:
        columns: which column holds what. Image and text may be None, but not both for a file.
        image_dir: the folder that paths of pictures start from; by default the folder of the table.
        split: keep only the rows of this split.
        max_image_pixels: pictures of more pixels than this are refused, by their header.
        any_columns: allow neither image nor text, to look at what columns there are.

    Raises:
        InputError: the source is missing, empty, malformed or of another format, or lacks a column.
    """
    name = os.fspath(source)
    directory = Path(image_dir).expanduser() if image_dir is not None else None
    if directory is not None and not directory.is_dir():
        raise InputError(
            f"{directory}: image_dir is not a folder; name the folder that the paths of '{name}' start from"
        )
    read = _read(name)
    dataset = read.dataset
    first_rows = tuple(itertools.accumulate(read.lengths[:-1], initial=0))
    dataset, filled = _add_levels(name, dataset, _fill(columns or Columns(), read.columns, dataset))
    table = Table(
        _Source(dataset, filled, name, tuple(read.files), first_rows, directory, max_image_pixels, read.picture, {}),
        np.arange(len(dataset)),
    )
    _check_columns(table, dataset, any_columns)
    return table if split is None else _keep_split(table, split)


def _read(name: str) -> Rows:
    found = named(name)
    if found is not None:
        return _READERS[found[0]](found[1])
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        dataset = read_folder(folder)
        has = set(dataset.column_names)
        own = Columns("image", "text" if "text" in has else None, ("label",) if "label" in has else (), ("image",))
        return Rows(dataset, [folder], [len(dataset)], own)
    files = list_files(name)
    dataset, lengths = read_files(files)
    return Rows(dataset, files, lengths)


def _openclipart(argument: str) -> Rows:
    if argument:
        raise InputError(f"openclipart:{argument}: this data set has no parts: name it 'openclipart'")
    files = [NAMED["openclipart"].path]
    dataset, lengths = read_files(files)
    return Rows(dataset, files, lengths, NAMED["openclipart"].columns)


_READERS: dict[str, Callable[[str], Rows]] = {"openclipart": _openclipart, "emoji": read_emoji, **public.READERS}


def _fill(given: Columns, own: Columns, dataset: datasets.Dataset) -> Columns:
    if given.image is None and given.text is None:
        given = replace(given, image=own.image, text=own.text)
    split = given.split or own.split or ("split" if "split" in dataset.column_names else None)
    tasks = given.tasks or (() if given.taxonomies else own.tasks)
    return replace(given, tasks=tasks, keys=given.keys or own.keys, split=split)


def _add_levels(name: str, dataset: datasets.Dataset, columns: Columns) -> tuple[datasets.Dataset, Columns]:
    """A column and a task for each level of each taxonomy."""
    tasks = list(columns.tasks)
    taxonomies = []
    for taxonomy in columns.taxonomies:
        if taxonomy.column not in dataset.column_names:
            names = dataset.column_names
            raise InputError(
                f"{name}: no column '{taxonomy.column}' for a taxonomy{near(taxonomy.column, names)}; "
                f"columns: {', '.join(names)}"
            )
        paths = [_label(value) for value in dataset.data.column(taxonomy.column).to_pylist()]
        deepest = max((len(taxonomy.names(path)) for path in paths if path is not None), default=0)
        for level in range(1, (taxonomy.levels or max(deepest, 1)) + 1):
            task = taxonomy.task(level)
            if task in dataset.column_names:
                raise InputError(f"{name}: column '{task}' has the name of a level of '{taxonomy.column}'; rename it")
            dataset = dataset.add_column(task, [path and taxonomy.upto(path, level) for path in paths])
            tasks.append(task)
        taxonomies.append(replace(taxonomy, levels=len(taxonomy.levels_in(tasks))))
    return dataset, replace(columns, tasks=tuple(tasks), taxonomies=tuple(taxonomies))


def _check_columns(table: Table, dataset: datasets.Dataset, any_columns: bool) -> None:
    columns, names = table.columns, table.column_names
    if columns.image is None and columns.text is None and not any_columns:
        raise InputError(f"{table.name}: name the column of pictures, of text, or both; columns: {', '.join(names)}")
    roles = [(columns.image, "image"), (columns.text, "text"), (columns.split, "split")]
    roles += [(task, "task") for task in columns.tasks] + [(key, "key") for key in columns.keys]
    for column, role in roles:
        if column is not None and column not in names:
            raise InputError(table._missing(column, role))
    repeated = sorted({task for task in columns.tasks if columns.tasks.count(task) > 1})
    if repeated:
        raise InputError(f"{table.name}: task '{repeated[0]}' is named twice; name each task once")
    for column in filter(None, (columns.text, columns.split, *columns.tasks)):
        kind = dataset.features.arrow_schema.field(column).type
        if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            raise InputError(f"{table.name}: column '{column}' holds {kind}, not text or classes; name another")
    if columns.image is not None:
        kind = dataset.features.arrow_schema.field(columns.image).type
        if not _holds_pictures(kind):
            raise InputError(f"{table.name}: column '{columns.image}' holds {kind}, not paths or bytes of pictures")


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool({field.name for field in kind} & {"bytes", "path"})
    tests = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_null,
    )
    return any(test(kind) for test in tests)


def _keep_split(table: Table, split: str) -> Table:
    wanted = SPLITS.get(split.lower(), split)
    values = table.splits()
    rows = [i for i, value in enumerate(values) if value is not None and SPLITS.get(value.lower(), value) == wanted]
    if not rows:
        there = sorted({value for value in values if value is not None})
        raise InputError(
            f"{table.name}, column '{table.columns.split}': no row of split '{split}'{near(split, there)}; "
            f"splits: {', '.join(there)}"
        )
    return table.select(rows)


def _scalar(value: Any) -> str | None:
    if value is None or value != value:  # NaN is the one value that differs from itself
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _label(value: Any) -> str | None:
    text = (_scalar(value) or "").strip()
    return None if text in ("", "nan", "NaN") else text

"""A table of image-text pairs: any file or folder in, texts, pictures, labels and keys out."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL.Image import Image as Picture

from cmaclip_fast.data import public
from cmaclip_fast.data.derived import add_applicability, add_levels, check_kind
from cmaclip_fast.data.emoji import read_emoji
from cmaclip_fast.data.files import SPLITS, Rows, list_files, near, read_files, read_folder
from cmaclip_fast.data.images import MAX_IMAGE_PIXELS, ImageProblem, read_image, verify_image
from cmaclip_fast.data.labels import ClassLists, Fault, check_na_value, check_separator, class_lists, fault_of_mixed
from cmaclip_fast.data.labels import label as _label
from cmaclip_fast.data.named import NAMED, Columns, named
from cmaclip_fast.data.values import class_feature, column_texts, is_bytes, is_text, python_value, storage
from cmaclip_fast.errors import InputError, clipped, listed


@dataclass(frozen=True)
class _Source:
    """What the views of one table share: the rows as read, and where each came from."""

    read: Rows
    table: pa.Table
    columns: Columns
    name: str
    first_rows: tuple[int, ...]
    image_dir: Path | None
    max_image_pixels: int
    values: dict[str, list[str | None]] = field(default_factory=dict)
    lists: dict[str, ClassLists] = field(default_factory=dict)

    def file(self, row: int) -> int:
        """The number of the file that a row came from."""
        return bisect.bisect_right(self.first_rows, row) - 1

    def where(self, row: int) -> str:
        number = self.file(row)
        return f"{self.read.files[number]}, row {row - self.first_rows[number] + 1}"

    def fault(self, column: str) -> Fault:
        """What makes the errors of a column."""
        return lambda row, said: InputError(
            f"{self.name if row is None else self.where(row)}, column '{clipped(column)}': {said}"
        )

    def class_lists(self, name: str) -> ClassLists:
        """The classes of each row of a multi-label column; none where it does not apply, None where unlabelled."""
        if name not in self.lists:
            column, columns, fault = self.table.column(name), self.columns, self.fault(name)
            if name in self.read.mixed and pa.types.is_nested(column.type):
                raise fault_of_mixed(column, self.read.mixed[name], fault)
            self.lists[name] = class_lists(column, columns.label_separator, columns.na_value, fault)
        return self.lists[name]

    def texts(self, name: str) -> list[str | None]:
        """A column as text, null and NaN as None."""
        if name not in self.values:
            column = self.table.column(name)
            names = class_feature(self.table.schema, name)
            if names is not None and pa.types.is_integer(column.type):
                known = dict(enumerate(names))
                # -1 is how `datasets` writes that there is no class
                self.values[name] = [
                    None if number is None or number < 0 else known.get(number, str(number))
                    for number in column.to_pylist()
                ]
            else:
                self.values[name] = column_texts(column)
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
    def max_image_pixels(self) -> int:
        """Pictures of more pixels are refused."""
        return self._source.max_image_pixels

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that were read, or the folder."""
        return tuple(self._source.read.files)

    @property
    def columns(self) -> Columns:
        return self._source.columns

    @property
    def column_names(self) -> list[str]:
        """Every column of the source, used or not."""
        return list(self._source.table.column_names)

    def with_columns(self, columns: Columns, split: str | None = None) -> Table:
        """All rows that were read, or those of a split, with other columns in use; nothing is read again.

        Raises:
            InputError: as `read_table`.
        """
        source = self._source
        table = _use(source.read, source.name, columns, source.image_dir, source.max_image_pixels)
        return table if split is None else _keep_split(table, split)

    def select(self, indices: Sequence[int] | np.ndarray) -> Table:
        """The rows `indices`, in that order."""
        return Table(self._source, self._rows[np.asarray(indices, dtype=np.int64)], self._masked)

    def mask_images(self, indices: Sequence[int]) -> Table:
        """The same rows, with the pictures of `indices` treated as missing."""
        return Table(self._source, self._rows, self._masked | {int(self._rows[i]) for i in indices})

    def text(self, index: int) -> str | None:
        """The text of a row, or None where it is absent or blank."""
        if self.columns.text is None:
            return None
        value = self._source.texts(self.columns.text)[self._rows[index]]
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
        if self._source.read.picture is not None:
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
        picture = f"picture '{clipped(path)}'" if isinstance(path, str) and path else "the picture"
        return f"{self.where(index)}, column '{self.columns.image}': {picture} {problem}"

    def labels(self, task: str) -> list[str | None]:
        """The class name of every row, None where it is unlabelled; numbers are written as text.

        Where a task does not apply to a row, the row is unlabelled.
        """
        if task not in self.column_names:
            raise InputError(self._missing(task, "task"))
        values = self._source.texts(task)
        found = [_label(values[row]) for row in self._rows]
        na_value = self.columns.na_value
        if na_value is None or task not in self.columns.tasks:
            return found
        return [None if label == na_value else label for label in found]

    def label_lists(self, task: str) -> list[list[str] | None]:
        """The class names of every row of a multi-label task, None where it is unlabelled or the task does not apply.

        Raises:
            InputError: a cell that is no list of classes.
        """
        lists = self._source.class_lists(task)
        return [lists[row] or None for row in self._rows]

    def key_columns(self) -> pa.Table:
        """The key columns, with the types that they were read with; a row for each row."""
        names = list(dict.fromkeys(self.columns.keys))
        chosen = self._source.table.select(names).take(pa.array(self._rows))
        return pa.table(dict(zip(names, chosen.columns, strict=True)))  # without what the file notes of its columns

    def keys(self, index: int) -> dict[str, Any]:
        """The values of the key columns of a row."""
        row = int(self._rows[index])
        return {name: python_value(self._source.table.column(name)[row]) for name in self.columns.keys}

    def splits(self, column: str | None = None) -> list[str | None]:
        """The value of the split column (or `column`) for every row, unchanged."""
        name = column or self.columns.split
        if name is None or name not in self.column_names:
            raise InputError(self._missing(name or "split", "split_column"))
        values = self._source.texts(name)
        return [_label(values[row]) for row in self._rows]

    def row_number(self, index: int) -> int:
        """The row in its file, counted from 1, the row of column names not counted."""
        row = int(self._rows[index])
        return row - self._source.first_rows[self._source.file(row)] + 1

    def picture_states(self, start: int, stop: int, with_files: bool = True) -> Iterator[Any]:
        """What changes when the picture of a row does: its bytes, or its path with size and time of its file."""
        rows = self._rows[start:stop]
        if self._source.read.picture is not None:
            yield from (
                (int(row), *_file_state(self._source.read.files[self._source.file(row)], with_files)) for row in rows
            )
            return
        if self.columns.image is None:
            return
        folders: dict[int, str] = {}
        values = self._source.table.column(self.columns.image).take(pa.array(rows)).to_pylist()
        for row, value in zip(rows.tolist(), values, strict=True):
            if isinstance(value, dict):
                value = value.get("bytes") or value.get("path")
            if row in self._masked:
                yield None
            elif isinstance(value, str) and value.strip():
                file = self._source.file(row)
                if file not in folders:
                    folders[file] = str(self._folder(row))
                yield value, *_file_state(os.path.join(folders[file], os.path.expanduser(value)), with_files)
            else:
                yield value or None

    def where(self, index: int) -> str:
        """`file, row N`, as messages give it."""
        return self._source.where(int(self._rows[index]))

    def _image_value(self, index: int) -> Any:
        column = self.columns.image
        return None if column is None else self._source.table.column(column)[int(self._rows[index])].as_py()

    def _image_source(self, index: int) -> bytes | Path | None:
        row = int(self._rows[index])
        if row in self._masked:
            return None
        if self._source.read.picture is not None:
            return self._source.read.picture(row)
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
        file = self._source.read.files[self._source.file(row)]
        return file if file.is_dir() else file.parent

    def _missing(self, column: str, role: str) -> str:
        names = self.column_names
        return f"{self.name}: no column '{clipped(column)}' for {role}{near(column, names)}; columns: {listed(names)}"


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
    table = _use(_read(name), name, columns or Columns(), directory, max_image_pixels, any_columns)
    return table if split is None else _keep_split(table, split)


def _use(
    read: Rows, name: str, columns: Columns, image_dir: Path | None, max_image_pixels: int, any_columns: bool = False
) -> Table:
    first_rows = tuple(itertools.accumulate(read.lengths[:-1], initial=0))
    rows, filled = add_levels(name, read.table, _fill(columns, read.columns, read.table.column_names))
    table = Table(_Source(read, rows, filled, name, first_rows, image_dir, max_image_pixels), np.arange(len(rows)))
    _check_columns(table, rows.schema, any_columns)
    return _add_applicability(table)


def _read(name: str) -> Rows:
    found = named(name)
    if found is not None:
        return _READERS[found[0]](found[1])
    if Path(name).expanduser().is_dir():
        return read_folder(Path(name).expanduser())
    return read_files(list_files(name))


def _whole(name: str, argument: str) -> Rows:
    """The rows of a named data set that is one file and has no parts."""
    if argument:
        raise InputError(f"{name}:{argument}: this data set has no parts: name it '{name}'")
    path = NAMED[name].path
    if not path.is_file():
        raise InputError(f"{path}: the data set '{name}' is not there yet: run `cmaclip data build {name}`")
    return replace(read_files([path]), columns=NAMED[name].columns)


_READERS: dict[str, Callable[[str], Rows]] = {
    "openclipart": partial(_whole, "openclipart"),
    "pairs": partial(_whole, "pairs"),
    "emoji": read_emoji,
    **public.READERS,
}


def _fill(given: Columns, own: Columns, names: list[str]) -> Columns:
    if given.image is None and given.text is None:
        given = replace(given, image=own.image, text=own.text)
    split = given.split or own.split or ("split" if "split" in names else None)
    tasks = given.tasks or (() if given.taxonomies or given.multi_label else own.tasks)
    return replace(given, tasks=tasks, keys=given.keys or own.keys, split=split)


def _add_applicability(table: Table) -> Table:
    """The table with the tasks of `add_applicability`, after a look at what is named for the first time."""
    source, columns = table._source, table.columns
    several = {name: source.table.column(name) for name in columns.multi_label}
    labels: dict[str, Sequence[str | None] | ClassLists] = {name: source.class_lists(name) for name in several}
    if columns.na_value is not None:
        own = [task for task in columns.tasks if task in source.read.table.column_names and task not in several]
        labels |= {task: [_label(value) for value in source.texts(task)] for task in own}
        # of a taxonomy the first level, which the others follow
        labels |= {t.task(1): [_label(value) for value in source.texts(t.column)] for t in columns.taxonomies}
    if columns.applies is None:
        if columns.label_separator is not None:
            for name, column in several.items():
                check_separator(column, columns.label_separator, source.fault(name))
        if columns.na_value is not None:
            check_na_value(table.name, labels, several, columns.na_value)
    filled, columns = add_applicability(table.name, source.table, columns, labels)
    return Table(replace(source, table=filled, columns=columns), table._rows)


def _check_columns(table: Table, schema: pa.Schema, any_columns: bool) -> None:
    columns, names = table.columns, table.column_names
    if columns.image is None and columns.text is None and not any_columns:
        raise InputError(f"{table.name}: name the column of pictures, of text, or both; columns: {listed(names)}")
    roles = [(columns.image, "image"), (columns.text, "text"), (columns.split, "split")]
    roles += [(task, "task") for task in columns.tasks] + [(key, "key") for key in columns.keys]
    for column, role in roles:
        if column is not None and column not in names:
            raise InputError(table._missing(column, role))
    repeated = sorted({task for task in columns.tasks if columns.tasks.count(task) > 1})
    if repeated:
        raise InputError(f"{table.name}: task '{repeated[0]}' is named twice; name each task once")
    one_label = [task for task in columns.tasks if task not in columns.multi_label]
    for column in filter(None, (columns.text, columns.split, *one_label)):
        check_kind(table.name, schema, column)
    for column in columns.keys:
        if pa.types.is_nested(storage(schema.field(column).type)):
            raise InputError(f"{table.name}: key column '{column}' holds {schema.field(column).type}; name another")
        if column in table._source.read.mixed:
            held = table._source.read.mixed[column]
            raise InputError(f"{table.name}: key column '{column}' holds {held}; write all of it as text, in quotes")
    if columns.image is not None and not _holds_pictures(storage(schema.field(columns.image).type)):
        kind = schema.field(columns.image).type
        raise InputError(f"{table.name}: column '{columns.image}' holds {kind}, not paths or bytes of pictures")


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return bool({field.name for field in kind} & {"bytes", "path"})
    return is_text(kind) or is_bytes(kind) or pa.types.is_null(kind)


def _keep_split(table: Table, split: str) -> Table:
    wanted = SPLITS.get(split.lower(), split)
    values = table.splits()
    rows = [i for i, value in enumerate(values) if value is not None and SPLITS.get(value.lower(), value) == wanted]
    if not rows:
        there = sorted({value for value in values if value is not None})
        raise InputError(
            f"{table.name}, column '{table.columns.split}': no row of split '{split}'{near(split, there)}; "
            f"splits: {listed(there)}"
        )
    return table.select(rows)


def _file_state(path: str | Path, wanted: bool) -> tuple[int, int] | tuple[()]:
    """Size and modification time in ns; nothing where there is no such file, or it is not wanted."""
    if not wanted:
        return ()
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return status.st_size, status.st_mtime_ns

"""Files and folders read into one Arrow table, without the network and without writing beside them."""

from __future__ import annotations

import csv
import difflib
import errno
import glob
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cmaclip_fast.data.images import image_suffixes
from cmaclip_fast.data.named import NAMED, PUBLIC, Columns
from cmaclip_fast.data.values import as_text, is_text
from cmaclip_fast.errors import InputError, clipped

IN_MEMORY = 2 * 1024**3
"""Parquet files of more bytes than this in all are kept in a temporary file, not in memory."""

_ROWS_AT_ONCE = 65_536

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
}

SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
"""The values that a split column may hold (in any case), and the split each names."""


@dataclass(frozen=True)
class Rows:
    """The rows read from a source.

    Attributes:
        table: all rows.
        files, lengths: where they came from, in order, and the number of rows of each.
        columns: what a source that knows its columns uses them for.
        picture: gives the bytes of a row's picture, where they are in no column.
        mixed: for each column that was made text of values of several types, what it held.
    """

    table: pa.Table
    files: list[Path]
    lengths: list[int]
    columns: Columns = field(default_factory=Columns)
    picture: Callable[[int], bytes] | None = None
    mixed: dict[str, str] = field(default_factory=dict)


_MOST_NEAR = 100  # characters: the search takes the product of the two lengths


def near(name: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` where an option is close to `name`, else an empty string."""
    if len(name) > _MOST_NEAR:
        return ""
    folded = {option.lower(): option for option in options if len(option) <= _MOST_NEAR}
    found = difflib.get_close_matches(name.lower(), folded, n=1)
    return f" (did you mean '{folded[found[0]]}'?)" if found else ""


def list_files(source: str) -> list[Path]:
    """The table files that a path or a glob names, sorted.

    Raises:
        InputError: nothing is there, or a file has a format that is not read.
    """
    path = Path(source).expanduser()
    if "://" in source:
        raise InputError(f"{source}: addresses are not read; download the file and name its path")
    if path.is_file():
        files = [path]
    elif glob.has_magic(source):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if os.path.isfile(found))
        if not files:
            raise InputError(f"{source}: no file matches this pattern; check it, and quote it for the shell")
    else:
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = near(path.name, there) or near(source, NAMED)
        if source in PUBLIC:
            raise InputError(f"{source}: say where it is, as '{source}:FOLDER'")
        raise InputError(f"{source}: no such file, folder or data set{hint}; data sets: {', '.join(NAMED)}")
    for file in files:
        if file.suffix.lower() not in FORMATS:
            raise InputError(f"{file}: format '{file.suffix}' is not read; convert it to CSV, TSV, JSONL or Parquet")
    return files


def read_files(files: list[Path]) -> Rows:
    """All rows of `files`, in order. They are read anew each time, and nothing is kept between runs.

    Raises:
        InputError: a file is empty, malformed, or its columns have other types than those of the file before.
    """
    on_disk = sum(_parquet_bytes(file) for file in files) > IN_MEMORY
    tables: list[pa.Table] = []
    mixed: dict[str, str] = {}
    for file in files:
        table, found = _read_file(file, on_disk)
        tables.append(table)
        mixed |= found
    try:
        joined = tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        names = f"{files[0]} ... {files[-1]}"
        raise InputError(
            f"{names}: the files do not fit together ({_cause(error)}); give them the same columns"
        ) from error
    return Rows(joined, files, [len(table) for table in tables], mixed=mixed)


def read_folder(folder: Path) -> Rows:
    """The pictures under `folder`: columns `image` (path from the folder), `label`, `split`, and those of metadata.

    `label` is the name of the sub-folder that holds the picture; `split` is there when the folder's own sub-folders
    are all named after splits. `metadata.csv` or `metadata.jsonl` in any folder adds columns to the pictures that its
    column `file_name` names, by their path from that folder.

    Raises:
        InputError: no picture is there, or a metadata file names a picture that is not.
    """
    known = image_suffixes()
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file())
    if not pictures:
        tables = sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS)
        hint = f"to read its tables name '{folder}/*{tables[0].suffix}'" if tables else "name a folder of pictures"
        raise InputError(f"{folder}: holds no pictures; {hint}")
    rows: dict[Path, dict[str, Any]] = {p: {"image": str(p.relative_to(folder))} for p in pictures}
    tops = {p.relative_to(folder).parts[0] for p in pictures}
    is_split = all(top.lower() in SPLITS for top in tops)
    for picture, row in rows.items():
        classes = picture.relative_to(folder).parent.parts[1 if is_split else 0 :]
        row["label"] = classes[-1] if classes else None
        if is_split:
            row["split"] = picture.relative_to(folder).parts[0]
    for metadata in sorted([*folder.rglob("metadata.csv"), *folder.rglob("metadata.jsonl")]):
        _add_metadata(rows, metadata)
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    columns = {name: [row.get(name) for row in rows.values()] for name in names}
    if not any(columns["label"]):
        del columns["label"]
    read = {name: _json_array(values, folder, name) for name, values in columns.items()}
    mixed = {name: held for name, (_, held) in read.items() if held is not None}
    own = Columns("image", "text" if "text" in read else None, ("label",) if "label" in read else (), ("image",))
    table = pa.table({name: array for name, (array, _) in read.items()})
    return Rows(table, [folder], [len(table)], own, mixed=mixed)


def _add_metadata(rows: dict[Path, dict[str, Any]], metadata: Path) -> None:
    table, _ = _read_file(metadata)
    if "file_name" not in table.column_names:
        raise InputError(f"{metadata}: has no column 'file_name'; add it, with each picture's path from this folder")
    for number, row in enumerate(table.to_pylist(), start=1):
        name = row.pop("file_name")
        picture = metadata.parent / str(name)
        if picture not in rows:
            raise InputError(
                f"{metadata}, row {number}, column 'file_name': picture '{clipped(str(name))}' does not exist; fix it"
            )
        rows[picture].update({column: value for column, value in row.items() if column != "image"})


def _read_file(file: Path, on_disk: bool = False) -> tuple[pa.Table, dict[str, str]]:
    """A table, and for each of its columns that was made text of values of several types what it held."""
    kind = FORMATS[file.suffix.lower()]
    mixed: dict[str, str] = {}
    try:
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty; give a table with a row of column names and rows of data")
        if kind == "parquet":
            table = _read_parquet(file, on_disk)
        elif kind == "json":
            table, mixed = _read_json(file)
        else:
            table = _read_csv(file, "\t" if kind == "tsv" else ",")
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            folder = tempfile.gettempdir()
            raise InputError(f"{file}: the disk is full at '{folder}'; free space or set TMPDIR") from error
        raise InputError(f"{file}: cannot be read as {kind.upper()} ({_cause(error)}); fix the file") from error
    _check_names(file, table.column_names)
    if len(table) == 0:
        raise InputError(f"{file}: the table has no rows; give at least one")
    return table, mixed


def _check_names(file: Path, names: list[str]) -> None:
    name, times = max(Counter(names).items(), key=lambda item: item[1], default=("", 1))
    if times > 1:
        raise InputError(f"{file}: column '{clipped(name)}' is there {times} times; rename one")
    if not all(map(_is_unicode, names)):
        raise InputError(f"{file}: the name of a column is not UTF-8; save it as UTF-8")


def _parquet_bytes(file: Path) -> int:
    """The bytes of a Parquet file's values once they are decompressed; 0 of any other file, or one that is damaged."""
    if FORMATS[file.suffix.lower()] != "parquet":
        return 0
    try:
        metadata = pq.read_metadata(file)
    except (OSError, pa.ArrowException):
        return 0
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


def _read_parquet(file: Path, on_disk: bool) -> pa.Table:
    with pq.ParquetFile(file) as parquet:
        table = _mapped(parquet) if on_disk else parquet.read()
    for number, (name, kind) in enumerate(zip(table.column_names, table.schema.types, strict=True)):
        column = table.column(number)
        if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):  # Arrow cannot take rows of these
            column = column.cast(pa.large_string() if pa.types.is_string_view(kind) else pa.large_binary())
            table = table.set_column(number, name, column)
        if is_text(column.type):
            _check_text(file, name, column)
    return table


def _mapped(parquet: pq.ParquetFile) -> pa.Table:
    """The rows in a temporary file, mapped into memory: larger than memory they may be, and gone with the process."""
    with tempfile.TemporaryDirectory(prefix="cmaclip-", ignore_cleanup_errors=True) as folder:
        path = os.path.join(folder, "rows.arrow")
        with pa.ipc.new_stream(path, parquet.schema_arrow) as writer:
            for batch in parquet.iter_batches():
                writer.write_batch(batch)
        return pa.ipc.open_stream(pa.memory_map(path)).read_all()  # the mapping outlives the file's name


def _check_text(file: Path, name: str, column: pa.ChunkedArray) -> None:
    """A Parquet file may hold any bytes as text."""
    row = 0
    for chunk in column.chunks:
        try:
            chunk.validate(full=True)
        except pa.ArrowInvalid:
            for value in chunk:
                row += 1
                try:
                    value.as_py()
                except UnicodeDecodeError:
                    raise _not_unicode(file, row, name) from None
        row += len(chunk)


def _read_csv(file: Path, separator: str) -> pa.Table:
    """Every value as the text it is, so that '01' stays a class of its own and 'NA' stays a title; '' is null."""
    csv.field_size_limit(2**31 - 1)  # the default is 128 KiB
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(_lines(stream, file), delimiter=separator, strict=True)
        try:
            header = next(filter(None, reader), [])
        except csv.Error as error:
            raise InputError(f"{file}: the row of column names cannot be read ({error}); fix the file") from error
        while header and not header[-1].strip():
            header.pop()
        if not header:
            raise InputError(f"{file}: has no column names; write them into the first row")
        header = [name if name.strip() else f"Unnamed: {number}" for number, name in enumerate(header)]
        _check_names(file, header)
        _check_separator(file, header, separator)
        rows = _csv_rows(reader, file, len(header))
        tables: list[pa.Table] = []
        while chunk := list(islice(rows, _ROWS_AT_ONCE)):
            first = len(tables) * _ROWS_AT_ONCE + 1
            columns = ([cell or None for cell in column] for column in zip(*chunk, strict=True))
            arrays = [_text_array(c, file, name, first) for name, c in zip(header, columns, strict=True)]
            tables.append(pa.table(arrays, names=header))
    schema = pa.schema([(name, pa.string()) for name in header])
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _check_separator(file: Path, header: list[str], separator: str) -> None:
    if len(header) > 1:
        return
    found = [other for other in (";", "\t", "|", ",") if other != separator and other in header[0]]
    if found:
        names = {"\t": "tabs", ",": "commas"}
        wanted, remedy = names[separator], {"\t": "name it .tsv", ",": "name it .csv"}.get(found[0], "")
        raise InputError(
            f"{file}: has one column, '{clipped(header[0])}', whose name holds {names.get(found[0], repr(found[0]))}: "
            f"save it with {wanted} between the cells" + (f", or {remedy}" if remedy else "")
        )


def _csv_rows(reader: Iterator[list[str]], file: Path, width: int) -> Iterator[list[str]]:
    """Rows of `width` cells; blank lines are passed over, and so are empty cells past the last column."""
    row = 1
    try:
        for cells in reader:
            while len(cells) > width and not cells[-1].strip():
                cells.pop()
            if not cells or (width > 1 and len(cells) == 1 and not cells[0].strip()):
                continue
            if len(cells) != width:
                raise InputError(
                    f"{file}, row {row}: has {len(cells)} cells, but there are {width} columns; fix the row, and put "
                    "a cell that contains the separator in quotes"
                )
            yield cells
            row += 1
    except csv.Error as error:
        raise InputError(
            f"{file}, row {row}: cannot be read as CSV ({error}); end each quoted cell with a quote, and write a quote "
            "inside it twice"
        ) from error


def _read_json(file: Path) -> tuple[pa.Table, dict[str, str]]:
    """Values of the types that JSON gives them: nothing is taken for a date or a number that is written as text."""
    columns: dict[str, list[Any]] = {}
    rows = 0
    for record in _json_records(file):
        for name, value in record.items():
            values = columns.setdefault(name, [])
            values.extend([None] * (rows - len(values)))
            values.append(value)
        rows += 1
    _check_names(file, list(columns))
    arrays, mixed = [], {}
    for name, values in columns.items():
        values.extend([None] * (rows - len(values)))
        array, held = _json_array(values, file, name)
        arrays.append(array)
        if held is not None:
            mixed[name] = held
    return pa.table(arrays, names=list(columns)), mixed


def _json_records(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one a line, or with one array of them."""
    parse = json.JSONDecoder(object_pairs_hook=_object).decode
    row = 1
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as stream:
        lines = (line for line in _lines(stream, file) if not line.isspace())
        first = next(lines, "")
        try:
            if first.lstrip().startswith("["):
                records: Iterable[Any] = parse(first + "".join(lines))
            else:
                records = map(parse, chain([first] if first else [], lines))
            for record in records:
                if not isinstance(record, dict):
                    raise InputError(
                        f"{file}, row {row}: is {type(record).__name__}, not an object; write one object a line"
                    )
                yield record
                row += 1
        except RecursionError:
            raise InputError(f"{file}, row {row}: is nested too deeply; leave such values out") from None
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{file}, row {row}: cannot be read as JSON ({_cause(error)}); write one object a line, in UTF-8"
            ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' is there twice in one object")
    return record


def _json_array(values: list[Any], file: Path, name: str) -> tuple[pa.Array, str | None]:
    """A column, and what it held where no one type holds it and it was made text."""
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {str}:
        return _text_array(values, file, name, 1), None
    nested = kinds & {list, dict}
    if len(kinds) < 2 or kinds == {int, float} or nested:
        for kind in (None, pa.uint64()) if kinds == {int} else (None,):
            try:
                return pa.array(values, kind), None
            except (ValueError, TypeError, OverflowError, pa.ArrowException):
                continue
    held = "whole numbers beyond 64 bits" if kinds == {int} else " and ".join(sorted(_JSON_KINDS[k] for k in kinds))
    if kinds == {list} and not any(isinstance(item, list | dict) for value in values for item in value or ()):
        texts = [None if value is None else [as_text(item) for item in value] for value in values]
        return pa.array(texts, pa.list_(pa.string())), None
    if nested:  # of several shapes: nothing can use such a column, and its type says so
        lists = [None if value is None else [json.dumps(value)] for value in values]
        return pa.array(lists, pa.list_(pa.string())), held
    return _text_array([as_text(value) for value in values], file, name, 1), held


_JSON_KINDS = {
    str: "text",
    bool: "true or false",
    int: "whole numbers",
    float: "numbers",
    list: "lists",
    dict: "objects",
}


def _lines(stream: Iterable[str], file: Path) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        if "\0" in line:
            raise InputError(f"{file}, line {number}: holds NUL characters, as UTF-16 does; save it as UTF-8")
        yield line


def _text_array(values: list[str | None], file: Path, name: str, first_row: int) -> pa.Array:
    """
    Raises:
        InputError: a text cannot be UTF-8: a byte of the file that is not, or half of a surrogate pair.
    """
    try:
        return pa.array(values, pa.string())
    except UnicodeEncodeError:
        row = next(row for row, value in enumerate(values, first_row) if value and not _is_unicode(value))
        raise _not_unicode(file, row, name) from None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_unicode(file: Path, row: int, column: str) -> InputError:
    return InputError(
        f"{file}, row {row}, column '{column}': is not UTF-8 (bad bytes, or a lone surrogate); save it as UTF-8"
    )


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

"""Files and folders read into one Hugging Face `Dataset`, without the network and without writing beside them."""

from __future__ import annotations

import atexit
import csv
import difflib
import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from cmaclip_fast.data.images import image_suffixes
from cmaclip_fast.data.named import NAMED, PUBLIC, Columns
from cmaclip_fast.errors import InputError

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
    """What a source was read into.

    Attributes:
        dataset: all rows.
        files, lengths: where they came from, in order, and the number of rows of each.
        columns: what a source that knows its columns uses them for.
        picture: gives the bytes of a row's picture, where they are in no column.
    """

    dataset: datasets.Dataset
    files: list[Path]
    lengths: list[int]
    columns: Columns = field(default_factory=Columns)
    picture: Callable[[int], bytes] | None = None


def near(name: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` where an option is close to `name`, else an empty string."""
    folded = {option.lower(): option for option in options}
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


def read_files(files: list[Path]) -> tuple[datasets.Dataset, list[int]]:
    """All rows of `files`, in order, and the number of rows of each file.

    Raises:
        InputError: a file is empty, malformed, or its columns have other types than those of the file before.
    """
    tables = [_read_file(file) for file in files]
    with _quiet():
        try:
            joined = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
        except (ValueError, TypeError) as error:
            names = f"{files[0]} ... {files[-1]}"
            raise InputError(
                f"{names}: the files do not fit together ({_cause(error)}); give them the same columns"
            ) from error
    return joined, [len(table) for table in tables]


def read_folder(folder: Path) -> datasets.Dataset:
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
    return datasets.Dataset.from_dict(columns)


def _add_metadata(rows: dict[Path, dict[str, Any]], metadata: Path) -> None:
    table = _read_file(metadata)
    if "file_name" not in table.column_names:
        raise InputError(f"{metadata}: has no column 'file_name'; add it, with each picture's path from this folder")
    for number, row in enumerate(table, start=1):
        name = row.pop("file_name")
        picture = metadata.parent / str(name)
        if picture not in rows:
            raise InputError(f"{metadata}, row {number}, column 'file_name': picture '{name}' does not exist; mend it")
        rows[picture].update({column: value for column, value in row.items() if column != "image"})


def _read_file(file: Path) -> datasets.Dataset:
    if file.stat().st_size == 0:
        raise InputError(f"{file}: the file is empty; give a table with a row of column names and rows of data")
    kind = FORMATS[file.suffix.lower()]
    name = glob.escape(str(file.absolute()))  # `datasets` takes a path for a pattern
    try:
        with _quiet():
            if kind == "parquet":
                _with_rows(range(pq.read_metadata(file).num_rows), file)  # `datasets` stumbles over a file without rows
                return _with_rows(datasets.Dataset.from_parquet(name, cache_dir=_cache_folder()), file)
            if kind == "json":
                return _with_rows(datasets.Dataset.from_json(name, cache_dir=_cache_folder()), file)
            return _with_rows(_read_csv(file, name, "\t" if kind == "tsv" else ","), file)
    except InputError:
        raise
    except Exception as error:  # each reader has exceptions of its own
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            raise InputError(f"{file}: the disk is full at '{_cache_folder()}'; free space or set HF_HOME") from error
        if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
            raise InputError(f"{file}: the table has no rows; give at least one") from error
        raise InputError(f"{file}: cannot be read as {kind.upper()} ({_cause(cause)}); mend the file") from error


def _with_rows(table: Any, file: Path) -> Any:
    if len(table) == 0:
        raise InputError(f"{file}: the table has no rows; give at least one")
    return table


def _read_csv(file: Path, name: str, separator: str) -> Any:
    """Every value as the text it is, so that '01' stays a class of its own and 'NA' stays a title."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            header = next(csv.reader(stream, delimiter=separator))
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise InputError(f"{file}: column '{repeated[0]}' is there {header.count(repeated[0])} times; rename one")
    features = datasets.Features({column: datasets.Value("string") for column in header})
    return datasets.Dataset.from_csv(
        name,
        cache_dir=_cache_folder(),
        features=features,
        sep=separator,
        keep_default_na=False,
        na_values=[""],
        encoding="utf-8-sig",
    )


def _cache_folder() -> str:
    """The user's own Hugging Face cache, or a folder that goes with the process where that cannot be written."""
    folder = str(datasets.config.HF_DATASETS_CACHE)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return _temporary_cache()
    return folder if os.access(folder, os.W_OK) else _temporary_cache()


@cache
def _temporary_cache() -> str:
    folder = tempfile.mkdtemp(prefix="cmaclip-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and log lines of `datasets`: what goes wrong is told once, by an InputError."""
    verbosity = datasets.logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

"""What tells one table from another, so that a run is only resumed, and a record only used, with the same rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from cmaclip_fast.data.noise import NoisyTable
from cmaclip_fast.data.table import Table

_AT_ONCE, _PICTURES_AT_ONCE = 4096, 256


def fingerprint(table: Table, with_files: bool = True) -> dict[str, Any]:
    """All of a table that a run depends on, by name: the columns in use, and digests of their content.

    A digest changes with any row's value or its type, with the order of the rows, and with their number.

    Args:
        with_files: whether the size and time of pictures' files count, beside their paths.
    """
    if isinstance(table, NoisyTable):
        return {**fingerprint(table._table, with_files), "noise": [asdict(table._noise), table._seed]}
    keys = table.key_columns()
    return {
        "number of rows": len(table),
        "columns": asdict(table.columns),
        "image_dir": None if table.image_dir is None else os.path.abspath(table.image_dir),
        "texts": digest(table.texts()),
        "labels": {
            task: digest(table.label_lists(task) if task in table.columns.multi_label else table.labels(task))
            for task in table.columns.tasks
        },
        "keys": [str(keys.schema.types), *(digest(column.to_pylist()) for column in keys.columns)],
        "pictures": picture_digest(table, 0, len(table), with_files),
    }


def picture_digest(table: Table, start: int, stop: int, with_files: bool = True) -> str:
    """Of the pictures of some rows: those in the table, and the paths, sizes and times of those in files."""
    parts = range(start, stop, _PICTURES_AT_ONCE)
    return digest(
        state for at in parts for state in table.picture_states(at, min(at + _PICTURES_AT_ONCE, stop), with_files)
    )


def digest(values: Iterable[Any]) -> str:
    """Of values and their types, in order."""
    found = hashlib.blake2b(digest_size=16)
    part: list[Any] = []
    for value in values:
        part.append(hashlib.blake2b(value, digest_size=16).digest() if isinstance(value, bytes) else value)
        if len(part) == _AT_ONCE:
            found.update(repr(part).encode("utf-8", "surrogatepass"))
            part.clear()
    found.update(repr(part).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """Of the content of a file.

    Raises:
        OSError: it cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()

"""Labels that are more than one class name: lists of classes, and what says that a task does not apply to a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import pyarrow as pa

from cmaclip_fast.data.named import APPLIES
from cmaclip_fast.data.values import as_text, column_texts, is_bytes, storage
from cmaclip_fast.errors import InputError, clipped, listed

ClassLists = list[list[str] | None]
"""For each row its classes: none where the task does not apply, None where the row is unlabelled."""

Fault = Callable[[int | None, str], InputError]
"""The error of a row, or of the whole column."""


def label(value: str | None) -> str | None:
    """A class name without spaces around it; None for what is blank or not a number."""
    text = (value or "").strip()
    return None if text in ("", "nan", "NaN") else text


def class_lists(column: pa.ChunkedArray, separator: str | None, na_value: str | None, fault: Fault) -> ClassLists:
    """The classes of each row, each once: of a column of lists, or of text that is split at `separator`.

    Raises:
        InputError: a cell that is no list, or holds `na_value` beside classes.
    """
    kind = storage(column.type)
    if is_bytes(kind) or (pa.types.is_nested(kind) and not _is_list(kind)):
        raise fault(None, f"holds {column.type}, not lists of classes; name another")
    if _is_list(kind):
        items = storage(kind.value_type)
        if pa.types.is_nested(items) or is_bytes(items):
            raise fault(None, f"holds {column.type}, not lists of classes; name another")
        cells: Iterable[Sequence[object] | None] = column.to_pylist()
    else:
        texts = [label(text) for text in column_texts(column)]
        first = next(((row, text) for row, text in enumerate(texts) if text is not None), None)
        if first is not None and separator is None:
            row, text = first
            raise fault(row, f"'{clipped(text)}' is not a list; write lists, or give the --label-separator of classes")
        cells = [None if text is None else [text] if text == na_value else text.split(separator) for text in texts]
    found: ClassLists = []
    for row, cell in enumerate(cells):
        if cell is None:
            found.append(None)
            continue
        names = list(dict.fromkeys(name for item in cell if (name := label(as_text(item))) is not None))
        if na_value in names and len(names) > 1:
            raise fault(
                row, f"'{clipped(na_value or '')}', which says that no class applies, is beside classes; fix it"
            )
        found.append([name for name in names if name != na_value])
    return found


def check_separator(column: pa.ChunkedArray, separator: str, fault: Fault) -> None:
    """Whether a column of text has the separator at all; lists need none.

    Raises:
        InputError: it has not.
    """
    if not _is_list(storage(column.type)) and not any(separator in text for text in column_texts(column) if text):
        raise fault(None, f"no cell holds the label separator '{clipped(separator)}'; name the one between its classes")


def check_na_value(
    name: str,
    labels: Mapping[str, Sequence[str | None] | ClassLists],
    columns: Mapping[str, pa.ChunkedArray],
    na_value: str,
) -> None:
    """Whether a task has the value at all: among `labels`, or for several classes in the cells of `columns`.

    Raises:
        InputError: none has.
    """
    if any(na_value in values for task, values in labels.items() if task not in columns):
        return
    for column in columns.values():
        for cell in column.to_pylist():
            if any(label(as_text(item)) == na_value for item in (cell if isinstance(cell, list) else [cell])):
                return
    raise InputError(
        f"{name}: the NA value '{clipped(na_value)}' is in no cell of {listed(list(labels))}; name the one that "
        "says that a task does not apply"
    )


def fault_of_mixed(column: pa.ChunkedArray, held: str, fault: Fault) -> InputError:
    """The error of a column of JSON that holds lists and other values; such a column is read as JSON texts."""
    for row, cell in enumerate(column.to_pylist()):
        try:
            value = json.loads(cell[0]) if cell else None
        except ValueError:
            continue
        if value is not None and not isinstance(value, list):
            return fault(row, f'\'{clipped(str(value))}\' is not a list; write a list, such as ["red", "blue"]')
    return fault(None, f"holds {held}, not lists of classes; write lists of text")


def applicability(labels: Sequence[str | None] | ClassLists, na_value: str | None) -> list[str | None]:
    """For each row whether its task applies, a class of `APPLIES`; None where the row is unlabelled."""
    no, yes = APPLIES
    return [None if value is None else no if value == [] or value == na_value else yes for value in labels]


def _is_list(kind: pa.DataType) -> bool:
    others = (pa.types.is_struct, pa.types.is_map, pa.types.is_union)
    return pa.types.is_nested(kind) and not any(test(kind) for test in others)

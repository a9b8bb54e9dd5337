"""The values of an Arrow column as the text that they are read as."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

_EXACT = 2**63


def column_texts(column: pa.ChunkedArray) -> list[str | None]:
    """Each value as text, None where it is null or NaN: `1.0` is '1', true is 'True', a date is '2020-01-31'."""
    kind = column.type
    if pa.types.is_floating(kind):
        # by NumPy's scalars, since a float32 of 0.1 is no 0.1 as a Python float
        return [as_text(value) for chunk in column.chunks for value in chunk.to_numpy(zero_copy_only=False)]
    try:
        return [as_text(value) for value in column.to_pylist()]
    except (ValueError, OverflowError):  # a time that Python's types cannot hold
        return list(column.cast(pa.string()).to_pylist())


def as_text(value: Any) -> str | None:
    """One value as text, None where it is None or NaN."""
    if value is None or value != value:  # NaN is the one value that differs from itself
        return None
    if isinstance(value, float | np.floating) and (number := float(value)).is_integer() and abs(number) < _EXACT:
        return str(int(number))
    return str(value)


def python_value(scalar: pa.Scalar) -> Any:
    """A value as a Python object; as text where it is a time that Python's types cannot hold."""
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return scalar.cast(pa.string()).as_py()


def storage(kind: pa.DataType) -> pa.DataType:
    """The type that values are kept in: of a dictionary its values, of an extension its storage."""
    while isinstance(kind, pa.BaseExtensionType | pa.DictionaryType):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
    return kind


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds bytes, of any of Arrow's types for them."""
    tests = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_fixed_size_binary,
        pa.types.is_binary_view,
    )
    return any(test(kind) for test in tests)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, of any of Arrow's types for it."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def class_feature(schema: pa.Schema, column: str) -> list[str] | None:
    """The names of a column of class numbers, as Hugging Face `datasets` notes them in a Parquet file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"] if features[column]["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None

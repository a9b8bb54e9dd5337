"""Class names and numbers, and what an unknown class leads to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cmaclip_fast.data import Columns, Table, class_names, encode, read_table
from cmaclip_fast.errors import InputError


@pytest.fixture
def table(write_csv: Callable[..., Path]) -> Table:
    rows = [["x", "dog", "1", "", "s"], ["y", "cat", "0", "", "s"], ["z", "", "1", "", "s"]]
    columns = Columns(None, "text", ("animal", "size", "none", "same"))
    return read_table(write_csv([["text", "animal", "size", "none", "same"], *rows]), columns)


def test_names_are_sorted_and_numbers_follow(table: Table) -> None:
    names = class_names(table, ["animal", "size"])
    assert names == {"animal": ["cat", "dog"], "size": ["0", "1"]}
    numbers, ignored = encode(table, "animal", names["animal"])
    assert numbers.tolist() == [1, 0, -1] and str(numbers.dtype) == "torch.int64" and ignored == 0


def test_a_task_needs_two_classes(table: Table) -> None:
    with pytest.raises(InputError, match=r"pairs.csv, column 'none': has no labelled row; a task needs two"):
        class_names(table, ["none"])
    with pytest.raises(InputError, match="column 'same': has only the class 's'"):
        class_names(table, ["same"])


def test_unknown_class(table: Table) -> None:
    with pytest.raises(
        InputError, match=r"pairs.csv, row 1, column 'animal': class 'dog' is not .*did you mean 'dogs'"
    ):
        encode(table, "animal", ["cat", "dogs"])
    numbers, ignored = encode(table, "animal", ["cat", "dogs"], unknown="ignore")
    assert numbers.tolist() == [-1, 0, -1] and ignored == 1

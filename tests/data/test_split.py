"""Splits: disjoint, complete, the same each time, in proportion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmaclip_fast.data import Columns, Table, read_table, split_table
from cmaclip_fast.data.split import _stratified
from cmaclip_fast.errors import InputError


def _table(write_csv: Callable[..., Path], labels: list[str], splits: list[str] | None = None) -> Table:
    rows = [[f"t{i}", label] for i, label in enumerate(labels)]
    if splits is None:
        return read_table(write_csv([["text", "label"], *rows]), Columns(None, "text", ("label",)))
    rows = [[*row, split] for row, split in zip(rows, splits, strict=True)]
    return read_table(write_csv([["text", "label", "part"], *rows]), Columns(None, "text", ("label",), split="part"))


def test_column_decides_in_any_spelling(write_csv: Callable[..., Path]) -> None:
    names = ["train", "Training", "validation", "VAL", "dev", "valid", "test", "Test"]
    parts = split_table(_table(write_csv, ["a"] * 8, names))
    assert {name: part.texts() for name, part in parts.items()} == {
        "train": ["t0", "t1"],
        "validation": ["t2", "t3", "t4", "t5"],
        "test": ["t6", "t7"],
    }


def test_validation_is_carved_from_train(write_csv: Callable[..., Path]) -> None:
    table = _table(write_csv, ["a"] * 100 + ["b"] * 100 + ["c"] * 9, ["train"] * 200 + ["test"] * 9)
    parts = split_table(table)
    assert {name: len(part) for name, part in parts.items()} == {"train": 180, "validation": 20, "test": 9}
    assert Counter(parts["validation"].labels("label")) == {"a": 10, "b": 10}
    assert set(parts["train"].texts()).isdisjoint(parts["validation"].texts())


@pytest.mark.parametrize("value", ["tets", ""])
def test_unknown_split_value(write_csv: Callable[..., Path], value: str) -> None:
    with pytest.raises(InputError, match=f"pairs.csv, row 2, column 'part': '{value}' is no split.*write train"):
        split_table(_table(write_csv, ["a", "b"], ["train", value]))


def test_missing_column_and_wrong_fractions(write_csv: Callable[..., Path]) -> None:
    table = _table(write_csv, ["a", "b"])
    with pytest.raises(InputError, match=r"no column 'lable' for split_column .did you mean 'label'"):
        split_table(table, "lable")
    for fractions in ((0.5, 0.1, 0.1), (1.2, -0.1, -0.1)):
        with pytest.raises(ValueError, match="sum to 1"):
            split_table(table, fractions=fractions)


def test_random_split_is_stratified_and_repeatable(write_csv: Callable[..., Path]) -> None:
    labels = ["a"] * 60 + ["b"] * 30 + [""] * 10
    table = _table(write_csv, labels)
    first, again, other = split_table(table), split_table(table), split_table(table, seed=1)
    assert {name: len(part) for name, part in first.items()} == {"train": 80, "validation": 10, "test": 10}
    assert Counter(first["test"].labels("label")) == {"a": 6, "b": 3, None: 1}
    assert sorted(text or "" for part in first.values() for text in part.texts()) == sorted(f"t{i}" for i in range(100))
    assert all(first[name].texts() == again[name].texts() for name in first)
    assert first["test"].texts() != other["test"].texts()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(0, 3))
def test_every_class_trains_and_sizes_come_near(sizes: list[int], seed: int) -> None:
    groups, start = [], 0
    for size in sizes:
        groups.append(list(range(start, start + size)))
        start += size
    train, validation, test = _stratified(groups, (0.8, 0.1, 0.1), seed)
    assert sorted(train + validation + test) == list(range(start))
    assert all(set(group) & set(train) for group in groups)
    assert len(validation) <= 0.1 * start + 1 and len(test) <= 0.1 * start + 1
    if min(sizes) >= 4:
        assert abs(len(validation) - 0.1 * start) <= 1.5 and abs(len(test) - 0.1 * start) <= 1.5

"""Damage to rows: how many, which, and that it follows from the seed alone."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cmaclip_fast import InputError
from cmaclip_fast.data import Columns, Table, read_table
from cmaclip_fast.data.noise import add_noise, parse_noise


@pytest.fixture(scope="module")
def table() -> Table:
    return read_table("openclipart", split="test").select(range(40))


def pixels(table: Table, row: int) -> np.ndarray:
    picture = table.image(row)
    assert picture is not None
    return np.asarray(picture)


@pytest.mark.parametrize("kind", ["text-replace", "text-drop", "text-shuffle"])
def test_share_of_texts(table: Table, kind: str) -> None:
    noisy = add_noise(table, parse_noise(f"{kind}:0.5"))
    changed = [row for row in range(40) if noisy.text(row) != table.text(row)]
    if kind == "text-shuffle":  # one word cannot be shuffled
        assert changed and all(sorted(noisy.text(r).split()) == sorted(table.text(r).split()) for r in range(40))
    else:
        assert len(changed) == 20
    if kind == "text-drop":
        assert {noisy.text(row) for row in changed} == {None}
    if kind == "text-replace":
        assert all(noisy.text(row) in table.texts() for row in changed)
    assert all(np.array_equal(pixels(noisy, row), pixels(table, row)) for row in range(5))
    assert [noisy.text(r) for r in range(40)] == [
        add_noise(table, parse_noise(f"{kind}:0.5")).text(r) for r in range(40)
    ]
    assert noisy.labels("category") == table.labels("category")


@pytest.mark.tried("table", ends="memory for the text, not for its words times the longest")
def test_shuffling_beside_a_long_word(tmp_path: Path) -> None:
    words = ["red", "hat"] * 50 + ["x" * 10**5]
    (tmp_path / "t.csv").write_text("title\n" + " ".join(words) + "\n")
    noisy = add_noise(read_table(tmp_path / "t.csv", Columns(None, "title")), parse_noise("text-shuffle:1"))
    tracemalloc.start()
    try:
        shuffled = noisy.text(0)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(shuffled) + 2**20
    finally:
        tracemalloc.stop()
    assert sorted(shuffled.split()) == sorted(words) and shuffled.split() != words


def test_pictures(table: Table) -> None:
    dropped = add_noise(table, parse_noise("image-drop:0.25"))
    assert sum(dropped.image(row) is None for row in range(40)) == 10
    replaced = add_noise(table, parse_noise("image-replace:1"))
    same = [np.array_equal(pixels(replaced, row), pixels(table, row)) for row in range(40)]
    assert sum(same) <= 2  # near-duplicates of one drawing
    blurred = add_noise(table, parse_noise("image-blur:0.1"))
    noisy = add_noise(table, parse_noise("image-noise:0.1"))
    for row in range(5):
        plain = pixels(table, row).astype(float)
        assert (
            np.abs(np.diff(pixels(blurred, row).astype(float), axis=0)).mean() < np.abs(np.diff(plain, axis=0)).mean()
        )
        assert 2 < np.abs(pixels(noisy, row) - plain).mean() < 30
    assert all(noisy.text(row) == table.text(row) for row in range(40))


def test_noises_add_up_and_none_is_none(table: Table) -> None:
    both = add_noise(add_noise(table, parse_noise("text-drop:1")), parse_noise("image-drop:1"))
    assert both.text(3) is None and both.image(3) is None
    none = add_noise(table, parse_noise("text-replace:0"))
    assert none.texts() == table.texts()


@pytest.mark.parametrize("spec", ["text-dorp:0.5", "text-drop", "text-drop:x", "text-drop:1.5", "image-blur:-1"])
def test_what_is_no_noise(spec: str) -> None:
    with pytest.raises(InputError, match="--noise"):
        parse_noise(spec)

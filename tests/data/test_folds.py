"""Folds of cross-validation: grouped, fixed in a file, each row tested once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cmaclip_fast.data import Columns, read_table
from cmaclip_fast.data.folds import make_folds, normalised, read_folds, split_by_folds, write_folds
from cmaclip_fast.errors import InputError

FOLDS = Path(__file__).parents[2] / "benchmarks/folds"


@pytest.mark.parametrize("title", ["Café 2", "cafe", "CAFÉ", " Cafe (3)", "café_11"])
def test_titles_that_are_the_same(title: str) -> None:
    assert normalised(title) == "cafe"


def test_a_group_is_in_one_fold_and_classes_are_spread() -> None:
    generator = np.random.default_rng(0)
    groups = [f"g{number}" for number in generator.integers(0, 200, 1000)]
    strata = [f"s{int(group[1:]) % 4}" for group in groups]
    folds = np.asarray(make_folds(groups, strata))
    for group in set(groups):
        assert len({fold for fold, of in zip(folds, groups, strict=True) if of == group}) == 1
    sizes = np.bincount(folds)
    assert len(sizes) == 5 and sizes.min() > 150 and sizes.max() < 250


def test_the_committed_folds_fit_the_embedded_drawings() -> None:
    table = read_table("openclipart")
    folds = read_folds(FOLDS / "openclipart.csv", table)
    of_title: dict[str, set[int]] = {}
    for title, fold in zip(table.texts(), folds, strict=True):
        if name := normalised(title or ""):
            of_title.setdefault(name, set()).add(fold)
    assert all(len(found) == 1 for found in of_title.values())
    tested = [split_by_folds(table, folds, number)["test"].labels("id") for number in range(5)]
    assert sorted(key for part in tested for key in part) == sorted(table.labels("id"))


@pytest.mark.tried("table", ends="one line that names the file")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "not a key column"),
        (b"id,fold,more\n", "not a key column"),
        (b"sku,fold\n1,0\n", "not a key column"),
        (b"id,fold\na,x\n", "no CSV file"),
        (b"id,fold\n\xff\xfe,0\n", "no CSV file"),
        (b"id,fold\na,0\n", "has no fold for"),
        (b"id,fold\na,0\nb,1\nc,1\n", "three or more"),
        (b"id,fold\na,0\nb,1\nc,5\n", "numbered"),
        (b"id,fold\na\nb\nc\n", "no CSV file"),
    ],
)
def test_a_bad_file(tmp_path: Path, content: bytes | None, said: str) -> None:
    (tmp_path / "rows.csv").write_text("id,title,kind\na,one,x\nb,two,y\nc,three,x\n")
    table = read_table(tmp_path / "rows.csv", Columns(text="title", tasks=("kind",), keys=("id",)))
    path = tmp_path / "folds.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        read_folds(path, table)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_written_and_read(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('id,title,kind\n"a,1",one,x\nb,two,y\nc,three,x\n')
    table = read_table(tmp_path / "rows.csv", Columns(text="title", tasks=("kind",), keys=("id",)))
    write_folds(tmp_path / "folds.csv", "id", ["a,1", "b", "c"], [2, 0, 1])
    assert read_folds(tmp_path / "folds.csv", table) == [2, 0, 1]

"""Grouped cross-validation: folds fixed in a file, and the splits that each of them gives."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from cmaclip_fast.data.split import NAMES
from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError, clipped
from cmaclip_fast.files import write_text


def normalised(title: str) -> str:
    """A title as its letters alone, without case, accents, digits and signs: 'Café 2' and 'cafe' are the same."""
    plain = unicodedata.normalize("NFKD", title).casefold()
    return " ".join("".join(c if c.isalpha() else " " for c in plain if not unicodedata.combining(c)).split())


def make_folds(groups: Sequence[str], strata: Sequence[str], number: int = 5, seed: int = 0) -> list[int]:
    """The fold of each row: rows of a group are in one fold, and each fold has its share of each stratum.

    Args:
        groups: what must not be torn apart, such as the normalised title or the family.
        strata: such as the class of the first task.
        number: of folds.
    """
    folds = np.zeros(len(groups), dtype=int)
    splitter = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
    for fold, (_, rows) in enumerate(splitter.split(np.zeros(len(groups)), np.asarray(strata), np.asarray(groups))):
        folds[rows] = fold
    return folds.tolist()


def write_folds(path: Path, key: str, keys: Sequence[str], folds: Sequence[int]) -> None:
    """Writes a CSV file with the columns `key` and `fold`."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([key, "fold"])
    writer.writerows(zip(keys, folds, strict=True))
    write_text(path, buffer.getvalue())


def read_folds(path: Path, table: Table) -> list[int]:
    """The fold of each row of a table, from a file that `write_folds` wrote.

    Raises:
        InputError: the file is missing or malformed, or does not name every row.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            key, *rest = reader.fieldnames or [""]
            found = {row[key]: int(row["fold"]) for row in reader} if rest == ["fold"] else {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): name a file of folds") from None
    except (UnicodeDecodeError, ValueError, TypeError, csv.Error):
        raise InputError(f"{path}: is no CSV file of keys and fold numbers: write it again") from None
    if rest != ["fold"] or key not in table.column_names:
        raise InputError(f"{path}: its columns are not a key column of {table.name} and 'fold': write it again")
    folds = []
    for row, value in enumerate(table.labels(key)):
        if value not in found:
            raise InputError(f"{path}: has no fold for {table.where(row)}, {key} '{clipped(value or '')}'")
        folds.append(found[value])
    if sorted(set(folds)) != list(range(max(folds) + 1)) or max(folds) < 2:
        raise InputError(f"{path}: folds must be numbered 0, 1, 2 ... and be three or more")
    return folds


def split_by_folds(table: Table, folds: Sequence[int], number: int) -> dict[str, Table]:
    """Fold `number` is the test split, the next one the validation split, the others are for training.

    Args:
        number: taken modulo the number of folds, so that seeds 0, 1, 2 ... go round.
    """
    fold = np.asarray(folds)
    count = int(fold.max()) + 1
    test, validation = number % count, (number + 1) % count
    masks = ((fold != test) & (fold != validation), fold == validation, fold == test)
    return {name: table.select(np.flatnonzero(mask)) for name, mask in zip(NAMES, masks, strict=True)}

"""Data sets known by name, and the columns that a table uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Attributes:
        image: the column of pictures, or None for a table of text alone.
        text: the column of text, or None for a table of pictures alone.
        tasks: one column of class names for each task.
        keys: columns that identify a row; they are carried through to predictions unread.
        split: the column that says which split a row belongs to; `split` is used where there is such a column.
    """

    image: str | None = None
    text: str | None = None
    tasks: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    split: str | None = None


@dataclass(frozen=True)
class NamedDataset:
    """A data set that comes with the package."""

    name: str
    path: Path
    columns: Columns
    licence: str
    summary: str
    card: Path


_FOLDER = Path(__file__).parent / "openclipart"

NAMED = {
    "openclipart": NamedDataset(
        name="openclipart",
        path=_FOLDER / "openclipart.parquet",
        columns=Columns("image", "title", ("category", "subcategory", "color"), ("id",), "split"),
        licence="public domain",
        summary="3,545 drawings with titles in several languages; category, subcategory and a derived color",
        card=_FOLDER / "README.md",
    )
}

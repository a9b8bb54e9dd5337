"""Data sets known by name, and the columns that a table uses."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from platformdirs import user_cache_path


@dataclass(frozen=True)
class Taxonomy:
    """A column of classes given as paths, such as 'Apparel > Dresses > Maxi': a task for each level of the tree.

    The task of level 2 is `COLUMN_2`, and its class here 'Apparel > Dresses'. A path that ends above the last level
    stands for itself below ('Apparel' at every level), so that the last level has the classes of the column as it is.

    Attributes:
        column: where the paths are.
        separator: between the names of a path; spaces around it do not matter.
        levels: how many tasks there are; None for as many as the longest path has.
    """

    column: str
    separator: str = " > "
    levels: int | None = None

    def task(self, level: int) -> str:
        """The task of a level, counted from 1."""
        return f"{self.column}_{level}"

    def levels_in(self, tasks: Iterable[str]) -> list[str]:
        """The tasks of this taxonomy among `tasks`, from the top."""
        known = set(tasks)
        return list(takewhile(known.__contains__, (self.task(level) for level in count(1))))

    def names(self, path: str) -> list[str]:
        """The names along a path."""
        parts = path.split(self.separator.strip() or self.separator)
        return [part.strip() for part in parts if part.strip()]

    def upto(self, path: str, level: int) -> str:
        """The path down to a level, or all of it where it ends before."""
        return self.separator.join(self.names(path)[:level])


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    Attributes:
        image: the column of pictures, or None for a table of text alone.
        text: the column of text, or None for a table of pictures alone.
        tasks: one column of class names for each task.
        keys: columns that identify a row; they are carried through to predictions unread.
        split: the column that says which split a row belongs to; `split` is used where there is such a column.
        taxonomies: columns of paths; their tasks come after `tasks`.
        multi_label: columns whose rows have any number of classes: lists, or text; those not among `tasks` come after.
        label_separator: what stands between the classes of such a column of text.
        na_value: the class name that says that a task does not apply to a row.
        applies: the tasks for which whether they apply is a task of its own (see `applies_task`); None for those with
            rows that they do not apply to.
    """

    image: str | None = None
    text: str | None = None
    tasks: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    split: str | None = None
    taxonomies: tuple[Taxonomy, ...] = ()
    multi_label: tuple[str, ...] = ()
    label_separator: str | None = None
    na_value: str | None = None
    applies: tuple[str, ...] | None = None


APPLIES = ("no", "yes")
"""The classes of whether a task applies to a row."""


def applies_task(task: str) -> str:
    """The task that says whether `task` applies to a row."""
    return f"{task}_applies"


@dataclass(frozen=True)
class NamedDataset:
    """A data set that is read by its name: one Parquet file and its card.

    Attributes:
        built: made by `cmaclip data build NAME`; otherwise it comes with the package.
    """

    name: str
    columns: Columns
    licence: str
    summary: str
    built: bool = False

    @property
    def folder(self) -> Path:
        return (data_home() if self.built else Path(__file__).parent) / self.name

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.parquet"

    @property
    def card(self) -> Path:
        return self.folder / "README.md"


NAMED = {
    "openclipart": NamedDataset(
        name="openclipart",
        columns=Columns("image", "title", ("category", "subcategory", "color"), ("id",), "split"),
        licence="public domain",
        summary="3,545 drawings with titles in several languages; category, subcategory and a derived color",
    ),
    "emoji": NamedDataset(
        name="emoji",
        columns=Columns(
            "image", "text", ("category", "subcategory", "tone", "vendor", "gender"), ("id", "language"), "split"
        ),
        licence="Apache-2.0, CC-BY-4.0, MIT",
        summary="7,562 emoji of two vendors with tags in 28 languages (`emoji:de`, `emoji:all`)",
        built=True,
    ),
    "pairs": NamedDataset(
        name="pairs",
        columns=Columns("image", "name", ("fits", "place", "colour"), ("id",), "split"),
        licence="public domain",
        summary="11,000 composed pictures with a name; labels that need picture and text together",
        built=True,
    ),
}

PUBLIC = {
    "upmc-food101": "UPMC-Food101: pictures of 101 dishes and titles of web pages",
    "fashion-gen": "Fashion-Gen: products with descriptions (HDF5)",
    "glami-1m": "GLAMI-1M: products of 191 categories with texts in 13 languages",
}
"""Public data sets that a user brings, read as `NAME:FOLDER`."""


def data_home() -> Path:
    """The folder that data sets are built in.

    It is the environment variable CMACLIP_DATA where that is set, else `cmaclip_fast` in the user's cache folder, which
    platformdirs finds: `$XDG_CACHE_HOME` or `~/.cache` on Linux, `~/Library/Caches` on macOS, `%LOCALAPPDATA%` on
    Windows.
    """
    if chosen := os.environ.get("CMACLIP_DATA"):
        return Path(chosen).expanduser()
    return user_cache_path("cmaclip_fast", appauthor=False, opinion=False)


def named(source: str) -> tuple[str, str] | None:
    """The name and what follows its colon, of a source that begins with a known name; None for all others."""
    name, colon, argument = source.partition(":")
    return (name, argument) if name in NAMED or (name in PUBLIC and colon) else None


def absolute(source: str) -> str:
    """A named data set as it is, any file or folder as an absolute path, so that it is the same from anywhere."""
    found = named(source)
    if found is None:
        return str(Path(source).expanduser().absolute())
    name, argument = found
    return f"{name}:{Path(argument).expanduser().absolute()}" if name in PUBLIC else source

"""What is in a data set: for `cmaclip data list` and `cmaclip data show`."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cmaclip_fast.data.files import SPLITS
from cmaclip_fast.data.named import NAMED, Columns, NamedDataset, named
from cmaclip_fast.data.table import Table, read_table


@dataclass(frozen=True)
class Description:
    """A table in figures.

    Attributes:
        columns: what is used for what; `column_names` are all there are.
        rows: in each split (`all` where there is no split column).
        classes: for each task, for each class its rows, the most frequent first.
        absent: rows without a text (`text`), without a picture (`image`), without a label of each task.
        text_words: least, median, mean and most words of a text; None without a text column.
        licence, card: of a named data set (the card in Markdown); None where not known.
        examples: the first rows, as text, labels and keys.
    """

    name: str
    columns: Columns
    column_names: list[str]
    rows: dict[str, int]
    classes: dict[str, dict[str, int]]
    absent: dict[str, int]
    text_words: dict[str, float] | None
    licence: str | None
    card: str | None
    examples: list[dict[str, Any]]


def list_datasets() -> list[NamedDataset]:
    """The data sets that are read by name, those that are still to be built too."""
    return list(NAMED.values())


def describe(name_or_table: str | Table, examples: int = 5) -> Description:
    """Counts of rows, classes, words and absent values; no picture is decoded.

    Raises:
        InputError: as `read_table`.
    """
    table = read_table(name_or_table) if isinstance(name_or_table, str) else name_or_table
    columns, texts = table.columns, table.texts()
    found = NAMED.get((named(table.name) or ("",))[0])
    labels: dict[str, list[Any]] = {
        task: table.label_lists(task) if task in columns.multi_label else table.labels(task) for task in columns.tasks
    }
    absent = {task: labels[task].count(None) for task in columns.tasks}
    if columns.text is not None:
        absent["text"] = texts.count(None)
    if columns.image is not None:
        absent["image"] = sum(not table.has_image(row) for row in range(len(table)))
    return Description(
        name=table.name,
        columns=columns,
        column_names=table.column_names,
        rows=_rows(table),
        classes={task: _classes(values) for task, values in labels.items()},
        absent=absent,
        text_words=_words([text for text in texts if text is not None]),
        licence=found.licence if found else None,
        card=_without_header(found.card.read_text(encoding="utf-8")) if found else None,
        examples=[
            {"text": texts[row], **table.keys(row), **{task: values[row] for task, values in labels.items()}}
            for row in range(min(examples, len(table)))
        ],
    )


def _classes(labels: list[Any]) -> dict[str, int]:
    names = (name for label in labels if label for name in (label if isinstance(label, list) else [label]))
    return dict(Counter(names).most_common())


def _without_header(card: str) -> str:
    """Markdown without the block of YAML before it."""
    return card.split("\n---\n", 1)[-1].lstrip() if card.startswith("---\n") else card


def _rows(table: Table) -> dict[str, int]:
    if table.columns.split is None:
        return {"all": len(table)}
    return dict(Counter(SPLITS.get((value or "").lower(), value or "none") for value in table.splits()))


def _words(texts: list[str]) -> dict[str, float] | None:
    counts = [len(text.split()) for text in texts]
    if not counts:
        return None
    return {
        "least": min(counts),
        "median": statistics.median(counts),
        "mean": statistics.fmean(counts),
        "most": max(counts),
    }

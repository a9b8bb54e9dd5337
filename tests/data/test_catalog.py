"""What `cmaclip data` shows, and that the card tells the truth about the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cmaclip_fast.data import Columns, describe, list_datasets, read_table


def test_openclipart_is_as_its_card_says() -> None:
    named = next(entry for entry in list_datasets() if entry.name == "openclipart")
    told = describe(named.name)
    card = told.card
    assert card is not None and card.startswith("# openclipart"), "without the block of YAML"
    assert told.rows == {"train": 2586, "validation": 333, "test": 626}
    assert {task: len(classes) for task, classes in told.classes.items()} == {
        "category": 17,
        "subcategory": 59,
        "color": 8,
    }
    for fact in ("17 classes", "59 classes", "8 classes", "2,586", "public domain", "derived, not"):
        assert fact in card
    assert told.absent == {"category": 0, "subcategory": 416, "color": 231, "text": 0, "image": 0}
    assert told.licence == "public domain" and told.text_words["median"] == 2
    assert len(told.examples) == 5 and set(told.examples[0]) == {"text", "id", "category", "subcategory", "color"}


def test_a_file(write_csv: Callable[..., Path]) -> None:
    path = write_csv([["title", "label", "k"], ["a b", "x", "1"], ["", "x", "2"], ["a b c d", "y", "3"]])
    told = describe(read_table(path, Columns(None, "title", ("label",), ("k",))), examples=1)
    assert told.rows == {"all": 3} and told.licence is None and told.column_names == ["title", "label", "k"]
    assert told.classes == {"label": {"x": 2, "y": 1}} and told.absent == {"label": 0, "text": 1}
    assert told.text_words == {"least": 2, "median": 3, "mean": 3, "most": 4}
    assert told.examples == [{"text": "a b", "k": "1", "label": "x"}]

"""Writes the folds of cross-validation: `python -m benchmarks.folds.make`; see docs/results.md."""

from __future__ import annotations

from pathlib import Path

from cmaclip_fast.data import Columns, Table, read_table
from cmaclip_fast.data.folds import make_folds, normalised, write_folds

FOLDER = Path(__file__).parent


def main() -> None:
    """openclipart by normalised title, emoji by family, each stratified by category."""
    drawings = read_table("openclipart")
    titles = [normalised(text or "") or (text or "") for text in drawings.texts()]
    write(drawings, "openclipart", titles)
    emoji = read_table("emoji", Columns(image="image", text="text", tasks=("category",)))
    write(emoji, "emoji", [family or "" for family in emoji.labels("family")])


def write(table: Table, name: str, groups: list[str]) -> None:
    folds = make_folds(groups, [label or "" for label in table.labels("category")])
    write_folds(FOLDER / f"{name}.csv", "id", [key or "" for key in table.labels("id")], folds)


if __name__ == "__main__":
    main()

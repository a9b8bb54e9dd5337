"""Makes a page of docs/tables from the tables that a command wrote.

python -m benchmarks.page benchmarks/results/performance.md docs/tables/performance.md "Speed" "make bench"
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer


def main(
    tables: Annotated[Path, typer.Argument(help="What the command wrote, as Markdown.")],
    page: Annotated[Path, typer.Argument(help="The page to write.")],
    title: Annotated[str, typer.Argument(help="The page's title.")],
    command: Annotated[str, typer.Argument(help="The command that writes the page.")],
) -> None:
    # the page has a title of its own
    text = re.sub(r"\A# .*\n", "", tables.read_text(encoding="utf-8").strip())
    # links to pictures start from the page
    folder = Path(os.path.relpath(tables.parent, page.parent)).as_posix()
    text = re.sub(r"\]\(([^():#]+\.png)\)", rf"]({folder}/\1)", text)
    page.parent.mkdir(exist_ok=True)
    page.write_text(f"# {title}\n\nWritten by `{command}`.\n\n{text.strip()}\n", encoding="utf-8")


def as_table(headings: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown; fractions get two decimals."""
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(headings), ["---"] * len(headings), *cells])


def insert(page: Path, command: str, text: str) -> None:
    """Replaces what stands between the marks of `command` on a page that is written by hand."""
    begin, end = f"<!-- the tables of `{command}` begin -->", f"<!-- the tables of `{command}` end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{page}: has no marks of `{command}`: write '{begin}' and '{end}' where its tables belong")
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

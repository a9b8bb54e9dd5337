"""Puts the tables that a command wrote between its marks on a page of the documentation.

python -m benchmarks.page benchmarks/results/performance.md docs/performance.md "make bench"
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer


def main(
    tables: Annotated[Path, typer.Argument(help="What the command wrote, as Markdown.")],
    page: Annotated[Path, typer.Argument(help="The page with the marks.")],
    command: Annotated[str, typer.Argument(help="The command that the marks name.")],
) -> None:
    # the page has a title of its own
    text = re.sub(r"\A# .*\n", "", tables.read_text(encoding="utf-8").strip())
    # pictures are seen from the page, and the page's own headings stand above the tables'
    folder = Path(os.path.relpath(tables.parent, page.parent)).as_posix()
    text = re.sub(r"\]\(([^():#]+\.png)\)", rf"]({folder}/\1)", text)
    insert(page, command, re.sub(r"^(#+) ", r"#\1 ", text, flags=re.MULTILINE))


def insert(page: Path, command: str, text: str) -> None:
    """Replaces what stands between the marks of `command` on a page."""
    begin, end = f"<!-- the tables of `{command}` begin -->", f"<!-- the tables of `{command}` end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{page}: has no marks of `{command}`: write '{begin}' and '{end}' where its tables belong")
    page.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

"""Puts the tables that `cmaclip bench` wrote between the marks of `docs/performance.md`.

python benchmarks/page.py benchmarks/results docs/performance.md
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer

BEGIN, END = "<!-- the tables of `make bench` begin -->", "<!-- the tables of `make bench` end -->"


def main(
    results: Annotated[Path, typer.Argument(help="The folder that `cmaclip bench` wrote.")],
    page: Annotated[Path, typer.Argument(help="The page with the marks.")],
) -> None:
    tables = (results / "performance.md").read_text(encoding="utf-8").strip()
    # the picture is seen from the page, and the page's own headings stand above the tables'
    folder = os.path.relpath(results, page.parent)
    tables = tables.replace("](performance.png)", f"]({Path(folder, 'performance.png').as_posix()})")
    tables = re.sub(r"^(#+) ", r"#\1 ", tables, flags=re.MULTILINE)
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

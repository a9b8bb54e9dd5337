"""`cmaclip data`: list, build, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markdown import Markdown
from rich.table import Table as RichTable

from cmaclip_fast.errors import InputError, clipped, listed

if TYPE_CHECKING:
    from cmaclip_fast.data.named import Columns
from cmaclip_fast.cli.options import MAX_PIXELS, ImageDirOption, ImageOption, TaskOption, TextOption
from cmaclip_fast.cli.output import err, out
from cmaclip_fast.data.source import read_columns

data_app = typer.Typer(help="Look at data sets and build them.", no_args_is_help=True, rich_markup_mode="markdown")

CELL = 300
"""The most characters of a cell that `data show` prints."""


@data_app.command("list")
def data_list() -> None:
    """List the data sets that are read by name.

    Example: `cmaclip data list`
    """
    from cmaclip_fast.data.catalog import list_datasets
    from cmaclip_fast.data.named import PUBLIC

    table = RichTable("name", "tasks", "licence", "about", box=None)
    for entry in list_datasets():
        table.add_row(entry.name, ", ".join(entry.columns.tasks), entry.licence, entry.summary)
    for name, summary in PUBLIC.items():
        table.add_row(f"{name}:FOLDER", "", "its own", summary)
    out.print(table)
    for entry in list_datasets():
        if not entry.path.is_file():
            out.print(f"{entry.name} is not built yet: cmaclip data build {entry.name}", highlight=False)


@data_app.command("build")
def data_build(
    name: Annotated[str, typer.Argument(help="`emoji` or `pairs`.")],
    output: Annotated[
        Path | None, typer.Option(help="Output folder [default: the data folder, which CMACLIP_DATA sets].")
    ] = None,
    languages: Annotated[str, typer.Option(help="Languages of the texts, such as `en,de,ja`, or `all`.")] = "all",
    packages: Annotated[
        Path | None, typer.Option(help="Folder with the packages' tarballs, instead of downloading.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Build a data set: `emoji` from npm packages, which are downloaded and verified, `pairs` from embedded drawings.

    Example: `cmaclip data build emoji`

    Example: `cmaclip data build pairs`
    """
    from cmaclip_fast.data.emoji import build_emoji, from_folder
    from cmaclip_fast.data.files import near
    from cmaclip_fast.data.named import NAMED
    from cmaclip_fast.data.pairs import build_pairs

    buildable = [entry.name for entry in NAMED.values() if entry.built]
    if name not in buildable:
        raise InputError(f"{name}: is not built{near(name, buildable)}: choose {', '.join(buildable)}")
    with err.status("building") as status:
        if name == "pairs":
            path = build_pairs(output, overwrite, report=status.update)
        else:
            chosen = None if languages == "all" else languages.split(",")
            fetch = None if packages is None else from_folder(packages)
            path = build_emoji(output, chosen, overwrite, fetch, report=status.update)
    out.print(f"{name}: {path}", soft_wrap=True, highlight=False)


@data_app.command("show")
def data_show(
    name: Annotated[str, typer.Argument(help="Data set name (`cmaclip data list`), file or folder.")],
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    image_dir: ImageDirOption = None,
) -> None:
    """Show a data set's size, columns, classes, example rows and data card.

    Example: `cmaclip data show openclipart`
    """
    from cmaclip_fast.data.catalog import describe

    found = describe(
        read_columns(name, image=image, text=text, tasks=task, image_dir=image_dir, max_image_pixels=MAX_PIXELS)
    )
    facts = RichTable.grid(padding=(0, 2))
    facts.add_row("name", found.name)
    facts.add_row("rows", listed([f"{clipped(split, 60)} {rows:,}" for split, rows in found.rows.items()]))
    facts.add_row("columns", listed(found.column_names))
    facts.add_row("used", _used(found.columns))
    facts.add_row("licence", found.licence or "unknown")
    if found.text_words is not None:
        facts.add_row("words of a text", ", ".join(f"{k} {v:.3g}" for k, v in found.text_words.items()))
    facts.add_row("absent", listed([f"{clipped(k, 60)} {v:,}" for k, v in found.absent.items() if v]) or "nothing")
    for name_, classes in found.classes.items():
        shown = listed([f"{clipped(label, 60)} {rows:,}" for label, rows in classes.items()], most=12)
        facts.add_row(clipped(name_), f"{len(classes)} classes: {shown}")
    out.print(facts, highlight=False)
    for example in found.examples:
        cells = (f"{clipped(k)}: {clipped(str(v), CELL)}" for k, v in example.items())
        out.print("- " + "; ".join(cells), highlight=False, markup=False)
    if found.card is not None:
        out.print(Markdown(found.card))


def _used(columns: Columns) -> str:
    parts = [f"image {columns.image}", f"text {columns.text}"]
    parts += [f"task {name}" for name in columns.tasks] + [f"key {name}" for name in columns.keys]
    return listed(parts + ([f"split {columns.split}"] if columns.split else []))

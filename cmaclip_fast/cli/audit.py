"""`cmaclip audit`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TaskID
from rich.table import Table as RichTable

from cmaclip_fast.cli.options import (
    MAX_PIXELS,
    BadRows,
    BadRowsOption,
    BatchOption,
    DeviceOption,
    ImageDirOption,
    ImageOption,
    KeyOption,
    ModelArgument,
    PixelsOption,
    SplitColumnOption,
    TaskOption,
    TextOption,
)
from cmaclip_fast.cli.output import err, out
from cmaclip_fast.cli.trained import checked_rows, examples_of, files_read, load
from cmaclip_fast.data.source import Source
from cmaclip_fast.errors import InputError, clipped

if TYPE_CHECKING:
    from cmaclip_fast.classifier.findings import Finding


class Kind(str, Enum):
    """What is looked for."""

    label = "label"
    duplicate = "duplicate"
    mismatch = "mismatch"
    next = "next"


def audit(
    directory: ModelArgument,
    output: Annotated[Path, typer.Option(help="Parquet file to write; the page goes beside it, as .html.")],
    data: Annotated[str | None, typer.Option(help="As for `train` [default: the training data].")] = None,
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    key: KeyOption = None,
    split: Annotated[str, typer.Option(help="Split to use; `all` for every row.")] = "all",
    kind: Annotated[list[Kind] | None, typer.Option(help="What to look for. Repeatable [default: all].")] = None,
    folds: Annotated[int, typer.Option(min=2, help="Folds of the cross-validation.")] = 5,
    next_rows: Annotated[int, typer.Option("--next", min=1, help="Rows to propose for labelling.")] = 100,
    page: Annotated[bool, typer.Option(help="Write the page.")] = True,
    limit: Annotated[int, typer.Option(min=1, help="Findings of each kind and task on the page.")] = 50,
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    on_bad_rows: BadRowsOption = BadRows.error,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
) -> None:
    """Find labels that look wrong, duplicates that disagree, texts that do not fit, and rows to label next.

    Needs cleanlab: `pip install 'cmaclip_fast[audit]'`.

    Example: `cmaclip audit runs/clipart --key id --output audit.parquet`

    Example: `cmaclip audit runs/clipart --data new.csv --kind next --next 200 --output to-label.parquet`
    """
    from cmaclip_fast.classifier.audit import AuditSettings
    from cmaclip_fast.classifier.audit import audit as find
    from cmaclip_fast.classifier.findings import KINDS, audit_view, check_keys, write_findings
    from cmaclip_fast.evaluation.label_errors import check_cleanlab
    from cmaclip_fast.files import check_output_file
    from cmaclip_fast.pages.audit import render_audit
    from cmaclip_fast.progress import rate_bar

    html = output.with_suffix(".html")
    if page and html == output:
        raise InputError(f"{output}: the page has this name: name a file that ends in .parquet, or pass --no-page")
    kinds = tuple(name for name in KINDS if not kind or name in {one.value for one in kind})
    if {"label", "duplicate"} & set(kinds):
        check_cleanlab()
    outputs = [output, html] if page else [output]
    for path in outputs:
        check_output_file(path, overwrite)
    classifier, config = load(directory, device)
    model = classifier.engine
    source = Source(
        data=data,
        image=image,
        text=text,
        tasks=task,
        keys=key,
        image_dir=image_dir,
        split=split,
        split_column=split_column,
        on_bad_rows=on_bad_rows.value,
        max_image_pixels=max_image_pixels,
    )
    table, counts = checked_rows(source, config)
    check_keys(table)
    for path in outputs:
        check_output_file(path, overwrite, files_read(directory, table))
    examples = examples_of(model, table, "ignore", task)
    counts |= {f"unknown class of {name}": number for name, number in examples.ignored.items() if number}
    settings = AuditSettings(kinds, folds, next_rows, batch_size, config.training["seed"])
    with rate_bar(err, "") as bar:
        steps: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in steps:
                steps[what] = bar.add_task(clipped(what), total=total)
            bar.update(steps[what], completed=done)

        found = find(model, examples, settings, bar.console.print, progress)
        view = audit_view(found, table, limit, progress) if page else None
    write_findings(found, table, output)
    out.print(summary(found))
    for name, number in counts.items():
        err.print(f"{name}: {number}", highlight=False)
    out.print(f"{len(found)} findings: {output}", soft_wrap=True, highlight=False)
    if view is not None:
        told = {"model": str(directory), "data": f"{table.name}, split {split}", "rows": f"{len(table):,}"}
        render_audit(view, html, "What to look at", told)
        out.print(f"page: {html}", soft_wrap=True, highlight=False)


def summary(findings: list[Finding]) -> RichTable:
    """How many findings there are of each kind and task."""
    numbers: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        numbers.setdefault((finding.kind, finding.task or ""), []).append(finding)
    table = RichTable("kind", "task", "rows", "likely wrong", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for (kind, task), found in numbers.items():
        likely = sum(bool(finding.likely) for finding in found)
        table.add_row(kind, clipped(task), str(len(found)), str(likely) if kind == "label" else "")
    return table

"""`cmaclip explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmaclip_fast.cli.options import (
    MAX_PIXELS,
    DeviceOption,
    ImageDirOption,
    ImageOption,
    KeyOption,
    LabelSeparatorOption,
    ModelArgument,
    PixelsOption,
    SplitColumnOption,
    TaskOption,
    TextOption,
)
from cmaclip_fast.cli.output import out
from cmaclip_fast.cli.trained import chosen_rows, files_read, load
from cmaclip_fast.data.source import Source
from cmaclip_fast.errors import InputError


def explain(
    directory: ModelArgument,
    row: Annotated[list[int], typer.Option(min=1, help="Row of the split, counted from 1. Repeatable.")],
    output: Annotated[Path, typer.Option(help="HTML page to write.")],
    data: Annotated[str | None, typer.Option(help="As for `train` [default: the training data].")] = None,
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    label_separator: LabelSeparatorOption = None,
    key: KeyOption = None,
    split: Annotated[str, typer.Option(help="Split to use; `all` for every row.")] = "test",
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing page.")] = False,
) -> None:
    """Explain single rows: modality weights and attention maps.

    Example: `cmaclip explain runs/clipart --row 1 --row 7 --output rows.html`
    """
    from cmaclip_fast.classifier.explanation import explain as explain_rows
    from cmaclip_fast.data.check import check_rows
    from cmaclip_fast.files import check_output_file
    from cmaclip_fast.pages.explanation import render_explanation

    check_output_file(output, overwrite)
    classifier, config = load(directory, device)
    source = Source(
        data=data,
        image=image,
        text=text,
        tasks=task,
        keys=key,
        image_dir=image_dir,
        split=split,
        split_column=split_column,
        max_image_pixels=max_image_pixels,
        label_separator=label_separator,
    )
    table = chosen_rows(source, config)
    check_output_file(output, overwrite, files_read(directory, table))
    for number in row:
        if number > len(table):
            raise InputError(f"{table.name}: row {number} is past the last of {len(table)}: choose --row up to that")
    chosen, _ = check_rows(table.select([number - 1 for number in row]))
    views = explain_rows(classifier.engine, chosen, classifier.decisions)
    for view, number in zip(views, row, strict=True):
        view.row = number
    summary = {"model": str(directory), "data": f"{table.name}, split {split}"}
    render_explanation(views, output, "What the model looked at", summary)
    out.print(f"explanation: {output}", soft_wrap=True, highlight=False)

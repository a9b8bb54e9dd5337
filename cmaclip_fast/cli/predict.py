"""`cmaclip predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmaclip_fast import signals
from cmaclip_fast.cli.options import (
    MAX_PIXELS,
    BadRows,
    BadRowsOption,
    BatchOption,
    DataOption,
    DeviceOption,
    EngineName,
    ImageDirOption,
    ImageOption,
    KeyOption,
    MinPrecisionOption,
    ModelArgument,
    PixelsOption,
    SplitColumnOption,
    TextOption,
    device_name,
)
from cmaclip_fast.cli.output import err, out
from cmaclip_fast.cli.trained import chosen_rows
from cmaclip_fast.data.source import Source
from cmaclip_fast.signals import exit_code


def predict(
    directory: ModelArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Parquet file to write.")],
    image: ImageOption = None,
    text: TextOption = None,
    key: KeyOption = None,
    split: Annotated[str, typer.Option(help="Split to use; `all` for every row.")] = "all",
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    on_bad_rows: BadRowsOption = BadRows.error,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
    engine: Annotated[
        EngineName, typer.Option(help="`local`: this process; `ray`: a Ray cluster (RAY_ADDRESS).")
    ] = EngineName.local,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers [default: one per GPU, or per machine].")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run; the result is the same.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    min_precision: MinPrecisionOption = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Print how busy the model was, and what it waited for.")
    ] = False,
) -> None:
    """Predict a table and write Parquet: per task label, status, probability, top five classes and modality weights.

    The status is `accepted` or `unsure`; an unsure row has no label, and its best class is the first of the top five.

    Results are saved every 512 rows; after an interruption, `--resume` continues with the remaining rows.

    Example: `cmaclip predict runs/clipart --data openclipart --split test --key id --output labels.parquet`
    """
    from cmaclip_fast.classifier.artifact import load_config
    from cmaclip_fast.classifier.bulk import BulkRun, predict_table
    from cmaclip_fast.files import check_output_file

    check_output_file(output, overwrite)
    config = load_config(directory)
    source = Source(
        data=data,
        image=image,
        text=text,
        tasks=[],
        keys=key,
        image_dir=image_dir,
        split=split,
        split_column=split_column,
        on_bad_rows=on_bad_rows.value,
        max_image_pixels=max_image_pixels,
    )
    bulk = BulkRun(
        model=directory,
        table=chosen_rows(source, config),
        output=output,
        policy=on_bad_rows.value,
        batch_size=batch_size,
        device=None if device == "auto" else device if engine is EngineName.ray else device_name(device),
        engine=engine.value,
        workers=workers,
        resume=resume,
        overwrite=overwrite,
        profile=profile,
        min_precision=min_precision,
    )
    try:
        counts = predict_table(bulk, config.tasks, config.columns.taxonomies, err, config.columns.multi_label)
    except (KeyboardInterrupt, signals.Interrupted) as stop:
        err.print("interrupted: labelled rows are kept; resume with the same command and --resume")
        raise typer.Exit(exit_code(stop)) from None
    rows = counts.pop("rows")
    for kind, number in counts.items():
        err.print(f"{kind}: {number}", highlight=False)
    out.print(f"{rows} rows: {output}", soft_wrap=True, highlight=False)

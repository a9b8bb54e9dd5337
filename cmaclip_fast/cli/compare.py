"""`cmaclip compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cmaclip_fast import signals
from cmaclip_fast.cli.options import (
    MAX_PIXELS,
    BadRows,
    BadRowsOption,
    DeviceOption,
    ImageDirOption,
    ImageOption,
    ImageTowerOption,
    PixelsOption,
    SplitColumnOption,
    TaskOption,
    TextOption,
    TextTowerOption,
    parse_options,
)
from cmaclip_fast.cli.output import err, out
from cmaclip_fast.data.source import read_columns
from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError
from cmaclip_fast.signals import exit_code


def compare(
    data: Annotated[list[str], typer.Option(help="As for `train`. Repeat for several data sets.")],
    output: Annotated[Path, typer.Option(help="Output folder. Finished runs in it are reused.")],
    systems: Annotated[
        str | None, typer.Option(help="Comma-separated systems; the others are tested against the first.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated seeds; two or more give standard deviations.")] = "0,1,2",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows, small images, short training.")] = False,
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    model: Annotated[str, typer.Option(help="Towers of all systems: `tiny`, or an open_clip model name.")] = "tiny",
    pretrained: Annotated[str | None, typer.Option(help="open_clip pretrained tag, or a checkpoint file.")] = None,
    text_tower: TextTowerOption = None,
    image_tower: ImageTowerOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs, the same for all systems.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Maximum training rows.")] = None,
    test_rows: Annotated[int | None, typer.Option(min=1, help="Maximum test rows.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for `TrainingConfig`, or for systems that have the field, such as `depth=2`. Repeatable."
        ),
    ] = None,
    attempt: Annotated[
        list[str] | None,
        typer.Option(
            "--try", help="Setting to try, NAME=VALUE,…; the best one on the validation rows is used. Repeatable."
        ),
    ] = None,
    training_noise: Annotated[
        str | None, typer.Option(help="Noise to add to the training rows, as for `evaluate --noise`.")
    ] = None,
    train_on: Annotated[
        str | None, typer.Option(help="Train only on rows where COLUMN=VALUE, such as `language=en`; test on all.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Also report metrics for each value of this column.")] = None,
    folds: Annotated[
        list[str] | None,
        typer.Option(
            help="DATA=FILE, a CSV of keys and folds: seed N is tested on fold N and tuned on the next. Repeatable."
        ),
    ] = None,
    target_precision: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Precision at which recall and coverage are reported.")
    ] = 0.9,
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    on_bad_rows: BadRowsOption = BadRows.error,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep each run's model folder with its report.")
    ] = False,
    device: DeviceOption = "auto",
    jobs: Annotated[int, typer.Option(min=1, help="Parallel runs; they share the CPU cores.")] = 1,
) -> None:
    """Train systems with the same towers and budget, and compare them: tables, significance tests and noise curves.

    Finished runs are not repeated, so an interrupted comparison continues with the same command.

    Example: `cmaclip compare --data openclipart --output runs/compared --quick`

    Example: `cmaclip compare --data openclipart --systems cma-clip,clip,mmbt --seeds 0,1 --output runs/three`

    Example: `cmaclip compare --data emoji --try learning_rate=1e-3 --try learning_rate=2e-3 --output runs/tuned`
    """
    from cmaclip_fast.data.noise import parse_noise
    from cmaclip_fast.pages.comparison import write_page
    from cmaclip_fast.systems.presets import preset
    from cmaclip_fast.training import comparison as c

    names = tuple(name.strip() for name in systems.split(",")) if systems else c.SYSTEMS
    model_options, training_options = parse_options(option or [], names)
    if quick:
        model_options = {**preset(model).quick, **model_options}
        training_options = {**c.QUICK_TRAINING, **training_options}
    training_options |= {} if epochs is None else {"epochs": epochs}
    towers = {"text_tower": text_tower, "image_tower": image_tower}
    model_options |= {name: value for name, value in towers.items() if value is not None}
    limits = dict(c.QUICK_ROWS) if quick else {}
    limits |= {split: most for split, most in (("train", rows), ("test", test_rows)) if most is not None}
    tries = tuple(
        c.Try(spec, *parse_options([pair.strip() for pair in spec.split(",")], names, "--try"))
        for spec in attempt or []
    )
    tables = {
        Path(source).name: read_columns(
            source,
            image=image,
            text=text,
            tasks=task,
            image_dir=image_dir,
            max_image_pixels=max_image_pixels,
            split_column=split_column,
        )
        for source in data
    }
    if len(tables) < len(data):
        raise InputError("--data: two have the same name: rename one")
    comparison = c.Comparison(
        tables=tables,
        output=output,
        systems=names,
        seeds=_numbers(seeds),
        model=model,
        pretrained=pretrained,
        model_options=model_options,
        training_options=training_options,
        tries=tries,
        kinds=c.QUICK_KINDS if quick else c.Comparison.kinds,
        training_noise=None if training_noise is None else parse_noise(training_noise),
        train_on=None if train_on is None else _column_value(train_on),
        by=by,
        rows=limits or None,
        folds=_folds(folds or [], tables),
        target_precision=target_precision,
        on_bad_rows=on_bad_rows.value,
        keep_models=keep_models,
        device=device,
    )
    try:
        records = c.compare(comparison, err, jobs=jobs)
    except (KeyboardInterrupt, signals.Interrupted) as stop:
        err.print("interrupted: finished runs are kept; resume with the same command")
        raise typer.Exit(exit_code(stop)) from None
    page = write_page(records, output, " ".join(["cmaclip", *map(shlex.quote, sys.argv[1:])]), target_precision)
    out.print(page.read_text(encoding="utf-8"), highlight=False, soft_wrap=True)
    out.print(f"page: {page}", soft_wrap=True, highlight=False)


def _folds(given: list[str], tables: dict[str, Table]) -> dict[str, list[int]]:
    from cmaclip_fast.data.folds import read_folds

    found = {}
    for spec in given:
        name, _, path = spec.partition("=")
        if name not in tables or not path:
            raise InputError(f"--folds {spec}: give DATA=FILE, where DATA is one of {', '.join(tables)}")
        found[name] = read_folds(Path(path), tables[name])
    return found


def _column_value(text: str) -> tuple[str, str]:
    column, equals, value = text.partition("=")
    if not (column and equals and value):
        raise InputError(f"--train-on {text}: give COLUMN=VALUE, such as language=en")
    return column, value


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (-1,)
    if min(numbers) < 0:
        raise InputError(f"--seeds {text}: give whole numbers from 0 up, with commas, such as 0,1,2")
    return numbers

"""`cmaclip evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cmaclip_fast.cli.options import (
    MAX_PIXELS,
    BadRows,
    BadRowsOption,
    BatchOption,
    DeviceOption,
    ImageDirOption,
    ImageOption,
    LabelSeparatorOption,
    MinPrecisionOption,
    ModelArgument,
    PixelsOption,
    SplitColumnOption,
    TaskOption,
    TextOption,
    device_name,
)
from cmaclip_fast.cli.output import (
    absence_table,
    decisions_table,
    err,
    groups_table,
    hierarchies_table,
    metrics_table,
    out,
)
from cmaclip_fast.cli.trained import checked_rows, examples_of, files_read, load
from cmaclip_fast.data.source import Source
from cmaclip_fast.errors import InputError, listed


def evaluate(
    directory: ModelArgument,
    data: Annotated[str | None, typer.Option(help="As for `train` [default: the training data].")] = None,
    split: Annotated[str, typer.Option(help="Split to use; `all` for every row.")] = "test",
    noise: Annotated[
        list[str] | None,
        typer.Option(
            help="Noise to add, KIND:LEVEL, such as `text-replace:0.5` (share of rows, or strength). Repeatable."
        ),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Also report metrics for each value of this column.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the metrics to this JSON file.")] = None,
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    label_separator: LabelSeparatorOption = None,
    min_precision: MinPrecisionOption = None,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown-classes", help="Ignore rows whose class the model does not know.")
    ] = False,
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    on_bad_rows: BadRowsOption = BadRows.error,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Compute metrics on labelled rows, and check whether the accepted answers are as precise as promised.

    Example: `cmaclip evaluate runs/clipart --split test --noise text-drop:0.5 --json metrics.json`

    Example: `cmaclip evaluate runs/emoji --data emoji:all --by language`
    """
    from cmaclip_fast.data.files import near
    from cmaclip_fast.data.noise import add_noise, parse_noise
    from cmaclip_fast.evaluation.evaluate import VIEWS, classify
    from cmaclip_fast.files import check_output_file, write_json

    if json_file is not None:
        check_output_file(json_file, overwrite=True)
    classifier, config = load(directory, device, min_precision)
    model, decisions = classifier.engine, classifier.decisions
    assert decisions is not None  # of a loaded model
    source = Source(
        data=data,
        image=image,
        text=text,
        tasks=task,
        image_dir=image_dir,
        split=split,
        split_column=split_column,
        on_bad_rows=on_bad_rows.value,
        max_image_pixels=max_image_pixels,
        label_separator=label_separator,
    )
    table, counts = checked_rows(source, config)
    if json_file is not None:
        check_output_file(json_file, overwrite=True, inputs=files_read(directory, table))
    if by is not None and by not in (names := table.column_names):
        raise InputError(f"--by {by}: {table.name} has no such column{near(by, names)}: {listed(names)}")
    for spec in noise or []:
        table = add_noise(table, parse_noise(spec))
    examples = examples_of(model, table, "ignore" if ignore_unknown else "error", task)
    counts |= {f"unknown class of {name}": number for name, number in examples.ignored.items() if number}
    if examples.truncated:
        counts["truncated text"] = examples.truncated
    target = device_name(device)
    precision = decisions.target_precision
    told: dict[str, Any] = {}
    headlines: dict[str, dict[str, dict[str, float]]] = {}
    groups: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for view in VIEWS:
        answers = classify(model, examples, batch_size, target, view, f"evaluating, {view}", decisions.calibrations)
        if view == "both":
            told["decisions"] = {task: kept.record() for task, kept in decisions.promises(answers).items()}
            told["calibration"] = {task: of.record() for task, of in answers.reliabilities().items()}
            told["not_applicable"] = answers.not_applicable(model.applies)
            told["hierarchies"] = decisions.hierarchies(answers)
        headlines[view] = answers.headlines(precision)
        for group, part in ({} if by is None else answers.by_value(examples.table.labels(by))).items():
            groups.setdefault(group, {})[view] = part.headlines(precision)
    if not any(m["rows"] for m in headlines["both"].values()):
        raise InputError(f"{examples.table.name}: no labelled row in split '{split}': name another --split or --task")
    if json_file is not None:
        record = {"tasks": headlines["both"], "views": headlines, **told, "counts": counts}
        write_json(json_file, record | ({} if by is None else {"by": {by: groups}}))
    out.print(metrics_table(headlines, precision))
    out.print(decisions_table(told["decisions"], told["calibration"]))
    if told["not_applicable"]:
        out.print(absence_table(told["not_applicable"]))
    if told["hierarchies"]:
        out.print(hierarchies_table(told["hierarchies"]))
    if by is not None:
        out.print(groups_table(groups, by))
    for kind, number in counts.items():
        err.print(f"{kind}: {number}", highlight=False)

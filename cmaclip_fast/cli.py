"""The `cmaclip` command: reads arguments, calls the package, prints."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markdown import Markdown
from rich.table import Table as RichTable

from cmaclip_fast import signals
from cmaclip_fast.errors import InputError, clipped, listed, one_line
from cmaclip_fast.progress import Console

if TYPE_CHECKING:
    from cmaclip_fast.artifact import ArtifactConfig
    from cmaclip_fast.classifier.engine import Engine
    from cmaclip_fast.data.examples import Examples
    from cmaclip_fast.data.named import Columns, Taxonomy
    from cmaclip_fast.data.table import Table

app = typer.Typer(
    help="Classify image-text pairs with CMA-CLIP: train, compare, evaluate, predict, explain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Look at data sets and build them.", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(data_app, name="data")

out = Console()
err = Console(stderr=True)


class BadRows(str, Enum):
    """What a bad row leads to."""

    error = "error"
    skip = "skip"
    mask = "mask"


class EngineName(str, Enum):
    """Where rows are labelled."""

    local = "local"
    ray = "ray"


class Vectors(str, Enum):
    """Whether a task has one keyless vector, or one for each modality."""

    task = "task"
    task_and_modality = "task-and-modality"


DataOption = Annotated[
    str,
    typer.Option(
        help="A name of `cmaclip data list`, a CSV, TSV, JSONL or Parquet file, a glob of them, a folder of pictures."
    ),
]
ImageOption = Annotated[str | None, typer.Option(help="Column of pictures: paths or bytes.")]
TextOption = Annotated[str | None, typer.Option(help="Column of texts.")]
TaskOption = Annotated[list[str] | None, typer.Option(help="Column of labels; repeat for several tasks.")]
TaxonomyOption = Annotated[
    list[str] | None,
    typer.Option(help="Column of class paths, such as 'Apparel > Dresses': a task for each level; repeat."),
]
SeparatorOption = Annotated[str, typer.Option(help="Between the names of a path of --taxonomy.")]
KeyOption = Annotated[list[str] | None, typer.Option(help="Column that names a row; repeat for several.")]
ImageDirOption = Annotated[Path | None, typer.Option(help="Folder that paths of pictures start from [the table's].")]
SplitColumnOption = Annotated[str | None, typer.Option(help="Column with train, validation, test [`split`, if any].")]
BadRowsOption = Annotated[
    BadRows, typer.Option(help="A bad row ends the run, is left out, or (its picture) is taken for absent.")
]
PixelsOption = Annotated[int, typer.Option(min=1, help="Pictures of more pixels than this are refused.")]
DeviceOption = Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`; `auto` takes a GPU if there is one.")]
TextTowerOption = Annotated[
    str | None, typer.Option(help="Folder with a Hugging Face encoder, in place of the model's text tower.")
]
ImageTowerOption = Annotated[
    str | None, typer.Option(help="NAME or NAME:WEIGHTS of a timm model, in place of the model's image tower.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
ModelArgument = Annotated[Path, typer.Argument(help="A folder that `cmaclip train` wrote.")]

MAX_PIXELS = 50_000_000

CELL = 300
"""The most characters of a cell that `data show` prints."""

SHOWN_GROUPS = 100
"""The most values of the column of `evaluate --by` that are printed; --json has all of them."""


@app.command()
def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, compiler, toolkit, GPUs, and which backends this machine can run, or why not.

    Example: `cmaclip env`
    """
    from cmaclip_fast import env as environment

    out.print(
        json.dumps(environment.as_dict(), indent=2) if as_json else environment.as_text(),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _recipe(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the options of a recipe the defaults of the command; what the command line says goes before."""
    if file is not None:
        from cmaclip_fast.recipes import read_recipe

        context.default_map = read_recipe(file, {parameter.name or "" for parameter in context.command.params})
    return file


@app.command()
def train(
    data: DataOption,
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    recipe: Annotated[
        Path | None,
        typer.Option(is_eager=True, callback=_recipe, help="YAML file of options; those given here go before."),
    ] = None,
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    system: Annotated[
        str, typer.Option(help="`cma-clip`, or another of docs/systems.md, such as `mmbt`.")
    ] = "cma-clip",
    taxonomy: TaxonomyOption = None,
    separator: SeparatorOption = " > ",
    model: Annotated[str, typer.Option(help="`tiny`, or an open_clip model name such as ViT-B-32.")] = "tiny",
    pretrained: Annotated[str | None, typer.Option(help="An open_clip tag, or a checkpoint file.")] = None,
    text_tower: TextTowerOption = None,
    image_tower: ImageTowerOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training rows.")] = None,
    contrastive_epochs: Annotated[
        int | None, typer.Option(min=0, help="Passes with CLIP's own loss before the tasks.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate of the new layers.")] = None,
    tower_learning_rate: Annotated[float | None, typer.Option(help="Peak rate of the towers.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=0, help="Stop after so many epochs without gain; 0: never.")
    ] = None,
    sequence_attention: Annotated[bool, typer.Option(help="Off: the paper's first ablation.")] = True,
    modality_attention: Annotated[bool, typer.Option(help="Off: the paper's second ablation.")] = True,
    vectors: Annotated[Vectors, typer.Option(help="Keyless vectors of modality attention.")] = Vectors.task,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of the system's options or of `TrainingConfig`, such as `depth=3`; repeat."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Repeats a run exactly on a CPU.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load data.")] = 0,
    mixed_precision: Annotated[str, typer.Option(help="`no`, `bf16` or `fp16`.")] = "no",
    precision: Annotated[float, typer.Option(min=0.01, max=1.0, help="Target of recall at a precision.")] = 0.9,
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    key: KeyOption = None,
    on_bad_rows: BadRowsOption = BadRows.error,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that did not end.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
) -> None:
    """Train a model and write its folder: weights, thresholds, metrics and a report.

    Example: `cmaclip train --data openclipart --output runs/clipart`

    Example: `cmaclip train --data dresses.csv --image file --text title --task colour --task style
    --model ViT-B-32 --pretrained laion2b_s34b_b79k --output runs/dresses`

    Example: `cmaclip train --recipe recipes/upmc-food101.yaml --data upmc-food101:FOLDER --output runs/food`
    """
    from cmaclip_fast.data.named import Taxonomy
    from cmaclip_fast.training import TrainingRun
    from cmaclip_fast.training import train as run_training

    if not separator.strip():
        raise InputError("--separator: is empty: give what stands between the names of a path, such as '>' or '/'")
    taxonomies = tuple(Taxonomy(column, separator) for column in taxonomy or [])
    table = _read(data, image, text, task, key, image_dir, max_image_pixels, split_column, taxonomies=taxonomies)
    model_options, training_options = _options(option or [], [system])
    if not sequence_attention:
        model_options["sequence_attention"] = False
    if not modality_attention:
        model_options["modality_attention"] = False
    if vectors is not Vectors.task:
        model_options["vectors"] = vectors.value
    towers = {"text_tower": text_tower, "image_tower": image_tower}
    model_options |= {name: value for name, value in towers.items() if value is not None}
    training_options |= {"seed": seed, "workers": workers, "mixed_precision": mixed_precision}
    given = {
        "epochs": epochs,
        "contrastive_epochs": contrastive_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "tower_learning_rate": tower_learning_rate,
        "patience": patience,
    }
    training_options |= {name: value for name, value in given.items() if value is not None}
    run = TrainingRun(
        table,
        output,
        system,
        model,
        pretrained,
        model_options,
        training_options,
        split_column,
        on_bad_rows.value,
        precision,
        overwrite,
        resume,
    )
    try:
        result = run_training(run, err)
    except (KeyboardInterrupt, signals.Interrupted) as stop:
        err.print("interrupted: finished epochs are kept; resume with the same command and --resume")
        raise typer.Exit(_exit_code(stop)) from None
    out.print(metrics_table(result.metrics, precision))
    out.print(f"report: {result.directory / 'report.html'}", soft_wrap=True)


@app.command()
def evaluate(
    directory: ModelArgument,
    data: Annotated[str | None, typer.Option(help="As for `train` [the training data].")] = None,
    split: Annotated[str, typer.Option(help="Which rows; `all` for every row.")] = "test",
    noise: Annotated[
        list[str] | None,
        typer.Option(help="KIND:LEVEL, a share of rows or a strength, such as `text-replace:0.5`; repeat."),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Column whose values are also measured one by one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    precision: Annotated[float, typer.Option(min=0.01, max=1.0, help="Target of recall at a precision.")] = 0.9,
    ignore_unknown: Annotated[
        bool, typer.Option("--ignore-unknown-classes", help="Leave out labels that the model does not know.")
    ] = False,
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    on_bad_rows: BadRowsOption = BadRows.error,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Measure a model on labelled rows.

    Example: `cmaclip evaluate runs/clipart --split test --noise text-drop:0.5 --json metrics.json`

    Example: `cmaclip evaluate runs/emoji --data emoji:all --by language`
    """
    from cmaclip_fast.data.files import near
    from cmaclip_fast.data.noise import add_noise, parse_noise
    from cmaclip_fast.evaluation import VIEWS, classify
    from cmaclip_fast.files import check_output_file, write_json

    if json_file is not None:
        check_output_file(json_file, overwrite=True)
    model, config = _load(directory, device)
    source = Source(data, image, text, task, None, image_dir, split, split_column, on_bad_rows, max_image_pixels)
    table, counts = source.rows(config)
    if json_file is not None:
        check_output_file(json_file, overwrite=True, inputs=_read_files(directory, table))
    if by is not None and by not in (names := table.column_names):
        raise InputError(f"--by {by}: {table.name} has no such column{near(by, names)}: {listed(names)}")
    for spec in noise or []:
        table = add_noise(table, parse_noise(spec))
    examples = _examples(model, table, "ignore" if ignore_unknown else "error", task)
    counts |= {f"unknown class of {name}": number for name, number in examples.ignored.items() if number}
    if examples.truncated:
        counts["truncated text"] = examples.truncated
    target = _device(device)
    headlines: dict[str, dict[str, dict[str, float]]] = {}
    groups: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for view in VIEWS:
        answers = classify(model, examples, batch_size, target, view, f"evaluating, {view}")
        headlines[view] = answers.headlines(precision)
        for group, part in ({} if by is None else answers.by_value(examples.table.labels(by))).items():
            groups.setdefault(group, {})[view] = part.headlines(precision)
    if not any(m["rows"] for m in headlines["both"].values()):
        raise InputError(f"{examples.table.name}: no labelled row in split '{split}': name another --split or --task")
    if json_file is not None:
        told = {"tasks": headlines["both"], "views": headlines, "counts": counts}
        write_json(json_file, told | ({} if by is None else {"by": {by: groups}}))
    out.print(metrics_table(headlines, precision))
    if by is not None:
        out.print(groups_table(groups, by))
    for kind, number in counts.items():
        err.print(f"{kind}: {number}", highlight=False)


@app.command()
def predict(
    directory: ModelArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="The Parquet file to write.")],
    image: ImageOption = None,
    text: TextOption = None,
    key: KeyOption = None,
    split: Annotated[str, typer.Option(help="Which rows; `all` for every row.")] = "all",
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    on_bad_rows: BadRowsOption = BadRows.error,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
    engine: Annotated[
        EngineName, typer.Option(help="This process, or a Ray cluster (RAY_ADDRESS).")
    ] = EngineName.local,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Models side by side with Ray [one for each GPU, or machine].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that did not end.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Label rows: per task the label, its probability, the top five and the modality weights, as Parquet.

    Rows are labelled part by part; after an interruption `--resume` goes on with what is left.

    Example: `cmaclip predict runs/clipart --data openclipart --split test --key id --output labels.parquet`
    """
    from cmaclip_fast.artifact import load_config
    from cmaclip_fast.bulk import BulkRun, predict_table
    from cmaclip_fast.files import check_output_file

    check_output_file(output, overwrite)
    config = load_config(directory)
    source = Source(data, image, text, [], key, image_dir, split, split_column, on_bad_rows, max_image_pixels)
    bulk = BulkRun(
        directory,
        source.unchecked(config),
        output,
        on_bad_rows.value,
        batch_size,
        None if device == "auto" else device if engine is EngineName.ray else _device(device),
        engine.value,
        workers,
        resume,
        overwrite,
    )
    try:
        counts = predict_table(bulk, config.tasks, err)
    except (KeyboardInterrupt, signals.Interrupted) as stop:
        err.print("interrupted: labelled rows are kept; resume with the same command and --resume")
        raise typer.Exit(_exit_code(stop)) from None
    rows = counts.pop("rows")
    for kind, number in counts.items():
        err.print(f"{kind}: {number}", highlight=False)
    out.print(f"{rows} rows: {output}", soft_wrap=True, highlight=False)


@app.command()
def explain(
    directory: ModelArgument,
    row: Annotated[list[int], typer.Option(min=1, help="Row of the split, counted from 1; repeat.")],
    output: Annotated[Path, typer.Option(help="The HTML page to write.")],
    data: Annotated[str | None, typer.Option(help="As for `train` [the training data].")] = None,
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    key: KeyOption = None,
    split: Annotated[str, typer.Option(help="Which rows; `all` for every row.")] = "test",
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing page.")] = False,
) -> None:
    """Show what the model looked at in single rows: modality weights and attention maps.

    Example: `cmaclip explain runs/clipart --row 1 --row 7 --output rows.html`
    """
    from cmaclip_fast.data.check import check_rows
    from cmaclip_fast.explanation import explain as explain_rows
    from cmaclip_fast.files import check_output_file
    from cmaclip_fast.report import render_explanation

    check_output_file(output, overwrite)
    model, config = _load(directory, device)
    source = Source(data, image, text, task, key, image_dir, split, split_column, BadRows.error, max_image_pixels)
    table = source.unchecked(config)
    check_output_file(output, overwrite, _read_files(directory, table))
    for number in row:
        if number > len(table):
            raise InputError(f"{table.name}: row {number} is past the last of {len(table)}: choose --row up to that")
    chosen, _ = check_rows(table.select([number - 1 for number in row]))
    views = explain_rows(model, chosen)
    for view, number in zip(views, row, strict=True):
        view.row = number
    summary = {"model": str(directory), "data": f"{table.name}, split {split}"}
    render_explanation(views, output, "What the model looked at", summary)
    out.print(f"explanation: {output}", soft_wrap=True, highlight=False)


@app.command()
def compare(
    data: Annotated[list[str], typer.Option(help="As for `train`; repeat for several data sets.")],
    output: Annotated[
        Path, typer.Option(help="The folder for records and the page; an interrupted one is gone on with.")
    ],
    systems: Annotated[str | None, typer.Option(help="Names, with commas; the first is tested against.")] = None,
    seeds: Annotated[str, typer.Option(help="Numbers, with commas; at least two give deviations.")] = "0,1,2",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows, small pictures, a short training.")] = False,
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    model: Annotated[str, typer.Option(help="Towers of all systems: `tiny`, or an open_clip model name.")] = "tiny",
    pretrained: Annotated[str | None, typer.Option(help="An open_clip tag, or a checkpoint file.")] = None,
    text_tower: TextTowerOption = None,
    image_tower: ImageTowerOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training rows, the same for all.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most so many training rows.")] = None,
    test_rows: Annotated[int | None, typer.Option(min=1, help="At most so many test rows.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of `TrainingConfig`, or of the systems that have it, such as `depth=2`; repeat."),
    ] = None,
    attempt: Annotated[
        list[str] | None,
        typer.Option("--try", help="NAME=VALUE,…: a setting to try; repeat. The best by validation is taken."),
    ] = None,
    training_noise: Annotated[
        str | None, typer.Option(help="KIND:LEVEL, damage to the training rows, as for `evaluate --noise`.")
    ] = None,
    train_on: Annotated[
        str | None, typer.Option(help="COLUMN=VALUE: train on these rows alone, such as `language=en`; test on all.")
    ] = None,
    by: Annotated[str | None, typer.Option(help="Column whose values are also measured one by one.")] = None,
    precision: Annotated[float, typer.Option(min=0.01, max=1.0, help="Target of recall at a precision.")] = 0.9,
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    on_bad_rows: BadRowsOption = BadRows.error,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep each run's folder, with its report.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each on its share of the cores.")] = 1,
) -> None:
    """Compare systems on data sets, with the same towers and training for all: tables, tests and curves on one page.

    Finished runs are not repeated: the same command goes on where it stopped.

    Example: `cmaclip compare --data openclipart --output runs/compared --quick`

    Example: `cmaclip compare --data openclipart --systems cma-clip,clip,mmbt --seeds 0,1 --output runs/three`

    Example: `cmaclip compare --data emoji --try learning_rate=1e-3 --try learning_rate=2e-3 --output runs/tuned`
    """
    from cmaclip_fast import comparison as c
    from cmaclip_fast.comparison_page import write_page
    from cmaclip_fast.data.noise import parse_noise

    names = tuple(name.strip() for name in systems.split(",")) if systems else c.SYSTEMS
    model_options, training_options = _options(option or [], names)
    if quick:
        model_options = {**(c.QUICK_MODEL if model == "tiny" else {}), **model_options}
        training_options = {**c.QUICK_TRAINING, **training_options}
    training_options |= {} if epochs is None else {"epochs": epochs}
    towers = {"text_tower": text_tower, "image_tower": image_tower}
    model_options |= {name: value for name, value in towers.items() if value is not None}
    limits = dict(c.QUICK_ROWS) if quick else {}
    limits |= {split: most for split, most in (("train", rows), ("test", test_rows)) if most is not None}
    tries = tuple(
        c.Try(spec, *_options([pair.strip() for pair in spec.split(",")], names, "--try")) for spec in attempt or []
    )
    comparison = c.Comparison(
        {
            Path(source).name: _read(source, image, text, task, None, image_dir, max_image_pixels, split_column)
            for source in data
        },
        output,
        names,
        _numbers(seeds),
        model,
        pretrained,
        model_options,
        training_options,
        tries,
        c.QUICK_KINDS if quick else c.Comparison.kinds,
        None if training_noise is None else parse_noise(training_noise),
        None if train_on is None else _column_value(train_on),
        by,
        limits or None,
        precision,
        on_bad_rows.value,
        keep_models,
    )
    if len(comparison.tables) < len(data):
        raise InputError("--data: two have the same name: rename one")
    try:
        records = c.compare(comparison, err, jobs=jobs)
    except (KeyboardInterrupt, signals.Interrupted) as stop:
        err.print("interrupted: finished runs are kept; resume with the same command")
        raise typer.Exit(_exit_code(stop)) from None
    page = write_page(records, output, " ".join(["cmaclip", *map(shlex.quote, sys.argv[1:])]), precision)
    out.print(page.read_text(encoding="utf-8"), highlight=False, soft_wrap=True)
    out.print(f"page: {page}", soft_wrap=True, highlight=False)


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


@app.command()
def bench(
    output: Annotated[Path, typer.Option(help="Folder of page, numbers and picture.")] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Three minutes instead of 45.")] = False,
    only: Annotated[
        str, typer.Option(help="Only what has this in its name; after a `/`, only systems with that in theirs.")
    ] = "",
    device: DeviceOption = "cpu",
    dtype: Annotated[str | None, typer.Option(help="`float32`, `bfloat16` [on a GPU], `float16`.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU [PyTorch's choice].")] = None,
    floors: Annotated[Path | None, typer.Option(help="File of floors: a ratio below its floor fails the run.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Set the floors by this run instead.")] = False,
) -> None:
    """Time the model against what people run today: the plain implementation, torch.compile, transformers, ONNX.

    Example: `cmaclip bench --quick`

    Example: `cmaclip bench --only 'ViT-B-32, inference at batch 32/o' --threads 2`
    """
    from cmaclip_fast.bench.results import BenchmarkError
    from cmaclip_fast.bench.run import Options, benchmark

    options = Options(output, quick, only, _device(device), dtype, threads, floors, record)
    try:
        benchmark(options, err)
    except BenchmarkError as error:
        err.print(f"error: {one_line(str(error))}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from None
    out.print((output / "performance.md").read_text(encoding="utf-8"), soft_wrap=True, highlight=False)


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
    name: Annotated[str, typer.Argument(help="`emoji`.")],
    output: Annotated[
        Path | None, typer.Option(help="The folder to write [where `--data NAME` reads; CMACLIP_DATA moves it].")
    ] = None,
    languages: Annotated[str, typer.Option(help="Languages of the texts, such as `en,de,ja`, or `all`.")] = "all",
    packages: Annotated[
        Path | None, typer.Option(help="Folder with the packages' tarballs, instead of the npm client.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Fetch the parts of a data set with the npm client, check them, and write it as Parquet.

    Example: `cmaclip data build emoji`
    """
    from cmaclip_fast.data.emoji import build_emoji, from_folder
    from cmaclip_fast.data.files import near
    from cmaclip_fast.data.named import NAMED

    buildable = [entry.name for entry in NAMED.values() if entry.built]
    if name not in buildable:
        raise InputError(f"{name}: is not built{near(name, buildable)}: choose {', '.join(buildable)}")
    chosen = None if languages == "all" else languages.split(",")
    with err.status("building") as status:
        fetch = None if packages is None else from_folder(packages)
        path = build_emoji(output, chosen, overwrite, fetch, report=status.update)
    out.print(f"{name}: {path}", soft_wrap=True, highlight=False)


@data_app.command("show")
def data_show(
    name: Annotated[str, typer.Argument(help="A name of `cmaclip data list`, or a file or folder.")],
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    image_dir: ImageDirOption = None,
) -> None:
    """Show rows, columns, classes and texts of a data set, and its card.

    Example: `cmaclip data show openclipart`
    """
    from cmaclip_fast.data.catalog import describe

    found = describe(_read(name, image, text, task, None, image_dir, MAX_PIXELS))
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


def metrics_table(metrics: dict[str, dict[str, dict[str, float]]], precision: float) -> RichTable:
    """Per task and view: accuracy, macro-F1 and recall at the target precision."""
    table = RichTable("task", "given", "accuracy", "macro F1", f"recall at {precision:.0%} precision", "rows", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for task in next(iter(metrics.values())):
        for view, tasks in metrics.items():
            m = tasks[task]
            numbers = [f"{m[k]:.3f}" for k in ("accuracy", "macro_f1", "recall_at_precision")]
            table.add_row(clipped(task), view, *numbers, f"{m['rows']:.0f}", style="bold" if view == "both" else None)
    return table


def groups_table(groups: dict[str, dict[str, dict[str, dict[str, float]]]], column: str) -> RichTable:
    """Each task's accuracy with both modalities, for each value of a column: the values with the most rows."""
    tasks = list(next(iter(groups.values()))["both"])
    table = RichTable(clipped(column), *(f"{clipped(task)} accuracy" for task in tasks), "rows", box=None)
    for number in table.columns[1:]:
        number.justify = "right"

    def rows(value: str) -> float:
        return max(m["rows"] for m in groups[value]["both"].values())

    largest = set(sorted(groups, key=rows, reverse=True)[:SHOWN_GROUPS])
    for value in (value for value in groups if value in largest):
        measured = groups[value]["both"]
        numbers = [f"{measured[task]['accuracy']:.3f}" if measured[task]["rows"] else "-" for task in tasks]
        table.add_row(clipped(value), *numbers, f"{rows(value):.0f}")
    if len(groups) > len(largest):
        table.caption = f"the {len(largest)} values of {len(groups):,} with the most rows; --json has them all"
    return table


def _read(
    data: str,
    image: str | None,
    text: str | None,
    tasks: list[str] | None,
    keys: list[str] | None,
    image_dir: Path | None,
    max_image_pixels: int,
    split_column: str | None = None,
    split: str | None = None,
    any_columns: bool = False,
    taxonomies: tuple[Taxonomy, ...] = (),
) -> Table:
    from cmaclip_fast.data.named import Columns
    from cmaclip_fast.data.table import read_table

    columns = Columns(image, text, tuple(tasks or ()), tuple(keys or ()), split_column, taxonomies)
    return read_table(
        data, columns, image_dir=image_dir, split=split, max_image_pixels=max_image_pixels, any_columns=any_columns
    )


def _options(
    pairs: list[str], systems: Sequence[str], option: str = "--option"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`NAME=VALUE` strings, sorted into the options of any of the systems and of training."""
    from cmaclip_fast.fitting import TrainingConfig
    from cmaclip_fast.systems import find_system

    fields = {name for system in systems for name in find_system(system)[0].Config.model_fields}
    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    own = {"name", "seed", "workers", "mixed_precision", "sequence_attention", "modality_attention", "vectors"}
    known = {*fields, *TrainingConfig.model_fields} - own - {"text_tower", "image_tower", "clip"}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise InputError(f"{option} '{pair}': give NAME=VALUE with NAME one of {', '.join(sorted(known))}")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        (model if name in fields else training)[name] = parsed
    return model, training


def _device(name: str) -> str:
    from cmaclip_fast.classifier.engine import choose_device

    return str(choose_device(name))


def _read_files(directory: Path, table: Table) -> list[Path]:
    """What a command reads that runs an artefact on a table, and so must not write."""
    from cmaclip_fast.artifact import FILES

    return [*table.files, *(directory / name for name in FILES)]


def _load(directory: Path, device: str) -> tuple[Engine, ArtifactConfig]:
    from cmaclip_fast.artifact import load_config
    from cmaclip_fast.classifier.classifier import Classifier

    return Classifier.load(directory, device).engine, load_config(directory)


@dataclass(frozen=True)
class Source:
    """The rows that a trained model is to be run on, as the command line names them."""

    data: str | None
    image: str | None
    text: str | None
    tasks: list[str] | None
    keys: list[str] | None
    image_dir: Path | None
    split: str
    split_column: str | None
    on_bad_rows: BadRows
    max_image_pixels: int

    def rows(self, config: ArtifactConfig) -> tuple[Table, dict[str, int]]:
        """The checked rows, and how many were bad in what way; what is not named is as in training."""
        from cmaclip_fast.data.check import check_rows

        table = self.unchecked(config)
        checked, counts = check_rows(table, self.on_bad_rows.value)
        return checked, counts

    def unchecked(self, config: ArtifactConfig) -> Table:
        """The rows of the split, pictures not yet read. Training data are split as they were for training."""
        from cmaclip_fast.data.named import Columns, absolute
        from cmaclip_fast.data.split import NAMES, split_table

        known = config.columns
        again = self.data is None or absolute(self.data) == config.source
        source = self.data or config.source
        image_dir = self.image_dir or (Path(known.image_dir) if again and known.image_dir else None)
        split_column = self.split_column or (known.split if again else None)
        found = _read(source, None, None, None, None, image_dir, self.max_image_pixels, any_columns=True)
        columns = found.column_names
        image, text = (
            given or (name if name in columns else None)
            for given, name in ((self.image, known.image), (self.text, known.text))
        )
        for name, there in ((known.image, image), (known.text, text)):
            if name is not None and there is None:
                err.print(f"{source}: no column '{name}', which the model was trained with: taken for absent")
        taxonomies = tuple(taxonomy for taxonomy in known.taxonomies if again or taxonomy.column in columns)
        levels = {task for taxonomy in known.taxonomies for task in taxonomy.levels_in(known.tasks)}
        tasks = known.tasks if again else [task for task in self.tasks or known.tasks if self.tasks or task in columns]
        tasks = [task for task in tasks if task not in levels]

        used = Columns(image, text, tuple(tasks), tuple(self.keys or ()), split_column, taxonomies)
        table = found.with_columns(used)
        if self.split == "all":
            return table
        if again and self.split in NAMES:
            part = split_table(table, split_column=split_column, seed=config.training["seed"])[self.split]
            if len(part) == 0:
                raise InputError(f"{source}: no row of split '{self.split}': name another --split, or all")
            return part
        if table.columns.split is None:
            err.print(f"{source}: no split column: all {len(table)} rows are used")
            return table
        return found.with_columns(used, self.split)


def _examples(
    model: Engine, table: Table, unknown: Literal["error", "ignore"], tasks: list[str] | None = None
) -> Examples:
    from cmaclip_fast.data.examples import Examples
    from cmaclip_fast.data.files import near

    for task in tasks or []:
        if task not in model.tasks:
            raise InputError(f"--task {task}: the model has no such task{near(task, list(model.tasks))}")
    wanted = tasks or table.columns.tasks
    classes = {task: names for task, names in model.tasks.items() if task in wanted and task in table.columns.tasks}
    return Examples(table, classes, model.preprocessing, model.tokenizer, unknown=unknown)


def main() -> None:
    """The entry point: errors that a user can mend end with one line and exit code 2, signals with 128 + N."""
    try:
        with signals.handled():
            app()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        if error.errno == errno.ENOSPC:
            _fail(f"{error.filename or 'output'}: no space left on the device: free some, then resume with --resume")
        _fail(f"{error.filename or 'a file'}: {reason}: choose another path, or change its permissions")


def _exit_code(stop: KeyboardInterrupt | signals.Interrupted) -> int:
    return stop.number + 128 if isinstance(stop, signals.Interrupted) else 130


def _fail(message: str) -> None:
    err.print(f"error: {one_line(message)}", soft_wrap=True, highlight=False, markup=False)
    sys.exit(2)


if __name__ == "__main__":
    main()

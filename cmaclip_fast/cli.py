"""The `cmaclip` command: reads arguments, calls the package, prints."""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table as RichTable

from cmaclip_fast.errors import InputError

if TYPE_CHECKING:
    from cmaclip_fast.artifact import ArtifactConfig
    from cmaclip_fast.data.examples import Examples
    from cmaclip_fast.data.named import Columns
    from cmaclip_fast.data.table import Table
    from cmaclip_fast.model import CMACLIP

app = typer.Typer(
    help="Classify image-text pairs with CMA-CLIP: train, evaluate, predict, explain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(data_app, name="data")

out = Console(markup=False)
err = Console(markup=False, stderr=True)


class BadRows(str, Enum):
    """What a bad row leads to."""

    error = "error"
    skip = "skip"
    mask = "mask"


class Vectors(str, Enum):
    """Whether a task has one keyless vector, or one for each modality."""

    task = "task"
    task_and_modality = "task-and-modality"


DataOption = Annotated[
    str,
    typer.Option(help="`openclipart`, a CSV, TSV, JSONL or Parquet file, a glob of them, or a folder of pictures."),
]
ImageOption = Annotated[str | None, typer.Option(help="Column of pictures: paths or bytes.")]
TextOption = Annotated[str | None, typer.Option(help="Column of texts.")]
TaskOption = Annotated[list[str] | None, typer.Option(help="Column of labels; repeat for several tasks.")]
KeyOption = Annotated[list[str] | None, typer.Option(help="Column that names a row; repeat for several.")]
ImageDirOption = Annotated[Path | None, typer.Option(help="Folder that paths of pictures start from [the table's].")]
SplitColumnOption = Annotated[str | None, typer.Option(help="Column with train, validation, test [`split`, if any].")]
BadRowsOption = Annotated[
    BadRows, typer.Option(help="A bad row ends the run, is left out, or (its picture) is taken for absent.")
]
PixelsOption = Annotated[int, typer.Option(min=1, help="Pictures of more pixels than this are refused.")]
DeviceOption = Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`; `auto` takes a GPU if there is one.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
ModelArgument = Annotated[Path, typer.Argument(help="A folder that `cmaclip train` wrote.")]

MAX_PIXELS = 50_000_000


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


@app.command()
def train(
    data: DataOption,
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    model: Annotated[str, typer.Option(help="`tiny`, or an open_clip model name such as ViT-B-32.")] = "tiny",
    pretrained: Annotated[str | None, typer.Option(help="An open_clip tag, or a checkpoint file.")] = None,
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
        typer.Option(help="NAME=VALUE of `ModelConfig` or `TrainingConfig`, such as `depth=3`; repeat."),
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
    """
    from cmaclip_fast.training import TrainingRun
    from cmaclip_fast.training import train as run_training

    table = _read(data, image, text, task, key, image_dir, max_image_pixels, split_column)
    model_options, training_options = _options(option or [])
    model_options |= {
        "sequence_attention": sequence_attention,
        "modality_attention": modality_attention,
        "vectors": vectors.value,
    }
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
    except KeyboardInterrupt:
        err.print("interrupted: finished epochs are kept; go on with the same command and --resume")
        raise typer.Exit(130) from None
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
    """
    from cmaclip_fast.data.noise import add_noise, parse_noise
    from cmaclip_fast.evaluation import VIEWS, classify
    from cmaclip_fast.files import write_json

    if json_file is not None:
        _check_output_file(json_file, overwrite=True)
    model, config = _load(directory, device)
    source = Source(data, image, text, task, None, image_dir, split, split_column, on_bad_rows, max_image_pixels)
    table, counts = source.rows(config)
    for spec in noise or []:
        table = add_noise(table, parse_noise(spec))
    examples = _examples(model, table, "ignore" if ignore_unknown else "error", task)
    counts |= {f"unknown class of {name}": number for name, number in examples.ignored.items() if number}
    if examples.truncated:
        counts["truncated text"] = examples.truncated
    target = _device(device)
    results = {
        view: classify(model, examples, batch_size, target, view, f"evaluating, {view}").metrics(precision)
        for view in VIEWS
    }
    headlines = {view: {name: m.headline() for name, m in tasks.items()} for view, tasks in results.items()}
    if not any(m.rows for m in results["both"].values()):
        raise InputError(f"{examples.table.name}: no labelled row in split '{split}': name another --split or --task")
    if json_file is not None:
        write_json(json_file, {"tasks": headlines["both"], "views": headlines, "counts": counts})
    out.print(metrics_table(headlines, precision))
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Label rows: per task the label, its probability, the top five and the modality weights, as Parquet.

    Example: `cmaclip predict runs/clipart --data openclipart --split test --key id --output labels.parquet`
    """
    from cmaclip_fast.prediction import predict_table

    _check_output_file(output, overwrite)
    model, config = _load(directory, device)
    source = Source(data, image, text, [], key, image_dir, split, split_column, on_bad_rows, max_image_pixels)
    table, counts = source.rows(config)
    examples = _examples(model, table, "ignore")
    if examples.truncated:
        counts["truncated text"] = examples.truncated
    keys: list[dict[str, Any]] = [table.keys(i) or {"row": table.row_number(i)} for i in range(len(table))]
    rows = predict_table(model, examples, keys, output, batch_size, _device(device))
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
    from cmaclip_fast.report import render_explanation

    _check_output_file(output, overwrite)
    model, config = _load(directory, device)
    source = Source(data, image, text, task, key, image_dir, split, split_column, BadRows.error, max_image_pixels)
    table = source.unchecked(config)
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
def bench(
    output: Annotated[Path, typer.Option(help="Folder of page, numbers and picture.")] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Three minutes instead of half an hour.")] = False,
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
        err.print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from None
    out.print((output / "performance.md").read_text(encoding="utf-8"), soft_wrap=True, highlight=False)


@data_app.command("list")
def data_list() -> None:
    """List the data sets that are read by name.

    Example: `cmaclip data list`
    """
    from cmaclip_fast.data.catalog import list_datasets

    table = RichTable("name", "tasks", "licence", "about", box=None)
    for entry in list_datasets():
        table.add_row(entry.name, ", ".join(entry.columns.tasks), entry.licence, entry.summary)
    out.print(table)


@data_app.command("show")
def data_show(
    name: Annotated[str, typer.Argument(help="A name of `cmaclip data list`, or a file or folder.")],
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    image_dir: ImageDirOption = None,
) -> None:
    """Show rows, columns, classes and texts of a data set.

    Example: `cmaclip data show openclipart`
    """
    from cmaclip_fast.data.catalog import describe

    found = describe(_read(name, image, text, task, None, image_dir, MAX_PIXELS))
    facts = RichTable.grid(padding=(0, 2))
    facts.add_row("name", found.name)
    facts.add_row("rows", ", ".join(f"{split} {rows:,}" for split, rows in found.rows.items()))
    facts.add_row("columns", ", ".join(found.column_names))
    facts.add_row("used", _used(found.columns))
    facts.add_row("licence", found.licence or "unknown")
    if found.text_words is not None:
        facts.add_row("words of a text", ", ".join(f"{k} {v:.3g}" for k, v in found.text_words.items()))
    facts.add_row("absent", ", ".join(f"{k} {v:,}" for k, v in found.absent.items() if v) or "nothing")
    for name_, classes in found.classes.items():
        shown = ", ".join(f"{label} {rows:,}" for label, rows in list(classes.items())[:12])
        more = f", and {len(classes) - 12} more" if len(classes) > 12 else ""
        facts.add_row(name_, f"{len(classes)} classes: {shown}{more}")
    out.print(facts, highlight=False)
    for example in found.examples:
        out.print("- " + "; ".join(f"{k}: {v}" for k, v in example.items()), highlight=False, markup=False)


def _used(columns: Columns) -> str:
    parts = [f"image {columns.image}", f"text {columns.text}"]
    parts += [f"task {name}" for name in columns.tasks] + [f"key {name}" for name in columns.keys]
    return ", ".join(parts + ([f"split {columns.split}"] if columns.split else []))


def metrics_table(metrics: dict[str, dict[str, dict[str, float]]], precision: float) -> RichTable:
    """Per task and view: accuracy, macro-F1 and recall at the target precision."""
    table = RichTable("task", "given", "accuracy", "macro F1", f"recall at {precision:.0%} precision", "rows", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for task in next(iter(metrics.values())):
        for view, tasks in metrics.items():
            m = tasks[task]
            numbers = [f"{m[k]:.3f}" for k in ("accuracy", "macro_f1", "recall_at_precision")]
            table.add_row(task, view, *numbers, f"{m['rows']:.0f}", style="bold" if view == "both" else None)
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
) -> Table:
    from cmaclip_fast.data.named import Columns
    from cmaclip_fast.data.table import read_table

    columns = Columns(image=image, text=text, tasks=tuple(tasks or ()), keys=tuple(keys or ()), split=split_column)
    return read_table(
        data, columns, image_dir=image_dir, split=split, max_image_pixels=max_image_pixels, any_columns=any_columns
    )


def _check_output_file(path: Path, overwrite: bool) -> None:
    """Before work is begun: whether the file can be written at its end."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder: name a file")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder: make it, or name another file")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already: name another file, or pass --overwrite to replace it")


def _options(pairs: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`NAME=VALUE` strings, sorted into model and training options."""
    from cmaclip_fast.fitting import TrainingConfig
    from cmaclip_fast.model import ModelConfig

    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    own = {"name", "seed", "workers", "mixed_precision", "sequence_attention", "modality_attention", "vectors"}
    known = {*ModelConfig.model_fields, *TrainingConfig.model_fields} - own
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise InputError(f"--option '{pair}': give NAME=VALUE with NAME one of {', '.join(sorted(known))}")
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        (model if name in ModelConfig.model_fields else training)[name] = parsed
    return model, training


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: unknown: pass auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise InputError(f"--device {name}: PyTorch sees {seen} GPUs: run `cmaclip env`, or pass --device cpu")
    return name


def _load(directory: Path, device: str) -> tuple[CMACLIP, ArtifactConfig]:
    from cmaclip_fast.artifact import load_config, load_model

    return load_model(directory, _device(device)), load_config(directory)


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
        from cmaclip_fast.data.split import NAMES, split_table
        from cmaclip_fast.training import source_name

        known = config.columns
        again = self.data is None or source_name(self.data) == config.source
        source = self.data or config.source
        image_dir = self.image_dir or (Path(known.image_dir) if again and known.image_dir else None)
        split_column = self.split_column or (known.split if again else None)
        columns = _read(source, None, None, None, None, image_dir, self.max_image_pixels, any_columns=True).column_names
        image, text = (
            given or (name if name in columns else None)
            for given, name in ((self.image, known.image), (self.text, known.text))
        )
        for name, used in ((known.image, image), (known.text, text)):
            if name is not None and used is None:
                err.print(f"{source}: no column '{name}', which the model was trained with: taken for absent")
        tasks = known.tasks if again else [task for task in self.tasks or known.tasks if self.tasks or task in columns]
        named = (source, image, text, tasks, self.keys, image_dir, self.max_image_pixels, split_column)
        table = _read(*named)
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
        return _read(*named, self.split)


def _examples(
    model: CMACLIP, table: Table, unknown: Literal["error", "ignore"], tasks: list[str] | None = None
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
    """The entry point: errors that a user can mend end with one line and exit code 2."""
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail(f"{error.filename or 'output'}: no space left on the device: free some, then go on with --resume")
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}: choose another path, or change its permissions")


def _fail(message: str) -> None:
    err.print(f"error: {message}", soft_wrap=True, highlight=False, markup=False)
    sys.exit(2)


if __name__ == "__main__":
    main()

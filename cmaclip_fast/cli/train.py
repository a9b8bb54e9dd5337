"""`cmaclip train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmaclip_fast import signals
from cmaclip_fast.cli.options import (
    MAX_PIXELS,
    BadRows,
    BadRowsOption,
    DataOption,
    ImageDirOption,
    ImageOption,
    ImageTowerOption,
    KeyOption,
    PixelsOption,
    SeparatorOption,
    SplitColumnOption,
    TaskOption,
    TaxonomyOption,
    TextOption,
    TextTowerOption,
    Vectors,
    parse_options,
)
from cmaclip_fast.cli.output import err, metrics_table, out
from cmaclip_fast.data.source import read_columns
from cmaclip_fast.errors import InputError
from cmaclip_fast.signals import exit_code


def _recipe(context: typer.Context, file: Path | None) -> Path | None:
    """Makes the options of a recipe the defaults of the command; what the command line says goes before."""
    if file is not None:
        from cmaclip_fast.training.recipes import read_recipe

        context.default_map = read_recipe(file, {parameter.name or "" for parameter in context.command.params})
    return file


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
    from cmaclip_fast.training.run import TrainingRun
    from cmaclip_fast.training.run import train as run_training

    if not separator.strip():
        raise InputError("--separator: is empty: give what stands between the names of a path, such as '>' or '/'")
    taxonomies = tuple(Taxonomy(column, separator) for column in taxonomy or [])
    table = read_columns(data, image, text, task, key, image_dir, max_image_pixels, split_column, taxonomies=taxonomies)
    model_options, training_options = parse_options(option or [], [system])
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
        raise typer.Exit(exit_code(stop)) from None
    out.print(metrics_table(result.metrics, precision))
    out.print(f"report: {result.directory / 'report.html'}", soft_wrap=True)

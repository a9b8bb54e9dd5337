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
    DeviceOption,
    ImageDirOption,
    ImageOption,
    ImageTowerOption,
    KeyOption,
    LabelSeparatorOption,
    MultiLabelOption,
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
    """Makes the options of a recipe the defaults of the command; command-line options override them."""
    if file is not None:
        from cmaclip_fast.training.recipes import read_recipe

        context.default_map = read_recipe(file, {parameter.name or "" for parameter in context.command.params})
    return file


def _workers(text: str) -> int | str:
    if text == "auto" or text.isdecimal():
        return text if text == "auto" else int(text)
    raise InputError(f"--workers {text}: give a number of processes, or auto")


def train(
    data: DataOption,
    output: Annotated[Path, typer.Option(help="Output folder.")],
    recipe: Annotated[
        Path | None,
        typer.Option(is_eager=True, callback=_recipe, help="YAML file with options. Command-line options override it."),
    ] = None,
    image: ImageOption = None,
    text: TextOption = None,
    task: TaskOption = None,
    system: Annotated[
        str, typer.Option(help="Model architecture: `cma-clip`, or another one listed in docs/systems.md.")
    ] = "cma-clip",
    taxonomy: TaxonomyOption = None,
    separator: SeparatorOption = " > ",
    multi_label: MultiLabelOption = None,
    label_separator: LabelSeparatorOption = None,
    na_value: Annotated[
        str | None,
        typer.Option(help="Label that means the task does not apply to the row, as an empty list does; learned apart."),
    ] = None,
    model: Annotated[str, typer.Option(help="`tiny`, or an open_clip model name such as ViT-B-32.")] = "tiny",
    pretrained: Annotated[str | None, typer.Option(help="open_clip pretrained tag, or a checkpoint file.")] = None,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="Trained model folder to start from: more rows, new classes, other tasks."),
    ] = None,
    text_tower: TextTowerOption = None,
    image_tower: ImageTowerOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Training epochs.")] = None,
    contrastive_epochs: Annotated[
        int | None, typer.Option(min=0, help="Epochs with CLIP's contrastive loss before training the tasks.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch size per device.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of the new layers.")] = None,
    tower_learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of the towers.")] = None,
    heads_first: Annotated[int | None, typer.Option(min=0, help="First epochs that train the heads alone.")] = None,
    patience: Annotated[
        int | None, typer.Option(min=0, help="Stop after this many epochs without improvement; 0 disables.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--class-weights",
            help="Class weights: `balanced`, `effective-number`, or a JSON file {TASK: {CLASS: WEIGHT}}.",
        ),
    ] = None,
    sequence_attention: Annotated[
        bool, typer.Option(help="Sequence-wise attention; disabled, the paper's first ablation.")
    ] = True,
    modality_attention: Annotated[
        bool, typer.Option(help="Modality-wise attention; disabled, the paper's second ablation.")
    ] = True,
    vectors: Annotated[
        Vectors, typer.Option(help="Attention vectors of modality-wise attention: per task, or per task and modality.")
    ] = Vectors.task,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for the system's configuration or `TrainingConfig`, such as `depth=3`. Repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed. On a CPU the same seed gives the same weights.")] = 0,
    device: DeviceOption = "auto",
    workers: Annotated[
        str, typer.Option(help="Data loading processes: a number, or `auto` to choose it from the first batches.")
    ] = "auto",
    mixed_precision: Annotated[
        str, typer.Option(help="Mixed precision: `no`, `bf16`, `fp16`, or `auto`: `bf16` on a GPU that has it.")
    ] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile; the first steps take minutes.")
    ] = False,
    target_precision: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Precision of the answers that are accepted without a look.")
    ] = 0.9,
    class_thresholds: Annotated[
        bool, typer.Option("--class-thresholds", help="A threshold for each class with enough validation rows.")
    ] = False,
    image_dir: ImageDirOption = None,
    split_column: SplitColumnOption = None,
    key: KeyOption = None,
    on_bad_rows: BadRowsOption = BadRows.error,
    max_image_pixels: PixelsOption = MAX_PIXELS,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run; the result is the same.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")] = False,
) -> None:
    """Train a model and write its folder: weights, thresholds, metrics and an HTML report.

    Example: `cmaclip train --data openclipart --output runs/clipart`

    Example: `cmaclip train --data dresses.csv --image file --text title --task colour --task style
    --model ViT-B-32 --pretrained laion2b_s34b_b79k --output runs/dresses`

    Example: `cmaclip train --from runs/dresses --data more.csv --task colour --task style --output runs/dresses-2`

    Example: `cmaclip train --recipe recipes/upmc-food101.yaml --data upmc-food101:FOLDER --output runs/food`
    """
    from cmaclip_fast.data.named import Taxonomy
    from cmaclip_fast.training.imbalance import read_class_weights
    from cmaclip_fast.training.run import TrainingRun
    from cmaclip_fast.training.run import train as run_training

    if not separator.strip():
        raise InputError("--separator: is empty: give what stands between the names of a path, such as '>' or '/'")
    taxonomies = tuple(Taxonomy(column, separator) for column in taxonomy or [])
    table = read_columns(
        data,
        image=image,
        text=text,
        tasks=task,
        keys=key,
        image_dir=image_dir,
        max_image_pixels=max_image_pixels,
        split_column=split_column,
        taxonomies=taxonomies,
        multi_label=tuple(multi_label or ()),
        label_separator=label_separator,
        na_value=na_value,
    )
    model_options, training_options = parse_options(option or [], [system])
    if not sequence_attention:
        model_options["sequence_attention"] = False
    if not modality_attention:
        model_options["modality_attention"] = False
    if vectors is not Vectors.task:
        model_options["vectors"] = vectors.value
    towers = {"text_tower": text_tower, "image_tower": image_tower}
    model_options |= {name: value for name, value in towers.items() if value is not None}
    training_options |= {"seed": seed, "workers": _workers(workers), "mixed_precision": mixed_precision}
    if class_thresholds:
        training_options["class_thresholds"] = True
    if compiled:
        training_options["compile"] = True
    if weights is not None:
        named = weights in ("balanced", "effective-number")
        training_options["class_weights"] = weights if named else read_class_weights(Path(weights))
    given = {
        "epochs": epochs,
        "contrastive_epochs": contrastive_epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "tower_learning_rate": tower_learning_rate,
        "heads_first": heads_first,
        "patience": patience,
    }
    training_options |= {name: value for name, value in given.items() if value is not None}
    run = TrainingRun(
        table=table,
        output=output,
        system=system,
        model=model,
        pretrained=pretrained,
        start=start,
        model_options=model_options,
        training_options=training_options,
        split_column=split_column,
        on_bad_rows=on_bad_rows.value,
        target_precision=target_precision,
        overwrite=overwrite,
        resume=resume,
        device=device,
    )
    try:
        result = run_training(run, err)
    except (KeyboardInterrupt, signals.Interrupted) as stop:
        err.print("interrupted: finished epochs are kept; resume with the same command and --resume")
        raise typer.Exit(exit_code(stop)) from None
    out.print(metrics_table({**result.metrics, **result.baselines}, target_precision))
    out.print(f"report: {result.directory / 'report.html'}", soft_wrap=True)

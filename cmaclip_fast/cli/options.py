"""Options and arguments that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from cmaclip_fast.errors import InputError


class BadRows(str, Enum):
    """How bad rows are handled."""

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
        help="Data set name (`cmaclip data list`), CSV, TSV, JSONL or Parquet file, glob of files, or folder of images."
    ),
]

ImageOption = Annotated[str | None, typer.Option(help="Image column: paths or bytes.")]

TextOption = Annotated[str | None, typer.Option(help="Text column.")]

TaskOption = Annotated[list[str] | None, typer.Option(help="Label column. Repeat for several tasks.")]

TaxonomyOption = Annotated[
    list[str] | None,
    typer.Option(help="Column of class paths such as 'Apparel > Dresses'; each level becomes a task. Repeatable."),
]

SeparatorOption = Annotated[str, typer.Option(help="Separator in the paths of --taxonomy.")]

MultiLabelOption = Annotated[
    list[str] | None,
    typer.Option(help="Column with any number of labels a row: lists (JSONL, Parquet), or text. Repeatable."),
]

LabelSeparatorOption = Annotated[
    str | None, typer.Option(help="Separator of the labels in a --multi-label column of text, such as `|`.")
]

KeyOption = Annotated[list[str] | None, typer.Option(help="Column that identifies a row. Repeatable.")]

ImageDirOption = Annotated[
    Path | None, typer.Option(help="Folder that relative image paths start from [default: the table's folder].")
]

SplitColumnOption = Annotated[
    str | None, typer.Option(help="Column with the values train, validation and test [default: `split`, if present].")
]

BadRowsOption = Annotated[
    BadRows, typer.Option(help="For a bad row: stop, skip the row, or treat its image as missing (mask).")
]

PixelsOption = Annotated[int, typer.Option(min=1, help="Maximum number of pixels per image.")]

DeviceOption = Annotated[str, typer.Option(help="`cpu`, `cuda`, `cuda:1`, or `auto`: a GPU if available.")]

TextTowerOption = Annotated[
    str | None, typer.Option(help="Folder with a Hugging Face encoder to use as the text tower.")
]

ImageTowerOption = Annotated[
    str | None, typer.Option(help="timm model (NAME or NAME:WEIGHTS) to use as the image tower.")
]

BatchOption = Annotated[int, typer.Option(min=1, help="Batch size.")]

MinPrecisionOption = Annotated[
    float | None,
    typer.Option(min=0.01, max=1.0, help="Precision of the accepted answers [default: the model's target precision]."),
]

ModelArgument = Annotated[Path, typer.Argument(help="Model folder written by `cmaclip train`.")]

MAX_PIXELS = 50_000_000


def parse_options(
    pairs: list[str], systems: Sequence[str], option: str = "--option"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`NAME=VALUE` strings, sorted into the options of any of the systems and of training."""
    from cmaclip_fast.systems.registry import find_system
    from cmaclip_fast.training.config import TrainingConfig

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


def device_name(name: str) -> str:
    """The device that `auto` or another name stands for."""
    from cmaclip_fast.classifier.engine import choose_device

    return str(choose_device(name))

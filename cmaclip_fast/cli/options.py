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

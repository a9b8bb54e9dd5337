"""`cmaclip_fast.train`: what `cmaclip train` does, from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmaclip_fast.classifier.classifier import Classifier
from cmaclip_fast.data.check import RowPolicy
from cmaclip_fast.data.images import MAX_IMAGE_PIXELS
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.data.source import read_columns
from cmaclip_fast.errors import InputError
from cmaclip_fast.systems.presets import TINY
from cmaclip_fast.systems.registry import find_system
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.run import TrainingRun
from cmaclip_fast.training.run import train as run_training


def train(
    data: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str],
    image: str | None = None,
    text: str | None = None,
    tasks: Sequence[str] | None = None,
    taxonomies: Mapping[str, str] | None = None,
    multi_label: Sequence[str] = (),
    label_separator: str | None = None,
    na_value: str | None = None,
    model: str = TINY,
    pretrained: str | None = None,
    system: str = "cma-clip",
    start: str | os.PathLike[str] | None = None,
    image_dir: str | os.PathLike[str] | None = None,
    split_column: str | None = None,
    on_bad_rows: RowPolicy = "error",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    target_precision: float = 0.9,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    **options: Any,
) -> Classifier:
    """Trains a model on a table and writes its folder, as `cmaclip train` does.

    Args:
        data: a name of `cmaclip data list`, a CSV, TSV, JSONL or Parquet file, a glob of them, or a folder of pictures.
        output: the folder to make: weights, thresholds, metrics, report.
        image, text: the columns of pictures (paths or bytes) and of texts; None has none, or the named data set's own.
        tasks: the columns of labels, one task each.
        taxonomies: columns of class paths, each with the separator of its names, such as `{"category": " > "}`.
        multi_label: columns whose rows have any number of classes: lists in JSONL and Parquet, or text.
        label_separator: what stands between the classes of a multi-label column of text.
        na_value: the class name that says that a task does not apply to a row; so does an empty list.
        model: `tiny`, or an open_clip model name, for the towers.
        pretrained: an open_clip tag or a checkpoint file; None starts from random weights.
        system: `cma-clip`, or another of docs/systems.md.
        start: a trained folder whose weights the training starts from; its system and model are taken. Its classes
            stay, new ones are added, and tasks that are not named go.
        image_dir: the folder that relative paths of pictures start from; None is the table's.
        split_column: a column with `train`, `validation` and `test`; None is `split` if there is one, else the rows are
            split at random.
        on_bad_rows: `error`, `skip`, or `mask` (the picture is treated as missing).
        max_image_pixels: pictures of more are refused.
        target_precision: of the thresholds and of recall at a fixed precision.
        overwrite: replace an earlier model at `output`.
        resume: continue a training towards `output` that was interrupted; the result is the same.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`: a GPU if available, for training and for the classifier.
        options: fields of the system's configuration (`depth=2`) and of `TrainingConfig` (`epochs=10`, `seed=1`).

    Returns:
        The classifier of the new folder.

    Raises:
        InputError: bad options or data, or an output that exists.
    """
    for name, given in (("tasks", tasks), ("multi_label", multi_label)):
        if isinstance(given, str):
            raise InputError(f"{name}: give a list of columns, not '{given}'")
    model_fields = find_system(system)[0].Config.model_fields
    known = {*model_fields, *TrainingConfig.model_fields} - {"name", "clip"}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"{unknown[0]}: no such option: choose among {', '.join(sorted(known))}")
    table = read_columns(
        os.fspath(data),
        image=image,
        text=text,
        tasks=list(tasks or ()),
        image_dir=None if image_dir is None else Path(image_dir),
        max_image_pixels=max_image_pixels,
        split_column=split_column,
        taxonomies=tuple(Taxonomy(column, separator) for column, separator in (taxonomies or {}).items()),
        multi_label=tuple(multi_label),
        label_separator=label_separator,
        na_value=na_value,
    )
    run = TrainingRun(
        table=table,
        output=Path(output),
        system=system,
        model=model,
        pretrained=pretrained,
        start=None if start is None else Path(start),
        model_options={name: value for name, value in options.items() if name in model_fields},
        training_options={name: value for name, value in options.items() if name not in model_fields},
        split_column=split_column,
        on_bad_rows=on_bad_rows,
        target_precision=target_precision,
        overwrite=overwrite,
        resume=resume,
        device=device,
    )
    run_training(run)
    return Classifier.load(output, device=device)

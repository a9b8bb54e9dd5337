"""Labels for new rows: a few pairs in memory, or a table written as Parquet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.images import MAX_IMAGE_PIXELS, ImageProblem, read_image, to_rgb
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.errors import InputError
from cmaclip_fast.evaluation import run
from cmaclip_fast.layouts import lay_out
from cmaclip_fast.systems.base import System
from cmaclip_fast.taxonomy import task_probabilities
from cmaclip_fast.types import IMAGE, TEXT, Batch, Output

TOP = 5


@dataclass(frozen=True)
class Prediction:
    """What the model says of one pair for one task.

    Attributes:
        label: the most probable class.
        probability: its probability.
        top: the five most probable classes with their probabilities, best first.
        text_weight, image_weight: the modality weights; None for a system without them.
    """

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    text_weight: float | None
    image_weight: float | None


def read_output(
    output: Output, tasks: dict[str, list[str]], taxonomies: Sequence[Taxonomy] = ()
) -> list[dict[str, Prediction]]:
    """The predictions of each row of a batch, from the model's output for it."""
    rows: list[dict[str, Prediction]] = [{} for _ in next(iter(output.logits.values()))]
    for task, probabilities in task_probabilities(output.logits, tasks, taxonomies).items():
        names = tasks[task]
        best = probabilities.topk(min(TOP, len(names)))
        weights = output.modality_weights[task].tolist() if output.modality_weights is not None else [None] * len(rows)
        for row, values, classes, weight in zip(
            rows, best.values.tolist(), best.indices.tolist(), weights, strict=True
        ):
            top = tuple((names[c], p) for c, p in zip(classes, values, strict=True))
            text, image = (None, None) if weight is None else (weight[TEXT], weight[IMAGE])
            row[task] = Prediction(top[0][0], top[0][1], top, text, image)
    return rows


@torch.inference_mode()
def predict_pairs(
    model: System,
    images: Sequence[Image.Image | str | Path | None],
    texts: Sequence[str | None],
    batch_size: int = 64,
) -> list[dict[str, Prediction]]:
    """See `CMACLIP.predict`."""
    if len(images) != len(texts):
        raise InputError(
            f"{len(images)} images but {len(texts)} texts: give one of each for every pair, None if absent"
        )
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    predictions: list[dict[str, Prediction]] = []
    try:
        for start in range(0, len(images), batch_size):
            pairs = zip(images[start : start + batch_size], texts[start : start + batch_size], strict=True)
            batch = _pairs_batch(model, list(pairs), start)
            predictions += read_output(model(batch.to(device)), model.tasks, model.taxonomies)
    finally:
        model.train(was_training)
    return predictions


def _pairs_batch(model: System, pairs: list[tuple[Any, str | None]], first: int) -> Batch:
    pixels: list[Tensor] = []
    present: list[list[bool]] = []
    texts: list[str | None] = []
    for number, (image, text) in enumerate(pairs, first):
        text = text if text and text.strip() else None
        if image is None and text is None:
            raise InputError(f"pair {number}: neither image nor text: give at least one")
        try:
            picture = _open_picture(image, model.preprocessing.background)
        except ImageProblem as problem:
            raise InputError(f"pair {number}: picture '{image}' {problem}") from problem
        blank = Image.new("RGB", (8, 8), "white")
        pixels.append(model.preprocessing(picture or blank))
        present.append([text is not None, picture is not None])
        texts.append(text)
    tokens, lengths, _ = model.tokenizer.encode(texts)
    return Batch(torch.stack(pixels), tokens, lengths, torch.tensor(present))


def _open_picture(image: Image.Image | str | Path | None, background: str) -> Image.Image | None:
    if isinstance(image, str | Path):
        return read_image(Path(image), MAX_IMAGE_PIXELS, background)
    return None if image is None else to_rgb(image, background)


def output_schema(keys: pa.Schema, tasks: dict[str, list[str]]) -> pa.Schema:
    """The columns of a file of predictions: the key columns, then five for each task."""
    fields = list(keys)
    for task in tasks:
        fields += [
            pa.field(task, pa.string()),
            pa.field(f"{task}_probability", pa.float32()),
            pa.field(f"{task}_top", pa.list_(pa.struct([("label", pa.string()), ("probability", pa.float32())]))),
            pa.field(f"{task}_text_weight", pa.float32()),
            pa.field(f"{task}_image_weight", pa.float32()),
        ]
    return pa.schema(fields)


def predict_table(
    model: System,
    examples: Examples,
    keys: list[dict[str, Any]],
    output: Path,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> int:
    """Labels every row of a table and writes them as Parquet, whole or not at all.

    Args:
        keys: for each row the values of its key columns.
        output: the file to write; its folder must exist.

    Returns:
        Rows written.

    Raises:
        InputError: the folder of `output` is missing, or a key column has the name of an output column.
    """
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder: make it, or name another --output")
    key_table = pa.Table.from_pylist(keys)
    taken = set(key_table.column_names) & {field.name for field in output_schema(pa.schema([]), model.tasks)}
    if taken:
        raise InputError(
            f"key column '{sorted(taken)[0]}' has the name of an output column: choose other --key columns"
        )
    schema = output_schema(key_table.schema, model.tasks)
    lay_out(model.parameters())
    temporary = output.with_name(output.name + ".tmp")
    done = 0
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for _, result in run(model, examples, batch_size, device, description="predicting"):
                rows = read_output(result, model.tasks, model.taxonomies)
                records = [
                    {**key, **_flatten(row)} for key, row in zip(keys[done : done + len(rows)], rows, strict=True)
                ]
                writer.write_table(pa.Table.from_pylist(records, schema=schema))
                done += len(rows)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return done


def _flatten(row: dict[str, Prediction]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for task, prediction in row.items():
        record[task] = prediction.label
        record[f"{task}_probability"] = prediction.probability
        record[f"{task}_top"] = [{"label": label, "probability": p} for label, p in prediction.top]
        record[f"{task}_text_weight"] = prediction.text_weight
        record[f"{task}_image_weight"] = prediction.image_weight
    return record

"""What a model says of rows: labels, probabilities and weights; and that of a few pairs in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from cmaclip_fast.data.images import MAX_IMAGE_PIXELS, ImageProblem, read_image, to_rgb
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.errors import InputError
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

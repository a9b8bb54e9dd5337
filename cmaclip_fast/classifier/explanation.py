"""What the model looked at: modality weights and attention maps of single rows (paper, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from cmaclip_fast.classifier.decisions import Decisions
from cmaclip_fast.classifier.engine import Engine
from cmaclip_fast.classifier.prediction import Prediction, read_output
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.table import Table
from cmaclip_fast.evaluation.evaluate import run
from cmaclip_fast.nn.towers import HuggingFaceTextTower
from cmaclip_fast.pages.views import ExampleView
from cmaclip_fast.pages.views import Prediction as PredictionView
from cmaclip_fast.systems.base import System
from cmaclip_fast.types import Batch, Output


def explain(model: System | Engine, table: Table, decisions: Decisions | None = None) -> list[ExampleView]:
    """Predictions, modality weights and attention maps of the rows of a table.

    The maps are the last layer's that reads text and image together, averaged over heads; a system without such a
    layer, or whose image tokens are no grid of patches, has none.

    Args:
        decisions: the model's, so that probabilities are calibrated and answers have a status.
    """
    system = model.module if isinstance(model, Engine) else model
    examples = Examples(table, _known_tasks(system, table), system.preprocessing, system.tokenizer, unknown="ignore")
    device = next(system.parameters()).device
    views: list[ExampleView] = []
    for batch, output in run(model, examples, 32, device, with_attention=True):
        read = read_output(output, system.tasks, system.taxonomies, decisions, multi_label=system.multi_label)
        for index, predictions in enumerate(read):
            row = len(views)
            picture, text = _seen(system, table, row), table.text(row)
            view = row_view(system, batch, output, index, predictions, picture, text)
            view.row = table.row_number(row)
            view.key = " ".join(str(value) for value in table.keys(row).values() if value is not None)
            views.append(view)
    return views


def _known_tasks(model: System, table: Table) -> dict[str, list[str]]:
    return {task: names for task, names in model.tasks.items() if task in table.columns.tasks}


def row_view(
    model: System,
    batch: Batch,
    output: Output,
    index: int,
    predictions: dict[str, Prediction],
    picture: Image.Image | None,
    text: str | None,
) -> ExampleView:
    """What there is to show of a row of a batch.

    Args:
        index: of the row in the batch.
        picture: as the image tower sees it, which is what the patches cover.
    """
    labels = {task: _label_text(values[index], model.tasks[task]) for task, values in batch.labels.items()}
    attention = output.attention
    view = ExampleView(
        row=index + 1,
        key="",
        image=picture,
        text=text,
        predictions={
            task: PredictionView(
                label=labels.get(task),
                predicted=said.top[0][0] if said.likely is None else _joined(said.likely),
                status=said.status,
                probability=said.probability,
                top=list(said.top),
                weights=None
                if said.text_weight is None or said.image_weight is None
                else (said.text_weight, said.image_weight),
            )
            for task, said in predictions.items()
        },
    )
    if attention is None:
        return view
    weights, count = attention.weights[index].float().cpu(), int(attention.text_tokens[index])
    if count:
        first = ["<text>"] if isinstance(model.text_tower, HuggingFaceTextTower) else []
        ids = batch.tokens[index, : count - len(first)].tolist()
        view.tokens = first + model.tokenizer.decode_tokens(ids)
    grid = model.image_tower.grid
    text_row = 0 if model.text_tower.global_first else count - 1
    if count and len(view.tokens) == count:
        view.text_global_to_token = weights[text_row, :count].numpy()
    if grid is not None and len(weights) > count:
        view.image_global_to_patch = _map(weights[count, count + 1 :], grid)
        if count and len(view.tokens) == count:
            view.token_to_patch = np.stack([_map(weights[token, count + 1 :], grid) for token in range(count)])
    return view


def _label_text(label: Tensor, names: Sequence[str]) -> str | None:
    """The class of a row, or its classes; None where it is unlabelled."""
    if label.ndim:
        return _joined([names[n] for n in (label == 1).nonzero().flatten().tolist()]) if (label >= 0).any() else None
    return names[int(label)] if label >= 0 else None


def _joined(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _seen(model: System, table: Table, row: int) -> Image.Image | None:
    """The picture as the image tower sees it, which is what the patches cover."""
    picture = table.image(row, model.preprocessing.background)
    if picture is None:
        return None
    return Image.fromarray(model.preprocessing.pixels(picture).permute(1, 2, 0).numpy())


def _map(weights: Tensor, grid: tuple[int, int]) -> np.ndarray:
    return weights.view(*grid).numpy()

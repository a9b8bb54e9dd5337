"""What an audit keeps of one pass of a model over a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmaclip_fast.classifier.engine import Engine
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.evaluation.duplicates import THUMBNAIL_SIDE
from cmaclip_fast.evaluation.evaluate import run
from cmaclip_fast.systems.taxonomy import task_probabilities
from cmaclip_fast.types import Batch, Output


@dataclass
class Seen:
    """Of the N rows of a table.

    Attributes:
        present: `[N, 2]` bool, text and image, as far as the model reads them.
        features: `[N, 2 D]` float32, the towers' global tokens of text and image, 0 where absent; of a system without
            such what its heads read, or its logits.
        thumbnails, has_picture: `[N, S, S, 3]` uint8, and `[N]` bool, also where the model reads no pictures.
        predicted, margin: for each task `[N]`, the most probable class, and its probability over the second's.
        contrastive: `[N, E]` each, of length 1: the towers' embeddings of text and image as CLIP compares them; None
            where they were not wanted or the system has no such.
        alone: for each task the probabilities by the text alone and by the image alone, `[N, C]` float16 each; empty
            where they were not wanted.
    """

    present: np.ndarray
    features: np.ndarray
    thumbnails: np.ndarray
    has_picture: np.ndarray
    predicted: dict[str, np.ndarray]
    margin: dict[str, np.ndarray]
    contrastive: tuple[np.ndarray, np.ndarray] | None = None
    alone: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def look(
    model: Engine,
    examples: Examples,
    batch_size: int,
    with_mismatch: bool,
    progress: Callable[[str, int, int], None],
) -> Seen:
    """Runs the model over the rows: once, or for mismatches once more with each modality hidden.

    Args:
        progress: called with what is being done, the rows done and their number.
    """
    names = ("present", "features", "thumbnails", "has_picture", "text", "image")
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    predicted: dict[str, list[Tensor]] = {task: [] for task in model.tasks}
    margin: dict[str, list[Tensor]] = {task: [] for task in model.tasks}
    wanted = with_mismatch and all(model.module.modalities)
    reads = torch.tensor(model.module.modalities)
    done = 0
    for batch, output in run(model, examples, batch_size, model.device):
        present = batch.present & reads
        kept["present"].append(present)
        kept["features"].append(_features(output, present).cpu())
        kept["has_picture"].append(batch.present[:, 1])
        kept["thumbnails"].append(_thumbnails(model, batch))
        pair = _contrastive(model, batch) if wanted else None
        if pair is not None:
            kept["image"].append(pair[0].float().cpu())
            kept["text"].append(pair[1].float().cpu())
        for task, values in task_probabilities(output.logits, model.tasks, model.taxonomies).items():
            best = values.topk(2)
            predicted[task].append(best.indices[:, 0].cpu())
            margin[task].append((best.values[:, 0] - best.values[:, 1]).cpu())
        done += len(batch)
        progress("looking at rows", done, len(examples))
    joined = {name: torch.cat(parts).numpy() for name, parts in kept.items() if parts}
    return Seen(
        joined["present"],
        joined["features"],
        joined["thumbnails"],
        joined["has_picture"],
        {task: torch.cat(parts).numpy() for task, parts in predicted.items()},
        {task: torch.cat(parts).numpy() for task, parts in margin.items()},
        (joined["text"], joined["image"]) if "text" in joined else None,
        _alone(model, examples, batch_size, progress) if wanted else {},
    )


def _features(output: Output, present: Tensor) -> Tensor:
    vectors = output.embedding if output.towers is None else output.towers
    if vectors is None:
        return torch.cat([values.float().log_softmax(1) for values in output.logits.values()], dim=1)
    return torch.where(present[..., None].to(vectors.device), vectors.float(), 0).flatten(1)


def _thumbnails(model: Engine, batch: Batch) -> Tensor:
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in (model.preprocessing.std, model.preprocessing.mean))
    small = F.adaptive_avg_pool2d(batch.images.float().cpu(), THUMBNAIL_SIDE)
    return ((small * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


@torch.inference_mode()
def _contrastive(model: Engine, batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Embeddings of image and text, or None where the towers end in spaces of different width."""
    placed = batch.to(model.device)
    image, text = model.module.contrastive_features(replace(placed, images=placed.images.to(model.dtype)))
    return (image, text) if image.shape == text.shape else None


def _alone(
    model: Engine, examples: Examples, batch_size: int, progress: Callable[[str, int, int], None]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    sides: list[dict[str, np.ndarray]] = []
    tasks = [task for task in model.tasks if task not in model.multi_label]
    for view in ("text alone", "image alone"):
        parts: dict[str, list[Tensor]] = {task: [] for task in tasks}
        done = 0
        for batch, output in run(model, examples, batch_size, model.device, view):
            found = task_probabilities(output.logits, model.tasks, model.taxonomies)
            for task in tasks:
                parts[task].append(found[task].half().cpu())
            done += len(batch)
            progress(f"looking at the {view}", done, len(examples))
        sides.append({task: torch.cat(values).numpy() for task, values in parts.items()})
    return {task: (sides[0][task], sides[1][task]) for task in tasks}

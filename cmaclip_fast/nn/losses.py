"""The losses of training: cross-entropy over the tasks, and CLIP's contrastive loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from cmaclip_fast.ops import multitask_cross_entropy


def multitask_loss(
    logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], label_smoothing: float = 0.0
) -> dict[str, Tensor]:
    """The mean cross-entropy of each task over its labelled rows; 0 where there are none.

    Args:
        logits: for each task `[B, C_task]`.
        labels: for each task `[B]` int64, -1 where unlabelled.
    """
    tasks = list(logits)
    sizes = [logits[task].shape[1] for task in tasks]
    device = logits[tasks[0]].device
    offsets = torch.tensor([0, *sizes], device=device).cumsum(0).to(torch.int32)
    loss = multitask_cross_entropy(
        torch.cat([logits[task] for task in tasks], dim=1),
        torch.stack([labels[task] for task in tasks], dim=1),
        offsets,
        label_smoothing=label_smoothing,
    )
    return dict(zip(tasks, loss.unbind(), strict=True))


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over the pairs of a batch: `image`, `text` `[B, E]` of length 1."""
    logits = logit_scale.exp().clamp(max=100) * image @ text.T
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

"""What losses of training need beside the operators: where tasks begin, and CLIP's contrastive loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def task_offsets(classes: Iterable[int]) -> Tensor:
    """`[K + 1]` int32 on the CPU: where each task's logits begin and end among those of all tasks side by side.

    Args:
        classes: of each task.
    """
    return torch.tensor(list(itertools.accumulate(classes, initial=0)), dtype=torch.int32)


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over the pairs of a batch: `image`, `text` `[B, E]` of length 1."""
    logits = logit_scale.exp().clamp(max=100) * image @ text.T
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

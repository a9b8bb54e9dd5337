"""The input and output of every system: `Batch` and `Output`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

TEXT, IMAGE = 0, 1
"""The order of the two modalities wherever they are stacked, as in the paper (text first)."""


@dataclass
class Batch:
    """A batch of image-text pairs.

    Attributes:
        images: `[B, 3, H, W]` float, normalised; pixels of a missing image are ignored. For a `CMACLIP` it may be
            `[B, 3, 0, 0]` if no row has an image.
        tokens: `[B, L]` int64, padded on the right; start and end tokens included.
        text_lengths: `[B]` int32, tokens up to and with the end token; the length of an absent text is ignored.
        present: `[B, 2]` bool, whether the text and the image (in this order) exist.
        labels: for each task `[B]` int64, -1 where the row is unlabelled; of a multi-label task `[B, C_task]` int8, 1
            where the row has the class, 0 where it has not, and -1 in unlabelled rows.
        rows: `[B]` int64, the row of the table each pair came from, or None.
    """

    images: Tensor
    tokens: Tensor
    text_lengths: Tensor
    present: Tensor
    labels: dict[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            self.tokens.to(device, non_blocking=non_blocking),
            self.text_lengths.to(device, non_blocking=non_blocking),
            self.present.to(device, non_blocking=non_blocking),
            {task: labels.to(device, non_blocking=non_blocking) for task, labels in self.labels.items()},
            None if self.rows is None else self.rows.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU run in the background."""
        return Batch(
            self.images.pin_memory(),
            self.tokens.pin_memory(),
            self.text_lengths.pin_memory(),
            self.present.pin_memory(),
            {task: labels.pin_memory() for task, labels in self.labels.items()},
            None if self.rows is None else self.rows.pin_memory(),
        )

    def keep(self, text: bool = True, image: bool = True) -> Batch:
        """The same batch with a modality hidden; a row that has only the hidden one is left with neither."""
        kept = torch.tensor([text, image], device=self.present.device)
        return replace(self, present=self.present & kept)


@dataclass
class AttentionMaps:
    """Attention of the last sequence-wise layer, averaged over heads, for each row of a batch.

    Attributes:
        weights: one `[n, n]` tensor a row; n counts that row's text tokens, then its image tokens.
        text_tokens: `[B]` int64, how many of each n are text (0 where the text is absent).
    """

    weights: list[Tensor]
    text_tokens: Tensor


@dataclass
class Output:
    """Predictions for a batch; fields that a system lacks are None.

    Attributes:
        logits: for each task `[B, C_task]`.
        modality_weights: for each task `[B, 2]`, the weights of text and image; rows sum to 1, or are 0 with neither.
        embedding: `[B, 2, D]`, the aggregate text and image embeddings; 0 where absent.
        towers: `[B, 2, D]`, the global tokens of the towers before fusion; undefined where absent.
        attention: the sequence-wise attention maps, when asked for.
        kept: intermediate results that a system's own training losses need.
        packed: `[B, C]`, the logits of all tasks side by side, where `logits` are views of it.
    """

    logits: dict[str, Tensor]
    modality_weights: dict[str, Tensor] | None = None
    embedding: Tensor | None = None
    towers: Tensor | None = None
    attention: AttentionMaps | None = None
    kept: Any = None
    packed: Tensor | None = None

"""CLIP, fine-tuned (arXiv 2103.00020): late fusion, the two embeddings side by side under a shallow head."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cmaclip_fast.systems.base import TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.types import Batch, Output


@register("clip")
class CLIP(TwoTowers):
    """CLIP's own embeddings, of length 1 as CLIP compares them (section 2.3), kept apart; an MLP per task reads both.

    The embeddings are scaled by the root of their width, so that the head reads numbers of the size it was
    initialised for.
    """

    title = "CLIP, fine-tuned"

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config, *parts)
        with torch.no_grad():
            embed = self.text_tower.project(torch.zeros(1, self.text_tower.width)).shape[1]
        if config.auxiliary_heads:
            self.auxiliary_heads = nn.ModuleList([self.make_heads(embed) for _ in ("text", "image")])
        del self.text_projection, self.image_projection  # CLIP's own are used
        self.heads = self.make_heads(2 * embed)

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        tokens, lengths = self.text_tower(batch.tokens, batch.text_lengths)
        rows = torch.arange(len(tokens), device=tokens.device)
        text = self.text_tower.project(tokens[rows, self.text_position(lengths)])
        image = self.image_tower.project(self.image_tower(batch.images)[:, 0])
        towers = F.normalize(torch.stack([text, image], dim=1), dim=-1) * text.shape[1] ** 0.5
        embedding = torch.where(batch.present[..., None], towers, 0)
        return self.output(self.heads(embedding.flatten(1)), embedding=embedding, towers=towers)

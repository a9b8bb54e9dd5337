"""The image tower alone: an MLP per task on its global token, as in the tables of arXiv 2112.03562."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cmaclip_fast.systems.base import TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.types import IMAGE, Batch, Output


@register("vit")
class ViT(TwoTowers):
    """Sees the image alone; a row without one gets what the heads say of nothing."""

    title = "ViT"
    modalities = (False, True)

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config, *parts)
        self.norm = nn.LayerNorm(config.width)
        self.heads = self.make_heads(config.width)

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        image = self.norm(self.image_projection(self.image_tower(batch.images)[:, 0]))
        image = torch.where(batch.present[:, IMAGE, None], image, 0)
        return self.output(self.heads(image), embedding=torch.stack([torch.zeros_like(image), image], dim=1))

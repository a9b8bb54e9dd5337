"""The text tower alone: an MLP per task on its global token, as in the tables of arXiv 2112.03562.

`text_tower` puts any Hugging Face encoder in its place, BERT itself for one (arXiv 1810.04805, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cmaclip_fast.systems.base import TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.types import TEXT, Batch, Output


@register("bert")
class BERT(TwoTowers):
    """Sees the text alone; a row without one gets what the heads say of nothing."""

    title = "BERT"
    modalities = (True, False)

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config, *parts)
        self.norm = nn.LayerNorm(config.width)
        self.heads = self.make_heads(config.width)

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        tokens, lengths = self.text_tower(batch.tokens, batch.text_lengths)
        rows = torch.arange(len(tokens), device=tokens.device)
        text = self.norm(self.text_projection(tokens[rows, self.text_position(lengths)]))
        text = torch.where(batch.present[:, TEXT, None], text, 0)
        return self.output(self.heads(text), embedding=torch.stack([text, torch.zeros_like(text)], dim=1))

"""MMBT, the supervised multimodal bitransformer (arXiv 1909.02950): pooled image features before the text's tokens."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from cmaclip_fast.systems.base import FusionConfig, TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.systems.stream import OneStream, pool_patches
from cmaclip_fast.types import Batch, Output


class MMBTConfig(FusionConfig):
    """
    Attributes:
        side: the image becomes `side * side` embeddings (section 3.2: N, tuned there; 3 in its released code).
    """

    side: int = Field(2, ge=1)


@register("mmbt")
class MMBT(TwoTowers):
    """Image embeddings and text tokens through one self-attention, read out at the class token.

    Section 3.2: the image's final feature map is pooled to N vectors, and each has a projection of its own into the
    transformer's token space, `I_n = W_n f(img, n)`. Every token gets a segment and a position embedding. Section 3.3:
    the class token's output is classified. The paper's order, image before text, is kept by the embeddings: attention
    knows no other order. Our transformer stands on the text tower's tokens, theirs on word pieces.
    """

    title = "MMBT"
    fusion = ("stream.",)
    Config = MMBTConfig

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config, *parts)
        places = config.side**2
        self.place_projections = nn.Parameter(torch.empty(places, self.image_tower.width, config.width))
        nn.init.normal_(self.place_projections, std=self.image_tower.width**-0.5)
        self.image_positions = nn.Parameter(torch.empty(places, config.width))
        # a text tower may put a class token behind the longest text
        self.text_positions = nn.Parameter(torch.empty(self.tokenizer.context_length + 1, config.width))
        for positions in (self.image_positions, self.text_positions):
            nn.init.normal_(positions, std=0.02)
        self.stream = OneStream(config.width, config.depth, config.heads, config.mlp_ratio, config.dropout)
        self.heads = self.make_heads(config.width)

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        image_tokens = self.image_tower(batch.images)
        tokens, lengths = self.text_tower(batch.tokens, batch.text_lengths)
        text = self.text_projection(tokens)
        rows = torch.arange(len(text), device=text.device)
        towers = torch.stack(
            [text[rows, self.text_position(lengths)], self.image_projection(image_tokens[:, 0])], dim=1
        )
        pooled = pool_patches(image_tokens[:, 1:], self.image_tower.grid, self.config.side)
        image = torch.einsum("bnw,nwd->bnd", pooled, self.place_projections) + self.image_positions
        text = text + self.text_positions[: text.shape[1]]
        fused = self.stream(text, lengths, image, batch.present)
        return self.output(self.heads(fused.class_tokens()), towers=towers)

"""Perceiver IO (arXiv 2107.14795): a small latent array reads all tokens, and a query for each task reads it out."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cmaclip_fast.nn.blocks import SequenceAttention
from cmaclip_fast.nn.heads import TaskLinear
from cmaclip_fast.nn.layers import Rows
from cmaclip_fast.ops import pack_padded, packed_attention
from cmaclip_fast.systems.base import FusionConfig, TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.systems.stream import token_counts
from cmaclip_fast.types import Batch, Output


class PerceiverConfig(FusionConfig):
    """
    Attributes:
        latents: N, vectors of the latent array. `depth` counts the latent self-attention layers.
    """

    latents: int = Field(32, ge=1)


class CrossAttention(nn.Module):
    """Queries read inputs: attention and an MLP, pre-norm, both with a shortcut for the queries (appendix E.2)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_queries, self.norm_inputs = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, inputs: Tensor, cu_queries: Tensor, cu_inputs: Tensor, longest: int) -> Tensor:
        """`queries [B * Q, D]`, `inputs [T, D]`, both packed -> `[B * Q, D]`."""
        q = self.q(self.norm_queries(queries)).unflatten(1, (self.heads, -1))
        k, v = self.kv(self.norm_inputs(inputs)).unflatten(1, (2, self.heads, -1)).unbind(1)
        most = len(queries) // max(1, len(cu_queries) - 1)
        attended, _ = packed_attention(q, k, v, cu_queries, cu_inputs, most, longest)
        x = queries + self.dropout(self.out(attended.flatten(1)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


@register("perceiver-io")
class PerceiverIO(TwoTowers):
    """Encode, process, decode (section 3.1).

    *Encode*: the latent array cross-attends to the text and image tokens, each marked by its modality (section 4.2 of
    the paper, appendix C: positions are the towers' own). *Process*: self-attention over the latents. *Decode*: one
    learnt query per task cross-attends to the latents, and a linear layer makes it logits (section 3.2).
    """

    title = "Perceiver IO"
    fusion = ("encoder.", "process.", "decoder.")
    per_task = ("queries",)
    Config = PerceiverConfig

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config, *parts)
        width = config.width
        self.type_embedding = nn.Parameter(torch.empty(2, width))
        self.latents = nn.Parameter(torch.empty(config.latents, width))
        self.queries = nn.Parameter(torch.empty(len(self.tasks), width))
        for parameter in (self.type_embedding, self.latents, self.queries):
            nn.init.trunc_normal_(parameter, std=0.02, a=-2, b=2)
        shape = (config.heads, config.mlp_ratio, config.dropout)
        self.encoder = CrossAttention(width, *shape)
        self.process = SequenceAttention(width, config.depth, *shape)
        self.decoder = CrossAttention(width, *shape)
        self.norm = nn.LayerNorm(width)
        self.heads = TaskLinear(width, [len(classes) for classes in self.tasks.values()])

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        encoded = self.encode(batch)
        counts = token_counts(encoded.text_lengths, encoded.image.shape[1], batch.present)
        packed, cu_inputs = pack_padded(encoded.text, encoded.image, counts, self.type_embedding)
        answers = self.read_out(packed, cu_inputs, encoded.text.shape[1] + encoded.image.shape[1])
        return self.output(self.heads(answers), towers=encoded.globals)

    def read_out(self, packed: Tensor, cu_inputs: Tensor, longest: int) -> Tensor:
        """`packed [T, D]` tokens of B rows -> what each task's query read, `[B, K, D]`."""
        rows, count = len(cu_inputs) - 1, len(self.latents)
        every = torch.arange(rows + 1, device=packed.device, dtype=torch.int32)
        latents = self.latents.to(packed.dtype).repeat(rows, 1)
        latents = self.encoder(latents, packed, every * count, cu_inputs, longest)
        latents = self.process(latents, Rows(every * count, count))
        queries = self.queries.to(packed.dtype).repeat(rows, 1)
        answers = self.decoder(queries, latents, every * len(self.queries), every * count, count)
        return self.norm(answers).view(rows, len(self.queries), -1)

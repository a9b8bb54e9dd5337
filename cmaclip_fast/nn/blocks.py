"""What CMA-CLIP puts between the towers and the heads: sequence attention, projections, modality attention."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmaclip_fast.nn.layers import Layer, Queries, Rows, Weights, run_layers, weights_of
from cmaclip_fast.nn.plain import classes_are_plain, is_activation, is_norm, is_ordinary, is_plain
from cmaclip_fast.ops import modality_pool, packed_attention


class SequenceLayer(nn.Module):
    """One pre-norm transformer layer over packed tokens."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rows: Rows, causal: bool = False, queries: Queries | None = None) -> Tensor:
        """`x [T, D]` -> `[T, D]`, or `[Q, D]`: for the queries alone."""
        layer = self._layer()
        return self._by_modules(x, rows, causal, queries) if layer is None else layer(x, rows, causal, queries)

    def _layer(self) -> Layer | None:
        """This layer with its weights, or None where something was added to one of its modules."""
        parts = list(self.mlp._modules.values())
        if not is_plain(self.mlp, nn.Sequential) or len(parts) != 4 or not classes_are_plain():
            return None
        expand, activation, inside, contract = cast(Any, parts)
        products = [weights_of(product) for product in (self.qkv, self.out, expand, contract)]
        fits = (
            all(isinstance(product, Weights) and is_ordinary(*product) for product in products)
            and is_norm(self.norm_attention)
            and is_norm(self.norm_mlp)
            and is_activation(activation)
            and all(is_plain(drop, nn.Dropout) for drop in (self.dropout, inside))
        )
        if not fits:
            return None
        qkv, out, expand, contract = cast(Any, products)
        drops = self.training and self.dropout.p > 0
        return Layer(
            heads=self.heads,
            norm_first=True,
            norm_attention=self.norm_attention,
            norm_mlp=self.norm_mlp,
            qkv=qkv,
            out=out,
            expand=expand,
            activation=activation,
            contract=contract,
            after_attention=self.dropout if drops else None,
            after_mlp=self.dropout if drops else None,
            inside_mlp=inside if drops else None,
        )

    def _by_modules(self, x: Tensor, rows: Rows, causal: bool, queries: Queries | None) -> Tensor:
        """The same with each module called, for those that were replaced or have hooks."""
        q, k, v = self.qkv(self.norm_attention(x)).view(len(x), 3, self.heads, -1).unbind(1)
        of_queries = rows
        if queries is not None:
            q, x, of_queries = q[queries.index], x[queries.index], queries.rows
        attended, _ = packed_attention(
            *(q, k, v, of_queries.cu_seqlens, rows.cu_seqlens, of_queries.longest, rows.longest), causal=causal
        )
        x = x + self.dropout(self.out(attended.flatten(1)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))

    def attention_weights(self, x: Tensor, rows: Rows) -> list[Tensor]:
        """The softmax of this layer, averaged over heads: one `[n, n]` a row (queries, keys)."""
        q, k, _ = self.qkv(self.norm_attention(x)).view(len(x), 3, self.heads, -1).unbind(1)
        scale = q.shape[-1] ** -0.5
        ends = rows.cu_seqlens.tolist()
        return [
            (torch.einsum("qhe,khe->hqk", q[start:end], k[start:end]) * scale).softmax(-1).mean(0)
            for start, end in itertools.pairwise(ends)
        ]


class SequenceAttention(nn.Module):
    """Sequence-wise attention: a transformer encoder over the text and image tokens of a pair (paper, figure 1)."""

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        """
        Raises:
            ValueError: `width` is not a multiple of `heads`.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.checkpointing = False
        self.layers = nn.ModuleList(SequenceLayer(width, heads, mlp_ratio, dropout) for _ in range(depth))

    def start_at_zero(self) -> None:
        """Sets the last product of every branch to zero: the layers return their input until they have learned."""
        for layer in cast(Iterable[SequenceLayer], self.layers):
            for product in cast(Iterable[nn.Linear], (layer.out, layer.mlp[-1])):
                nn.init.zeros_(product.weight)
                nn.init.zeros_(product.bias)

    def forward(self, packed: Tensor, rows: Rows, queries: Queries | None = None) -> Tensor:
        """`packed [T, D]` -> `[T, D]`, or `[Q, D]`: the last layer is computed for the queries alone."""
        return run_layers(self.layers, packed, rows, queries=queries, checkpointing=self.checkpointing)

    def forward_with_weights(
        self, packed: Tensor, rows: Rows, queries: Queries | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, and the last layer's attention, averaged over heads and without gradients: one `[n, n]` a row
        (queries, keys)."""
        *before, last = (cast(SequenceLayer, layer) for layer in self.layers)
        x = run_layers(before, packed, rows, checkpointing=self.checkpointing)
        with torch.no_grad():
            weights = last.attention_weights(x, rows)
        return run_layers([last], x, rows, queries=queries, checkpointing=self.checkpointing), weights


class Projection(nn.Linear):
    """From a tower's width into the common width, at the scale of its input from the start.

    Weights start as those of CLIP's own projections do (its code: a deviation of one over the root of the input's
    width). PyTorch's default would start both modalities at 0.58 of the tokens' scale.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        nn.init.zeros_(self.bias)


class ModalityAttention(nn.Module):
    """Modality-wise attention: keyless attention over the two aggregate embeddings, one per task (paper, figure 1).

    Each embedding is scored by a dot product with a vector learned for the task; the softmax of the two scores weighs
    the embeddings. `per_modality` learns one vector per task and modality instead of one per task.
    """

    def __init__(self, tasks: int, width: int, per_modality: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tasks, 2 if per_modality else 1, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, embedding: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """`embedding [B, 2, D]`, `present [B, 2]` -> pooled `[B, K, D]`, weights `[B, K, 2]` (0 where absent)."""
        return modality_pool(embedding, self.weight, present)

"""The three parts that CMA-CLIP puts on top of the towers: sequence attention, modality attention, task heads."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

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

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """`x [T, D]`, `cu_seqlens [B+1]` -> `[T, D]`."""
        q, k, v = self._qkv(x)
        attended, _ = packed_attention(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=q.shape[-1] ** -0.5, causal=False
        )
        x = x + self.dropout(self.out(attended.flatten(1)))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))

    def attention_weights(self, x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
        """The softmax of this layer, averaged over heads: one `[n, n]` a row (queries, keys)."""
        q, k, _ = self._qkv(x)
        rows = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        scale = q.shape[-1] ** -0.5
        return [
            (torch.einsum("qhe,khe->hqk", q[start:end], k[start:end]) * scale).softmax(-1).mean(0)
            for start, end in rows
        ]

    def _qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norm_attention(x)).view(len(x), 3, self.heads, -1).unbind(1)


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
        self.layers = nn.ModuleList(SequenceLayer(width, heads, mlp_ratio, dropout) for _ in range(depth))

    def forward(
        self, packed: Tensor, cu_seqlens: Tensor, max_seqlen: int, with_weights: bool = False
    ) -> tuple[Tensor, list[Tensor] | None]:
        """`packed [T, D]` -> `[T, D]`, and the last layer's attention weights when asked for."""
        weights = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if with_weights and index == last:
                weights = cast(SequenceLayer, layer).attention_weights(packed, cu_seqlens)
            packed = layer(packed, cu_seqlens, max_seqlen)
        return packed, weights


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


class TaskHead(nn.Sequential):
    """The MLP that turns a task's pooled embedding `[B, D]` into logits `[B, C]`."""

    def __init__(self, width: int, hidden: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, classes))

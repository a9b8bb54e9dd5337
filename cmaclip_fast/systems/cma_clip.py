"""CMA-CLIP: towers -> sequence attention -> modality attention -> one head per task (arXiv 2112.03562, figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from cmaclip_fast.nn.blocks import ModalityAttention, SequenceAttention
from cmaclip_fast.nn.distinct import distinct_images, distinct_texts
from cmaclip_fast.nn.heads import TaskHeads
from cmaclip_fast.nn.layers import Queries, Rows, run_linear
from cmaclip_fast.ops import pack_tokens
from cmaclip_fast.systems.base import FusionConfig, TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.types import IMAGE, TEXT, AttentionMaps, Batch, Output


class CMACLIPConfig(FusionConfig):
    """
    Attributes:
        dropout: after each layer's attention and inside and after its MLP.
        sequence_attention: False is the ablation: the towers' global tokens, projected, are the embeddings.
        modality_attention: False is the ablation: each head gets both embeddings, side by side.
        vectors: keyless attention with one vector per task (the paper), or one per task and modality.
        fusion_start: `zero` starts each branch of the sequence-wise attention, and the type embedding, at zero, so
            that the first step computes exactly what the system without sequence-wise attention does and fusion is
            added to it (as in ReZero, arXiv 2003.04887, and ControlNet's zero convolutions, arXiv 2302.05543);
            `random` is the paper's own initialisation.
        fusion_gate: learn for each task how much of the fused embedding is used, between 0 (the towers' global
            tokens alone) and 1.
    """

    sequence_attention: bool = True
    modality_attention: bool = True
    vectors: Literal["task", "task-and-modality"] = "task"
    fusion_start: Literal["zero", "random"] = "zero"
    fusion_gate: bool = False

    @model_validator(mode="after")
    def _gate_has_two_sides(self) -> CMACLIPConfig:
        if self.fusion_gate and not (self.sequence_attention and self.modality_attention):
            raise ValueError("fusion_gate needs sequence_attention and modality_attention")
        return self


@dataclass
class _Tokens:
    """Tokens `values [T, D]` of a modality; row b of the batch has those from `starts[b]`, `counts[b]` of them."""

    values: Tensor
    starts: Tensor
    counts: Tensor
    longest: int

    def global_tokens(self, first: bool) -> Tensor:
        """`[B, D]`, the first or last token of each row; some other token where a row has none."""
        if len(self.values) == 0:
            return self.values.new_zeros(len(self.starts), self.values.shape[1])
        index = self.starts if first else self.starts + self.counts - 1
        return self.values.index_select(0, index.clamp(0, len(self.values) - 1))


@register("cma-clip")
class CMACLIP(TwoTowers):
    """The whole system: a `Batch` in, an `Output` out; `create_model` builds one.

    Attributes:
        config: how it was built.
        tasks: for each task the names of its classes, in the order of its logits.
        preprocessing: how a picture becomes `images`.
        tokenizer: how a text becomes `tokens` and `text_lengths`.
    """

    Config = CMACLIPConfig
    title = "CMA-CLIP"
    fusion = ("sequence_attention.",)
    per_task = ("modality_attention.weight", "fusion_gate")
    config: CMACLIPConfig
    heads: TaskHeads

    def __init__(self, config: CMACLIPConfig, tasks: Mapping[str, Sequence[str]], *parts: Any) -> None:
        super().__init__(config, tasks, *parts)
        width = config.width
        if config.sequence_attention:
            self.type_embedding = nn.Parameter(torch.empty(2, width))
            nn.init.normal_(self.type_embedding, std=0.02)
            self.sequence_attention = SequenceAttention(
                width, config.depth, config.heads, config.mlp_ratio, config.dropout
            )
            if config.fusion_start == "zero":
                nn.init.zeros_(self.type_embedding)
                self.sequence_attention.start_at_zero()
        self.norm = nn.LayerNorm(width)
        if config.modality_attention:
            self.modality_attention = ModalityAttention(len(tasks), width, config.vectors == "task-and-modality")
        if config.fusion_gate:
            self.fusion_gate = nn.Parameter(torch.zeros(len(tasks)))
        self.heads = self.make_heads(width if config.modality_attention else 2 * width)

    @property
    def weighs_modalities(self) -> bool:
        return self.config.modality_attention

    def forward(self, batch: Batch, with_attention: bool = False, capacity: int | None = None) -> Output:
        """Classifies a batch.

        In training every text and image is encoded, unless `batch.images` is empty. In evaluation those that are
        absent are not, and what occurs several times is encoded once.

        Args:
            batch: images `[B, 3, H, W]`, tokens `[B, L]`, text_lengths `[B]`, present `[B, 2]`.
            with_attention: also give the last sequence-wise layer's attention maps.
            capacity: room for text tokens, at least as many as the batch has. With it all shapes are known beforehand
                and the host never waits for the device, as a CUDA graph needs it; nothing is encoded only once.

        Returns:
            Logits `[B, C_task]` and modality weights `[B, 2]` of each task, and the embedding `[B, 2, D]`.
        """
        once = not self.training and capacity is None and not torch.compiler.is_compiling()
        text = self._text_tokens(batch, once, capacity)
        image = self._image_tokens(batch, once)
        towers = torch.stack([text.global_tokens(self.text_tower.global_first), image.global_tokens(True)], dim=1)
        attention = None
        if self.config.sequence_attention:
            embedding, attention = self._fuse(text, image, batch.present, capacity, with_attention)
        else:
            embedding = towers
        there = batch.present[..., None]
        embedding = self._normalized(embedding, there)
        if not self.config.modality_attention:
            logits = self.heads(embedding.flatten(1))
            return self.output(logits, embedding=embedding, towers=towers, attention=attention)
        pooled, weights = self.modality_attention(embedding, batch.present)
        if self.config.fusion_gate:
            unfused = weights.to(embedding.dtype) @ self._normalized(towers, there)
            pooled = torch.lerp(unfused, pooled, self.fusion_gate.sigmoid().to(pooled.dtype)[:, None])
        return self.output(
            self.heads(pooled),
            modality_weights=dict(zip(self.tasks, weights.unbind(1), strict=True)),
            embedding=embedding,
            towers=towers,
            attention=attention,
        )

    def _normalized(self, embedding: Tensor, there: Tensor) -> Tensor:
        """`embedding [B, 2, D]` through the norm; 0 where absent, where it may be NaN, which a product with 0 keeps."""
        return self.norm(torch.where(there, embedding, 0)) * there

    def _text_tokens(self, batch: Batch, once: bool, capacity: int | None) -> _Tokens:
        tokens, lengths, texts = batch.tokens, batch.text_lengths, None
        if once:
            texts = distinct_texts(tokens, lengths, batch.present[:, TEXT])
            if texts is not None:
                if len(texts.rows) == 0:
                    return self._no_tokens(batch)
                tokens, lengths = tokens[texts.rows], lengths[texts.rows]
        packed, rows = self.text_tower.packed(tokens, lengths, capacity)
        starts, counts = rows.starts, rows.cu_seqlens.diff()
        if texts is not None:
            starts, counts = starts[texts.of_row], counts[texts.of_row]
        values = run_linear(self.text_projection, packed)
        return _Tokens(values, starts, counts, rows.longest)

    def _image_tokens(self, batch: Batch, once: bool) -> _Tokens:
        images = distinct_images(batch.images, batch.present[:, IMAGE]) if once else None
        if batch.images.numel() == 0 or (images is not None and len(images.rows) == 0):
            return self._no_tokens(batch)
        tokens = self.image_tower(batch.images if images is None else batch.images[images.rows])
        length = tokens.shape[1]
        of_row = torch.arange(len(batch), device=tokens.device) if images is None else images.of_row
        values = run_linear(self.image_projection, tokens.flatten(0, 1))
        return _Tokens(values, of_row * length, torch.full_like(of_row, length), length)

    def _no_tokens(self, batch: Batch) -> _Tokens:
        none = torch.zeros_like(batch.text_lengths)
        return _Tokens(self.norm.weight.new_zeros(0, self.config.width), none, none, 0)

    def _fuse(
        self, text: _Tokens, image: _Tokens, present: Tensor, capacity: int | None, with_attention: bool
    ) -> tuple[Tensor, AttentionMaps | None]:
        """Sequence-wise attention over both: its two global tokens, `[B, 2, D]`.

        Where a modality is absent its place holds another token of the row, if there is one, for the caller to hide.
        """
        counts = torch.stack([text.counts, image.counts], dim=1) * present
        # with a capacity, what is behind the last row belongs to none
        room = None if capacity is None else capacity + len(present) * image.longest
        pack = pack_tokens if capacity is not None else _pack_tokens_uncompiled
        starts = torch.stack([text.starts, image.starts], dim=1)
        packed, cu_seqlens = pack(text.values, image.values, starts, counts, self.type_embedding, capacity=room)
        text_counts, total = counts[:, TEXT], len(packed)
        if total == 0:
            nothing = [text.values.new_zeros(0, 0) for _ in present]
            maps = AttentionMaps(nothing, text_counts.long()) if with_attention else None
            return text.values.new_zeros(len(present), 2, self.config.width), maps
        rows = Rows(cu_seqlens, text.longest + image.longest)

        first = torch.zeros_like(text_counts)
        position = first if self.text_tower.global_first else (text_counts - 1).clamp(min=0)
        index = torch.stack([rows.starts + position, rows.starts + text_counts], dim=1)
        last = (rows.cu_seqlens[1:] - 1).clamp(min=0)
        index = torch.minimum(index, last[:, None])
        queries = Queries(index.flatten().long(), Rows.equal(len(present), 2, index.device))
        if not with_attention:
            return self.sequence_attention(packed, rows, queries).view(len(present), 2, -1), None
        embedding, weights = self.sequence_attention.forward_with_weights(packed, rows, queries)
        return embedding.view(len(present), 2, -1), AttentionMaps(weights, text_counts.long())


# how many tokens come out depends on values, so this stands between compiled graphs
_pack_tokens_uncompiled = torch.compiler.disable(pack_tokens)

"""From the plain implementation to ours, one step at a time: each system here does one thing more than the last."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmaclip_fast.bench.peers.plain import PlainCMACLIP, PlainLongest
from cmaclip_fast.bench.peers.system import Setting, System
from cmaclip_fast.nn.layers import Queries, Rows
from cmaclip_fast.types import Batch


class PackedText(PlainLongest):
    """The text tower on packed tokens; all else padded to the longest text."""

    title = "text tower without padding"

    def logits(self, batch: Batch) -> list[Tensor]:
        plain = cast(PlainCMACLIP, self.module)
        first, patches = plain.visual(batch.images)
        text, lengths = self.setting.model.text_tower(batch.tokens, batch.text_lengths)
        image = torch.cat([first[:, None], patches], dim=1)
        return cast("list[Tensor]", plain.fusion(image, text, lengths))


class AllTokens(nn.Module):
    """Sequence attention that computes its last layer for every token, and then takes the queries."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, packed: Tensor, rows: Rows, queries: Queries) -> Tensor:
        return cast(Tensor, self.attention(packed, rows).index_select(0, queries.index))


class ShortLast(System):
    """The model as it is, its weights not laid out."""

    title = "last fusion layer for two tokens"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        # layouts are found by parameter: what is shared would be laid out here too
        self.module = copy.deepcopy(setting.model)

    def logits(self, batch: Batch) -> list[Tensor]:
        return list(cast(nn.Module, self.module)(batch).logits.values())


class PackedFusion(ShortLast):
    """Towers and fusion on packed tokens, every fusion layer for all of them."""

    title = "fusion without padding"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        model: Any = self.module
        model.sequence_attention = AllTokens(model.sequence_attention)

"""What a system costs: its parameters, and the floating-point operations of one pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cmaclip_fast.modes import evaluation_copy
from cmaclip_fast.systems.base import System
from cmaclip_fast.types import Batch


def _packed_attention_flops(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any, **out: Any) -> int:
    """Two products of each row's queries with its own keys."""
    pairs = int((cu_q.diff().long() * cu_k.diff().long()).sum())
    return 4 * pairs * q.shape[1] * q.shape[2]


# the counter then passes tensors, not shapes: the number of keys is in cu_seqlens
_packed_attention_flops._get_raw = True  # type: ignore[attr-defined]


def parameters(system: System) -> dict[str, int]:
    """All parameters, and those of the towers among them."""
    everything = sum(p.numel() for p in system.parameters())
    return {"all": everything, "towers": sum(p.numel() for _, p in system.tower_parameters())}


def forward_flops(system: System, batch: Batch) -> float:
    """Floating-point operations of classifying one pair, the mean over a batch: products of matrices, convolutions and
    attention, an addition and a multiplication counted as two."""
    system = evaluation_copy(system)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # the fused layers of inference are one operator, which no counter sees into
    torch.backends.mha.set_fastpath_enabled(False)
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.cmaclip.packed_attention: _packed_attention_flops}
    )
    try:
        system(batch)  # what is made once, such as the prompts of classes, is not a pair's
        with counter:
            system(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() / len(batch)

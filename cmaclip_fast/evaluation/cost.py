"""The cost of a system: its parameters, and the floating-point operations of one pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cmaclip_fast.nn.modes import evaluation_copy
from cmaclip_fast.systems.base import System
from cmaclip_fast.types import Batch


class _Counter(TorchDispatchMode):
    """Counts by PyTorch's formulas, and `packed_attention` by ours.

    PyTorch's `FlopCounterMode` puts hooks on all modules, with which layers do not run as they otherwise would.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, formula = kwargs or {}, flop_registry.get(func._overloadpacket)
        if func._overloadpacket is torch.ops.cmaclip.packed_attention:
            self.total += _packed_attention_flops(*args)
        elif formula is None:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _packed_attention_flops(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any) -> int:
    """Two products of each row's queries with its own keys."""
    pairs = int((cu_q.diff().long() * cu_k.diff().long()).sum())
    return 4 * pairs * q.shape[1] * q.shape[2]


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
    counter = _Counter()
    try:
        system(batch)  # what is made once, such as the prompts of classes, is not a pair's
        with torch.no_grad(), counter:
            system(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.total / len(batch)

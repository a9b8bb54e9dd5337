"""What `torch.autocast` means for an operator: the dtype to which its floating-point arguments are brought."""

from __future__ import annotations

import torch
from torch import Tensor


def to_low_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast to its dtype, as matrix products are; else leave as they are."""
    if not _enabled(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(_cast(tensor, dtype) for tensor in tensors)


def to_widest(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast to the widest dtype among them, as `torch.cat` does; else leave as they are."""
    if not _enabled(tensors[0]):
        return tensors
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(_cast(tensor, dtype) for tensor in tensors)


def to_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, cast to float32, as losses are; else leave as they are."""
    if not _enabled(tensors[0]):
        return tensors
    return tuple(_cast(tensor, torch.float32) for tensor in tensors)


def _enabled(tensor: Tensor) -> bool:
    return isinstance(tensor, Tensor) and torch.is_autocast_enabled(tensor.device.type)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    narrow = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if narrow else tensor

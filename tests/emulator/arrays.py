"""Tensors as the emulator takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .emulate import Kernels, module

Load = Callable[..., Kernels]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def ends(lengths: Sequence[int]) -> Tensor:
    """Where each of the neighbouring parts ends, after the 0 where the first begins."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy as NumPy has it: bfloat16 as the integers with its bits."""
    tensor = tensor.detach().contiguous().clone()
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def nan_like(shape: Sequence[int], dtype: torch.dtype) -> np.ndarray:
    return to_numpy(torch.full(tuple(shape), torch.nan, dtype=dtype))


def to_tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == torch.bfloat16 else tensor


def misplaced(tensor: Tensor) -> Tensor:
    """The same values one element past an aligned address."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether the launchers may read the tensors 16 bytes at a time."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def pointer(name: str, tensor: Tensor) -> Any:
    """A kernel's argument: a view that begins or runs elsewhere than its memory is a pointer into all of that."""
    if tensor.is_contiguous() and tensor.storage_offset() == 0:
        return to_numpy(tensor)
    base = tensor._base
    assert base is not None and base.is_contiguous()
    return module().Buffer(to_numpy(base), name, 0).at(tensor.storage_offset() - base.storage_offset())

"""Tensors as the emulator takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .emulate import Kernels

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

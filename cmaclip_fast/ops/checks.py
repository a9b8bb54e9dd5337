"""Checks of operator arguments: each error names the argument and what was expected of it."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


class Arguments:
    """The tensors of one call: they share a device, and sizes of the same name are equal."""

    def __init__(self, device_of: str, device: torch.device) -> None:
        self.device_of, self.device = device_of, device
        self.sizes: dict[str, int] = {}
        self.sources: dict[str, str] = {}

    def check(
        self, name: str, tensor: Tensor, shape: str, dtypes: tuple[torch.dtype, ...], like: str | None = None
    ) -> None:
        """Check rank and sizes against `shape` ("B, M, D"; "B+1" is one more than B), dtype and device.

        `like` names the argument whose dtype, the only one in `dtypes`, this one must share.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor [{shape}], not {type(tensor).__name__}")
        if tensor.dtype not in dtypes:
            if like is not None:
                raise TypeError(f"{name} must have the dtype of {like}, {dtypes[0]}, but has {tensor.dtype}")
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be of dtype {expected}, but is {tensor.dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name} must be on {self.device}, as {self.device_of} is, but is on {tensor.device}")
        sizes, symbols = tensor.shape, shape.split(", ")
        if len(sizes) != len(symbols):
            raise ValueError(f"{name} must have the shape [{shape}], but has {list(sizes)}")
        for dim, (symbol, size) in enumerate(zip(symbols, sizes, strict=True)):
            if symbol not in self.sizes:
                self._learn(name, symbol, size)
            if size != self.sizes[symbol]:
                raise ValueError(
                    f"{name} must have the shape [{shape}] with {self.sizes[symbol]} ({self.sources[symbol]}) "
                    f"at dimension {dim}, but has {list(sizes)}"
                )

    def _learn(self, name: str, symbol: str, size: int) -> None:
        if symbol.isdigit():
            self.sizes[symbol], self.sources[symbol] = int(symbol), "always"
        elif symbol.endswith("+1"):
            one_less = symbol.removesuffix("+1")
            if one_less not in self.sizes:
                self._learn(name, one_less, size - 1)
            self.sizes[symbol], self.sources[symbol] = self.sizes[one_less] + 1, self.sources[one_less]
        else:
            self.sizes[symbol], self.sources[symbol] = size, f"from {name}"


def last_contiguous(name: str, tensor: Tensor) -> None:
    """Require that the last dimension of a tensor with elements is contiguous."""
    if tensor.numel() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, but has strides {tensor.stride()}; "
            f"call {name}.contiguous()"
        )


def values_are_checked(tensor: Tensor) -> bool:
    """Whether values may be looked at: on the CPU, and elsewhere (it waits for the device) if CMACLIP_DEBUG=1.

    Not under `torch.func.vmap`, where a value stands for many.
    """
    if any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ()):
        return False
    return tensor.device.type == "cpu" or debug()


def debug() -> bool:
    """Whether CMACLIP_DEBUG=1 asks for every check, whatever it costs."""
    return os.environ.get("CMACLIP_DEBUG", "0") not in ("", "0")


def cu_seqlens(name: str, ends: Tensor, tokens: int, longest: int) -> None:
    """Check the values of `[B + 1]` sequence ends against the packed tokens there are and the stated longest row."""
    if not values_are_checked(ends):
        return
    # in NumPy, which takes a tenth of the time for so few numbers; by way of a list, since torch.func wraps tensors
    values = np.array(ends.tolist())
    first, last = int(values[0]), int(values[-1])
    if first != 0:
        raise ValueError(f"{name} must begin with 0, but begins with {first}")
    if len(values) > 1:
        lengths = values[1:] - values[:-1]
        if lengths.min() < 0:
            raise ValueError(f"{name} must not decrease, but does at index {int(lengths.argmin()) + 1}")
        if lengths.max() > longest:
            raise ValueError(
                f"max_seqlen{name.removeprefix('cu_seqlens')} must be at least the longest row of {name}, "
                f"{int(lengths.max())}, but is {longest}"
            )
    if last > tokens:
        raise ValueError(f"{name} must end at most at the number of tokens, {tokens}, but ends with {last}")


def not_nan(**tensors: Tensor) -> None:
    """In debug mode, require that no tensor holds NaN."""
    if not debug():
        return
    for name, tensor in tensors.items():
        if bool(tensor.isnan().any()):
            raise ValueError(f"{name} must hold no NaN, but does at index {tensor.isnan().nonzero()[0].tolist()}")

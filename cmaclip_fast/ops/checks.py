"""Checks of operator arguments: each error names the argument and what was expected of it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


class Arguments:
    """The tensors of one call: they share a device, and sizes of the same name are equal."""

    def __init__(self, device_of: str, device: torch.device) -> None:
        self.device_of, self.device = device_of, device
        self.sizes: dict[str, tuple[int, str]] = {}

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
        symbols = shape.split(", ")
        if tensor.dim() != len(symbols):
            raise ValueError(f"{name} must have the shape [{shape}], but has {list(tensor.shape)}")
        for dim, symbol in enumerate(symbols):
            self._bind(name, tensor, shape, dim, symbol)

    def _bind(self, name: str, tensor: Tensor, shape: str, dim: int, symbol: str) -> None:
        size, more = tensor.shape[dim], 0
        if symbol.isdigit():
            known, source = int(symbol), "always"
        else:
            if symbol.endswith("+1"):
                symbol, more = symbol.removesuffix("+1"), 1
            known, source = self.sizes.setdefault(symbol, (size - more, name))
            source = f"from {source}"
        if size != known + more:
            raise ValueError(
                f"{name} must have the shape [{shape}] with {known + more} ({source}) at dimension {dim}, "
                f"but has {list(tensor.shape)}"
            )


def last_contiguous(name: str, tensor: Tensor) -> None:
    """Require that the last dimension of a tensor with elements is contiguous."""
    if tensor.numel() > 0 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, but has strides {tensor.stride()}; "
            f"call {name}.contiguous()"
        )


def values_are_checked(tensor: Tensor) -> bool:
    """Whether values may be looked at: always on the CPU, elsewhere (it waits for the device) if CMACLIP_DEBUG=1."""
    return tensor.device.type == "cpu" or debug()


def debug() -> bool:
    """Whether CMACLIP_DEBUG=1 asks for every check, whatever it costs."""
    return os.environ.get("CMACLIP_DEBUG", "0") not in ("", "0")


def cu_seqlens(name: str, ends: Tensor, tokens: int, longest: int) -> None:
    """Check the values of `[B + 1]` sequence ends against the packed tokens there are and the stated longest row."""
    if not values_are_checked(ends):
        return
    first, last = int(ends[0]), int(ends[-1])
    if first != 0:
        raise ValueError(f"{name} must begin with 0, but begins with {first}")
    if len(ends) > 1:
        lengths = ends.diff()
        if int(lengths.min()) < 0:
            raise ValueError(f"{name} must not decrease, but does at index {int(lengths.argmin()) + 1}")
        if int(lengths.max()) > longest:
            raise ValueError(
                f"max_seqlen{name.removeprefix('cu_seqlens')} must be at least the longest row of {name}, "
                f"{int(lengths.max())}, but is {longest}"
            )
    if last > tokens:
        raise ValueError(f"{name} must end at most at the number of tokens, {tokens}, but ends with {last}")


def not_nan(name: str, tensor: Tensor) -> None:
    """In debug mode, require that a tensor holds no NaN."""
    if debug() and bool(tensor.isnan().any()):
        raise ValueError(f"{name} must hold no NaN, but does at index {tensor.isnan().nonzero()[0].tolist()}")

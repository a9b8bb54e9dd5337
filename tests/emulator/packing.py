"""The launcher's part of pack_tokens, as `csrc/cuda/pack_tokens_cuda.cu` has it, on the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .arrays import aligned, ceil_div, name_of, nan_like, pointer, to_numpy, to_tensor
from .emulate import ORDERS, Kernels, Report

SCAN_THREADS, THREADS, TOKENS_PER_BLOCK, SUM_THREADS = 1024, 128, 16, 256


class Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("rows", "length", "patches", "width")),
        ("capacity", ctypes.c_int64),
    )


class Packing:
    """One call of the operator."""

    def __init__(
        self,
        library: Kernels,
        text: Tensor,
        image: Tensor,
        lengths: Tensor,
        present: Tensor,
        orders: Sequence[tuple[str, int]] = ORDERS,
    ) -> None:
        self.compiled, self.dtype, self.orders = library, text.dtype, orders
        self.rows, self.length, self.width = text.shape
        self.patches = image.shape[1]
        self.places = self.length + self.patches
        self.text, self.image = pointer("text", text), pointer("image", image)
        self.lengths, self.present = to_numpy(lengths), to_numpy(present)
        per_access = 16 // text.element_size()
        self.count = per_access if self.width % per_access == 0 and aligned(text, image) else 1
        self.name = name_of(self.dtype) + ("_wide" if self.count > 1 else "_narrow")
        self.reports: dict[str, Report] = {}

    def launch(self, kernel: str, name: str, grid: int | tuple[int, ...], threads: int, arguments: list) -> None:
        report = self.compiled.launch_in_orders(kernel + name, grid, threads, arguments, orders=self.orders)
        self.reports[kernel] = report.check()

    def shape(self, capacity: int) -> bytes:
        return bytes(Shape(self.rows, self.length, self.patches, self.width, capacity))

    def forward(self, types: Tensor | None, capacity: int | None) -> tuple[Tensor, Tensor]:
        ends = np.full(self.rows + 1, -1, np.int32)
        self.launch("row_ends", "", 1, SCAN_THREADS, [self.shape(0), self.lengths, self.present, ends])
        size = int(ends[-1]) if capacity is None else capacity
        packed = nan_like((size, self.width), self.dtype)
        packed[self.rows * self.places :] = 0
        given = None if types is None else to_numpy(types)
        grid = (self.rows, ceil_div(self.places, TOKENS_PER_BLOCK))
        arguments = [self.text, self.image, self.lengths, self.present, given, ends, packed]
        self.launch("pack", "_" + self.name, grid, THREADS, [self.shape(size), *arguments])
        return to_tensor(packed, self.dtype), to_tensor(ends, torch.int32)

    def backward(self, grad_packed: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.compiled.call("sums_per_row", self.places)
        grad_text = nan_like((self.rows, self.length, self.width), self.dtype)
        grad_image = nan_like((self.rows, self.patches, self.width), self.dtype)
        grad_types = nan_like((2, self.width), self.dtype)
        sums = nan_like((self.rows * parts, 2, self.width), torch.float32)
        grid = (self.rows, ceil_div(self.width, 32 * self.count), parts)
        arguments = [to_numpy(grad_packed), self.lengths, self.present, to_numpy(ends), grad_text, grad_image, sums]
        self.launch("unpack", "_" + self.name, grid, SUM_THREADS, [self.shape(len(grad_packed)), *arguments])
        arguments = [2 * self.width, self.rows * parts, sums, grad_types]
        self.launch("add_sums", "_" + name_of(self.dtype), ceil_div(2 * self.width, 32), SCAN_THREADS, arguments)
        return tuple(to_tensor(array, self.dtype) for array in (grad_text, grad_image, grad_types))

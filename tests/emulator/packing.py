"""The launcher's part of pack_tokens, as `csrc/cuda/pack_tokens_cuda.cu` has it, on the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .arrays import aligned, ceil_div, name_of, nan_like, pointer, to_numpy, to_tensor
from .emulate import ORDERS, Kernels, Report

SCAN_THREADS, THREADS, TOKENS_PER_BLOCK, SUM_THREADS, TOKENS_PER_SUM = 1024, 128, 16, 256, 128


class Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("rows", "texts", "images", "width")),
        ("capacity", ctypes.c_int64),
    )


class Packing:
    """One call of the operator."""

    def __init__(
        self,
        library: Kernels,
        text: Tensor,
        image: Tensor,
        starts: Tensor,
        counts: Tensor,
        orders: Sequence[tuple[str, int]] = ORDERS,
    ) -> None:
        self.compiled, self.dtype, self.orders = library, text.dtype, orders
        self.texts, self.width = text.shape
        self.images, self.rows = len(image), len(starts)
        self.text, self.image = pointer("text", text), pointer("image", image)
        self.starts, self.counts = to_numpy(starts), to_numpy(counts)
        per_access = 16 // text.element_size()
        self.count = per_access if self.width % per_access == 0 and aligned(text, image) else 1
        self.name = name_of(self.dtype) + ("_wide" if self.count > 1 else "_narrow")
        self.reports: dict[str, Report] = {}

    def launch(self, kernel: str, name: str, grid: int | tuple[int, ...], threads: int, arguments: list) -> None:
        report = self.compiled.launch_in_orders(kernel + name, grid, threads, arguments, orders=self.orders)
        self.reports[kernel] = report.check()

    def shape(self, capacity: int) -> bytes:
        return bytes(Shape(self.rows, self.texts, self.images, self.width, capacity))

    def forward(self, types: Tensor | None, capacity: int | None) -> tuple[Tensor, Tensor]:
        ends = np.full(self.rows + 1, -1, np.int32)
        self.launch("row_ends", "", 1, SCAN_THREADS, [self.shape(0), self.starts, self.counts, ends])
        size = int(ends[-1]) if capacity is None else capacity
        packed = nan_like((size, self.width), self.dtype)
        given = None if types is None else to_numpy(types)
        arguments = [self.text, self.image, self.starts, self.counts, given, ends, packed]
        grid = ceil_div(size, TOKENS_PER_BLOCK)
        if grid > 0:
            self.launch("pack", "_" + self.name, grid, THREADS, [self.shape(size), *arguments])
        return to_tensor(packed, self.dtype), to_tensor(ends, torch.int32)

    def backward(self, grad_packed: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grads = [nan_like((size, self.width), self.dtype) for size in (self.texts, self.images)]
        types = [nan_like((self.width,), self.dtype) for _ in grads]
        shape = self.shape(len(grad_packed))
        given = [to_numpy(grad_packed), self.starts, self.counts, to_numpy(ends)]
        for modality, (grad, type_) in enumerate(zip(grads, types, strict=True)):
            parts = ceil_div(len(grad), TOKENS_PER_SUM)
            sums = nan_like((parts, self.width), torch.float32)
            grid = (parts, ceil_div(self.width, 32 * self.count))
            if parts > 0:
                self.launch("unpack", "_" + self.name, grid, SUM_THREADS, [shape, modality, *given, grad, sums])
            arguments = [self.width, parts, sums, type_]
            self.launch("add_sums", "_" + name_of(self.dtype), ceil_div(self.width, 32), SCAN_THREADS, arguments)
        text, image = (to_tensor(grad, self.dtype) for grad in grads)
        return text, image, torch.stack([to_tensor(type_, self.dtype) for type_ in types])

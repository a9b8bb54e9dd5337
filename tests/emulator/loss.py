"""The launcher's part of multitask_cross_entropy, as its file in `csrc/cuda/` has it, on the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arrays import ceil_div, name_of, nan_like, to_numpy, to_tensor
from .emulate import ORDERS, Kernels, Report

THREADS, BLOCK_THREADS = 256, 512
PLANS = ("tile", "warps", "blocks")


class Shape(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("tasks", ctypes.c_int),
        ("classes", ctypes.c_int),
        ("smoothing", ctypes.c_float),
    )


class Loss:
    """One call of the operator; `plan` overrides the choice of the kernels."""

    def __init__(
        self,
        library: Kernels,
        logits: Tensor,
        labels: Tensor,
        offsets: Tensor,
        class_weight: Tensor | None = None,
        smoothing: float = 0.0,
        plan: str | None = None,
        orders: Sequence[tuple[str, int]] = ORDERS,
    ) -> None:
        self.compiled, self.dtype, self.smoothing, self.orders = library, logits.dtype, smoothing, orders
        (self.rows, self.tasks), self.classes = labels.shape, logits.shape[1]
        self.logits, self.labels, self.offsets = to_numpy(logits), to_numpy(labels), to_numpy(offsets)
        self.weight = None if class_weight is None else to_numpy(class_weight)
        size = logits.element_size()
        weighted = class_weight is not None
        self.plan = plan or PLANS[library.call("plan", self.classes, self.tasks, weighted, True, size)]
        self.grid = {
            "tile": (ceil_div(self.rows, 16 // size), 1),
            "warps": (self.rows, library.call("blocks_per_row", self.tasks)),
            "blocks": (self.rows * self.tasks, 1),
        }[self.plan]
        self.shared = library.call("tile_bytes", self.classes, weighted, size) if self.plan == "tile" else 0
        self.reports: dict[str, Report] = {}

    def launch(self, kernel: str, name: str, grid: Any, threads: int, arguments: list, shared: int = 0) -> None:
        report = self.compiled.launch_in_orders(
            kernel + name, grid, threads, arguments, dynamic_shared=shared, orders=self.orders
        )
        self.reports[kernel] = report.check()

    def launch_plan(self, kernel: str, arguments: list) -> None:
        shape = bytes(Shape(self.rows, self.tasks, self.classes, self.smoothing))
        name, threads = f"_{self.plan}_{name_of(self.dtype)}", BLOCK_THREADS if self.plan == "blocks" else THREADS
        self.launch(kernel, name, self.grid, threads, [shape, *arguments], self.shared)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        lse = nan_like((self.rows, self.tasks), torch.float32)
        row_loss, row_weight = (nan_like((self.tasks, self.rows), torch.float32) for _ in range(2))
        loss, weight_sum = (nan_like((self.tasks,), torch.float32) for _ in range(2))
        given = [self.logits, self.labels, self.offsets, self.weight]
        self.launch_plan("forward", [*given, lse, row_loss, row_weight])
        shape = bytes(Shape(self.rows, self.tasks, self.classes, self.smoothing))
        self.launch("add_rows", "", self.tasks, BLOCK_THREADS, [shape, row_loss, row_weight, loss, weight_sum])
        return tuple(to_tensor(array, torch.float32) for array in (loss, lse, weight_sum))

    def backward(self, grad_loss: Tensor, lse: Tensor, weight_sum: Tensor) -> Tensor:
        totals = None
        if self.weight is not None and self.smoothing > 0:
            totals = nan_like((self.tasks,), torch.float32)
            arguments = [self.offsets, self.weight, totals]
            self.launch("add_class_weights", "_" + name_of(self.dtype), self.tasks, BLOCK_THREADS, arguments)
        grad_logits = nan_like((self.rows, self.classes), self.dtype)
        given = [to_numpy(grad_loss), self.logits, self.labels, self.offsets, self.weight, totals]
        self.launch_plan("backward", [*given, to_numpy(lse), to_numpy(weight_sum), grad_logits])
        return to_tensor(grad_logits, self.dtype)

"""The launcher's part of multitask_binary_cross_entropy, as its file in `csrc/cuda/` has it, on the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arrays import ceil_div, name_of, nan_like, to_numpy, to_tensor
from .emulate import ORDERS, Kernels, Report

THREADS, ROWS = 256, 16


class Shape(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("tasks", ctypes.c_int),
        ("classes", ctypes.c_int),
        ("gamma_positive", ctypes.c_float),
        ("gamma_negative", ctypes.c_float),
        ("margin", ctypes.c_float),
    )


class BinaryLoss:
    """One call of the operator; `options` are the two exponents and the margin."""

    def __init__(
        self,
        library: Kernels,
        logits: Tensor,
        targets: Tensor,
        offsets: Tensor,
        class_weight: Tensor | None = None,
        options: Sequence[float] = (0.0, 0.0, 0.0),
        orders: Sequence[tuple[str, int]] = ORDERS,
    ) -> None:
        self.compiled, self.dtype, self.orders = library, logits.dtype, orders
        (self.rows, self.classes), self.tasks = logits.shape, len(offsets) - 1
        self.logits, self.targets, self.offsets = to_numpy(logits), to_numpy(targets), to_numpy(offsets)
        self.weight = None if class_weight is None else to_numpy(class_weight)
        self.shape = bytes(Shape(self.rows, self.tasks, self.classes, *options))
        self.parts = ceil_div(self.rows, ROWS)
        self.grid = (ceil_div(self.classes, THREADS), self.parts)
        self.reports: dict[str, Report] = {}

    def launch(self, kernel: str, grid: Any, arguments: list, typed: bool = True) -> None:
        name = f"{kernel}_{name_of(self.dtype)}" if typed else kernel
        report = self.compiled.launch_in_orders(name, grid, THREADS, arguments, orders=self.orders)
        self.reports[kernel] = report.check()

    def forward(self) -> tuple[Tensor, Tensor]:
        losses, weights = (nan_like((self.parts, self.classes), torch.float32) for _ in range(2))
        loss, weight_sum = (nan_like((self.tasks,), torch.float32) for _ in range(2))
        self.launch("sum_columns", self.grid, [self.shape, self.logits, self.targets, self.weight, losses, weights])
        given = [self.parts, self.classes, self.offsets, losses, weights, loss, weight_sum]
        self.launch("add_parts", self.tasks, given, typed=False)
        return to_tensor(loss, torch.float32), to_tensor(weight_sum, torch.float32)

    def backward(self, grad_loss: Tensor, weight_sum: Tensor) -> Tensor:
        scales = nan_like((self.classes,), torch.float32)
        given = [self.offsets, to_numpy(grad_loss), to_numpy(weight_sum), self.weight, scales]
        self.launch("scale_columns", self.tasks, given)
        grad_logits = nan_like((self.rows, self.classes), self.dtype)
        self.launch("gradient", self.grid, [self.shape, self.logits, self.targets, scales, grad_logits])
        return to_tensor(grad_logits, self.dtype)

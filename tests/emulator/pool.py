"""The launcher's part of modality_pool, as `csrc/cuda/modality_pool_cuda.cu` has it, on the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .arrays import aligned, ceil_div, name_of, nan_like, pointer, to_numpy, to_tensor
from .emulate import ORDERS, Kernels, Report

THREADS, TASKS_PER_BLOCK, TASKS_PER_WARP, WEIGHT_WARPS = 128, 32, 4, 8


class Shape(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int),
        ("modalities", ctypes.c_int),
        ("tasks", ctypes.c_int),
        ("width", ctypes.c_int),
        ("shared", ctypes.c_bool),
    )


class Pool:
    """One call of the operator."""

    def __init__(
        self,
        library: Kernels,
        embeddings: Tensor,
        weight: Tensor,
        present: Tensor,
        orders: Sequence[tuple[str, int]] = ORDERS,
    ) -> None:
        self.compiled, self.dtype, self.orders = library, embeddings.dtype, orders
        self.rows, self.modalities, self.width = embeddings.shape
        self.tasks, self.shared = weight.shape[0], weight.shape[1] == 1
        self.embeddings, self.weight = pointer("embeddings", embeddings), pointer("weight", weight)
        self.present, self.weight_shape = present.numpy().copy(), tuple(weight.shape)
        per_access = 16 // embeddings.element_size()
        self.wide = self.width % per_access == 0 and aligned(embeddings, weight)
        self.count = per_access if self.wide else 1
        self.name = name_of(embeddings.dtype) + ("_wide" if self.wide else "_narrow")
        self.bytes = self.modalities * self.width * embeddings.element_size() if self.wide else 0
        self.shape = bytes(Shape(self.rows, self.modalities, self.tasks, self.width, self.shared))
        self.reports: dict[str, Report] = {}

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, arguments: list, shared: int = 0) -> None:
        arguments = [self.shape, *arguments]
        report = self.compiled.launch_in_orders(
            f"{kernel}_{self.name}", grid, threads, arguments, dynamic_shared=shared, orders=self.orders
        )
        self.reports[kernel] = report.check()

    def forward(self) -> tuple[Tensor, Tensor]:
        pooled = nan_like((self.rows, self.tasks, self.width), self.dtype)
        weights = nan_like((self.rows, self.tasks, self.modalities), torch.float32)
        grid = (self.rows, ceil_div(self.tasks, TASKS_PER_BLOCK))
        arguments = [self.embeddings, self.weight, self.present, pooled, weights]
        self.launch("forward", grid, THREADS, arguments, self.bytes)
        return to_tensor(pooled, self.dtype), to_tensor(weights, torch.float32)

    def backward(self, grad_pooled: Tensor, grad_weights: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
        grad, pool_weights = to_numpy(grad_pooled), to_numpy(weights)
        scores = nan_like((self.rows, self.tasks, self.modalities), torch.float32)
        grid = (self.rows, ceil_div(self.tasks, TASKS_PER_BLOCK))
        given = None if grad_weights is None else to_numpy(grad_weights)
        arguments = [grad, given, self.embeddings, self.present, pool_weights, scores]
        self.launch("backward_scores", grid, THREADS, arguments, self.bytes)
        grad_embeddings = nan_like((self.rows, self.modalities, self.width), self.dtype)
        grid = (self.rows, ceil_div(self.width, THREADS * self.count))
        arguments = [grad, self.weight, self.present, pool_weights, scores, grad_embeddings]
        self.launch("backward_embeddings", grid, THREADS, arguments)
        grad_weight = nan_like(self.weight_shape, self.dtype)
        grid3 = (
            ceil_div(self.width, 32 * self.count),
            ceil_div(self.tasks, TASKS_PER_WARP),
            1 if self.shared else self.modalities,
        )
        arguments = [self.embeddings, self.present, scores, grad_weight]
        self.launch("backward_weight", grid3, 32 * WEIGHT_WARPS, arguments)
        return to_tensor(grad_embeddings, self.dtype), to_tensor(grad_weight, self.dtype)

"""The CUDA kernels of modality_pool in the emulator: values, gradients, faults and memory traffic."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from cmaclip_fast.ops import reference

from .arrays import DTYPES, Load, assert_close, ceil_div, name_of, nan_like, to_numpy, to_tensor
from .emulate import Kernels, Report

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
    """The launcher's part: grids and choices as `csrc/cuda/modality_pool_cuda.cu` makes them."""

    def __init__(self, library: Kernels, embeddings: Tensor, weight: Tensor, present: Tensor) -> None:
        self.library, self.dtype = library, embeddings.dtype
        self.rows, self.modalities, self.width = embeddings.shape
        self.tasks, self.shared = weight.shape[0], weight.shape[1] == 1
        self.embeddings, self.weight, self.present = to_numpy(embeddings), to_numpy(weight), present.numpy().copy()
        per_access = 16 // embeddings.element_size()
        self.wide = self.width % per_access == 0
        self.count = per_access if self.wide else 1
        self.name = name_of(embeddings.dtype) + ("_wide" if self.wide else "_narrow")
        self.bytes = self.modalities * self.width * embeddings.element_size() if self.wide else 0
        self.shape = bytes(Shape(self.rows, self.modalities, self.tasks, self.width, self.shared))
        self.reports: dict[str, Report] = {}

    def launch(self, kernel: str, grid: tuple[int, ...], threads: int, arguments: list, shared: int = 0) -> None:
        arguments = [self.shape, *arguments]
        report = self.library.launch_in_orders(f"{kernel}_{self.name}", grid, threads, arguments, dynamic_shared=shared)
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
        grad_weight = nan_like(self.weight.shape, self.dtype)
        grid3 = (
            ceil_div(self.width, 32 * self.count),
            ceil_div(self.tasks, TASKS_PER_WARP),
            1 if self.shared else self.modalities,
        )
        arguments = [self.embeddings, self.present, scores, grad_weight]
        self.launch("backward_weight", grid3, 32 * WEIGHT_WARPS, arguments)
        return to_tensor(grad_embeddings, self.dtype), to_tensor(grad_weight, self.dtype)


# Rows, modalities, tasks, width, one weight vector per task.
SHAPES = [(3, 2, 5, 40, False), (2, 3, 33, 37, True), (9, 2, 2, 64, True), (1, 8, 1, 136, False), (2, 1, 4, 1, False)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(kernels: Load, shape: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    rows, modalities, tasks, width, shared = shape
    embeddings = torch.randn(rows, modalities, width).to(dtype)
    weight = (torch.randn(tasks, 1 if shared else modalities, width) / width**0.5).to(dtype)
    present = torch.rand(rows, modalities) < 0.7
    present[0] = False
    # What is absent must not be read: NaN there changes nothing.
    embeddings[~present] = torch.nan
    pool = Pool(kernels("modality_pool"), embeddings, weight, present)
    pooled, weights = pool.forward()
    plain = reference.modality_pool_forward(embeddings, weight, present)
    exact = reference.modality_pool_forward(embeddings.double(), weight.double(), present)
    assert_close(pooled, plain[0], exact[0], dtype)
    assert_close(weights, plain[1], exact[1], torch.float32)

    grad_pooled = torch.randn(rows, tasks, width).to(dtype)
    grad_weights = None if shared else torch.randn(rows, tasks, modalities)
    results = pool.backward(grad_pooled, grad_weights, plain[1])
    plain_grads = reference.modality_pool_backward(grad_pooled, grad_weights, embeddings, weight, present, plain[1])
    exact_grads = reference.modality_pool_backward(
        grad_pooled.double(),
        None if grad_weights is None else grad_weights.double(),
        embeddings.double(),
        weight.double(),
        present,
        exact[1],
    )
    for result, plain_grad, exact_grad in zip(results, plain_grads, exact_grads, strict=True):
        assert_close(result, plain_grad, exact_grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_memory_traffic(kernels: Load, dtype: torch.dtype) -> None:
    """At a width of whole sectors, as few sectors as can be; and no bank conflicts."""
    embeddings, weight = torch.randn(2, 2, 256).to(dtype), torch.randn(4, 2, 256).to(dtype)
    pool = Pool(kernels("modality_pool"), embeddings, weight, torch.ones(2, 2, dtype=torch.bool))
    _, weights = pool.forward()
    pool.backward(torch.randn(2, 4, 256).to(dtype), None, weights)
    for kernel, report in pool.reports.items():
        counts = report.counts
        assert counts.sectors <= 1.05 * counts.fewest_sectors, kernel
        assert counts.bank_conflicts == 0, kernel

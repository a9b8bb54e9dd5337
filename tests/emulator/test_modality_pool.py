"""The CUDA kernels of modality_pool in the emulator: values, gradients, faults and memory traffic."""

from __future__ import annotations

import pytest
import torch

from cmaclip_fast.ops import reference

from .. import rule
from .arrays import DTYPES, Load, misplaced
from .pool import Pool

# Rows, modalities, tasks, width, one weight vector per task.
SHAPES = [(3, 2, 5, 40, False), (2, 3, 33, 37, True), (9, 2, 2, 64, True), (1, 8, 1, 136, False), (2, 1, 4, 1, False)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(kernels: Load, shape: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    run(kernels, shape, dtype)


def test_large_scores(kernels: Load) -> None:
    run(kernels, (9, 4, 5, 64, False), torch.float32, grow=300)


def run(kernels: Load, shape: tuple[int, int, int, int, bool], dtype: torch.dtype, grow: float = 1.0) -> None:
    """Forward and backward on the emulator, each held against float64."""
    rows, modalities, tasks, width, shared = shape
    embeddings = torch.randn(rows, modalities, width).to(dtype) * grow
    weight = (torch.randn(tasks, 1 if shared else modalities, width) / width**0.5).to(dtype)
    present = torch.rand(rows, modalities) < 0.7
    present[0] = False
    # What is absent must not be read: NaN there changes nothing.
    embeddings[~present] = torch.nan
    pool = Pool(kernels("modality_pool"), embeddings, weight, present)
    pooled, weights = pool.forward()
    plain = reference.modality_pool_forward(embeddings, weight, present)
    exact = reference.modality_pool_forward(embeddings.double(), weight.double(), present)
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
    of_weights = torch.zeros(weights.shape) if grad_weights is None else grad_weights
    conditioning = rule.pool(grad_pooled, of_weights, embeddings, weight, present)
    for name, *judged, kind, bound in zip(
        ("pooled", "weights", "gradient of embeddings", "gradient of weight"),
        (pooled, weights, *results),
        (*plain, *plain_grads),
        (*exact, *exact_grads),
        (dtype, torch.float32, dtype, dtype),
        conditioning,
        strict=True,
    ):
        rule.judge(name, *judged, kind, bound)


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


@pytest.mark.tried("operator", ends="the result of aligned tensors")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("which", ["embeddings", "weight"])
def test_views_that_are_not_aligned(kernels: Load, which: str, dtype: torch.dtype) -> None:
    """A width of whole accesses, from an odd address on: the narrow kernels, and the wide ones would be misaligned."""
    given = {"embeddings": torch.randn(3, 2, 64).to(dtype), "weight": torch.randn(5, 2, 64).to(dtype) / 8}
    present = torch.ones(3, 2, dtype=torch.bool)
    plain = reference.modality_pool_forward(**given, present=present)
    exact = reference.modality_pool_forward(**{k: x.double() for k, x in given.items()}, present=present)
    given[which] = misplaced(given[which])
    pool = Pool(kernels("modality_pool"), given["embeddings"], given["weight"], present)
    pooled, weights = pool.forward()
    rule.judge("pooled", pooled, plain[0], exact[0], dtype)
    rule.judge("weights", weights, plain[1], exact[1], torch.float32)
    grad = torch.randn(pooled.shape).to(dtype)
    results = pool.backward(grad, None, plain[1])
    plain_grads = reference.modality_pool_backward(grad, None, *given.values(), present, plain[1])
    wide = (x.double() for x in given.values())
    exact_grads = reference.modality_pool_backward(grad.double(), None, *wide, present, exact[1])
    for result, plain_grad, exact_grad in zip(results, plain_grads, exact_grads, strict=True):
        rule.judge("gradient", result, plain_grad, exact_grad, dtype)

    pool.name, pool.bytes = pool.name.replace("narrow", "wide"), 2 * 64 * dtype.itemsize
    with pytest.raises(AssertionError, match="misaligned"):
        pool.forward()

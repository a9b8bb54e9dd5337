"""The CUDA kernels of multitask_binary_cross_entropy in the emulator: values, gradients, faults, memory traffic."""

from __future__ import annotations

import pytest
import torch

from cmaclip_fast.ops import reference

from .. import rule
from .arrays import DTYPES, Load, ends
from .binary_loss import BinaryLoss

# Rows, classes of each task, whether there are class weights.
SHAPES = [(1, [1], False), (9, [2, 33, 7], True), (35, [19, 61, 12], False), (17, [300, 250], True)]
# The exponents and the margin.
OPTIONS = [(0.0, 0.0, 0.0), (2.0, 0.5, 0.0), (1.0, 4.0, 0.05), (0.0, 0.0, 0.3), (0.0, 2.0, 1e-6)]


def run(
    kernels: Load,
    shape: tuple[int, list[int], bool],
    options: tuple[float, float, float],
    dtype: torch.dtype,
    scale: float = 3.0,
) -> None:
    """Forward and backward on the emulator, each held against float64."""
    rows, classes, weighted = shape
    logits = (torch.randn(rows, sum(classes)) * scale).to(dtype)
    targets = torch.randint(-1, 2, logits.shape, dtype=torch.int8)
    # A task without known targets, but for the smallest shape.
    targets[:, -classes[-1] :] = -3 if len(classes) > 1 else 1
    weight = torch.rand(sum(classes)).to(dtype) if weighted else None
    loss = BinaryLoss(kernels("multitask_binary_cross_entropy"), logits, targets, ends(classes), weight, options)
    results = loss.forward()
    given = (targets, ends(classes), weight, *options)
    wide = (targets, ends(classes), None if weight is None else weight.double(), *options)
    plain = reference.multitask_binary_cross_entropy_forward(logits, *given)
    exact = reference.multitask_binary_cross_entropy_forward(logits.double(), *wide)
    for name, *judged in zip(("loss", "weight_sum"), results, plain, exact, strict=True):
        rule.judge(name, *judged, torch.float32)
    assert len(classes) == 1 or results[0][-1] == 0

    grad_loss = torch.randn(len(classes))
    grad = loss.backward(grad_loss, plain[1])
    plain_grad = reference.multitask_binary_cross_entropy_backward(grad_loss, logits, *given, plain[1])
    exact_grad = reference.multitask_binary_cross_entropy_backward(grad_loss.double(), logits.double(), *wide, exact[1])
    rule.judge("gradient of logits", grad, plain_grad, exact_grad, dtype)
    assert not grad.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    kernels: Load, shape: tuple[int, list[int], bool], options: tuple[float, float, float], dtype: torch.dtype
) -> None:
    run(kernels, shape, options, dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_of_hundreds(kernels: Load, options: tuple[float, float, float]) -> None:
    run(kernels, (9, [19, 12], True), options, torch.float32, scale=300.0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_that_are_not_finite(kernels: Load, options: tuple[float, float, float]) -> None:
    """Infinite and NaN logits, known and unknown, and targets above 1: as plain PyTorch has it."""
    logits = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, 700.0, -700.0, -3.0]])
    offsets = torch.arange(8, dtype=torch.int32)
    for target in (-1, 0, 1, 2):
        given = (logits, torch.full((1, 7), target, dtype=torch.int8), offsets)
        loss = BinaryLoss(kernels("multitask_binary_cross_entropy"), *given, options=options)
        results = loss.forward()
        expected = reference.multitask_binary_cross_entropy_forward(*given, None, *options)
        torch.testing.assert_close(results, expected, equal_nan=True)
        grad = reference.multitask_binary_cross_entropy_backward(torch.ones(7), *given, None, *options, expected[1])
        torch.testing.assert_close(loss.backward(torch.ones(7), expected[1]), grad, equal_nan=True)


def test_many_tasks(kernels: Load) -> None:
    run(kernels, (3, [3] * 40, False), (1.0, 2.0, 0.1), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_memory_traffic(kernels: Load, dtype: torch.dtype) -> None:
    """As few sectors as can be, and no bank conflicts."""
    logits, targets = torch.randn(32, 4096).to(dtype), torch.ones(32, 4096, dtype=torch.int8)
    loss = BinaryLoss(
        kernels("multitask_binary_cross_entropy"), logits, targets, ends([1024, 3072]), torch.rand(4096).to(dtype)
    )
    _, weight_sum = loss.forward()
    loss.backward(torch.ones(2), weight_sum)
    for kernel, report in loss.reports.items():
        assert report.counts.sectors <= 1.05 * report.counts.fewest_sectors, kernel
        assert report.counts.bank_conflicts == 0, kernel
    assert loss.reports["gradient"].instructions["distinct_sectors_written"] == logits.nbytes // 32

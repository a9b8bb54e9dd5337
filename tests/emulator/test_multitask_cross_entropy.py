"""The CUDA kernels of multitask_cross_entropy in the emulator: values, gradients, faults and memory traffic."""

from __future__ import annotations

import pytest
import torch

from cmaclip_fast.ops import reference

from .. import rule
from .arrays import DTYPES, Load, ends, nan_like, to_numpy, to_tensor
from .emulate import module
from .loss import BLOCK_THREADS, PLANS, Loss, Shape

# Rows, classes of each task, whether there are class weights, label smoothing.
SHAPES = [(1, [1], False, 0.0), (9, [2, 33, 7], True, 0.1), (5, [19, 61, 12], False, 0.3), (3, [2500], True, 0.2)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    kernels: Load, shape: tuple[int, list[int], bool, float], plan: str, dtype: torch.dtype
) -> None:
    run(kernels, shape, plan, dtype)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_logits_far_from_zero(kernels: Load, plan: str, shift: float) -> None:
    run(kernels, (5, [19, 61, 12], True, 0.3), plan, torch.float32, shift)


def run(
    kernels: Load, shape: tuple[int, list[int], bool, float], plan: str, dtype: torch.dtype, shift: float = 0.0
) -> None:
    """Forward and backward on the emulator, each held against float64."""
    rows, classes, weighted, smoothing = shape
    logits = (torch.randn(rows, sum(classes)) * 3 + shift).to(dtype)
    labels = torch.stack([torch.randint(0, count, (rows,)) for count in classes], dim=1)
    labels = torch.where(torch.rand(labels.shape) < 0.7, labels, -1)
    # A task without labels, but for the smallest shape.
    labels[:, -1] = -3 if len(classes) > 1 else 0
    weight = torch.rand(sum(classes)).to(dtype) if weighted else None
    offsets = ends(classes)
    loss = Loss(kernels("multitask_cross_entropy"), logits, labels, offsets, weight, smoothing, plan)
    results = loss.forward()
    given = (labels, offsets, weight, smoothing)
    plain = reference.multitask_cross_entropy_forward(logits, *given)
    wide = (labels, offsets, None if weight is None else weight.double(), smoothing)
    exact = reference.multitask_cross_entropy_forward(logits.double(), *wide)
    grad_loss = torch.randn(len(classes))
    of_loss, of_logits = rule.cross_entropy(grad_loss, logits, *given)
    for name, *judged, bound in zip(
        ("loss", "lse", "weight_sum"), results, plain, exact, (of_loss, None, None), strict=True
    ):
        rule.judge(name, *judged, torch.float32, bound)
    assert len(classes) == 1 or results[0][-1] == 0

    grad_logits = loss.backward(grad_loss, *plain[1:])
    plain_grad = reference.multitask_cross_entropy_backward(grad_loss, logits, *given, *plain[1:])
    exact_grad = reference.multitask_cross_entropy_backward(grad_loss.double(), logits.double(), *wide, *exact[1:])
    rule.judge("gradient of logits", grad_logits, plain_grad, exact_grad, dtype, of_logits)
    assert not grad_logits.isnan().any()


@pytest.mark.parametrize("plan", PLANS)
def test_values_that_are_not_finite(kernels: Load, plan: str) -> None:
    """Infinite and NaN logits, labels past the last class and weights that add to 0: as plain PyTorch has it."""
    inf = torch.inf
    tasks = [[1, -inf, 2], [-inf, -inf, -inf], [inf, 0, 1], [torch.nan, 0, 1], [-1e4, 1e4, 0], [5, 1, -inf]]
    logits, offsets = torch.tensor(tasks).view(1, -1), ends([3] * len(tasks))
    some = torch.tensor([0.0, 1, 1]).repeat(len(tasks))
    for label in (-1, 0, 1, 3):
        for weight, smoothing in ((None, 0.0), (None, 0.1), (some, 0.0)):
            given = (logits, torch.full((1, len(tasks)), label), offsets, weight, smoothing)
            loss = Loss(kernels("multitask_cross_entropy"), *given, plan)
            results, expected = loss.forward(), reference.multitask_cross_entropy_forward(*given)
            torch.testing.assert_close(results, expected, equal_nan=True)
            grad = torch.ones(len(tasks))
            expected_grad = reference.multitask_cross_entropy_backward(grad, *given, *expected[1:])
            torch.testing.assert_close(loss.backward(grad, *expected[1:]), expected_grad, equal_nan=True)


def test_many_tasks(kernels: Load) -> None:
    classes = [3] * 40
    logits, labels = torch.randn(3, 120), torch.randint(-1, 3, (3, 40))
    for plan in ("tile", "warps"):
        loss = Loss(kernels("multitask_cross_entropy"), logits, labels, ends(classes), None, 0.1, plan)
        expected = reference.multitask_cross_entropy_forward(logits, labels, ends(classes), None, 0.1)
        torch.testing.assert_close(loss.forward(), expected)
        grad = torch.randn(40)
        expected_grad = reference.multitask_cross_entropy_backward(
            grad, logits, labels, ends(classes), None, 0.1, *expected[1:]
        )
        torch.testing.assert_close(loss.backward(grad, *expected[1:]), expected_grad)


def test_logits_that_are_not_aligned(kernels: Load) -> None:
    """A view whose rows begin anywhere: no access that is not aligned, the same results."""
    library = kernels("multitask_cross_entropy")
    wide = torch.randn(2 * 1501 + 3)
    logits = wide[3:].view(2, 1501)
    loss = Loss(library, logits, torch.tensor([[7], [1500]]), ends([1501]), plan="blocks")
    expected = loss.forward()[1]
    buffer = module().Buffer(to_numpy(wide), "logits")
    lse = nan_like((2, 1), torch.float32)
    parts = [nan_like((1, 2), torch.float32) for _ in range(2)]
    shape = bytes(Shape(2, 1, 1501, 0.0))
    arguments = [shape, buffer.at(3), loss.labels, loss.offsets, None, lse, *parts]
    library.launch("forward_blocks_float32", 2, BLOCK_THREADS, arguments).check()
    torch.testing.assert_close(to_tensor(lse, torch.float32), expected)


def test_plan(kernels: Load) -> None:
    call = kernels("multitask_cross_entropy").call
    assert PLANS[call("plan", 92, 3, False, True, 4)] == "tile"
    assert PLANS[call("plan", 92, 3, False, False, 4)] == "warps"
    assert PLANS[call("plan", 40_000, 1024, True, True, 2)] == "warps"
    assert PLANS[call("plan", 100_000, 1, True, True, 2)] == "blocks"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("classes", [[19, 61, 12], [4096]], ids=str)
def test_memory_traffic(kernels: Load, classes: list[int], dtype: torch.dtype) -> None:
    """As few sectors as can be, also where tasks begin anywhere, and no bank conflicts."""
    logits = torch.randn(32, sum(classes)).to(dtype)
    labels = torch.zeros(32, len(classes), dtype=torch.int64)
    weight = torch.rand(sum(classes)).to(dtype)
    loss = Loss(kernels("multitask_cross_entropy"), logits, labels, ends(classes), weight, 0.1)
    assert loss.plan == ("tile" if len(classes) > 1 else "blocks")
    _, lse, weight_sum = loss.forward()
    loss.backward(torch.ones(len(classes)), lse, weight_sum)
    for kernel in ("forward", "backward", "add_rows"):
        counts = loss.reports[kernel].counts
        assert counts.sectors <= 1.05 * counts.fewest_sectors, kernel
        assert counts.bank_conflicts == 0, kernel
    assert loss.reports["backward"].instructions["distinct_sectors_written"] == logits.nbytes // 32

"""multitask_cross_entropy on the CPU: every backend against float64, odd sizes, missing labels, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import check, check_threads, ends, multitask_cross_entropy_case, spread

from cmaclip_fast.ops import available_backends, multitask_cross_entropy

pytestmark = pytest.mark.usefixtures("nan_filled")
USABLE = available_backends(operator="multitask_cross_entropy")
BACKENDS = [name for name in ("reference", "cpp") if USABLE[name] is None]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, [1]), (5, [2, 33, 7]), (64, [19, 61, 12])])
def test_results_and_gradients(backend, dtype, weighted, label_smoothing, rows, classes):
    check(multitask_cross_entropy_case(rows, classes, weighted, label_smoothing), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [[100_000], [3] * 1024])
def test_many_classes_and_many_tasks(backend, classes):
    check(multitask_cross_entropy_case(3, classes, weighted=True, label_smoothing=0.1), backend, torch.float32)


@given(st.integers(0, 9), st.lists(st.integers(1, 40), min_size=1, max_size=4), st.booleans(), st.floats(0, 1))
def test_any_shape(rows, classes, weighted, label_smoothing):
    case = multitask_cross_entropy_case(rows, classes, weighted, label_smoothing)
    check(case, BACKENDS[-1], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    check(multitask_cross_entropy_case(6, [3, 9]), backend, torch.float32, transform=spread)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_logits_far_from_zero(backend, shift):
    case = multitask_cross_entropy_case(6, [3, 40, 200], weighted=True, label_smoothing=0.5)
    case.arguments["logits"] += shift
    check(case, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_same_as_separate_losses(backend, weighted, label_smoothing):
    case = multitask_cross_entropy_case(20, [4, 9, 3], weighted, label_smoothing).arguments
    start, expected = 0, []
    for task, classes in enumerate([4, 9, 3]):
        columns = slice(start, start + classes)
        weight = None if case["class_weight"] is None else case["class_weight"][columns]
        options = {"weight": weight, "ignore_index": -1, "label_smoothing": label_smoothing}
        expected.append(F.cross_entropy(case["logits"][:, columns], case["labels"][:, task], **options))
        start += classes
    torch.testing.assert_close(multitask_cross_entropy(**case, backend=backend), torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_task_without_labels_costs_nothing(backend):
    logits = torch.randn(3, 5, requires_grad=True)
    labels = torch.tensor([[0, -1], [1, -1], [1, -3]])
    loss = multitask_cross_entropy(logits, labels, torch.tensor([0, 2, 5]), backend=backend)
    assert loss[1] == 0
    loss.sum().backward()
    assert torch.equal(logits.grad[:, 2:], torch.zeros(3, 3))
    assert (logits.grad[:, :2] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_of_minus_infinity(backend):
    """A class that is ruled out takes no part, also where many neighbours are: as in plain PyTorch."""
    logits = torch.randn(3, 20_000)
    logits[0, 4:9_000] = logits[1, 10_000:] = logits[2, 7] = -torch.inf
    logits.requires_grad_()
    labels = torch.tensor([[3], [9], [11]])
    loss = multitask_cross_entropy(logits, labels, torch.tensor([0, 20_000]), backend=backend)
    expected = F.cross_entropy(logits, labels[:, 0])
    torch.testing.assert_close(loss[0], expected)
    gradients = (torch.autograd.grad(x, logits)[0] for x in (loss.sum(), expected))
    torch.testing.assert_close(*gradients)


def test_same_gradient_for_any_number_of_threads():
    check_threads(multitask_cross_entropy_case(70, [19, 9000], True, 0.1), torch.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_gradcheck(weighted, label_smoothing):
    case = multitask_cross_entropy_case(6, [2, 4, 3], weighted, label_smoothing).tensors(torch.float64)
    logits = case.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: multitask_cross_entropy(x, **case, backend="reference"), (logits,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 5)}, ValueError, r"logits must have the shape \[B, C\]"),
        ({"labels": torch.zeros(3, 2).long()}, ValueError, r"labels must have .* 2 \(from logits\)"),
        ({"labels": torch.zeros(2, 2)}, TypeError, "labels must be of dtype int64"),
        ({"labels": torch.tensor([[0, 0], [0, 3]])}, ValueError, "labels must be less than .* 3, but is 3 in row 1"),
        ({"offsets": ends([2, 2, 1])}, ValueError, r"offsets must have the shape \[K\+1\] with 3"),
        ({"offsets": ends([2, 2])}, ValueError, r"offsets must increase from 0 to the width of logits, 5"),
        ({"offsets": ends([5, 0])}, ValueError, r"offsets must increase"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must have .* 5 \(from logits\)"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be 0 to 1, but is 1.5"),
    ],
)
def test_bad_input(change, error, message):
    good = {"logits": torch.zeros(2, 5), "labels": torch.zeros(2, 2).long(), "offsets": ends([2, 3])}
    with pytest.raises(error, match=message):
        multitask_cross_entropy(**(good | change))

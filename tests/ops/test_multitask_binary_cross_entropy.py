"""multitask_binary_cross_entropy on the CPU: every backend against float64, odd sizes, unknown targets, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import check, check_threads, ends, multitask_binary_cross_entropy_case, spread

from cmaclip_fast.ops import available_backends, multitask_binary_cross_entropy

pytestmark = pytest.mark.usefixtures("nan_filled")
USABLE = available_backends(operator="multitask_binary_cross_entropy")
BACKENDS = [name for name in ("reference", "cpp") if USABLE[name] is None]
OPTIONS = {
    "plain": (0.0, 0.0, 0.0),
    "focal": (2.0, 2.0, 0.0),
    "asymmetric": (1.0, 4.0, 0.05),
    "exponents below 1": (0.5, 0.3, 0.2),
    "margin alone": (0.0, 0.0, 0.3),
    "positive alone": (1.5, 0.0, 0.0),
    "small margin": (0.0, 2.0, 1e-6),
}


def asymmetric_loss(x, target, gamma_positive, gamma_negative, margin):
    """The loss as the paper's equations 4 to 7 have it; `x` and `target` are vectors of known elements."""
    p = torch.sigmoid(x)
    shifted = (p - margin).clamp(min=0)
    positive = -((1 - p) ** gamma_positive) * torch.log(p)
    negative = -(shifted**gamma_negative) * torch.log(1 - shifted)
    return torch.where(target == 1, positive, negative)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("rows", "classes"), [(1, [1]), (5, [2, 33, 7]), (64, [19, 61, 12])])
def test_results_and_gradients(backend, dtype, weighted, options, rows, classes):
    check(multitask_binary_cross_entropy_case(rows, classes, weighted, *options), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [[100_000], [3] * 1024])
def test_many_classes_and_many_tasks(backend, classes):
    check(multitask_binary_cross_entropy_case(3, classes, True, 1.0, 4.0, 0.05), backend, torch.float32)


@given(
    st.integers(0, 40),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.booleans(),
    st.floats(0, 5),
    st.floats(0, 5),
    st.sampled_from([0.0, 0.05, 0.7]),
)
def test_any_shape(rows, classes, weighted, gamma_positive, gamma_negative, margin):
    case = multitask_binary_cross_entropy_case(rows, classes, weighted, gamma_positive, gamma_negative, margin)
    check(case, BACKENDS[-1], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    case = multitask_binary_cross_entropy_case(6, [3, 9], False, 1.0, 2.0, 0.1)
    check(case, backend, torch.float32, transform=spread)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_of_hundreds(backend, dtype, options):
    case = multitask_binary_cross_entropy_case(8, [7, 40], True, *options)
    case.arguments["logits"] = torch.linspace(-700, 700, 8 * 47).view(47, 8).T.contiguous()
    check(case, backend, dtype)
    arguments = case.tensors(torch.float32)
    arguments["logits"].requires_grad_()
    loss = multitask_binary_cross_entropy(**arguments, backend=backend)
    loss.sum().backward()
    assert loss.isfinite().all() and arguments["logits"].grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_same_as_the_equations(backend, options):
    """Values and gradients are those of the paper's expression, which autograd differentiates as a whole."""
    case = multitask_binary_cross_entropy_case(20, [4, 9, 3], True, *options).tensors(torch.float32)
    x = case["logits"].requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = []
    for task, start in enumerate([0, 4, 13]):
        columns = slice(start, start + [4, 9, 3][task])
        known = case["targets"][:, columns] >= 0
        weight = case["class_weight"][columns].double().expand(20, -1)[known]
        target = case["targets"][:, columns][known]
        expected.append((weight * asymmetric_loss(exact[:, columns][known], target, *options)).sum() / weight.sum())
    loss, expected = multitask_binary_cross_entropy(**case, backend=backend), torch.stack(expected)
    torch.testing.assert_close(loss, expected.float(), atol=1e-5, rtol=1e-5)
    (found,), (gradient,) = (torch.autograd.grad(*pair) for pair in ((loss.sum(), x), (expected.sum(), exact)))
    torch.testing.assert_close(found, gradient.float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_is_pytorchs_own(backend):
    logits, targets = torch.randn(9, 12) * 5, torch.randint(0, 2, (9, 12), dtype=torch.int8)
    loss = multitask_binary_cross_entropy(logits, targets, ends([5, 7]), backend=backend)
    for found, columns in zip(loss, (slice(0, 5), slice(5, 12)), strict=True):
        expected = F.binary_cross_entropy_with_logits(logits[:, columns], targets[:, columns].float())
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_unknown_counts_for_nothing(backend):
    logits = torch.randn(3, 5)
    targets = torch.tensor([[0, -1, -1, -1, -1], [1, 1, -1, -2, -1], [-1, 0, -128, -1, -1]], dtype=torch.int8)
    known = targets >= 0
    for value in (torch.nan, torch.inf):
        x = torch.where(known, logits, value).requires_grad_()
        loss = multitask_binary_cross_entropy(x, targets, ends([2, 3]), gamma_negative=2, margin=0.1, backend=backend)
        loss.sum().backward()
        assert loss[1] == 0 and loss[0].isfinite() and loss[0] > 0
        assert torch.equal(x.grad[~known], torch.zeros(11))


@pytest.mark.parametrize("backend", BACKENDS)
def test_below_the_margin_there_is_no_loss_and_no_gradient(backend):
    logits = torch.tensor([[-200.0, -30, -5, -3, 3, 200]]).requires_grad_()  # the sigmoid of -3 is 0.047
    targets = torch.zeros(1, 6, dtype=torch.int8)
    loss = multitask_binary_cross_entropy(logits, targets, torch.arange(7), margin=0.05, backend=backend)
    loss.sum().backward()
    assert torch.equal(loss[:4], torch.zeros(4)) and torch.equal(logits.grad[0, :4], torch.zeros(4))
    assert (loss[4:] > 0.5).all() and logits.grad[0, 4] > 0.1
    torch.testing.assert_close(loss[5], -torch.tensor(0.05).log())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nan_shows(backend, options):
    logits = torch.tensor([[torch.nan, 1.0, 2.0]])
    for target in (0, 1):
        case = multitask_binary_cross_entropy_case(1, [1, 2], False, *options).arguments
        case |= {"logits": logits, "targets": torch.full((1, 3), target, dtype=torch.int8)}
        assert multitask_binary_cross_entropy(**case, backend=backend).isnan().tolist() == [True, False]


def test_same_gradient_for_any_number_of_threads():
    check_threads(multitask_binary_cross_entropy_case(70, [19, 9000], True, 1.0, 4.0, 0.05), torch.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(weighted, options):
    case = multitask_binary_cross_entropy_case(6, [2, 4, 3], weighted, *options).tensors(torch.float64)
    logits = case.pop("logits").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: multitask_binary_cross_entropy(x, **case, backend="reference"), logits)


@pytest.mark.tried("operator", ends="error that names the argument")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 5)}, ValueError, r"logits must have the shape \[B, C\]"),
        ({"targets": torch.zeros(2, 2).char()}, ValueError, r"targets must have .* 5 \(from logits\)"),
        ({"targets": torch.zeros(2, 5)}, TypeError, "targets must be of dtype int8"),
        ({"targets": torch.eye(2, 5).char() * 2}, ValueError, "targets must be 1, 0 or negative, but is 2 in row 0"),
        ({"offsets": ends([2, 2])}, ValueError, r"offsets must increase from 0 to the width of logits, 5"),
        ({"offsets": ends([5, 0])}, ValueError, r"offsets must increase"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight must have .* 5 \(from logits\)"),
        ({"class_weight": torch.ones(5).double()}, TypeError, r"class_weight must have the dtype of logits"),
        ({"gamma_positive": -1.0}, ValueError, "gamma_positive must be at least 0 and finite, but is -1.0"),
        ({"gamma_negative": float("nan")}, ValueError, "gamma_negative must be at least 0 and finite, but is nan"),
        ({"margin": 1.0}, ValueError, "margin must be at least 0 and less than 1, but is 1.0"),
    ],
)
def test_bad_input(backend, change, error, message):
    good = {"logits": torch.zeros(2, 5), "targets": torch.zeros(2, 5).char(), "offsets": ends([2, 3])}
    with pytest.raises(error, match=message):
        multitask_binary_cross_entropy(**(good | change), backend=backend)

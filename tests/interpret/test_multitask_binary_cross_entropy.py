"""The Triton kernels of multitask_binary_cross_entropy in Triton's interpreter, judged like the other backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import check, ends, multitask_binary_cross_entropy_case, spread

from cmaclip_fast.ops import reference

pytestmark = pytest.mark.usefixtures("interpreted", "nan_filled")
# The exponents and the margin.
OPTIONS = [(0.0, 0.0, 0.0), (2.0, 0.5, 0.0), (1.0, 4.0, 0.05), (0.0, 0.0, 0.3), (1.5, 0.0, 0.0), (0.0, 2.0, 1e-6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, [1]), (6, [2, 200, 7])])
def test_results_and_gradients(dtype, weighted, options, rows, classes):
    check(multitask_binary_cross_entropy_case(rows, classes, weighted, *options), "triton", dtype)


@pytest.mark.parametrize("classes", [[9000], [3] * 20])
def test_many_classes_and_many_tasks(classes):
    check(multitask_binary_cross_entropy_case(2, classes, True, 1.0, 4.0, 0.05), "triton", torch.float32)


@settings(max_examples=8)
@given(
    st.integers(0, 40),
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(OPTIONS),
)
def test_any_shape(rows, classes, weighted, options):
    check(multitask_binary_cross_entropy_case(rows, classes, weighted, *options), "triton", torch.float32)


def test_strided_inputs():
    check(multitask_binary_cross_entropy_case(6, [3, 9]), "triton", torch.float32, transform=spread)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_logits_of_hundreds(options):
    case = multitask_binary_cross_entropy_case(8, [7, 40], True, *options)
    case.arguments["logits"] = torch.linspace(-700, 700, 8 * 47).view(47, 8).T.contiguous()
    check(case, "triton", torch.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_that_are_not_finite(options):
    """Infinite and NaN logits, known and unknown, and targets above 1: as plain PyTorch has it."""
    # The public function refuses such a target on the CPU, so the kernels are called as it calls them on a GPU.
    from cmaclip_fast.kernels import multitask_binary_cross_entropy as kernels

    logits, offsets = torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0, 700.0, -700.0, -3.0]]), ends([1] * 7)
    for target in (-1, 0, 1, 2):
        given = (logits, torch.full((1, 7), target, dtype=torch.int8), offsets, None, *options)
        results, expected = kernels.forward(*given), reference.multitask_binary_cross_entropy_forward(*given)
        torch.testing.assert_close(results, expected, equal_nan=True)
        arguments = (torch.ones(7), *given, expected[1])
        found, gradient = kernels.backward(*arguments), reference.multitask_binary_cross_entropy_backward(*arguments)
        torch.testing.assert_close(found, gradient, equal_nan=True)

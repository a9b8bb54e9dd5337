"""The Triton kernels of multitask_cross_entropy in Triton's interpreter, judged like the other backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import check, multitask_cross_entropy_case, spread

from cmaclip_fast.ops import reference

pytestmark = pytest.mark.usefixtures("interpreted", "nan_filled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, [1]), (6, [2, 200, 7])])
def test_results_and_gradients(dtype, weighted, label_smoothing, rows, classes):
    check(multitask_cross_entropy_case(rows, classes, weighted, label_smoothing), "triton", dtype)


@pytest.mark.parametrize("classes", [[20_000], [3] * 20])
def test_many_classes_and_many_tasks(classes):
    check(multitask_cross_entropy_case(2, classes, weighted=True, label_smoothing=0.1), "triton", torch.float32)


@settings(max_examples=8)
@given(st.integers(0, 5), st.lists(st.integers(1, 40), min_size=1, max_size=3), st.booleans(), st.floats(0, 1))
def test_any_shape(rows, classes, weighted, label_smoothing):
    case = multitask_cross_entropy_case(rows, classes, weighted, label_smoothing)
    check(case, "triton", torch.float32)


def test_more_rows_than_a_block_sums():
    check(multitask_cross_entropy_case(70, [2]), "triton", torch.float32)


def test_strided_inputs():
    check(multitask_cross_entropy_case(6, [3, 9]), "triton", torch.float32, transform=spread)


@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_logits_far_from_zero(shift):
    case = multitask_cross_entropy_case(4, [40], weighted=True, label_smoothing=0.5)
    case.arguments["logits"] += shift
    check(case, "triton", torch.float32)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_label_past_the_last_class_is_nan(label_smoothing):
    # The public function refuses such a label on the CPU, so the kernels are called as it calls them on a GPU.
    from cmaclip_fast.kernels import multitask_cross_entropy as kernels

    case = multitask_cross_entropy_case(4, [5, 3], True, label_smoothing, labelled=1.0).arguments
    case["labels"][2, 0] = 5
    arguments = (case["logits"], case["labels"], case["offsets"], case["class_weight"], label_smoothing)
    outputs = kernels.forward(*arguments)
    torch.testing.assert_close(outputs, reference.multitask_cross_entropy_forward(*arguments), equal_nan=True)
    arguments = (torch.ones(2), *arguments, *outputs[1:])
    grad = kernels.backward(*arguments)
    torch.testing.assert_close(grad, reference.multitask_cross_entropy_backward(*arguments), equal_nan=True)
    assert grad.isnan().nonzero().unique(dim=0)[:, 0].tolist() == [2] * 5

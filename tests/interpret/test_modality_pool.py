"""The Triton kernels of modality_pool in Triton's interpreter, judged like the other backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import check, modality_pool_case, spread

pytestmark = pytest.mark.usefixtures("interpreted", "nan_filled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("rows", "modalities", "width", "tasks"),
    [(1, 1, 1, 1), (3, 2, 7, 5), (17, 3, 33, 9), (2, 8, 130, 4), (2, 2, 4, 65)],
)
def test_results_and_gradients(dtype, shared, rows, modalities, width, tasks):
    check(modality_pool_case(rows, modalities, width, tasks, shared), "triton", dtype)


@settings(max_examples=10)
@given(st.integers(0, 5), st.integers(1, 8), st.integers(0, 40), st.integers(0, 9), st.booleans())
def test_any_shape(rows, modalities, width, tasks, shared):
    check(modality_pool_case(rows, modalities, width, tasks, shared), "triton", torch.float32)


def test_strided_inputs():
    check(modality_pool_case(3, 2, 9, 4), "triton", torch.float32, transform=spread)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_scores(dtype):
    case = modality_pool_case(9, 4, 64, 5)
    case.arguments["embeddings"] *= 300
    check(case, "triton", dtype)


def test_absent_modalities_are_never_used():
    case = modality_pool_case(6, 3, 9, 4)
    case.arguments["embeddings"][~case.arguments["present"]] = torch.nan
    check(case, "triton", torch.float32)

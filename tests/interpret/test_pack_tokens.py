"""The Triton kernels of pack_tokens in Triton's interpreter, judged like the other backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import check, pack_tokens_case, spread

from cmaclip_fast.ops import reference

pytestmark = pytest.mark.usefixtures("interpreted", "nan_filled")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("spare", [None, 0, 90])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 70, 3, 33), (3, 0, 4, 8), (1, 4, 0, 600)])
def test_results_and_gradients(dtype, typed, spare, shape):
    check(pack_tokens_case(*shape, typed=typed, spare=spare), "triton", dtype)


@settings(max_examples=10)
@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9), st.integers(0, 70), st.booleans(), st.booleans())
def test_any_shape(rows, length, patches, width, typed, shared):
    check(pack_tokens_case(rows, length, patches, width, typed, shared=shared), "triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 7, 3, 33), (30, 80, 5, 8)])
def test_rows_that_share_tokens(dtype, shape):
    check(pack_tokens_case(*shape, shared=True), "triton", dtype)


def test_ends_of_more_rows_than_a_block():
    from cmaclip_fast.kernels.pack_tokens import cu_seqlens_kernel

    case = pack_tokens_case(37, 9, 4, 1, shared=True).arguments
    got = torch.empty(38, dtype=torch.int32)
    sizes = len(case["text"]), len(case["image"])
    cu_seqlens_kernel[(1,)](case["starts"], case["counts"], got, 37, *sizes, BLOCK_B=16)
    expected = reference.pack_tokens_forward(*(case[name] for name in case), capacity=None)[1]
    assert torch.equal(got, expected)
    # Spans are kept within their sources.
    case["counts"] += 3
    cu_seqlens_kernel[(1,)](case["starts"], case["counts"], got, 37, *sizes, BLOCK_B=16)
    kept = torch.minimum(case["counts"], torch.tensor(sizes) - case["starts"])
    assert torch.equal(got[1:], kept.sum(1).cumsum(0).int()) and (kept < case["counts"]).any()


def test_more_rows_than_are_looked_at_together(monkeypatch):
    from cmaclip_fast.kernels import pack_tokens

    monkeypatch.setattr(pack_tokens, "BLOCK_B", 4)
    check(pack_tokens_case(19, 9, 4, 3, shared=True), "triton", torch.float32)


def test_strided_inputs():
    check(pack_tokens_case(4, 5, 6, 20), "triton", torch.float32, transform=spread)


def test_absent_modalities_have_no_start():
    case = pack_tokens_case(6, 5, 3, 4)
    case.arguments["starts"][case.arguments["counts"] == 0] = -7
    check(case, "triton", torch.float32)

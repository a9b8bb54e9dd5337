"""The Triton kernels of packed_attention in Triton's interpreter, judged like the other backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import check, packed_attention_case, spread

from cmaclip_fast.ops import packed_attention

pytestmark = pytest.mark.usefixtures("interpreted", "nan_filled", "bfloat16_dots")


@pytest.mark.parametrize(
    ("size", "causal"), [(3, False), (32, True), (64, False), (80, True), (96, False), (128, True), (130, False)]
)
def test_head_sizes(size, causal):
    check(packed_attention_case([45, 0, 7], size=size, causal=causal, spare=3), "triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "causal"), [(32, True), (80, False), (128, True)])
def test_half_types(dtype, size, causal):
    check(packed_attention_case([45, 1, 70], heads=1, size=size, causal=causal), "triton", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [
        ([1], [1]),
        ([2, 2, 0, 2], [127, 1, 3, 0]),
        ([70, 35], [35, 70]),
        ([5, 0], [0, 130]),
        ([0, 0], [0, 0]),
        ([], []),
    ],
)
def test_query_and_key_lengths(q_lengths, k_lengths, causal, dtype):
    check(packed_attention_case(q_lengths, k_lengths, heads=1, size=20, causal=causal, spare=40), "triton", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_of_many_blocks(dtype):
    check(packed_attention_case([200], heads=1, size=32), "triton", dtype)


@settings(max_examples=6)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=3),
    st.integers(1, 3),
    st.integers(1, 70),
    st.booleans(),
)
def test_any_shape(lengths, heads, size, causal):
    q_lengths, k_lengths = [q for q, _ in lengths], [k for _, k in lengths]
    check(packed_attention_case(q_lengths, k_lengths, heads, size, causal), "triton", torch.float32)


def test_strided_views():
    case = packed_attention_case([5, 9], heads=3, size=20)
    check(case, "triton", torch.float32, transform=spread)
    check(case, "triton", torch.float32, transform=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))


@pytest.mark.parametrize("scale", [0.0, -0.5, 50.0])
def test_scale(scale):
    case = packed_attention_case([6, 40])
    case.arguments["scale"] = scale
    check(case, "triton", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_scores_do_not_overflow(dtype):
    case = packed_attention_case([40, 7])
    case.arguments["q"] *= 300
    check(case, "triton", dtype)


def test_nan_stays_in_its_row():
    case = packed_attention_case([4, 4]).arguments
    case["q"][1] = torch.nan
    leaves = [case[name].requires_grad_() for name in "qkv"]
    out, lse = packed_attention(**case, backend="triton")
    out.sum().backward()
    assert out[1].isnan().all()
    assert lse[:, 1].isnan().all()
    assert out[[0, 2, 3, 4, 5, 6, 7]].isfinite().all()
    assert all(leaf.grad[4:].isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("output", [0, 1])
def test_gradient_of_one_output(output):
    case = packed_attention_case([5, 20]).arguments
    grads = []
    for backend in ("reference", "triton"):
        leaves = {name: case[name].clone().requires_grad_() for name in "qkv"}
        packed_attention(**(case | leaves), backend=backend)[output].square().sum().backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    torch.testing.assert_close(*grads)

"""pack_tokens on the CPU: every backend against float64, odd sizes, absent and shared tokens, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import check, check_threads, pack_tokens_case, spread

from cmaclip_fast.ops import available_backends, pack_tokens, unpad

pytestmark = pytest.mark.usefixtures("nan_filled")
BACKENDS = [name for name in ("reference", "cpp") if available_backends(operator="pack_tokens")[name] is None]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize("spare", [None, 0, 5])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 7, 3, 33), (3, 0, 4, 8), (3, 4, 0, 8), (64, 20, 26, 192)])
def test_results_and_gradients(backend, dtype, typed, spare, shape):
    check(pack_tokens_case(*shape, typed=typed, spare=spare), backend, dtype)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 70), st.booleans(), st.booleans())
def test_any_shape(rows, length, patches, width, typed, shared):
    check(pack_tokens_case(rows, length, patches, width, typed, shared=shared), BACKENDS[-1], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 7, 3, 33), (200, 90, 50, 24), (3, 1, 1, 8)])
def test_rows_that_share_tokens(backend, dtype, shape):
    check(pack_tokens_case(*shape, shared=True), backend, dtype)
    check(pack_tokens_case(*shape, shared=True, typed=False, spare=4), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_shared_tokens_are_sums_over_their_rows(backend):
    text, image = torch.zeros(4, 1, requires_grad=True), torch.zeros(2, 1, requires_grad=True)
    starts = torch.tensor([[0, 0], [1, 0], [1, 9], [-3, 0]])
    counts = torch.tensor([[3, 2], [1, 2], [2, 0], [0, 1]])
    packed, cu_seqlens = pack_tokens(text, image, starts, counts, backend=backend)
    assert cu_seqlens.tolist() == [0, 5, 8, 10, 11]
    packed.backward((2.0 ** torch.arange(11))[:, None])
    assert text.grad.flatten().tolist() == [1, 2 + 32 + 256, 4 + 512, 0]
    assert image.grad.flatten().tolist() == [8 + 64 + 1024, 16 + 128]


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    check(pack_tokens_case(4, 5, 6, 20), backend, torch.float32, transform=spread)


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_goes_first_and_absent_modalities_have_no_tokens(backend):
    text, image = torch.arange(12.0)[:, None], -torch.arange(8.0)[:, None] - 1
    starts = torch.tensor([[0, 0], [99, 2], [6, -1], [0, 0]])  # those of absent modalities are ignored
    counts = torch.tensor([[2, 2], [0, 2], [3, 0], [0, 0]])
    packed, cu_seqlens = pack_tokens(text, image, starts, counts, torch.tensor([[100.0], [0.0]]), backend=backend)
    assert cu_seqlens.tolist() == [0, 4, 6, 9, 9]
    assert cu_seqlens.dtype == torch.int32
    assert packed[:, 0].tolist() == [100, 101, -1, -2, -3, -4, 106, 107, 108]


@pytest.mark.parametrize("backend", BACKENDS)
def test_unpad(backend):
    padded = torch.arange(24.0).view(3, 4, 2).requires_grad_()
    packed, cu_seqlens = unpad(padded, torch.tensor([2, 0, 3]), backend=backend)
    assert cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packed[:, 0].tolist() == [0, 2, 16, 18, 20]
    packed.sum().backward()
    assert padded.grad[..., 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert len(unpad(padded, torch.tensor([2, 0, 3]), capacity=9, backend=backend)[0]) == 9


def test_same_gradient_for_any_number_of_threads():
    check_threads(pack_tokens_case(50, 20, 26, 192), torch.float32)
    check_threads(pack_tokens_case(50, 90, 70, 40, shared=True), torch.float32)


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared):
    case = pack_tokens_case(4, 4, 3, 5, shared=shared).tensors(torch.float64)
    leaves = [case[name].requires_grad_() for name in ("text", "image", "type_embedding")]
    assert torch.autograd.gradcheck(
        lambda text, image, types: pack_tokens(text, image, case["starts"], case["counts"], types, backend="reference")[
            0
        ],
        leaves,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text": torch.zeros(2, 3, 5)}, ValueError, r"text must have the shape \[Tt, D\]"),
        ({"image": torch.zeros(8, 6)}, ValueError, r"image must have .* 5 \(from text\)"),
        ({"image": torch.zeros(8, 5).half()}, TypeError, "image must have the dtype of text"),
        ({"starts": torch.zeros(2, 2)}, TypeError, "starts must be of dtype int32, int64"),
        ({"starts": torch.tensor([[0, 0], [5, 4]])}, ValueError, "row 1 takes 2 tokens of text from 5 on, .* 6 tokens"),
        ({"starts": torch.tensor([[0, -1], [3, 4]])}, ValueError, "row 0 takes 4 tokens of image from -1 on"),
        ({"starts": torch.tensor([[0, 0], [2**31 - 1, 4]])}, ValueError, "row 1 takes 2 tokens of text"),
        ({"counts": torch.tensor([[1, 4], [-2, 4]])}, ValueError, "row 1 takes -2 tokens of text"),
        (
            {"counts": torch.tensor([[1, 4], [2, 5]])},
            ValueError,
            "row 1 takes 5 tokens of image from 4 on, .* 8 tokens",
        ),
        ({"counts": torch.ones(2, 3).int()}, ValueError, r"counts must have the shape \[B, 2\]"),
        ({"counts": torch.ones(3, 2).int()}, ValueError, "counts must have"),
        ({"type_embedding": torch.zeros(3, 5)}, ValueError, r"type_embedding must have the shape \[2, D\]"),
        ({"capacity": 10}, ValueError, "capacity must be at least the number of tokens, 11, but is 10"),
        ({"capacity": -1}, ValueError, "capacity must be at least 0"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        **{"text": torch.zeros(6, 5), "image": torch.zeros(8, 5)},
        **{"starts": torch.tensor([[0, 0], [3, 4]]), "counts": torch.tensor([[1, 4], [2, 4]])},
    }
    with pytest.raises(error, match=message):
        pack_tokens(**(good | change))

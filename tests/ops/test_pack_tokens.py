"""pack_tokens on the CPU: every backend against float64, odd sizes, absent modalities, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import check, check_threads, pack_tokens_case, spread

from cmaclip_fast.ops import available_backends, pack_tokens

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


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 70), st.booleans())
def test_any_shape(rows, length, patches, width, typed):
    check(pack_tokens_case(rows, length, patches, width, typed), BACKENDS[-1], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    check(pack_tokens_case(4, 5, 6, 20), backend, torch.float32, transform=spread)


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_goes_first_and_absent_modalities_have_no_tokens(backend):
    text, image = torch.arange(12.0).view(4, 3, 1), -torch.arange(8.0).view(4, 2, 1) - 1
    present = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    lengths = torch.tensor([2, 9, 3, 0])
    lengths[1] = -7  # ignored: this text is absent
    packed, cu_seqlens = pack_tokens(text, image, lengths, present, torch.tensor([[100.0], [0.0]]), backend=backend)
    assert cu_seqlens.tolist() == [0, 4, 6, 9, 9]
    assert cu_seqlens.dtype == torch.int32
    assert packed[:, 0].tolist() == [100, 101, -1, -2, -3, -4, 106, 107, 108]


def test_same_gradient_for_any_number_of_threads():
    check_threads(pack_tokens_case(50, 20, 26, 192), torch.float32)


def test_gradcheck():
    case = pack_tokens_case(3, 4, 3, 5).tensors(torch.float64)
    leaves = [case[name].requires_grad_() for name in ("text", "image", "type_embedding")]
    assert torch.autograd.gradcheck(
        lambda text, image, types: pack_tokens(
            text, image, case["text_lengths"], case["present"], types, backend="reference"
        )[0],
        leaves,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text": torch.zeros(2, 3)}, ValueError, r"text must have the shape \[B, L, D\]"),
        ({"image": torch.zeros(2, 4, 6)}, ValueError, r"image must have .* 5 \(from text\)"),
        ({"image": torch.zeros(2, 4, 5).half()}, TypeError, "image must have the dtype of text"),
        ({"text_lengths": torch.zeros(2)}, TypeError, "text_lengths must be of dtype int32, int64"),
        ({"text_lengths": torch.tensor([1, 4])}, ValueError, "text_lengths must be 0 to .* 3, but is 4 in row 1"),
        ({"text_lengths": torch.tensor([-1, 1])}, ValueError, "but is -1 in row 0"),
        ({"present": torch.ones(2, 3).bool()}, ValueError, r"present must have the shape \[B, 2\]"),
        ({"type_embedding": torch.zeros(3, 5)}, ValueError, r"type_embedding must have the shape \[2, D\]"),
        ({"capacity": 10}, ValueError, "capacity must be at least the number of tokens, 11, but is 10"),
        ({"capacity": -1}, ValueError, "capacity must be at least 0"),
    ],
)
def test_bad_input(change, error, message):
    good = {
        **{"text": torch.zeros(2, 3, 5), "image": torch.zeros(2, 4, 5), "text_lengths": torch.tensor([1, 2])},
        "present": torch.ones(2, 2).bool(),
    }
    with pytest.raises(error, match=message):
        pack_tokens(**(good | change))

"""modality_pool on the CPU: every backend against float64, odd sizes, absent modalities, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import check, check_threads, modality_pool_case, spread

from cmaclip_fast.ops import modality_pool

pytestmark = pytest.mark.usefixtures("nan_filled")
BACKENDS = ("reference", "cpp")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("rows", "modalities", "width", "tasks"),
    [(1, 1, 1, 1), (3, 2, 7, 5), (5, 3, 33, 9), (2, 8, 130, 4), (64, 2, 192, 3), (2, 2, 16, 1024)],
)
def test_results_and_gradients(backend, dtype, rows, modalities, width, tasks, shared):
    check(modality_pool_case(rows, modalities, width, tasks, shared), backend, dtype)


@given(st.integers(0, 9), st.integers(1, 8), st.integers(0, 70), st.integers(0, 20), st.booleans())
def test_any_shape(rows, modalities, width, tasks, shared):
    check(modality_pool_case(rows, modalities, width, tasks, shared), "cpp", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    check(modality_pool_case(4, 3, 20, 5), backend, torch.float32, transform=spread)
    check(modality_pool_case(4, 3, 20, 5), backend, torch.float32, transform=lambda x: x.mT.contiguous().mT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_modalities_are_never_used(backend):
    embeddings = torch.randn(3, 2, 5)
    present = torch.tensor([[True, False], [False, True], [False, False]])
    embeddings[~present] = torch.nan
    leaf = embeddings.requires_grad_()
    pooled, weights = modality_pool(leaf, torch.randn(4, 2, 5), present, backend=backend)
    assert torch.equal(weights, present[:, None].expand(3, 4, 2).float())
    assert torch.equal(pooled[0], embeddings[0, 0].expand(4, 5))
    assert torch.equal(pooled[1], embeddings[1, 1].expand(4, 5))
    assert torch.equal(pooled[2], torch.zeros(4, 5))
    pooled.sum().backward()
    assert torch.equal(leaf.grad, torch.where(present[:, :, None], 4.0, 0.0).expand(3, 2, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_large_scores_show(backend):
    embeddings = torch.tensor([[[torch.nan], [1.0]], [[1e30], [-1e30]]])
    pooled, weights = modality_pool(embeddings, torch.ones(1, 1, 1), torch.ones(2, 2).bool(), backend=backend)
    assert weights[0].isnan().all()
    assert pooled[0].isnan().all()
    assert torch.equal(weights[1], torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [False, True])
def test_large_scores(backend, dtype, shared):
    case = modality_pool_case(9, 4, 64, 5, shared)
    case.arguments["embeddings"] *= 300
    check(case, backend, dtype)


def test_gradcheck():
    case = modality_pool_case(4, 3, 5, 2).tensors(torch.float64)
    embeddings, weight = case["embeddings"].requires_grad_(), case["weight"].requires_grad_()
    for w in (weight, weight[:, :1].detach().requires_grad_()):
        assert torch.autograd.gradcheck(
            lambda e, w: modality_pool(e, w, case["present"], backend="reference"), (embeddings, w)
        )


def test_same_gradient_for_any_number_of_threads():
    check_threads(modality_pool_case(64, 2, 512, 64), torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeddings": torch.zeros(2, 5)}, ValueError, r"embeddings must have the shape \[B, M, D\]"),
        ({"embeddings": torch.zeros(2, 3, 5).long()}, TypeError, "embeddings must be of dtype float32"),
        ({"embeddings": torch.zeros(2, 9, 5)}, ValueError, "embeddings must have 1 to 8 modalities|weight must have"),
        ({"weight": torch.zeros(4, 2, 5)}, ValueError, r"weight must have the shape .* 3 \(from embeddings\)"),
        ({"weight": torch.zeros(4, 3, 6)}, ValueError, r"5 \(from embeddings\) at dimension 2"),
        ({"weight": torch.zeros(4, 3, 5).bfloat16()}, TypeError, "weight must have the dtype of embeddings"),
        ({"weight": torch.zeros(1025, 1, 5)}, ValueError, "weight must have at most 1024 tasks"),
        ({"weight": torch.zeros(4, 3, 5, device="meta")}, ValueError, "weight must be on cpu"),
        ({"present": torch.ones(2, 3)}, TypeError, "present must be of dtype bool"),
        ({"present": torch.ones(3, 3).bool()}, ValueError, r"present must have the shape \[B, M\]"),
        ({"present": [True]}, TypeError, "present must be a tensor"),
        ({"backend": "fast"}, ValueError, "backend must be one of auto, reference, cpp, triton, cuda"),
    ],
)
def test_bad_input(change, error, message):
    good = {"embeddings": torch.zeros(2, 3, 5), "weight": torch.zeros(4, 3, 5), "present": torch.ones(2, 3).bool()}
    with pytest.raises(error, match=message):
        modality_pool(**(good | change))


def test_nan_is_an_error_in_debug_mode(monkeypatch):
    weight = torch.zeros(1, 1, 4)
    weight[0, 0, 2] = torch.nan
    arguments = (torch.zeros(1, 2, 4), weight, torch.ones(1, 2).bool())
    modality_pool(*arguments)
    monkeypatch.setenv("CMACLIP_DEBUG", "1")
    with pytest.raises(ValueError, match=r"weight must hold no NaN, but does at index \[0, 0, 2\]"):
        modality_pool(*arguments)

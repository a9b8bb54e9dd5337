"""Products of few rows with weights in panels: against float64 and PyTorch, odd sizes, threads, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cmaclip_fast.ops import dispatch
from tests.rule import judge

pytestmark = pytest.mark.skipif(dispatch.extension_missing() is not None, reason="the extension is not built")


def check(rows: int, width: int, depth: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows * width + depth)
    x, bias = torch.randn(rows, depth, generator=generator), torch.randn(width, generator=generator)
    weight = torch.randn(width, depth, generator=generator) / depth**0.5
    bias_or_none = bias if biased else None
    panels = torch.ops.cmaclip._lay_panels_cpp(weight)
    found = torch.ops.cmaclip._panel_linear_cpp(x, panels, bias_or_none, width)
    plain = F.linear(x, weight, bias_or_none)
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    judge("product", found, plain, exact, torch.float32)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 10, 7), (6, 512, 512), (13, 2048, 512), (50, 768, 3072), (50, 100, 300), (96, 130, 65)]
)
def test_products_cpp(shape: tuple[int, int, int], biased: bool) -> None:
    check(*shape, biased)


@given(st.integers(1, 100), st.integers(1, 300), st.integers(1, 300), st.booleans())
def test_any_shape(rows: int, width: int, depth: int, biased: bool) -> None:
    check(rows, width, depth, biased)


def test_number_of_threads_changes_nothing() -> None:
    x, weight = torch.randn(20, 300), torch.randn(513, 300)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            panels = torch.ops.cmaclip._lay_panels_cpp(weight)
            found.append(torch.ops.cmaclip._panel_linear_cpp(x, panels, None, 513))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_no_rows() -> None:
    panels = torch.ops.cmaclip._lay_panels_cpp(torch.randn(100, 30))
    assert torch.ops.cmaclip._panel_linear_cpp(torch.randn(0, 30), panels, None, 100).shape == (0, 100)


def test_what_does_not_fit_is_said() -> None:
    panels = torch.ops.cmaclip._lay_panels_cpp(torch.randn(100, 30))
    with pytest.raises(RuntimeError, match="panels are not those of a weight of 100 by 31"):
        torch.ops.cmaclip._panel_linear_cpp(torch.randn(2, 31), panels, None, 100)
    with pytest.raises(RuntimeError, match="bias must have 100 elements"):
        torch.ops.cmaclip._panel_linear_cpp(torch.randn(2, 30), panels, torch.randn(99), 100)
    with pytest.raises(RuntimeError, match="x must be contiguous float32"):
        torch.ops.cmaclip._panel_linear_cpp(torch.randn(2, 30).double(), panels, None, 100)

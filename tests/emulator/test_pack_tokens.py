"""The CUDA kernels of pack_tokens in the emulator: values, gradients, faults and memory traffic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmaclip_fast.ops import reference

from .arrays import DTYPES, Load, assert_close, misplaced, to_numpy
from .packing import SCAN_THREADS, Packing, Shape

# Rows, text length, patches, width, spare rows of the result (None: no capacity), whether there are type embeddings.
SHAPES = [
    *[(3, 5, 2, 40, None, True), (4, 7, 3, 33, 5, True), (2, 20, 26, 64, 0, False), (2, 1, 1, 1, 9, True)],
    *[(3, 0, 4, 8, None, True), (3, 4, 0, 8, 3, False), (2, 130, 7, 8, None, True)],
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    kernels: Load, shape: tuple[int, int, int, int, int | None, bool], dtype: torch.dtype
) -> None:
    rows, length, patches, width, spare, typed = shape
    text, image = torch.randn(rows, length, width).to(dtype), torch.randn(rows, patches, width).to(dtype)
    lengths = torch.randint(0, length + 1, (rows,), dtype=torch.int32)
    present = torch.rand(rows, 2) < 0.7
    present[0], present[-1] = False, True
    # What is absent or padding must not be read, nor the length of an absent text.
    text[torch.arange(length) >= (lengths * present[:, 0])[:, None]] = torch.nan
    image[~present[:, 1]] = torch.nan
    lengths[0] = -7
    types = torch.randn(2, width).to(dtype) if typed else None
    counts = sum(reference.token_counts(lengths, present, length, patches))
    capacity = None if spare is None else int(counts.sum()) + spare
    packing = Packing(kernels("pack_tokens"), text, image, lengths, present)
    packed, ends = packing.forward(types, capacity)
    expected, expected_ends = reference.pack_tokens_forward(text, image, lengths, present, types, capacity)
    assert torch.equal(ends, expected_ends)
    # Each value is one rounded sum.
    assert torch.equal(packed, expected)

    grad = torch.randn(packed.shape).to(dtype)
    grad[int(ends[-1]) :] = torch.nan
    results = packing.backward(grad, ends)
    plain = reference.pack_tokens_backward(grad, lengths, present, ends, length, patches)
    exact = reference.pack_tokens_backward(grad.double(), lengths, present, ends, length, patches)
    assert torch.equal(results[0], plain[0])
    assert torch.equal(results[1], plain[1])
    assert_close(results[2], plain[2], exact[2], dtype)


@pytest.mark.parametrize("rows", [0, 1, 31, 1025, 5000])
def test_row_ends(kernels: Load, rows: int) -> None:
    lengths, present = torch.randint(-2, 9, (rows,), dtype=torch.int32), torch.rand(rows, 2) < 0.7
    ends = np.full(rows + 1, -1, np.int32)
    shape = bytes(Shape(rows, 6, 3, 1, 0))
    arguments = [shape, to_numpy(lengths), to_numpy(present), ends]
    report = kernels("pack_tokens").launch_in_orders("row_ends", 1, SCAN_THREADS, arguments).check()
    expected = sum(reference.token_counts(lengths, present, 6, 3)).cumsum(0)
    np.testing.assert_array_equal(ends, np.concatenate([[0], expected.numpy()]))
    assert report.counts.bank_conflicts == 0


def test_a_capacity_that_is_too_small_is_not_overrun(kernels: Load) -> None:
    text, image = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    packing = Packing(
        kernels("pack_tokens"), text, image, torch.tensor([3, 3], dtype=torch.int32), torch.ones(2, 2).bool()
    )
    packed, ends = packing.forward(None, 9)
    assert torch.equal(packed, torch.cat([text, image], dim=1).flatten(0, 1)[:9])
    packing.backward(packed, ends)


@pytest.mark.tried("operator", ends="the result of aligned tensors")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("which", ["text", "image"])
def test_views_that_are_not_aligned(kernels: Load, which: str, dtype: torch.dtype) -> None:
    """A width of whole accesses, from an odd address on: the narrow kernels, and the wide ones would be misaligned."""
    given = {"text": torch.randn(2, 3, 64).to(dtype), "image": torch.randn(2, 4, 64).to(dtype)}
    given[which] = misplaced(given[which])
    lengths, present = torch.tensor([3, 1], dtype=torch.int32), torch.ones(2, 2, dtype=torch.bool)
    packing = Packing(kernels("pack_tokens"), *given.values(), lengths, present)
    packed, _ = packing.forward(None, None)
    assert torch.equal(packed, reference.pack_tokens_forward(*given.values(), lengths, present, None, None)[0])

    packing.name = packing.name.replace("narrow", "wide")
    with pytest.raises(AssertionError, match="misaligned"):
        packing.forward(None, None)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_memory_traffic(kernels: Load, dtype: torch.dtype) -> None:
    """At a width of whole sectors, as few sectors as can be, and no bank conflicts."""
    text, image = torch.randn(3, 40, 256).to(dtype), torch.randn(3, 50, 256).to(dtype)
    lengths = torch.tensor([40, 9, 23], dtype=torch.int32)
    packing = Packing(kernels("pack_tokens"), text, image, lengths, torch.ones(3, 2, dtype=torch.bool))
    packed, ends = packing.forward(torch.randn(2, 256).to(dtype), 3 * 90)
    packing.backward(packed, ends)
    for kernel, report in packing.reports.items():
        counts = report.counts
        assert counts.sectors <= 1.05 * counts.fewest_sectors, kernel
        assert counts.bank_conflicts == 0, kernel
    # Gradients come and go once: the sums are taken on the way.
    token = 256 * dtype.itemsize // 32
    read = packing.reports["unpack"].instructions["distinct_sectors_read"]
    assert int(ends[-1]) * token <= read <= 1.01 * int(ends[-1]) * token

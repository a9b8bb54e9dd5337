"""The CUDA kernels of pack_tokens in the emulator: values, gradients, faults and memory traffic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import pack_tokens_case

from cmaclip_fast.ops import reference

from ..rule import judge
from .arrays import DTYPES, Load, misplaced, to_numpy
from .packing import SCAN_THREADS, Packing, Shape

# Rows, most tokens of a text, patches, width, spare rows of the result (None: no capacity), whether there are type
# embeddings, whether rows share tokens.
SHAPES = [
    *[(3, 5, 2, 40, None, True, False), (4, 7, 3, 33, 5, True, False), (2, 20, 26, 64, 0, False, False)],
    *[(2, 1, 1, 1, 9, True, False), (3, 0, 4, 8, None, True, False), (3, 4, 0, 8, 3, False, False)],
    *[(2, 130, 7, 8, None, True, False), (9, 5, 3, 40, None, True, True), (70, 70, 4, 33, 2, True, True)],
    *[(300, 3, 2, 8, None, False, True), (0, 3, 2, 8, 4, True, False)],
]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(
    kernels: Load, shape: tuple[int, int, int, int, int | None, bool, bool], dtype: torch.dtype
) -> None:
    *sizes, spare, typed, shared = shape
    case = pack_tokens_case(*sizes, typed=typed, spare=spare, shared=shared).tensors(dtype)
    text, image, starts, counts, types = (
        case[name] for name in ("text", "image", "starts", "counts", "type_embedding")
    )
    capacity = case.get("capacity")
    # What belongs to no row must not be read, nor the start of what is absent.
    for modality, source in enumerate((text, image)):
        held = torch.zeros(len(source), dtype=torch.bool)
        for first, count in zip(starts[:, modality].tolist(), counts[:, modality].tolist(), strict=True):
            held[first : first + count] = True
        source[~held] = torch.nan
    starts[counts == 0] = -7
    packing = Packing(kernels("pack_tokens"), text, image, starts, counts)
    packed, ends = packing.forward(types, capacity)
    expected, expected_ends = reference.pack_tokens_forward(text, image, starts, counts, types, capacity)
    assert torch.equal(ends, expected_ends)
    # Each value is one rounded sum.
    assert torch.equal(packed, expected)

    grad = torch.randn(packed.shape).to(dtype)
    grad[int(ends[-1]) :] = torch.nan
    results = packing.backward(grad, ends)
    plain = reference.pack_tokens_backward(grad, starts, counts, ends, len(text), len(image))
    exact = reference.pack_tokens_backward(grad.double(), starts, counts, ends, len(text), len(image))
    for result, rounded, true in zip(results, plain, exact, strict=True):
        if shared or result is results[2]:
            judge("gradient", result, rounded, true, dtype)
        else:
            assert torch.equal(result, rounded)


@pytest.mark.parametrize("rows", [0, 1, 31, 1025, 5000])
def test_row_ends(kernels: Load, rows: int) -> None:
    starts, counts = (torch.randint(-2, 9, (rows, 2), dtype=torch.int32) for _ in range(2))
    ends = np.full(rows + 1, -1, np.int32)
    sizes = torch.tensor([6, 3])
    arguments = [bytes(Shape(rows, 6, 3, 1, 0)), to_numpy(starts), to_numpy(counts), ends]
    report = kernels("pack_tokens").launch_in_orders("row_ends", 1, SCAN_THREADS, arguments).check()
    # Spans are kept within their sources.
    starts = torch.minimum(starts.clamp(min=0), sizes)
    expected = torch.minimum(counts.clamp(min=0), sizes - starts).sum(1).cumsum(0)
    np.testing.assert_array_equal(ends, np.concatenate([[0], expected.numpy()]))
    assert report.counts.bank_conflicts == 0


def test_a_capacity_that_is_too_small_is_not_overrun(kernels: Load) -> None:
    text, image = torch.randn(6, 8), torch.randn(8, 8)
    starts, counts = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 0], [3, 4]], [[3, 4], [3, 4]]))
    packing = Packing(kernels("pack_tokens"), text, image, starts, counts)
    packed, ends = packing.forward(None, 9)
    assert torch.equal(packed, torch.cat([text[:3], image[:4], text[3:5]]))
    packing.backward(packed, ends)


@pytest.mark.tried("operator", ends="the result of aligned tensors")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("which", ["text", "image"])
def test_views_that_are_not_aligned(kernels: Load, which: str, dtype: torch.dtype) -> None:
    """A width of whole accesses, from an odd address on: the narrow kernels, and the wide ones would be misaligned."""
    given = {"text": torch.randn(6, 64).to(dtype), "image": torch.randn(8, 64).to(dtype)}
    given[which] = misplaced(given[which])
    starts, counts = (torch.tensor(x, dtype=torch.int32) for x in ([[0, 0], [3, 4]], [[3, 4], [1, 4]]))
    packing = Packing(kernels("pack_tokens"), *given.values(), starts, counts)
    packed, _ = packing.forward(None, None)
    assert torch.equal(packed, reference.pack_tokens_forward(*given.values(), starts, counts, None, None)[0])

    packing.name = packing.name.replace("narrow", "wide")
    with pytest.raises(AssertionError, match="misaligned"):
        packing.forward(None, None)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_memory_traffic(kernels: Load, dtype: torch.dtype) -> None:
    """At a width of whole sectors, nearly as few sectors as can be, and no bank conflicts."""
    counts = torch.tensor([[40, 50], [9, 50], [23, 50]], dtype=torch.int32)
    starts = torch.cat([torch.zeros(1, 2, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)[:-1]])
    text, image = torch.randn(72, 256).to(dtype), torch.randn(150, 256).to(dtype)
    packing = Packing(kernels("pack_tokens"), text, image, starts, counts)
    packed, ends = packing.forward(torch.randn(2, 256).to(dtype), None)
    packing.backward(packed, ends)
    for kernel, report in packing.reports.items():
        traffic = report.counts
        assert traffic.sectors <= 1.05 * traffic.fewest_sectors, kernel
        assert traffic.bank_conflicts == 0, kernel
    # Gradients come once: the sums are taken on the way. The last launch is that of the images.
    token = 256 * dtype.itemsize // 32
    read = packing.reports["unpack"].instructions["distinct_sectors_read"]
    assert 150 * token <= read <= 1.01 * 150 * token

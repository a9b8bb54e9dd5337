"""The emulator's arithmetic against NumPy and PyTorch, and its counts against counts by hand."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch

from .emulate import Kernels, MemoryCounts, Report, module

Load = Callable[[str], Kernels]


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


def bfloat16_values(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()


def half_bits(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16)


def half_values(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


FORMATS = {"half": (half_bits, half_values), "bfloat16": (bfloat16_bits, bfloat16_values)}


def run(library: Kernels, name: str, count: int, arguments: list) -> Report:
    return library.launch(name, -(-count // 256), 256, [*arguments, count]).check()


def assert_same_numbers(result: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, except that a NaN may be any."""
    np.testing.assert_array_equal(np.isnan(result), np.isnan(expected))
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(result[known].view(np.uint32), expected[known].view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
def test_every_16_bit_number_widens(kernels: Load, name: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    out = np.empty(65536, np.float32)
    run(kernels("numerics"), f"to_float_{name}", 65536, [bits, out])
    assert_same_numbers(out, FORMATS[name][1](bits))


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_to_16_bits(kernels: Load, name: str) -> None:
    to_bits, to_values = FORMATS[name]
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    # Numbers of the format, the middles between neighbours, and what lies just beside the middles.
    exact = to_values(generator.integers(0, 0x7B00, 5000).astype(np.uint16))
    after = to_values(to_bits(exact) + np.uint16(1))
    middle = exact + (after - exact) / 2
    edges = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 2**-24, 2**-25, 3 * 2**-26, 3.4e38], np.float32
    )
    values = np.concatenate([drawn, exact, middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf), edges])
    values = values.astype(np.float32)
    out = np.empty(len(values), np.uint16)
    run(kernels("numerics"), f"from_float_{name}", len(values), [values, out])
    assert_same_numbers(to_values(out), to_values(to_bits(values)))


@pytest.mark.parametrize("name", FORMATS)
def test_arithmetic_rounds_each_result_once(kernels: Load, name: str) -> None:
    to_bits, to_values = FORMATS[name]
    generator = np.random.default_rng(1)
    count = 20000
    scale = 2.0 ** generator.integers(-6, 7, (3, count))
    bits = to_bits((generator.standard_normal((3, count)) * scale).astype(np.float32))
    # The product 17 * 19 is the middle between two bfloat16s; the addend decides, but is lost in a float.
    bits[:, 0] = to_bits(np.array([17, 19, -(2.0**-20)], np.float32))
    out = np.empty(5 * count, np.uint16)
    run(kernels("numerics"), f"arithmetic_{name}", count, [bits[0].copy(), bits[1].copy(), bits[2].copy(), out])
    a, b, c = to_values(bits).astype(np.float64)
    results = to_values(out).reshape(5, count)
    for row, exact in enumerate((a + b, a - b, a * b, a / b)):
        # One rounding to float in between changes nothing for these four.
        assert_same_numbers(results[row], to_values(to_bits(exact.astype(np.float32))))
    # The exact sum, rounded once: the nearest of three neighbours.
    high = to_bits((a * b + c).astype(np.float32)).astype(np.int32)
    candidates = np.stack([to_values((high + step).astype(np.uint16)) for step in (-1, 0, 1)]).astype(np.float64)
    error = np.abs((a * b - candidates) + c)
    best = np.nanmin(error, axis=0)
    result_error = np.abs((a * b - results[4]) + c)
    normal = np.abs(a * b + c) > 2.0**-10
    np.testing.assert_array_equal(result_error[normal], best[normal])


def test_tf32_rounds_to_nearest_and_ties_away_from_zero(kernels: Load) -> None:
    ulp = np.float32(2.0**-10)
    values = np.zeros(32, np.float32)
    values[:6] = [1, 1 + ulp / 2, 1 + ulp * 0.499, -(1 + ulp / 2), 1 + 1.5 * ulp, 3.0e-39]
    out = np.empty(32, np.uint32)
    kernels("numerics").launch("tf32", 1, 32, [values, out]).check()
    np.testing.assert_array_equal(out.view(np.float32)[:5], [1, 1 + ulp, 1, -(1 + ulp), 1 + 2 * ulp])


def test_warp_functions(kernels: Load) -> None:
    x = np.random.default_rng(2).integers(0, 200, 32).astype(np.int32)
    out = np.empty(256, np.int32)
    report = kernels("numerics").launch("warp_functions", 1, 32, [x, out]).check()
    rows = out.reshape(8, 32)
    lane = np.arange(32)
    np.testing.assert_array_equal(rows[0], x[5])
    np.testing.assert_array_equal(rows[1], np.where(lane < 3, x, np.roll(x, 3)))
    np.testing.assert_array_equal(rows[2], np.where(lane % 8 < 4, np.roll(x, -4), x))
    np.testing.assert_array_equal(rows[3], x[lane ^ 16])
    np.testing.assert_array_equal(rows[4].view(np.uint32), (np.uint64(1) << lane[x > 100].astype(np.uint64)).sum())
    np.testing.assert_array_equal(rows[5], x.sum())
    np.testing.assert_array_equal(rows[6], -x.min())
    np.testing.assert_array_equal(rows[7], (x % 2).sum() + 128)
    assert report.instructions["shuffles"] == 6
    assert report.instructions["votes"] == 3
    assert report.instructions["block_barriers"] == 1


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_indices(kernels: Load, order: str) -> None:
    grid, block = (2, 3, 2), (4, 3, 5)
    out = np.zeros((12, 60), np.int64)
    report = kernels("numerics").launch("indices", grid, block, [out], order=order, seed=1).check()
    z, y, x = np.meshgrid(*(np.arange(n) for n in reversed(grid)), indexing="ij")
    tz, ty, tx = np.meshgrid(*(np.arange(n) for n in reversed(block)), indexing="ij")
    expected = ((z * 100 + y) * 100 + x).reshape(-1, 1) + ((tz * 100 + ty) * 100 + tx).reshape(1, -1) * 1000000
    np.testing.assert_array_equal(out, expected)
    assert report.instructions["blocks"] == 12


def test_structures_views_and_host_functions(kernels: Load) -> None:
    class Pair(ctypes.Structure):
        _fields_ = (("pointer", ctypes.c_uint64), ("scale", ctypes.c_float))

    library = kernels("numerics")
    buffer = module().Buffer(np.arange(40, dtype=np.float32), "in")
    out = np.empty(32, np.float32)
    library.launch("structure", 1, 32, [bytes(Pair(buffer.address + 4, 3.0)), out]).check()
    np.testing.assert_array_equal(out, 3 * np.arange(1, 33, dtype=np.float32))
    library.launch("strided_read_float", 1, 32, [buffer.at(8), out, 1, 0]).check()
    np.testing.assert_array_equal(out, np.arange(8, 40, dtype=np.float32))
    assert library.call("half_of", 7) == 3


# Element, stride, offset (both in elements) of 32 lanes' reads -> sectors, fewest sectors.
@pytest.mark.parametrize(
    ("element", "stride", "offset", "sectors", "fewest"),
    [
        ("float", 1, 0, 4, 4),
        ("float", 1, 1, 5, 4),
        ("float", 2, 0, 8, 4),
        ("float", 8, 0, 32, 4),
        ("float", 0, 3, 1, 1),
        ("float4", 1, 0, 16, 16),
        ("float4", 2, 0, 32, 16),
        ("byte", 1, 0, 1, 1),
        ("byte", 1, 31, 2, 1),
    ],
)
def test_sectors(kernels: Load, element: str, stride: int, offset: int, sectors: int, fewest: int) -> None:
    shapes = {"float": (np.float32, (300,)), "float4": (np.float32, (300, 4)), "byte": (np.uint8, (300,))}
    dtype, shape = shapes[element]
    data = np.zeros(shape, dtype)
    if element == "float4":
        data = data.view(np.complex128).reshape(-1)
    out = np.zeros(32, np.float32)
    report = kernels("numerics").launch(f"strided_read_{element}", 1, 32, [data, out, stride, offset]).check()
    line = report.lines[min(report.lines, key=lambda place: int(place.rpartition(":")[2]))]
    assert line == MemoryCounts(1, sectors, fewest)
    assert report.instructions["distinct_sectors_read"] == sectors
    assert report.instructions["distinct_sectors_written"] == 4


# Stride in elements of 32 lanes' writes to shared memory -> wavefronts, fewest wavefronts.
@pytest.mark.parametrize(
    ("element", "stride", "wavefronts", "fewest"),
    [
        ("float", 1, 1, 1),
        ("float", 2, 2, 1),
        ("float", 32, 32, 1),
        ("float", 33, 1, 1),
        ("float", 0, 1, 1),
        ("float4", 1, 4, 4),
        ("float4", 2, 8, 4),
        ("float4", 8, 32, 4),
    ],
)
def test_bank_conflicts(kernels: Load, element: str, stride: int, wavefronts: int, fewest: int) -> None:
    out = np.zeros(32, np.float32)
    shared = 33 * 32 * (16 if element == "float4" else 4)
    report = kernels("numerics").launch(f"shared_stride_{element}", 1, 32, [out, stride], dynamic_shared=shared)
    # Lanes that write one word together race; only the count is looked at.
    counts = report.counts
    assert (counts.shared_accesses, counts.wavefronts, counts.fewest_wavefronts) == (1, wavefronts, fewest)
    assert counts.bank_conflicts == wavefronts - fewest

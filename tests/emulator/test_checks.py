"""Each of the emulator's checks finds the kernel that breaks its rule, names the line, and lets the clean twin pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import KERNELS
from .emulate import Kernels, Report

Load = Callable[[str], Kernels]


def ramp(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float32)


def zeros(count: int, dtype: Any = np.float32) -> np.ndarray:
    return np.zeros(count, dtype)


def fault_line(name: str) -> str:
    """`checks.cpp:N`, where N is the line marked as the fault of this kernel."""
    lines = (KERNELS / "checks.cpp").read_text().splitlines()
    (number,) = [index for index, line in enumerate(lines, 1) if line.endswith(f"// fault: {name}")]
    return f"checks.cpp:{number}"


# Kernel, kind of finding, grid, block, arguments, bytes of dynamic shared memory.
CASES = [
    ("block_barrier", "race", 1, 64, lambda: [ramp(64), zeros(64)], 0),
    ("warp_barrier", "race", 1, 32, lambda: [ramp(32), zeros(32)], 0),
    ("overwrite_barrier", "race", 1, 64, lambda: [ramp(192), zeros(64)], 0),
    ("read_bounds", "out of bounds", 2, 32, lambda: [ramp(50), zeros(50), 50], 0),
    ("write_bounds", "out of bounds", 2, 32, lambda: [ramp(50), zeros(50), 50], 0),
    ("shared_bounds", "out of bounds", 1, 32, lambda: [zeros(32)], 128),
    ("vector_alignment", "misaligned", 1, 8, lambda: [ramp(64), zeros(8)], 0),
    ("uninitialised", "uninitialised", 1, 64, lambda: [ramp(64), zeros(64)], 0),
    ("divergent_shuffle", "divergence", 1, 32, lambda: [ramp(32), zeros(32), 20], 0),
    ("divergent_barrier", "divergence", 1, 64, lambda: [zeros(64), 40], 0),
    ("two_barriers", "divergence", 1, 64, lambda: [zeros(64)], 0),
    ("mask_without_self", "divergence", 1, 32, lambda: [zeros(32)], 0),
    ("block_race", "race", 4, 1, lambda: [ramp(4), zeros(1)], 0),
    ("writes_constant", "constant written", 1, 4, lambda: [ramp(4), zeros(4)], 0),
]


@pytest.mark.parametrize(("name", "kind", "grid", "block", "make", "shared"), CASES, ids=[case[0] for case in CASES])
def test_finds_the_broken_kernel_and_passes_its_twin(
    kernels: Load, name: str, kind: str, grid: int, block: int, make: Callable[[], list[Any]], shared: int
) -> None:
    library = kernels("checks")
    library.launch_in_orders(name, grid, block, make(), dynamic_shared=shared).check()
    report = library.launch_in_orders(f"{name}_broken", grid, block, make(), dynamic_shared=shared)
    places = {Path(place).name for f in report.findings if f.kind == kind for place in (f.where, f.other)}
    assert fault_line(name) in places, report.findings


def test_results_that_hang_on_the_order_are_found(kernels: Load) -> None:
    def run(name: str) -> Report:
        return kernels("checks").launch_in_orders(name, 4, 1, [zeros(1, np.int32), zeros(4, np.int32)])

    run("order_decides").check()
    assert run("order_decides_broken").kinds == {"order"}


def test_clean_twins_compute(kernels: Load) -> None:
    library = kernels("checks")
    out = zeros(64)
    library.launch("block_barrier", 1, 64, [ramp(64), out])
    np.testing.assert_array_equal(out, ramp(64)[::-1])
    out = zeros(32)
    library.launch("divergent_shuffle", 1, 32, [ramp(32), out, 20])
    np.testing.assert_array_equal(out, np.where(ramp(32) < 20, 2 * ramp(32) + 1, ramp(32)))


def test_a_shuffle_orders_no_memory(kernels: Load) -> None:
    report = kernels("checks").launch("shuffle_is_no_barrier", 1, 32, [ramp(32), zeros(32)])
    assert "race" in report.kinds


def double_buffer(library: Kernels, name: str) -> tuple[Report, np.ndarray]:
    out = zeros(64)
    report = library.launch_in_orders(name, 1, 64, [ramp(64 * 4 * 3), out, 3], dynamic_shared=2 * 64 * 16)
    return report, out


def test_asynchronous_copies(kernels: Load) -> None:
    report, out = double_buffer(kernels("checks"), "double_buffer")
    report.check()
    expected = np.roll(ramp(64 * 4 * 3).reshape(3, 64, 4).sum((0, 2)), -1)
    np.testing.assert_array_equal(out, expected)


def test_a_missing_wait_is_found_and_gives_no_data(kernels: Load) -> None:
    report, out = double_buffer(kernels("checks"), "double_buffer_no_wait")
    assert "cp.async" in report.kinds
    assert np.isnan(out).all()


@pytest.mark.parametrize("missing", ["barrier", "refill_barrier"])
def test_a_missing_barrier_around_a_copy_is_found(kernels: Load, missing: str) -> None:
    report, _ = double_buffer(kernels("checks"), f"double_buffer_no_{missing}")
    assert report.kinds & {"race", "cp.async"}


def test_a_null_pointer_is_out_of_bounds(kernels: Load) -> None:
    report = kernels("checks").launch("block_barrier", 1, 32, [None, zeros(32)])
    (finding,) = report.findings
    assert (finding.kind, "a null pointer" in finding.message) == ("out of bounds", True)


def test_an_endless_loop_ends(kernels: Load) -> None:
    arguments = [zeros(1, np.int32), zeros(1, np.int32)]
    kernels("checks").launch("endless", 1, 1, arguments).check()
    report = kernels("checks").launch("endless_broken", 1, 1, arguments, step_limit=10_000)
    assert report.kinds == {"endless"}


def test_the_same_seed_gives_the_same_report(kernels: Load) -> None:
    def run(seed: int) -> list[str]:
        arguments = [ramp(256), zeros(256)]
        report = kernels("checks").launch("block_barrier_broken", 1, 256, arguments, order="random", seed=seed)
        return [str(finding) for finding in report.findings] + [arguments[1].tobytes().hex()]

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_bad_arguments_are_refused(kernels: Load) -> None:
    library = kernels("checks")
    with pytest.raises(ValueError, match="takes 2 arguments, not 1"):
        library.launch("block_barrier", 1, 32, [ramp(32)])
    with pytest.raises(ValueError, match="elements of 4 bytes, the buffer's have 8"):
        library.launch("block_barrier", 1, 32, [np.zeros(32), zeros(32)])
    with pytest.raises(ValueError, match="no function 'nothing'"):
        library.launch("nothing", 1, 32, [])
    with pytest.raises(ValueError, match="1 to 1024 threads"):
        library.launch("block_barrier", 1, 1025, [ramp(32), zeros(32)])

"""`mma.sync` and `ldmatrix`: the values against matmul, the fragment layouts against CuTe's traits."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .conftest import KERNELS
from .emulate import Kernels, _compile, _digest, cache_folder, compiler
from .test_numerics import bfloat16_bits, bfloat16_values, half_bits, half_values

Load = Callable[[str], Kernels]
Layouts = dict[tuple[str, str], np.ndarray]


def tf32_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)


# Depth, and functions to bits and back.
MMA = {
    "half": (16, half_bits, half_values),
    "bfloat16": (16, bfloat16_bits, bfloat16_values),
    "tf32": (8, tf32_bits, lambda bits: bits.view(np.float32)),
}


def isa_layouts(depth: int) -> dict[str, np.ndarray]:
    """The PTX ISA's fragments as CuTe writes them: per thread and value the element's place, column by column."""
    lane = np.arange(32)[:, None]
    group, member = lane // 4, lane % 4
    if depth == 16:
        value = np.arange(8)[None]
        row, k = group + 8 * (value // 2 % 2), 2 * member + value % 2 + 8 * (value // 4)
        half = np.arange(4)[None]
        b = group + 8 * (2 * member + half % 2 + 8 * (half // 2))
    else:
        value = np.arange(4)[None]
        row, k = group + 8 * (value % 2), member + 4 * (value // 2)
        half = np.arange(2)[None]
        b = group + 8 * (member + 4 * half)
    result = np.arange(4)[None]
    c = group + 8 * (result // 2) + 16 * (2 * member + result % 2)
    return {"a": row + 16 * k, "b": b, "c": c}


@functools.cache
def cute_layouts() -> Layouts | str:
    """CuTe's layouts, or why they cannot be had."""
    package = importlib.util.find_spec("cutlass_library")
    if package is None or package.origin is None:
        return "the package nvidia-cutlass is not installed"
    headers = Path(package.origin).parent / "source" / "include"
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME", ""),
        "/usr/local/cuda",
        *([str(Path(nvcc).resolve().parents[1])] if nvcc else []),
    ]
    toolkits = [
        Path(home) / "include" for home in homes if home and (Path(home) / "include" / "cuda_runtime.h").exists()
    ]
    if not toolkits:
        return "CuTe's headers need those of a CUDA toolkit, and none is found"
    source = KERNELS / "cute_layouts.cpp"
    flags = ["-std=c++17", "-O0", "-w", f"-I{headers}", f"-I{toolkits[-1]}", f"-I{toolkits[-1] / 'cccl'}"]
    program = cache_folder() / f"cute_layouts-{_digest([source], [compiler(), *flags])}"
    _compile(program, [*flags, str(source)])
    program.chmod(0o755)
    text = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    layouts: Layouts = {}
    for line in text.splitlines():
        name, operand, *numbers = line.split()
        layouts[name, operand] = np.array(numbers, dtype=np.int64).reshape(32, -1)
    return layouts


@pytest.fixture(scope="module")
def cute() -> Layouts:
    layouts = cute_layouts()
    if isinstance(layouts, str):
        pytest.skip(layouts)
    return layouts


def run_mma(library: Kernels, name: str, layouts: dict[str, np.ndarray]) -> None:
    """Hands out fragments by the layouts, runs the instruction, and compares what comes back with matmul."""
    depth, to_bits, to_values = MMA[name]
    generator = np.random.default_rng(3)
    a_bits = to_bits(generator.standard_normal((16, depth)).astype(np.float32))
    b_bits = to_bits(generator.standard_normal((8, depth)).astype(np.float32))
    start = generator.standard_normal((16, 8)).astype(np.float32)
    # CuTe numbers elements column by column: row + rows * column.
    a = np.ascontiguousarray(a_bits.T.reshape(-1)[layouts["a"]]).view(np.uint32)
    b = np.ascontiguousarray(b_bits.T.reshape(-1)[layouts["b"]]).view(np.uint32)
    accumulator = np.ascontiguousarray(start.T.reshape(-1)[layouts["c"]])
    report = library.launch(f"mma_{name}", 1, 32, [a, b, accumulator]).check()
    result = np.empty(128, np.float32)
    result[layouts["c"]] = accumulator
    exact = to_values(a_bits).astype(np.float64) @ to_values(b_bits).astype(np.float64).T + start
    np.testing.assert_allclose(result.reshape(8, 16).T, exact, rtol=2**-23, atol=2**-24)
    kind = {"half": "f16", "bfloat16": "bf16", "tf32": "tf32"}[name]
    assert report.instructions[f"mma_{kind}"] == 1


@pytest.mark.parametrize("name", MMA)
def test_mma_is_matmul(kernels: Load, name: str) -> None:
    run_mma(kernels("numerics"), name, isa_layouts(MMA[name][0]))


# A product, how many of them, and 1 plus these: each is cut to multiples of 2^-24, the sum to those of 2^-23.
@pytest.mark.parametrize(
    ("term", "count", "result"),
    [
        (0.25, 8, 3.0),
        (2.0**-24, 8, 1 + 2.0**-21),
        (1.5 * 2.0**-24, 8, 1 + 2.0**-21),
        (2.0**-25, 8, 1.0),
        (-(2.0**-25), 8, 1.0),
        (3 * 2.0**-24, 1, 1 + 2.0**-23),
        (-(2.0**-24), 1, 1 - 2.0**-24),
    ],
)
@pytest.mark.parametrize("name", MMA)
def test_mma_that_truncates(kernels: Load, name: str, term: float, count: int, result: float, monkeypatch) -> None:
    monkeypatch.setenv("CMACLIP_EMULATOR_MMA", "truncate")
    depth, to_bits, _ = MMA[name]
    a, b = np.zeros((16, depth), np.float32), np.zeros((8, depth), np.float32)
    a[:, :count], b[:, :count] = 2.0**-12, term * 2.0**12
    layouts = isa_layouts(depth)
    accumulator = np.ones((32, 4), np.float32)
    fragments = [to_bits(x).T.reshape(-1)[layouts[n]] for x, n in ((a, "a"), (b, "b"))]
    arguments = [*(np.ascontiguousarray(x).view(np.uint32) for x in fragments), accumulator]
    kernels("numerics").launch(f"mma_{name}", 1, 32, arguments).check()
    np.testing.assert_array_equal(accumulator, np.full((32, 4), result, np.float32))


def test_mma_rounds_or_truncates(kernels: Load, monkeypatch) -> None:
    monkeypatch.setenv("CMACLIP_EMULATOR_MMA", "up")
    with pytest.raises(ValueError, match="CMACLIP_EMULATOR_MMA is round or truncate"):
        run_mma(kernels("numerics"), "half", isa_layouts(16))


@pytest.mark.parametrize("name", MMA)
def test_mma_fragments_are_cutes(kernels: Load, cute: Layouts, name: str) -> None:
    run_mma(kernels("numerics"), name, {operand: cute[f"mma_{name}", operand] for operand in "abc"})


def run_ldmatrix(library: Kernels, name: str, stride: int = 8, swizzle: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows [32, 8] of 16 bits, what each lane receives [32, 2 * matrices], and the bank conflicts."""
    rows = np.arange(256, dtype=np.uint16).reshape(32, 8)
    matrices = int(name[10])
    out = np.zeros((32, matrices), np.uint32)
    report = library.launch(name, 1, 32, [rows, out, stride, swizzle], dynamic_shared=32 * stride * 2 + 128).check()
    assert report.instructions["ldmatrix"] == 1
    (load,) = [counts for counts in report.lines.values() if counts.shared_accesses == 1 and not counts.global_accesses]
    assert load.fewest_wavefronts == matrices
    return rows, out.view(np.uint16).reshape(32, 2 * matrices), load.bank_conflicts


@pytest.mark.parametrize("name", ["ldmatrix_x2", "ldmatrix_x2_trans", "ldmatrix_x4", "ldmatrix_x4_trans"])
def test_ldmatrix_transposes_or_not(kernels: Load, name: str) -> None:
    rows, received, _ = run_ldmatrix(kernels("numerics"), name)
    lane = np.arange(32)
    for matrix in range(int(name[10])):
        elements = rows[8 * matrix : 8 * matrix + 8]
        elements = elements.T if name.endswith("trans") else elements
        for half in range(2):
            np.testing.assert_array_equal(received[:, 2 * matrix + half], elements[lane // 4, 2 * (lane % 4) + half])


@pytest.mark.parametrize("name", ["ldmatrix_x2", "ldmatrix_x2_trans", "ldmatrix_x4", "ldmatrix_x4_trans"])
def test_ldmatrix_fragments_are_cutes(kernels: Load, cute: Layouts, name: str) -> None:
    rows, received, _ = run_ldmatrix(kernels("numerics"), name)
    source, destination = cute[name, "source"], cute[name, "destination"]
    contents = np.full(source.max() + 1, -1, np.int64)
    # Lanes beyond the named rows repeat the first ones' places.
    for lane in reversed(range(32)):
        contents[source[lane]] = rows[lane]
    np.testing.assert_array_equal(received, contents[destination])


def test_ldmatrix_bank_conflicts(kernels: Load) -> None:
    """Rows 128 bytes apart fall on the same banks, eight deep in each of four matrices; a swizzle spreads them."""
    assert run_ldmatrix(kernels("numerics"), "ldmatrix_x4", stride=64)[2] == 4 * 7
    assert run_ldmatrix(kernels("numerics"), "ldmatrix_x4", stride=64, swizzle=1)[2] == 0
    assert run_ldmatrix(kernels("numerics"), "ldmatrix_x4", stride=72)[2] == 0

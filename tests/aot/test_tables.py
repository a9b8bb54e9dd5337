"""The tables of docs/tables/kernels.md name every kernel, and what they calculate is calculated right."""

from __future__ import annotations

import pytest

from benchmarks import kernel_tables
from tests.emulator.emulate import Report

from . import compile_cuda, test_triton


def section(name: str) -> str:
    begin, end = kernel_tables.markers(name)
    return kernel_tables.DOCS.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]


@pytest.mark.parametrize("operator", compile_cuda.INSTANCES)
def test_cuda_table_names_every_kernel(operator: str) -> None:
    text = section("cuda")
    missing = [name for name in compile_cuda.INSTANCES[operator] if f"| {operator} | `{name}` |" not in text]
    assert not missing, "make tables writes them"


@pytest.mark.parametrize("operator", test_triton.KERNELS)
def test_triton_table_names_every_kernel(operator: str) -> None:
    text = section("triton")
    missing = [name for name in test_triton.KERNELS[operator] if f"| {operator} | `{name}" not in text]
    assert not missing, "make tables writes them"


@pytest.mark.parametrize("operator", compile_cuda.INSTANCES)
def test_counts_name_every_operator(operator: str) -> None:
    text = section("counts")
    assert (f"`{operator}`:" if operator != "work_list" else "| `plan` |") in text, "make tables writes them"


def test_calculated_time() -> None:
    """By hand: 10 launches of 3 sectors read and 1 written, of 10^9 operations each in fp16."""
    report = Report(instructions={"distinct_sectors_read": 3, "distinct_sectors_written": 1, "mma_f16": 7})
    cost = kernel_tables.Cost("", "", "fp16", "", report, operations=1e9, unit="fp16", times=10, fewest=(5, 7))
    assert (cost.bytes, cost.tensor_core) == (1280, 7)
    a100 = kernel_tables.GPUS[0]
    assert cost.seconds(a100) == 1e10 / 312e12 and not cost.bound_by_memory(a100)
    moved = kernel_tables.Cost("", "", "fp16", "", report, times=10)
    assert moved.seconds(a100) == 1280 / 2039e9 and moved.bound_by_memory(a100)


def test_variants_are_told_apart_by_as_few_constants_as_can_be() -> None:
    two = [{"SIZE": 64, "BLOCK": 32, "CAUSAL": True}, {"SIZE": 128, "BLOCK": 16, "CAUSAL": True}]
    assert kernel_tables.variant(two[0], two) == "[SIZE=64]"
    assert kernel_tables.variant(two[0], [*two, {"SIZE": 64, "BLOCK": 64, "CAUSAL": True}]) == "[SIZE=64, BLOCK=32]"
    assert kernel_tables.variant(two[0], two[:1] * 2) == ""

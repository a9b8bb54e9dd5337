"""Writes docs/tables/kernels.md: what the kernels need, and what they move and compute beside the roofline.

    python -m benchmarks.kernel_tables

CUDA kernels are compiled by nvcc, Triton's ahead of time, and the CUDA kernels run in the emulator: no GPU is needed.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernel_costs import (
    BATCH,
    DTYPES,
    GPUS,
    ROWS,
    WIDTH,
    Cost,
    attention_costs,
    binary_loss_costs,
    kernels,
    loss_costs,
    pack_costs,
    plan_costs,
    pool_costs,
)
from tests.aot import compile_cuda
from tests.emulator import attention, emulate

ROOT = Path(__file__).parents[1]

DOCS = ROOT / "docs" / "tables" / "kernels.md"

COSTS: tuple[Callable[[], Iterable[Cost]], ...] = (
    *(functools.partial(attention_costs, row) for row in ROWS),
    functools.partial(plan_costs, ROWS[0]),
    functools.partial(pool_costs, 3),
    functools.partial(pool_costs, 64),
    functools.partial(pack_costs, 77, 50),
    functools.partial(loss_costs, "19, 61 and 12 classes", [19, 61, 12]),
    functools.partial(loss_costs, "4096 classes", [4096]),
    functools.partial(binary_loss_costs, "19, 61 and 12 classes", [19, 61, 12]),
    functools.partial(binary_loss_costs, "4096 classes", [4096]),
)


def table(headings: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (headings, *rows)]
    return [lines[0], "|" + "---|" * lines[0].count(" | ") + "---|", *lines[1:]]


def by_architecture(rows: dict[int, dict[str, Any]], what: str, always: bool = False) -> str:
    values = [rows[architecture][what] for architecture in sorted(rows)]
    return "/".join(map(str, values)) if always or len(set(values)) > 1 else str(values[0])


def resource_table(rows: list[dict[str, Any]], dynamic: Callable[[str, str, str], str] | None = None) -> list[str]:
    """A line for each kernel; each row is of one operator, kernel, dtype and architecture."""
    instances: dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        of_dtype = instances.setdefault((row["operator"], row["kernel"]), {}).setdefault(row["dtype"], {})
        of_dtype[row["architecture"]] = row

    def cells(operator: str, kernel: str, of_dtype: dict[str, dict[int, dict[str, Any]]]) -> Iterator[str]:
        yield from (operator, f"`{kernel}`")
        any_dtype = of_dtype.get("")
        for dtype in DTYPES:
            found = of_dtype.get(dtype) or (any_dtype if dtype == "fp16" else None)
            yield by_architecture(found, "registers", always=True) if found else ""
        for dtype in ("fp16", "fp32"):
            found = of_dtype.get(dtype) or any_dtype
            shared = by_architecture(found, "shared") if found else ""
            yield f"{shared} + {dynamic(operator, kernel, dtype)}" if dynamic else shared
        for dtype in ("fp16", "fp32"):
            found = of_dtype.get(dtype) or any_dtype
            yield by_architecture(found, "tensor_core") if found else ""

    headings = ["operator", "kernel", *(f"registers {dtype}" for dtype in DTYPES)]
    headings += ["shared fp16", "shared fp32", "tensor core fp16", "tensor core fp32"]
    return table(headings, (cells(*key, of_dtype) for key, of_dtype in instances.items()))


def most(rows: list[dict[str, Any]]) -> str:
    """The most registers, and which kernels use the stack."""
    top = max(rows, key=lambda row: row["registers"])
    text = (
        f"The most registers of all {len(rows)} compilations are {top['registers']}, of `{top['kernel']}` in "
        f"{top['dtype'] or 'integers'} on sm_{top['architecture']}; 255 is the limit."
    )
    used = [row for row in rows if row["stack"] or row.get("spill_stores") or row.get("spill_loads")]
    if not used:
        return f"{text} None uses the stack or spills."
    listed = "; ".join(
        f"`{row['kernel']}` {row['dtype']} sm_{row['architecture']}: {row['stack']} stack"
        + (f", {row['spill_stores']} stored, {row['spill_loads']} loaded" if "spill_stores" in row else "")
        for row in used
    )
    return f"{text} **Not reached, no stack and no spills** (bytes a thread): {listed}."


ACCESSES = ("copy", "global load", "global store", "shared load", "shared store")


def access_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kernel: how many memory instructions of how many bytes, in fp16 (or integers) and in fp32."""
    instances: dict[tuple[str, str], dict[str, dict[str, dict[int, int]]]] = {}
    for row in rows:
        instances.setdefault((row["operator"], row["kernel"]), {})[row["dtype"]] = row["accesses"]

    def cells(operator: str, kernel: str, of_dtype: dict[str, dict[str, dict[int, int]]]) -> Iterator[str]:
        yield from (operator, f"`{kernel}`")
        for kind in ACCESSES:
            for dtype in ("fp16", "fp32"):
                widths = of_dtype.get(dtype, of_dtype.get("", {})).get(kind, {})
                yield ", ".join(f"{widths[width]}x{width}" for width in sorted(widths, reverse=True))

    headings = ["operator", "kernel", *(f"{kind} {dtype}" for kind in ACCESSES for dtype in ("fp16", "fp32"))]
    return table(headings, (cells(*key, of_dtype) for key, of_dtype in instances.items()))


def wholeness(rows: list[dict[str, Any]]) -> str:
    """Whether accesses that the source makes 16 bytes at a time are compiled so."""
    split = [f"`{row['kernel']}` {row['dtype']} sm_{row['architecture']}" for row in rows if row["split"]]
    aim = "Every access that the source makes 16 bytes at a time is one instruction, in PTX and in machine code"
    return (
        f"**Not reached:** {aim}; split: {'; '.join(split)}." if split else f"{aim}, in all {len(rows)} compilations."
    )


def dynamic_shared(operator: str, kernel: str, dtype: str) -> str:
    """Bytes that the launcher asks for at the usual shape."""
    size = DTYPES[dtype].itemsize
    if operator == "packed_attention" and kernel != "backward_delta<T>":
        head = int(re.findall(r"\d+", kernel)[0])
        which = kernel.partition("<")[0]
        warps = attention.MOST_WARPS if which == "forward" else attention.most_grad_warps(size, head)
        return str(attention.compiled(kernels, DTYPES[dtype], head).call(f"{which}_bytes", warps))
    if operator == "modality_pool" and kernel.endswith("true>"):
        return str(2 * WIDTH * size)
    if operator == "multitask_cross_entropy" and kernel.endswith("true>"):
        return str(kernels(operator).call("tile_bytes", 19 + 61 + 12, False, size))
    return "0"


def cuda_section() -> list[str]:
    rows = [row for operator in compile_cuda.INSTANCES for row in compile_cuda.compile_operator(operator)]
    order = [(operator, kernel) for operator, kernels in compile_cuda.INSTANCES.items() for kernel in kernels]
    rows.sort(key=lambda row: order.index((row["operator"], row["kernel"])))
    words = subprocess.run([str(compile_cuda.nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    version = words.rpartition(" V")[2].split()[0]
    return [
        *paragraph(
            f"`make tables`, {datetime.date.today()}: nvcc {version}, `-O3`, as `ptxas -v` and the machine code say;",
            "compiled only, not run. Registers a thread are those of sm_80/sm_90/sm_100; so are other figures with",
            "slashes. Shared memory is bytes a block, static + dynamic: in `packed_attention` for four warps (two",
            "in the gradients of fp32 from size 80 on), in `modality_pool` for two modalities of width 512, in",
            "`multitask_cross_entropy` for 92 classes. Tensor-core instructions (`HMMA`) are counted in the machine",
            "code, where a loop's body stands once. A kernel of integers stands under fp16.",
        ),
        "",
        *paragraph(most(rows)),
        "",
        *resource_table(rows, dynamic_shared),
        "",
        *paragraph(
            "Memory instructions in the machine code of sm_90, as number x bytes a thread: an unrolled loop has many,",
            "and its remainders, heads and tails are narrow. A copy is `cp.async`; `ldmatrix` is not counted.",
            wholeness(rows),
        ),
        "",
        *access_table([row for row in rows if row["architecture"] == 90]),
    ]


def key_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["operator"], row["kernel"], row["dtype"]


def triton_rows() -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "tests" / "aot" / "compile_kernels.py")]
    # Compilation needs the compiled form of the kernels, which a process has instead of the interpreted one.
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"}, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    variants: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        variants.setdefault(key_of(row), []).append(row["constants"])
    return [row | {"kernel": row["kernel"] + variant(row["constants"], variants[key_of(row)])} for row in rows]


def variant(constants: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The first constants that tell a kernel's variants apart, in brackets; "" where there is one only."""
    shown: list[str] = []
    for key in constants:
        if len(set(map(str, others))) == len({str([other[name] for name in shown]) for other in others}):
            break
        if len({other[key] for other in others}) > 1:
            shown.append(key)
    return f"[{', '.join(f'{key}={constants[key]}' for key in shown)}]" if shown else ""


def triton_section() -> list[str]:
    rows = triton_rows()
    return [
        *paragraph(
            f"`make tables`, {datetime.date.today()}: Triton {triton.__version__}, compiled ahead of time, not run.",
            "Registers a thread are those of sm_80/sm_90/sm_100; so are other figures with slashes. Shared memory",
            "is bytes a block. Tensor-core instructions are counted in the PTX (`mma`, `wgmma`, `tcgen05.mma`,",
            "which differ in size), where a loop's body stands once. Of the configurations that `packed_attention` is",
            "tuned over, the largest.",
        ),
        "",
        *paragraph(most(rows)),
        "",
        *resource_table(rows),
    ]


def figure(number: float) -> str:
    return "<0.01" if 0 < number < 0.01 else f"{number:.3g}"


def bound(cost: Cost) -> str:
    bounds = ["memory" if cost.bound_by_memory(gpu) else "operations" for gpu in GPUS]
    return bounds[0] if len(set(bounds)) == 1 else "/".join(bounds)


def traffic(cost: Cost) -> list[str]:
    counts = cost.report.counts
    ratio = counts.sectors / counts.fewest_sectors
    return [f"{counts.sectors:,}", f"{counts.fewest_sectors:,}", f"{ratio:.2f}", f"{counts.bank_conflicts:,}"]


def time_cells(cost: Cost) -> list[str]:
    amounts = [figure(cost.bytes / 1e6), figure(cost.operations * cost.times / 1e9) if cost.operations else ""]
    times = [figure(cost.seconds(gpu) * 1e6) for gpu in GPUS]
    return [f"{cost.report.instructions['block_barriers']:,}", *amounts, *times, bound(cost)]


def tensor_cells(cost: Cost) -> list[str]:
    if cost.fewest is None:
        return ["", "", ""]
    return [f"{cost.tensor_core:,}", *(f"{cost.tensor_core / fewest:.2f}" for fewest in cost.fewest)]


AIMS: dict[str, Callable[[Cost], bool]] = {
    "Sectors at most 1.05 times the fewest": lambda cost: (
        cost.report.counts.sectors <= 1.05 * cost.report.counts.fewest_sectors
    ),
    "No bank conflicts": lambda cost: cost.report.counts.bank_conflicts == 0,
    "Tensor-core instructions at most 1.15 times the arithmetic's": lambda cost: (
        cost.fewest is None or cost.tensor_core <= 1.15 * cost.fewest[0]
    ),
    "Tensor-core instructions at most 1.15 times what whole instructions allow": lambda cost: (
        cost.fewest is None or cost.tensor_core <= 1.15 * cost.fewest[1]
    ),
}


def reached(costs: list[Cost]) -> Iterator[str]:
    """An item for each aim: reached, or where it is not."""
    for aim, holds in AIMS.items():
        where: dict[str, list[str]] = {}
        for cost in costs:
            if not holds(cost):
                where.setdefault(f"{cost.shape} ({cost.dtype})", []).append(f"`{cost.kernel}`")
        listed = "; ".join(f"{shape}: {', '.join(names)}" for shape, names in where.items())
        yield from paragraph(f"- {aim}:", f"not reached at {listed}." if where else "reached everywhere.")


def counts_section() -> list[str]:
    torch.manual_seed(0)
    costs = [cost for make in COSTS for cost in make()]
    version = subprocess.run(
        [emulate.compiler(), "-dumpfullversion"], capture_output=True, text=True, check=True
    ).stdout
    rates = "; ".join(
        f"{gpu.name} {gpu.bandwidth / 1e9:.0f} GB/s, and {gpu.rates['fp16'] / 1e12:g} TFLOP/s in fp16, "
        f"{gpu.rates['tf32'] / 1e12:g} in TF32, {gpu.rates['vector'] / 1e12:g} without tensor cores"
        for gpu in GPUS
    )
    lines = [
        *paragraph(
            f"`make tables`, {datetime.date.today()}: the CUDA kernels in the emulator (g++ {version.strip()}).",
            "Counted: 32-byte sectors of all warps' accesses and the fewest that hold the same bytes; bank",
            "conflicts; tensor-core instructions, and their ratio to what the arithmetic fills and to what whole",
            "instructions allow (rows rounded up to 16, columns to 8, depth to 16, in TF32 to 8); barriers of",
            "blocks.",
        ),
        "",
        *paragraph(
            "**Calculated, not measured**: MB that a launch must move at least once (its distinct sectors), GFLOP,",
            "and time = max(bytes / bandwidth, operations / rate). Launches, latency and too few blocks cost",
            "nothing in it, so small kernels are far slower; what is still in the L2 cache comes faster. Rates of the",
            f"data sheets of A100 80GB SXM and H100 SXM, dense: {rates}.",
        ),
        "",
        *reached(costs),
        "",
    ]
    for operator, shape in SHAPES.items():
        with_tensor_cores = operator == "packed_attention"
        headings = ["shape", "dtype", "kernel", "sectors", "fewest", "ratio", "bank conflicts"]
        headings += ["tensor core", "of the arithmetic", "of whole instructions"] if with_tensor_cores else []
        headings += ["barriers", "MB", "GFLOP", *(f"{gpu.name} µs" for gpu in GPUS), "bound by"]
        rows = [
            [cost.shape, cost.dtype, f"`{cost.kernel}`", *traffic(cost)]
            + (tensor_cells(cost) if with_tensor_cores else [])
            + time_cells(cost)
            for cost in costs
            if cost.operator == operator
        ]
        lines += [*paragraph(f"`{operator}`: {shape}"), "", *table(headings, rows), ""]
    return lines[:-1]


def paragraph(*words: str) -> list[str]:
    indent = "  " if words[0].startswith("- ") else ""
    return textwrap.wrap(" ".join(words), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


SHAPES = {
    "packed_attention": f"head size 64. Counts are those of one row and one head; MB, GFLOP and time are scaled up to "
    f"{BATCH} rows and all heads (12 in the towers, 8 in the fusion). Floats take six TF32 instructions for the scores "
    "and three for other products, all of which GFLOP has. `plan` takes the whole batch; it runs once in the forward "
    "and twice in the backward.",
    "modality_pool": f"{BATCH} rows, 2 modalities, width {WIDTH}.",
    "pack_tokens": f"{BATCH} rows, width {WIDTH}, with type embeddings; its few operations are not counted.",
    "multitask_cross_entropy": f"{BATCH} rows, label smoothing; its few operations are not counted.",
    "multitask_binary_cross_entropy": f"{BATCH} rows, exponents and a margin; its operations are not counted.",
}

SECTIONS = {"cuda": cuda_section, "triton": triton_section, "counts": counts_section}


def markers(name: str) -> tuple[str, str]:
    return f"<!-- {name} table: written by make tables -->", f"<!-- end of {name} table -->"


def replaced(text: str, name: str, lines: list[str]) -> str:
    begin, end = markers(name)
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{DOCS} has no '{begin}' ... '{end}'")
    return "\n".join([before + begin, *lines, end]) + after


def main(names: list[str]) -> None:
    if compile_cuda.nvcc() is None:
        raise SystemExit("not written: there is no CUDA compiler (nvcc)")
    for name in names or SECTIONS:
        lines = SECTIONS[name]()
        DOCS.write_text(replaced(DOCS.read_text(encoding="utf-8"), name, lines), encoding="utf-8")
        print(f"wrote the {name} table of {DOCS.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])

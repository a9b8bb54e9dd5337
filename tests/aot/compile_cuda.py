"""Compiles every CUDA header ahead of time, without a GPU, and prints what each kernel needs as JSON lines.

Run as a command: `python -m tests.aot.compile_cuda [OPERATOR ...]`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import instructions

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "csrc" / "include"
ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp16": "__half", "bf16": "__nv_bfloat16", "fp32": "float"}

# Each operator's kernels as its launcher uses them; those that name T exist for every dtype.
INSTANCES = {
    "modality_pool": [
        f"{kernel}<T, {arguments}>"
        for kernel, in_shared in (("forward", True), ("backward_scores", True), ("backward_embeddings", False))
        for arguments in (("kPerAccess<T>, true", "1, false") if in_shared else ("kPerAccess<T>", "1"))
    ]
    + ["backward_weight<T, kPerAccess<T>>", "backward_weight<T, 1>"],
    "packed_attention": [
        *(f"forward<T, {size}>" for size in (32, 64, 80, 96, 128)),
        "backward_delta<T>",
        *(f"backward<T, {size}, {by_keys}>" for by_keys in ("false", "true") for size in (32, 64, 80, 96, 128)),
    ],
    "work_list": ["plan<64>"],
    "pack_tokens": [
        "row_ends",
        *(f"{kernel}<T, {count}>" for kernel in ("pack", "unpack") for count in ("kPerAccess<T>", "1")),
        "add_sums<T>",
    ],
    "multitask_cross_entropy": [
        *(f"{direction}_warps<T, {tile}>" for direction in ("forward", "backward") for tile in ("true", "false")),
        *("forward_blocks<T>", "backward_blocks<T>", "add_class_weights<T>", "add_rows"),
    ],
    "multitask_binary_cross_entropy": ["sum_columns<T>", "add_parts", "scale_columns<T>", "gradient<T>"],
}


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")


def named(operator: str) -> dict[str, tuple[str, str]]:
    """Each kernel's name in C++ with its instance and dtype ("" where the kernel has no element type)."""
    names = {}
    for instance in INSTANCES[operator]:
        for dtype, element in DTYPES.items():
            count = "4" if dtype == "fp32" else "8"
            name = re.sub(r"\bT\b", element, instance.replace("kPerAccess<T>", count))
            names[f"cmaclip::{operator}::{name}"] = (instance, dtype if name != instance else "")
    return names


def compile_operator(
    operator: str, include: Path = INCLUDE, architectures: tuple[int, ...] = ARCHITECTURES, only: str = ""
) -> list[dict[str, Any]]:
    """What every kernel needs on every architecture. Raises RuntimeError with nvcc's words where it fails.

    With `only`, the kernels whose name contains it. `accesses` counts memory instructions of the machine code by kind
    and bytes; `split` names those, in PTX or machine code, of fewer than 16 bytes where the source has one access.
    """
    kernels = {name: instance for name, instance in named(operator).items() if only in name}
    targets = [f"-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]" for number in architectures]
    options = ["-std=c++20", "-O3", "-lineinfo", "-I", include, "-Xptxas", "-v", "--threads", "2", *targets]
    with tempfile.TemporaryDirectory() as folder:
        source, compiled = Path(folder, f"{operator}.cu"), Path(folder, "out.o")
        pointers = ", ".join(f"(void*){name}" for name in kernels)
        source.write_text(f'#include "cmaclip/{operator}.cuh"\nvoid* kernels[] = {{{pointers}}};\n')
        done = subprocess.run([nvcc(), *options, "-c", source, "-o", compiled], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        needs, whole = ptxas_report(done.stderr), whole_accesses(include)
        ptx, machine = instructions.of_ptx(compiled), instructions.of_machine_code(compiled)
    plain = demangled({symbol for symbol, _ in needs})
    rows = []
    for (symbol, architecture), need in needs.items():
        if plain[symbol] not in kernels:
            continue
        instance, dtype = kernels[plain[symbol]]
        row = {"operator": operator, "kernel": instance, "dtype": dtype, "architecture": architecture}
        found = machine[symbol, architecture]
        accesses: dict[str, dict[int, int]] = {}
        for access in found.accesses:
            of_kind = accesses.setdefault(access.kind, {})
            of_kind[access.bytes] = of_kind.get(access.bytes, 0) + 1
        split = sorted(
            {
                f"{access.name} at {access.file}:{access.line}"
                for access in (*ptx[symbol, architecture].accesses, *found.accesses)
                if (access.file, access.line) in whole and access.bytes < 16
            }
        )
        rows.append(row | need | {"tensor_core": found.tensor_core, "accesses": accesses, "split": split})
    return rows


def whole_accesses(include: Path) -> set[tuple[str, int]]:
    """The file names and lines of accesses that the source means to be one instruction of 16 bytes."""
    return {
        (path.name, number)
        for path in include.rglob("*.cuh")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r";\s*// one access", line)
    }


def ptxas_report(text: str) -> dict[tuple[str, int], dict[str, int]]:
    """Registers, stack, spills and static shared memory by symbol and architecture, from `ptxas -v`."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*\n\s*"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*: Used (\d+) registers(.*)"
    )
    needs = {}
    for symbol, architecture, stack, stores, loads, registers, rest in re.findall(pattern, text):
        shared = re.search(r"(\d+) bytes smem", rest)
        needs[symbol, int(architecture)] = {
            "registers": int(registers),
            "stack": int(stack),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
            "shared": int(shared[1]) if shared else 0,
        }
    return needs


def demangled(symbols: set[str]) -> dict[str, str]:
    """The kernels' names as C++ writes them, without the types of their arguments."""
    ordered = sorted(symbols)
    output = subprocess.run(["c++filt"], input="\n".join(ordered), capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"^void ", "", line).partition("(")[0] for line in output.splitlines()]
    return dict(zip(ordered, names, strict=True))


if __name__ == "__main__":
    for operator in sys.argv[1:] or INSTANCES:
        for row in compile_operator(operator):
            print(json.dumps(row), flush=True)

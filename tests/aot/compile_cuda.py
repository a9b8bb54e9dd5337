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

ROOT = Path(__file__).parents[2]
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


def compile_operator(operator: str) -> list[dict[str, Any]]:
    """What every kernel needs on every architecture. Raises RuntimeError with nvcc's words where it fails."""
    kernels = named(operator)
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    options = ["-std=c++20", "-O3", "-I", ROOT / "csrc" / "include", "-Xptxas", "-v", "--threads", "2", *targets]
    with tempfile.TemporaryDirectory() as folder:
        source, compiled = Path(folder, f"{operator}.cu"), Path(folder, "out.o")
        pointers = ", ".join(f"(void*){name}" for name in kernels)
        source.write_text(f'#include "cmaclip/{operator}.cuh"\nvoid* kernels[] = {{{pointers}}};\n')
        done = subprocess.run([nvcc(), *options, "-c", source, "-o", compiled], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr)
        needs, tensor_core = ptxas_report(done.stderr), tensor_core_counts(compiled)
    plain = demangled({symbol for symbol, _ in needs})
    rows = []
    for (symbol, architecture), need in needs.items():
        if plain[symbol] not in kernels:
            continue
        instance, dtype = kernels[plain[symbol]]
        row = {"operator": operator, "kernel": instance, "dtype": dtype, "architecture": architecture}
        rows.append(row | need | {"tensor_core": tensor_core.get((symbol, architecture), 0)})
    return rows


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


def tensor_core_counts(compiled: Path) -> dict[tuple[str, int], int]:
    """Tensor-core instructions (HMMA and its kin) in the machine code, by symbol and architecture."""
    import triton

    # Triton ships the disassembler; not every CUDA toolkit does.
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    command = [tools / "cuobjdump", "-sass", compiled]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PATH": path}).stdout
    counts: dict[tuple[str, int], int] = {}
    architecture, symbol = 0, ""
    for line in text.splitlines():
        if found := re.match(r"\s*code for sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function : (\w+)", line):
            symbol = found[1]
        # HFMA2.MMA is none of them.
        elif re.search(r"(?<![.\w])\w*MMA[.\s]", line):
            counts[symbol, architecture] = counts.get((symbol, architecture), 0) + 1
    return counts


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

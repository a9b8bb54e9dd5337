"""Compiles every Triton kernel ahead of time, without a GPU, and prints what each needs as JSON lines.

Run as a command: `TRITON_INTERPRET=0 python tests/aot/compile_kernels.py [OPERATOR ...]`.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32"}


def modality_pool() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Kernels of modality_pool with the types of their arguments ("T": the dtype) and their constants."""
    for modalities in (2, 8):
        blocks = {"MODALITIES": modalities} | kernels_of("modality_pool")._blocks(modalities, 512)
        sizes = {"tasks": "i32", "width": "i32"}
        embeddings = {"embeddings": "T", "present": "*i1"}
        yield (
            "forward_kernel",
            embeddings | {"weight": "T", "pooled": "T", "weights": "*fp32"} | sizes,
            blocks | {"SHARED": False},
        )
        yield (
            "scores_kernel",
            embeddings
            | {"grad_pooled": "T", **dict.fromkeys(("grad_weights", "weights", "grad_scores"), "*fp32")}
            | sizes,
            blocks,
        )
        yield (
            "embeddings_kernel",
            {"grad_pooled": "T", "weight": "T", "present": "*i1", "weights": "*fp32", "grad_scores": "*fp32"}
            | {"grad_embeddings": "T"}
            | sizes,
            blocks | {"SHARED": False},
        )
        yield (
            "weight_kernel",
            embeddings | {"grad_scores": "*fp32", "grad_weight": "T", "rows": "i32"} | sizes,
            {"MODALITIES": modalities, "SHARED": False, "BLOCK_B": 16, "BLOCK_K": 4, "BLOCK_D": 64},
        )


VARIANTS = {"modality_pool": modality_pool}


def kernels_of(operator: str) -> Any:
    return importlib.import_module(f"cmaclip_fast.kernels.{operator}")


def compile_all(operators: list[str]) -> Iterator[dict[str, Any]]:
    for operator in operators:
        for name, types, constants in VARIANTS[operator]():
            for dtype, pointer in DTYPES.items():
                for architecture in ARCHITECTURES:
                    row = {"operator": operator, "kernel": name, "constants": constants, "dtype": dtype}
                    kernel = getattr(kernels_of(operator), name)
                    yield (
                        row
                        | {"architecture": architecture}
                        | resources(kernel, types, constants, pointer, architecture)
                    )


def resources(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], pointer: str, architecture: int
) -> dict[str, Any]:
    signature = {
        name: "constexpr" if name in constants else types[name].replace("T", pointer) for name in kernel.arg_names
    }
    aligned = [(i,) for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name == "width"]
    attributes = {index: [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    tensor_core = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", compiled.asm["ptx"]))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "tensor_core": tensor_core,
        "warps": compiled.metadata.num_warps,
    }


if __name__ == "__main__":
    for row in compile_all(sys.argv[1:] or list(VARIANTS)):
        print(json.dumps(row), flush=True)

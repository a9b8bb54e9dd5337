"""Compiles every Triton kernel ahead of time, without a GPU, and prints what each needs as JSON lines.

Run as a command: `TRITON_INTERPRET=0 python tests/aot/compile_kernels.py [--all] [OPERATOR ...]`. Without `--all`, only
the largest of the configurations that packed_attention is tuned over. A kernel without stack has no spills.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

# A kernel's name, the types of its arguments ("T": the dtype) and its constants, with `num_warps` and `num_stages`.
Variant = tuple[str, dict[str, Any], dict[str, Any]]


def modality_pool(dtype: str, every: bool) -> Iterator[Variant]:
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


def pack_tokens(dtype: str, every: bool) -> Iterator[Variant]:
    kernels = kernels_of("pack_tokens")
    spans = {"starts": "*i32", "counts": "*i32", "cu_seqlens": "*i32", "rows": "i32"}
    blocks, rows = kernels._blocks(512), {"BLOCK_B": kernels.BLOCK_B}
    sources = {"texts": "i32", "images": "i32"}
    sizes = {"tokens": "i32", "width": "i32"}
    yield "cu_seqlens_kernel", spans | sources, rows
    tokens = {"text": "T", "image": "T", "type_embedding": "T", "packed": "T"}
    yield "pack_kernel", tokens | spans | sources | sizes, blocks | {"STEPS": 9}
    grads = {"grad_packed": "T", "grad_source": "T", "partial": "*fp32"}
    places = {"modality": "i32", "texts": "i32", "sources": "i32"}
    yield "unpack_kernel", grads | spans | places | sizes, blocks | rows | {"CHUNK": kernels.CHUNK}
    sums = {"partial": "*fp32", "grad_type": "T", "partials": "i32", "width": "i32"}
    yield "type_kernel", sums, {"BLOCK_R": 32, "BLOCK_D": 64}


def packed_attention(dtype: str, every: bool) -> Iterator[Variant]:
    kernels = kernels_of("packed_attention")
    tensors = dict.fromkeys(("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"), "T")
    sums = dict.fromkeys(("lse", "grad_lse", "delta"), "*fp32")
    ends = {"cu_seqlens_q": "*i32", "cu_seqlens_k": "*i32"}
    strides = {f"{name}_{of}": "i32" for name in "qkv" for of in ("token", "head")}
    sizes = dict.fromkeys(("rows", "tokens", "tokens_q", "tokens_k", "longest_q", "longest_k"), "i32")
    types = {**tensors, **sums, **ends, **strides, **sizes, "scale": "fp32"}
    for size in (32, 64, 80, 128) if every else (64, 128):
        block_e = triton.next_power_of_2(size)
        for name in ("forward", "grad_q", "grad_kv"):
            blocks = getattr(kernels, f"{name.upper()}_BLOCKS")
            configs = kernels.selectable(blocks, block_e, DTYPES[dtype], 1024, 1024)
            for block_q, block_k, warps, stages in configs if every else configs[-1:]:
                tuned = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
                yield f"{name}_kernel", types, {"SIZE": size, "BLOCK_E": block_e, "CAUSAL": True} | tuned


def multitask_cross_entropy(dtype: str, every: bool) -> Iterator[Variant]:
    sums = dict.fromkeys(("row_loss", "row_weight", "loss", "lse", "weight_sum", "grad_loss"), "*fp32")
    logits = dict.fromkeys(("logits", "class_weight", "grad_logits"), "T") | {"labels": "*i64", "offsets": "*i32"}
    sizes = {"rows": "i32", "tasks": "i32", "width": "i32", "label_share": "fp32", "smoothing": "fp32"}
    types = sums | logits | sizes
    yield "loss_kernel", types, {"BLOCK_B": 64, "BLOCK_K": 16}
    for kernel in ("row_kernel", "grad_kernel"):
        yield kernel, types, {"SMOOTH": True, "BLOCK_C": 1024, "num_warps": 4}


def multitask_binary_cross_entropy(dtype: str, every: bool) -> Iterator[Variant]:
    sums = dict.fromkeys(("losses", "weights", "loss", "weight_sum", "grad_loss", "scales"), "*fp32")
    elements = dict.fromkeys(("logits", "class_weight", "grad_logits"), "T") | {"targets": "*i8", "offsets": "*i32"}
    options = dict.fromkeys(("gamma_positive", "gamma_negative", "margin"), "fp32")
    types = sums | elements | options | {"rows": "i32", "classes": "i32", "parts": "i32"}
    columns = kernels_of("multitask_binary_cross_entropy").COLUMNS
    for kernel in ("loss_kernel", "scale_kernel"):
        yield kernel, types, {"BLOCK_C": columns}
    rows = kernels_of("multitask_binary_cross_entropy").ROWS
    for kernel in ("columns_kernel", "grad_kernel"):
        yield kernel, types, {"FOCUSED": True, "SHIFTED": True, "BLOCK_B": rows, "BLOCK_C": columns}


VARIANTS = {
    "modality_pool": modality_pool,
    "pack_tokens": pack_tokens,
    "packed_attention": packed_attention,
    "multitask_cross_entropy": multitask_cross_entropy,
    "multitask_binary_cross_entropy": multitask_binary_cross_entropy,
}


def kernels_of(operator: str) -> Any:
    return importlib.import_module(f"cmaclip_fast.kernels.{operator}")


def compile_all(operators: list[str], every: bool = False) -> Iterator[dict[str, Any]]:
    with ProcessPoolExecutor(2) as pool:
        yield from pool.map(compile_one, *zip(*list_all(operators, every), strict=True))


def list_all(operators: list[str], every: bool) -> Iterator[tuple[str, str, int, Variant]]:
    for operator in operators:
        for dtype in DTYPES:
            for variant in VARIANTS[operator](dtype, every):
                for architecture in ARCHITECTURES:
                    yield operator, dtype, architecture, variant


def compile_one(operator: str, dtype: str, architecture: int, variant: Variant) -> dict[str, Any]:
    name, types, constants = variant
    row = {"operator": operator, "kernel": name, "constants": constants, "dtype": dtype, "architecture": architecture}
    kernel = getattr(kernels_of(operator), name)
    if isinstance(kernel, triton.runtime.Autotuner):
        kernel = kernel.fn
    return row | resources(kernel, types, constants, f"*{dtype}", architecture)


def resources(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], pointer: str, architecture: int
) -> dict[str, Any]:
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature = {
        name: "constexpr" if name in constants else types[name].replace("T", pointer) for name in kernel.arg_names
    }
    # Pointers, widths and strides as they are in a model.
    whole = [
        signature[name].startswith("*") or name == "width" or name.endswith(("_token", "_head"))
        for name in kernel.arg_names
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i, divisible in enumerate(whole) if divisible}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
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
    names = [name for name in sys.argv[1:] if name != "--all"]
    for row in compile_all(names or list(VARIANTS), every="--all" in sys.argv):
        print(json.dumps(row), flush=True)

"""Every CUDA header compiles for sm_80, sm_90 and sm_100 without spills or stack, as ptxas reports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HEADERS = Path(__file__).parents[2] / "csrc" / "include"
ARCHITECTURES = (80, 90, 100)

# Template arguments of each operator's kernels, as its launcher uses them.
INSTANCES = {
    "modality_pool": [
        f"{kernel}<{dtype}, {arguments}>"
        for dtype, count in (("float", 4), ("__half", 8), ("__nv_bfloat16", 8))
        for kernel, arguments in (
            ("forward", f"{count}, true"),
            ("forward", "1, false"),
            ("backward_scores", f"{count}, true"),
            ("backward_scores", "1, false"),
            ("backward_embeddings", f"{count}"),
            ("backward_embeddings", "1"),
            ("backward_weight", f"{count}"),
            ("backward_weight", "1"),
        )
    ],
    "packed_attention": [
        f"{kernel}<{dtype}{arguments}>"
        for dtype in ("float", "__half", "__nv_bfloat16")
        for kernel, arguments in (
            ("backward_delta", ""),
            *(
                (kernel, f", {size}{side}")
                for size in (32, 64, 80, 96, 128)
                for kernel, side in (("forward", ""), ("backward", ", false"), ("backward", ", true"))
            ),
        )
    ],
    "work_list": ["plan"],
    "pack_tokens": [
        "row_ends",
        *(
            instance
            for dtype, count in (("float", 4), ("__half", 8), ("__nv_bfloat16", 8))
            for instance in (
                *(f"{kernel}<{dtype}, {n}>" for kernel in ("pack", "unpack") for n in (count, 1)),
                f"add_sums<{dtype}>",
            )
        ),
    ],
    "multitask_cross_entropy": [
        "add_rows",
        *(
            kernel.replace("T", dtype)
            for dtype in ("float", "__half", "__nv_bfloat16")
            for kernel in (
                *(
                    f"{direction}_warps<T, {tile}>"
                    for direction in ("forward", "backward")
                    for tile in ("true", "false")
                ),
                *("forward_blocks<T>", "backward_blocks<T>", "add_class_weights<T>"),
            )
        ),
    ],
}


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if found is None:
        pytest.skip("there is no CUDA compiler (nvcc)")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("operator", INSTANCES)
def test_compiles_without_spills(operator, tmp_path):
    source = tmp_path / f"{operator}.cu"
    kernels = ", ".join(f"(void*)cmaclip::{operator}::{instance}" for instance in INSTANCES[operator])
    source.write_text(f'#include "cmaclip/{operator}.cuh"\nvoid* kernels[] = {{{kernels}}};\n')
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    command = [nvcc(), "-std=c++20", "-O3", "-I", HEADERS, "-Xptxas", "-v", "--threads", "2", *targets, "-c", source]
    done = subprocess.run([*command, "-o", tmp_path / "out.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needs = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(needs) == len(INSTANCES[operator]) * len(ARCHITECTURES)
    assert set(needs) == {("0", "0", "0")}, done.stderr

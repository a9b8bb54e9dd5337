"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 in each dtype, and keeps its values in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = {
    "modality_pool": {"forward_kernel", "scores_kernel", "embeddings_kernel", "weight_kernel"},
    "pack_tokens": {"cu_seqlens_kernel", "pack_kernel", "unpack_kernel", "type_kernel"},
    "packed_attention": {"forward_kernel", "grad_q_kernel", "grad_kv_kernel"},
    "multitask_cross_entropy": {"row_kernel", "loss_kernel", "grad_kernel"},
    "multitask_binary_cross_entropy": {"columns_kernel", "loss_kernel", "scale_kernel", "grad_kernel"},
}


@pytest.mark.slow
@pytest.mark.parametrize("operator", KERNELS)
def test_compiles_without_spills(operator):
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), operator]
    # Compilation needs the compiled form of the kernels, which a process has instead of the interpreted one.
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS[operator]
    assert {(row["dtype"], row["architecture"]) for row in rows} == {
        (dtype, architecture) for dtype in ("fp16", "bf16", "fp32") for architecture in (80, 90, 100)
    }
    spilled = [row for row in rows if row["stack"] > 0]
    assert not spilled, spilled
    assert all(row["registers"] <= 255 and row["shared"] <= 99 * 1024 for row in rows)
    if operator == "packed_attention":
        assert all((row["tensor_core"] > 0) == (row["dtype"] != "fp32") for row in rows)

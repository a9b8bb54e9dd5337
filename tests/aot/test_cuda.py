"""Every CUDA header compiles for sm_80, sm_90 and sm_100 without spills or stack; its vector accesses stay whole."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from . import compile_cuda

pytestmark = pytest.mark.skipif(compile_cuda.nvcc() is None, reason="there is no CUDA compiler (nvcc)")

# The kinds of access that each kernel makes 16 bytes at a time; the kernels that are not here make none.
WIDE = {
    "modality_pool": {
        "forward<T, kPerAccess<T>, true>": {"global load", "global store", "shared load", "shared store"},
        "backward_scores<T, kPerAccess<T>, true>": {"global load", "shared load", "shared store"},
        "backward_embeddings<T, kPerAccess<T>>": {"global load", "global store"},
        "backward_weight<T, kPerAccess<T>>": {"global load"},
    },
    "packed_attention": {
        "forward<T, N>": {"copy", "global store", "shared load"},
        "backward_delta<T>": {"global load"},
        "backward<T, N, false>": {"copy", "global store", "shared load"},
        "backward<T, N, true>": {"copy", "global store", "shared load"},
    },
    "work_list": {},
    "pack_tokens": {
        "row_ends": {"shared load", "shared store"},
        "pack<T, kPerAccess<T>>": {"global load", "global store"},
        # the list of pieces, which all threads read alike: the compiler takes four at a time
        "unpack<T, 1>": {"shared load"},
        "unpack<T, kPerAccess<T>>": {"global load", "global store", "shared load"},
    },
    "multitask_cross_entropy": {
        "forward_warps<T, true>": {"global load", "shared store"},
        "backward_warps<T, true>": {"global load", "global store", "shared load", "shared store"},
        "forward_blocks<T>": {"global load"},
        "backward_blocks<T>": {"global load", "global store"},
    },
    "multitask_binary_cross_entropy": {},
}


@functools.cache
def compiled(operator: str) -> list[dict[str, Any]]:
    return compile_cuda.compile_operator(operator)


@pytest.mark.slow
@pytest.mark.parametrize("operator", compile_cuda.INSTANCES)
def test_compiles_without_spills(operator: str) -> None:
    rows = compiled(operator)
    assert {(row["kernel"], row["dtype"], row["architecture"]) for row in rows} == {
        (instance, dtype, architecture)
        for instance, dtype in compile_cuda.named(operator).values()
        for architecture in compile_cuda.ARCHITECTURES
    }
    spilled = [row for row in rows if row["stack"] or row["spill_stores"] or row["spill_loads"]]
    assert not spilled, spilled
    unplaced = [row for row in rows if any(kind.startswith(("local", "generic")) for kind in row["accesses"])]
    assert not unplaced, "accesses to local memory, or of an address whose memory the compiler does not know"


@pytest.mark.slow
@pytest.mark.parametrize("operator", compile_cuda.INSTANCES)
def test_vector_accesses_stay_whole(operator: str) -> None:
    rows = compiled(operator)
    split = {(row["kernel"], row["dtype"], row["architecture"]): row["split"] for row in rows if row["split"]}
    assert not split, split
    for row in rows:
        wide = {kind for kind, widths in row["accesses"].items() if max(widths) >= 16}
        assert wide == WIDE[operator].get(re.sub(r"\b\d{2,}\b", "N", row["kernel"]), set()), row


@pytest.mark.slow
def test_a_split_vector_store_is_seen(tmp_path: Path) -> None:
    """The store that nvcc 13.0 cuts into four in PTX, and for half types in machine code too."""
    include = tmp_path / "include"
    shutil.copytree(compile_cuda.INCLUDE, include)
    header = include / "cmaclip" / "multitask_cross_entropy.cuh"
    text = header.read_text(encoding="utf-8")
    whole = "isa::store_shared(out + i, load<kCount>(in + i));"
    assert whole in text
    header.write_text(text.replace(whole, "store(out + i, load<kCount>(in + i));"), encoding="utf-8")
    rows = compile_cuda.compile_operator("multitask_cross_entropy", include, (80,), only="forward_warps")
    found = {(row["kernel"], row["dtype"]): row["split"] for row in rows if row["split"]}
    assert found.keys() == {("forward_warps<T, true>", dtype) for dtype in compile_cuda.DTYPES}
    assert all(any(name.startswith("st.shared.") for name in split) for split in found.values())
    assert any(name.startswith("STS") for name in found["forward_warps<T, true>", "fp16"])

"""Every CUDA header compiles for sm_80, sm_90 and sm_100 without spills or stack, as ptxas reports."""

from __future__ import annotations

import pytest

from . import compile_cuda


@pytest.mark.slow
@pytest.mark.parametrize("operator", compile_cuda.INSTANCES)
def test_compiles_without_spills(operator):
    if compile_cuda.nvcc() is None:
        pytest.skip("there is no CUDA compiler (nvcc)")
    rows = compile_cuda.compile_operator(operator)
    compiled = {(row["kernel"], row["dtype"], row["architecture"]) for row in rows}
    assert compiled == {
        (instance, dtype, architecture)
        for instance, dtype in compile_cuda.named(operator).values()
        for architecture in compile_cuda.ARCHITECTURES
    }
    spilled = [row for row in rows if row["stack"] or row["spill_stores"] or row["spill_loads"]]
    assert not spilled, spilled

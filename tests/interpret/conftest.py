"""Tests of Triton kernels on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@pytest.fixture(scope="session")
def interpreted() -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=0 was asked for, so Triton kernels run on a GPU only")


@pytest.fixture
def bfloat16_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of bfloat16: the interpreter keeps it as bits in uint16, and its `tl.dot` would multiply those."""
    dot = InterpreterBuilder.create_dot

    def of_values(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, _values(a), _values(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", of_values)


def _values(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

"""Tests of Triton kernels on the CPU."""

from __future__ import annotations

import pytest
import triton


@pytest.fixture(scope="session")
def interpreted() -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET=0 was asked for, so Triton kernels run on a GPU only")

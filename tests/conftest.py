"""Shared by all tests: Triton runs in its interpreter unless asked otherwise, and nothing is left to chance."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Triton reads it when it is first imported; tests/gpu runs with TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")

import cmaclip_fast.kernels
import hypothesis
import pytest
import threadpoolctl
import torch

from cmaclip_fast import env

# tests/mutants puts changed copies of the kernels in their place.
if changed := os.environ.get("CMACLIP_TEST_KERNELS"):
    cmaclip_fast.kernels.__path__ = [changed]

hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_report_header() -> str:
    """What the numbers were computed on: results differ from one instruction set to the next, by rounding."""
    names = ("CMACLIP_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_CORETYPE")
    asked = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
    libraries = {library.get("internal_api"): library for library in threadpoolctl.threadpool_info()}
    numpy = libraries.get("openblas", {}).get("architecture", "no OpenBLAS")
    mkl = os.environ.get("MKL_ENABLE_INSTRUCTIONS", "its own choice") if torch.backends.mkl.is_available() else "none"
    return (
        f"instruction sets: extension {env.processor()['instruction_set']}, "
        f"ATen {torch.backends.cpu.get_cpu_capability()}, MKL {mkl}, NumPy's OpenBLAS {numpy}; "
        f"{torch.get_num_threads()} threads; asked for: {asked or 'nothing'}"
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Fills what `torch.empty` and its kin return with NaN, so that an element never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)

"""Shared by all tests: Triton runs in its interpreter unless asked otherwise, and nothing is left to chance."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Triton reads it when it is first imported; tests/gpu runs with TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import torch

import cmaclip_fast.kernels

# tests/mutants puts changed copies of the kernels in their place.
if changed := os.environ.get("CMACLIP_TEST_KERNELS"):
    cmaclip_fast.kernels.__path__ = [changed]

hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")


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

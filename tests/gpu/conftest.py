"""Tests that need an NVIDIA GPU: each is skipped, with the reason, where there is none."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`CMACLIP_TEST_SHARD=1/8` keeps every eighth test, from the second on: so several processes share them."""
    shard, _, shards = os.environ.get("CMACLIP_TEST_SHARD", "0/1").partition("/")
    items[:] = items[int(shard) :: int(shards)]


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no NVIDIA GPU")

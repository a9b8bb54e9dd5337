"""Tests that need an NVIDIA GPU: each is skipped, with the reason, where there is none."""

from __future__ import annotations

import json
import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`CMACLIP_TEST_SHARD=1/8` keeps every eighth test, from the second on: so several processes share them."""
    shard, _, shards = os.environ.get("CMACLIP_TEST_SHARD", "0/1").partition("/")
    items[:] = items[int(shard) :: int(shards)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(report)


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    """`CMACLIP_TEST_REPORT=FILE` gets a line of JSON for each test as it ends: a run that is cut off keeps them."""
    if path := os.environ.get("CMACLIP_TEST_REPORT"):
        if isinstance(report.longrepr, tuple):  # a skipped test's file, line and reason
            reason = report.longrepr[2].removeprefix("Skipped: ")
        else:
            reason = " ".join(line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E "))
        line = {"name": report.nodeid, "outcome": report.outcome, "reason": reason}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no NVIDIA GPU")

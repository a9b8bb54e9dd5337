"""A small model, and where a peer's package is missing, why its test is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cmaclip_fast.bench.comparison import Machine
from cmaclip_fast.bench.peers import SYSTEMS, Setting
from cmaclip_fast.bench.workloads import SMALL, make_batch, make_model
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch

MACHINE = Machine("cpu", torch.float32, torch.get_num_threads())
LENGTHS = [3, 11, 7, 20]


@pytest.fixture(scope="session")
def model() -> CMACLIP:
    """Read by the peers, never trained."""
    return make_model(SMALL, depth=2).eval()


@pytest.fixture
def batch(model: CMACLIP) -> Batch:
    return make_batch(model, LENGTHS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export serves all tests."""
    return tmp_path_factory.mktemp("exports")


def setting(model: CMACLIP, folder: Path, training: bool = False) -> Setting:
    return Setting(
        model.train(training), len(LENGTHS), training, MACHINE.threads, MACHINE.device, MACHINE.dtype, folder
    )


def skip_unless_runs(name: str, training: bool = False) -> None:
    reason = SYSTEMS[name].why_not("cpu", training)
    if reason is not None:
        pytest.skip(f"{SYSTEMS[name].title}: {reason}")

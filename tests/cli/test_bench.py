"""`cmaclip bench` on a small model: its page, and how it ends when a figure is below its floor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cmaclip_fast.bench import run
from cmaclip_fast.bench.comparison import Group, Measurement
from cmaclip_fast.bench.guard import FEWEST_ROUNDS
from cmaclip_fast.bench.plan import QUICK
from cmaclip_fast.bench.workloads import SMALL, Texts

from .conftest import Done

Run = Callable[..., Done]
NAME = f"{SMALL}, inference at batch 1, product titles"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--quick` measures one table, with as many rounds as are guarded."""
    group = Group(SMALL, 1, False, (Measurement(Texts.product, ("ours", "plain"), 0, FEWEST_ROUNDS),))
    nothing = {"batches": (), "lengths": (), "tasks": (), "classes": (), "part_seconds": 0, "loader_seconds": 0}
    monkeypatch.setattr(run, "QUICK", replace(QUICK, groups=(group,), **nothing))


def test_bench_prints_the_page(cmaclip: Run, quick: None, tmp_path: Path) -> None:
    done = cmaclip("bench", "--quick", "--output", tmp_path / "out", "--threads", 1)
    assert done.code == 0, done.err
    assert f"## {NAME}" in done.out and "| cmaclip_fast |" in done.out
    assert json.loads((tmp_path / "out" / "performance.json").read_text())["threads"] == 1


def test_bench_fails_below_a_floor_and_names_it(cmaclip: Run, quick: None, tmp_path: Path) -> None:
    floors = tmp_path / "floors.json"
    options = ("bench", "--quick", "--output", tmp_path / "out", "--floors", floors)
    floors.write_text("{}")
    assert cmaclip(*options, "--record").code == 0
    recorded = json.loads(floors.read_text())["cpu"]
    speed = f"{NAME}: speed over 'plain, padded to 77'"
    assert set(recorded) == {speed}
    floors.write_text(json.dumps({"cpu": {speed: 1e6}}))
    done = cmaclip(*options)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(f"error: {speed}: ")
    assert done.err.endswith("is below its floor 1000000.00\n")


def test_wrong_options_end_with_one_line(cmaclip: Run, tmp_path: Path) -> None:
    done = cmaclip("bench", "--only", "nothing", "--output", tmp_path)
    assert done.code == 2 and done.err == "error: --only nothing: no step has this in its name\n"

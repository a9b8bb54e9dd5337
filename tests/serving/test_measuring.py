"""What `make serving` and `make soak` run, on the tiny artefact."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> str:
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_table_of_the_service_is_written(folder: Path, tmp_path: Path) -> None:
    tables, page = tmp_path / "serving.md", tmp_path / "docs" / "serving.md"
    run("benchmarks.serving", folder, "--seconds", 0.5, "--clients", 1, "--clients", 4, "--write", tables)
    run("benchmarks.page", tables, page, "The service", "make serving")
    said = page.read_text()
    assert "Of all answers, 0 differed from those of `predict`." in " ".join(said.split())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [
        ["`predict`, batches of 32", ""],
        ["`predict`, one row", ""],
        ["service", "1"],
        ["service", "4"],
        ["service, half load", ""],
    ]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[2:])


@pytest.mark.slow
def test_a_service_under_mixed_load_loses_nothing(folder: Path) -> None:
    said = run("benchmarks.soak", folder, "--seconds", 6, "--clients", 4, "--hostile", 0.3, "--growth", 0.5)
    found = {name: int(number) for name, number in re.findall(r"([a-z ]+?) (\d+)[,;]", said)}
    found = {name.strip(): number for name, number in found.items()}
    assert found["answered"] > 10 and found["hostile"] >= 8
    assert found["wrong"] == found["lost"] == found["hostile accepted"] == 0

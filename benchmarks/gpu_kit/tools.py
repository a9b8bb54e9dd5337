"""NVIDIA's command-line tools: where they are, and what they say."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path


def find(name: str) -> str | None:
    """The tool's path: on PATH, else in the CUDA toolkit's folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(name) or shutil.which(name, path=str(Path(home, "bin")))


def output_of(command: Sequence[str]) -> str:
    """What a command prints, or "" where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def sanitizer_errors(text: str) -> int | None:
    """The number of errors in what `compute-sanitizer` said, or None where it has not come to its summary."""
    found = re.search(r"ERROR SUMMARY: (\d+) error", text) or re.search(r"RACECHECK SUMMARY: (\d+) hazard", text)
    return int(found[1]) if found else None


def ncu_launches(text: str) -> list[dict[str, str]]:
    """The launches in the CSV of `ncu --csv`: its columns and metrics by name, for either of its two layouts."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        if not row["ID"].isdigit():  # the row of units, or what the program itself says
            continue
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if "Metric Name" in row:
            launch[row["Metric Name"]] = row["Metric Value"]
        else:
            launch |= {key: value for key, value in row.items() if key and value is not None}
    return list(launches.values())


def number(text: str | None) -> float | None:
    """A number as the tools print it, or None for what is no number, such as `n/a`."""
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None

"""Floors: ratios that were reached once, below which the benchmark fails."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from cmaclip_fast.bench.results import Report
from cmaclip_fast.errors import InputError
from cmaclip_fast.files import write_json

MARGIN = 0.9
"""A floor is set at this share of what was measured, so that noise alone does not fail."""
FEWEST_ROUNDS = 3
"""A speed from fewer rounds says too little to be guarded."""


@dataclass(frozen=True)
class Figure:
    """What is guarded; more is better.

    Attributes:
        value: the median of what was measured.
        low: its 20th percentile where there is one, by which a floor is set.
    """

    value: float
    low: float


def figures(report: Report) -> dict[str, Figure]:
    """What is guarded, by name: speeds over the baseline, memory against the others', and the operators' speeds."""
    found: dict[str, Figure] = {}
    for table in report.tables:
        ours, baseline = table.row("ours"), table.row(table.baseline)
        if ours is None or baseline is None or ours.rounds < FEWEST_ROUNDS:
            continue
        found[f"{table.workload}: speed over '{baseline.title}'"] = Figure(ours.speedup.median, ours.speedup.p20)
    steps = {(memory.workload, memory.system): memory.step for memory in report.memory}
    for memory in report.memory:
        own = steps.get((memory.workload, "ours"))
        if memory.system != "ours" and own and memory.step:
            ratio = memory.step / own
            found[f"{memory.workload}: memory of '{memory.title}' over ours"] = Figure(ratio, ratio)
    for part in report.parts:
        found[f"{part.operator}, {part.what}: speed over the loop"] = Figure(part.ratio, part.ratio)
    return found


def read_floors(path: Path, device: str) -> dict[str, float]:
    """The floors of a kind of device; none where the file has none for it.

    Raises:
        InputError: the file is missing or is no such file.
    """
    try:
        floors = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): float(floor) for name, floor in floors.get(_kind(device), {}).items()}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: name another file with --floors, or leave it out") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: is no file of floors ({error}): write a new one with --record") from None


def below(report: Report, floors: dict[str, float]) -> list[str]:
    """One line for each figure that is below its floor. What was not measured is not held against its floor."""
    found = figures(report)
    return [
        f"{name}: {found[name].value:.2f} is below its floor {floor:.2f}"
        for name, floor in floors.items()
        if name in found and not found[name].value >= floor
    ]


def record(report: Report, path: Path) -> int:
    """Sets the floors of all that was measured, at `MARGIN` of it; others stay. Returns how many were set."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = figures(report)
    new = {name: math.floor(figure.low * MARGIN * 100) / 100 for name, figure in found.items()}
    kind = _kind(report.device)
    write_json(path, known | {kind: dict(sorted((known.get(kind, {}) | new).items()))})
    return len(new)


def _kind(device: str) -> str:
    return device.split(":")[0]

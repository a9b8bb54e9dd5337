"""Writes a page of what is accepted, how precise that is, and how well probabilities are calibrated: `make decisions`.

python -m benchmarks.decisions benchmarks/results/compare/decisions docs/tables/decisions.md
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import as_table

HEADINGS = (
    "task",
    "target",
    "precision of the accepted rows",
    "coverage",
    "seeds that accept any",
    "calibration error",
    "of which by chance",
    "before calibration",
)

LEEWAY = 0.02
"""By so much may the mean precision be below the target."""

MOST_ERROR = 0.05
"""The largest calibration error that is aimed at."""


def page(folder: Path) -> str:
    """A table for each data set: means and standard deviations over seeds, on the test rows."""
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    lines, missed = [], []
    for data in found["data"]:
        records = [record for record in found["records"] if record["data"] == data]
        rows = []
        for task in records[0]["decisions"]:
            said = [record["decisions"][task] for record in records]
            errors = [record["calibration"][task] for record in records]
            precisions = [one["precision"] for one in said if one["accepted"]]
            target = said[0]["target_precision"]
            error = [one["expected_calibration_error"] for one in errors]
            rows.append(
                [
                    task,
                    f"{target:g}",
                    spread(precisions),
                    spread([one["coverage"] for one in said]),
                    f"{len(precisions)} of {len(said)}",
                    spread(error),
                    spread([one["by_chance"] for one in errors]),
                    spread([one["before_calibration"] for one in errors]),
                ]
            )
            if precisions and statistics.mean(precisions) < target - LEEWAY:
                missed.append(f"{data}, {task}: precision {statistics.mean(precisions):.3f}, target {target:g}")
            if statistics.mean(error) > MOST_ERROR:
                missed.append(f"{data}, {task}: calibration error {statistics.mean(error):.3f}, over {MOST_ERROR:g}")
        lines += [f"## {data}", "", as_table(HEADINGS, rows), ""]
    made = ", ".join(f"{name} {version}" for name, version in records[0]["versions"].items())
    verdict = "All goals are reached." if not missed else "Not reached: " + "; ".join(missed) + "."
    head = [
        "# Decisions on the test rows",
        "",
        f"Written by `make decisions`: the quick setting of `cmaclip compare`, {len(records)} seeds, mean ± standard",
        "deviation. Thresholds and calibration are chosen on the validation rows ([decisions](../decisions.md)).",
        f"Goals: mean precision at most {100 * LEEWAY:g} points below the target, calibration error at most "
        f"{MOST_ERROR:g}.",
        verdict,
        "",
        f"{platform.machine()}, {records[0]['threads']} threads a run; {made}; {datetime.date.today()}.",
        "",
    ]
    return "\n".join(head + lines)


def spread(values: Sequence[Any]) -> str:
    """Mean and standard deviation; a dash without values."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(page(Path(sys.argv[1])), encoding="utf-8")

"""Writes a page of what class weights, logit adjustment and balanced sampling do: `make imbalance`.

python -m benchmarks.imbalance benchmarks/results/compare/imbalance docs/tables/imbalance.md
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


def page(folder: Path) -> str:
    """A table for each data set: accuracy and macro-F1 of each task, mean and standard deviation over seeds."""
    settings = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/comparison.json"))}
    lines = [
        "# Classes of unequal size",
        "",
        "Written by `make imbalance`: the quick setting of `cmaclip compare`.",
        "",
    ]
    for data in next(iter(settings.values()))["data"]:
        records = {
            name: [record for record in found["records"] if record["data"] == data] for name, found in settings.items()
        }
        tasks = list(next(iter(records.values()))[0]["test"]["both"])
        columns = [f"{task}, {title}" for task in tasks for title in METRICS.values()]
        lines += [f"## {data}", "", "| setting | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
        for name, runs in records.items():
            cells = []
            for task in tasks:
                for metric in METRICS:
                    values = [run["test"]["both"][task][metric] for run in runs]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(page(Path(sys.argv[1])), encoding="utf-8")

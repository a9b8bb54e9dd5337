"""What commands print, and the tables of metrics."""

from __future__ import annotations

from typing import Any

from rich.table import Table as RichTable

from cmaclip_fast.errors import clipped
from cmaclip_fast.progress import Console

out = Console()

err = Console(stderr=True)

SHOWN_GROUPS = 100
"""The most values of the column of `evaluate --by` that are printed; --json has all of them."""


def metrics_table(metrics: dict[str, dict[str, dict[str, float]]], precision: float) -> RichTable:
    """Per task and view or baseline: accuracy, macro-F1, recall at a precision; of multi-label tasks two more."""
    first = next(iter(metrics.values()))
    names = {
        "accuracy": "accuracy",
        "macro_f1": "macro F1",
        "recall_at_precision": f"recall at {precision:.0%} precision",
    }
    if any("mean_average_precision" in m for m in first.values()):
        names |= {"micro_f1": "micro F1", "mean_average_precision": "mean average precision"}
    table = RichTable("task", "given", *names.values(), "rows", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for task in first:
        for view, tasks in metrics.items():
            if task not in tasks:  # a baseline need not cover all
                continue
            m = tasks[task]
            numbers = [f"{m[k]:.3f}" if k in m else "-" for k in names]
            table.add_row(clipped(task), view, *numbers, f"{m['rows']:.0f}", style="bold" if view == "both" else None)
    return table


def decisions_table(decisions: dict[str, dict[str, Any]], errors: dict[str, dict[str, float]]) -> RichTable:
    """Per task with thresholds: how much is accepted, how precise that is, and the calibration error."""
    table = RichTable(
        "task", "target", "accepted", "coverage", "precision", "calibration error", "by chance", "promise", box=None
    )
    for column in table.columns[1:7]:
        column.justify = "right"
    for task, found in decisions.items():
        shares = [f"{found[name]:.3f}" for name in ("coverage", "precision")]
        accepted = f"{found['accepted']:,} of {found['rows']:,}"
        table.add_row(
            clipped(task),
            f"{found['target_precision']:g}",
            accepted,
            *(share.replace("nan", "-") for share in shares),
            *(f"{errors[task][name]:.3f}".replace("nan", "-") for name in ("expected_calibration_error", "by_chance")),
            found["verdict"],
        )
    return table


def absence_table(found: dict[str, dict[str, float]]) -> RichTable:
    """Per task that may not apply: precision and recall of that it does not, and the rows it does not apply to."""
    table = RichTable("not applicable", "precision", "recall", "rows", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for task, m in found.items():
        shares = [f"{m[name]:.3f}".replace("nan", "-") for name in ("precision", "recall")]
        table.add_row(clipped(task), *shares, f"{m['rows']:.0f}")
    return table


def hierarchies_table(hierarchies: dict[str, dict[str, dict[str, float]]]) -> RichTable:
    """Per taxonomy: hierarchical precision, recall and F1, of whole paths and of their accepted parts."""
    table = RichTable("taxonomy", "paths", "hierarchical precision", "recall", "F1", "rows", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, kinds in hierarchies.items():
        for kind, m in kinds.items():
            shares = [f"{m[key]:.3f}".replace("nan", "-") for key in ("precision", "recall", "f1")]
            table.add_row(clipped(name), kind, *shares, f"{m['rows']:.0f}")
    return table


def groups_table(groups: dict[str, dict[str, dict[str, dict[str, float]]]], column: str) -> RichTable:
    """Each task's accuracy with both modalities, for each value of a column: the values with the most rows."""
    tasks = list(next(iter(groups.values()))["both"])
    table = RichTable(clipped(column), *(f"{clipped(task)} accuracy" for task in tasks), "rows", box=None)
    for number in table.columns[1:]:
        number.justify = "right"

    def rows(value: str) -> float:
        return max(m["rows"] for m in groups[value]["both"].values())

    largest = set(sorted(groups, key=rows, reverse=True)[:SHOWN_GROUPS])
    for value in (value for value in groups if value in largest):
        measured = groups[value]["both"]
        numbers = [f"{measured[task]['accuracy']:.3f}" if measured[task]["rows"] else "-" for task in tasks]
        table.add_row(clipped(value), *numbers, f"{rows(value):.0f}")
    if len(groups) > len(largest):
        table.caption = f"the {len(largest)} values of {len(groups):,} with the most rows; --json has them all"
    return table

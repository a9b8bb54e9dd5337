"""The page of a comparison: its tables in Markdown, all numbers in JSON, its curves as pictures."""

from __future__ import annotations

import math
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import ttest_ind

from cmaclip_fast.errors import one_line
from cmaclip_fast.files import replacing, write_json, write_text
from cmaclip_fast.pages.comparison_pictures import save_figure

PAGE, NUMBERS = "comparison.md", "comparison.json"
SIGNIFICANT = 0.05
VALIDATION = "average, validation"
METRICS = {"accuracy": "Accuracy", "macro_f1": "Macro-F1", "recall_at_precision": "Recall"}

Record = dict[str, Any]


def write_page(records: Sequence[Record], output: Path, command: str, target_precision: float = 0.9) -> Path:
    """Writes `comparison.md`, `comparison.json` and the pictures that the page shows into `output`.

    Args:
        records: what `compare` gives; the first system is the one that the others are tested against.
        command: what makes the page again.

    Returns:
        The page.
    """
    lines = ["# Systems compared", "", f"`{_shown(command)}`", ""]
    numbers: dict[str, Any] = {"command": command, "target_precision": target_precision, "data": {}}
    for data in _unique(r["data"] for r in records):
        part = [r for r in records if r["data"] == data]
        seeds = _unique(r["seed"] for r in part)
        lines += [f"## {_shown(data)}", "", _setting(part[0], seeds), ""]
        numbers["data"][data] = {}
        for metric, title in METRICS.items():
            if metric == "recall_at_precision":
                title = f"Recall at {target_precision:.0%} precision"
            table = summary(part, metric)
            simple = baseline_summary(part, metric)
            numbers["data"][data][metric] = {**table, **simple}
            lines += [f"### {title}", "", *_table(table, simple), ""]
        values = by_value(part)
        if values:
            numbers["data"][data]["by"] = values
            lines += ["### Accuracy by value", "", *_by_table(values), ""]
        if any(r.get("tried") for r in part):
            numbers["data"][data]["tried"] = tried = {s: runs[0]["tried"] for s, runs in _by_system(part)}
            lines += [
                "### What was tried",
                "",
                *_tried_table(tried, {s: r[0]["chosen"] for s, r in _by_system(part)}),
                "",
            ]
        ablated = [s for s in _unique(r["system"] for r in part) if s.startswith("cma-clip")]
        if len(ablated) > 1 and ablated[0] == "cma-clip":
            ablations = _ablations(part, ablated)
            numbers["data"][data]["ablations"] = ablations
            lines += ["### What each attention gives", "", *_ablation_table(ablations), ""]
        numbers["data"][data]["cost"] = costs(part)
        lines += ["### Cost", "", *_cost_table(numbers["data"][data]["cost"]), ""]
        weights = _weights(part)
        if weights:
            numbers["data"][data]["weights"] = weights
            lines += ["### Modality weights", "", *_weight_table(weights), ""]
        name = re.sub(r"[^A-Za-z0-9]+", "-", data).strip("-") or "data"
        curves = robustness(part)
        numbers["data"][data]["robustness"] = curves
        if curves:
            lines += ["### Robustness", "", *_loss_table(curves), ""]
            _draw_accuracy(curves, output / f"robustness-{name}.png")
            lines += [f"![Accuracy against damage of the test rows](robustness-{name}.png)", ""]
            if _draw_weights(curves, output / f"weights-{name}.png"):
                lines += [f"![The text's weight against damage of the test rows](weights-{name}.png)", ""]
        maps = {r["system"]: r["attention"] for r in part if r["attention"] and (output / r["attention"]).is_file()}
        if maps:
            lines += ["### Where the title's most relevant token looks", ""]
        for system, kept in maps.items():
            picture = Path("attention", name, f"{system}.png")
            (output / picture).parent.mkdir(parents=True, exist_ok=True)
            with replacing(output / picture) as temporary:
                shutil.copyfile(output / kept, temporary)
            lines += [f"{system}:", "", f"![Attention over the patches]({picture.as_posix()})", ""]
    # the curves are above, as means
    numbers["records"] = [{key: value for key, value in r.items() if key != "noise"} for r in records]
    write_json(output / NUMBERS, numbers)
    path = output / PAGE
    write_text(path, "\n".join(lines).rstrip() + "\n")
    return path


def summary(records: Sequence[Record], metric: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """For each system and task, and `average` over tasks: mean, deviation over seeds, and the p-value of Welch's test
    against the first system; None where there are too few seeds. Accuracy has the validation rows' average too."""
    systems = _unique(r["system"] for r in records)
    columns = [*_tasks(records), "average", *([VALIDATION] if metric == "accuracy" else [])]
    values = {s: {c: [_value(r, c, metric) for r in records if r["system"] == s] for c in columns} for s in systems}
    return {
        system: {
            column: {
                "mean": float(np.mean(values[system][column])),
                "deviation": _deviation(values[system][column]),
                "p": None if system == systems[0] else welch(values[system][column], values[systems[0]][column]),
            }
            for column in columns
        }
        for system in systems
    }


def baseline_summary(records: Sequence[Record], metric: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """For each baseline what `summary` gives for a system; a task that it does not cover is None."""
    first = [r for r in records if r["system"] == records[0]["system"]]
    tasks = _tasks(records)
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in _unique(name for r in first for name in r["baselines"]):
        means = {
            task: None
            if any(task not in r["baselines"][name] for r in first)
            else float(np.mean([r["baselines"][name][task][metric] for r in first]))
            for task in tasks
        }
        known = [mean for mean in means.values() if mean is not None]
        means["average"] = float(np.mean(known)) if len(known) == len(tasks) else None
        found[name] = {column: {"mean": mean, "deviation": None, "p": None} for column, mean in means.items()}
    return found


def welch(one: Sequence[float], other: Sequence[float]) -> float | None:
    """The p-value of Welch's t-test; None for fewer than two values a side, or values without any deviation."""
    if len(one) < 2 or len(other) < 2 or (np.ptp(one) == 0 and np.ptp(other) == 0):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one side alone may have no deviation
        p = float(ttest_ind(one, other, equal_var=False).pvalue)
    return p if math.isfinite(p) else None


def costs(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """For each system its parameters, those beside the towers, operations of one pair, and seconds of training."""
    return {
        system: {
            "parameters": part[0]["parameters"]["all"],
            "beside towers": part[0]["parameters"]["all"] - part[0]["parameters"]["towers"],
            "flops": part[0]["flops"],
            "seconds": float(np.mean([r["seconds"] for r in part])),
        }
        for system, part in _by_system(records)
    }


def robustness(records: Sequence[Record]) -> dict[str, dict[str, dict[str, list[Any]]]]:
    """For each kind of damage and system: levels, the tasks' average accuracy at each, its deviation over seeds, and
    for each task the text's weight (None for a system without weights)."""
    curves: dict[str, dict[str, dict[str, list[Any]]]] = {}
    for system, part in _by_system(records):
        for kind in part[0]["noise"]:
            lines = np.array([[_average(point) for point in r["noise"][kind]] for r in part])
            points = part[0]["noise"][kind]
            weights = None
            if points[0]["text_weight"] is not None:
                weights = {
                    task: np.mean([[p["text_weight"][task] for p in r["noise"][kind]] for r in part], axis=0).tolist()
                    for task in points[0]["text_weight"]
                }
            curves.setdefault(kind, {})[system] = {
                "levels": [point["level"] for point in points],
                "accuracy": lines.mean(0).tolist(),
                "deviation": (lines.std(0, ddof=1) if len(lines) > 1 else np.zeros(lines.shape[1])).tolist(),
                "text_weight": weights,  # type: ignore[dict-item]
            }
    return curves


def by_value(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """For each value of the column that was measured by, each system's accuracy, the mean over tasks and seeds."""
    values = _unique(value for r in records for value in r["by"] or ())
    return {
        value: {
            system: float(np.mean([np.mean([m["accuracy"] for m in r["by"][value].values()]) for r in part]))
            for system, part in _by_system(records)
        }
        for value in values
        if all(r["by"].get(value) for r in records)
    }


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _by_system(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    return [(s, [r for r in records if r["system"] == s]) for s in _unique(r["system"] for r in records)]


def _tasks(records: Sequence[Record]) -> list[str]:
    return [task for task, m in records[0]["test"]["both"].items() if m["rows"]]


def _value(record: Record, column: str, metric: str) -> float:
    if column == VALIDATION:
        return float(record["validation"])
    tasks = record["test"]["both"]
    if column != "average":
        return float(tasks[column][metric])
    return float(np.mean([m[metric] for m in tasks.values() if m["rows"]]))


def _average(point: dict[str, Any]) -> float:
    return float(np.mean([m["accuracy"] for m in point["tasks"].values()]))


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _setting(record: Record, seeds: list[int]) -> str:
    made = record["versions"]
    rows = max(m["rows"] for m in record["test"]["both"].values())
    return (
        f"{rows:.0f} test rows; {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}; means"
        f"{' and deviations over seeds' if len(seeds) > 1 else ''}. Bold is the best of a column; * differs from the "
        f"first system at p < {SIGNIFICANT} (Welch's t-test). cmaclip_fast {made['cmaclip_fast']}, torch "
        f"{made['torch']}, {record['threads']} threads."
    )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(_shown(cell).replace('|', '&#124;') for cell in cells)} |"


def _shown(name: str) -> str:
    """A name from outside as Markdown shows it: in one line, and no tag."""
    return one_line(name).replace("<", "&lt;")


def _table(
    table: dict[str, dict[str, dict[str, float | None]]],
    baselines: dict[str, dict[str, dict[str, float | None]]],
) -> list[str]:
    columns = list(next(iter(table.values())))
    best = {c: max(row[c]["mean"] or 0.0 for row in table.values()) for c in columns}
    lines = [_row(["system", *columns]), _row(["---"] * (len(columns) + 1))]
    for system, row in table.items():
        cells = []
        for column in columns:
            cell, mean = row[column], row[column]["mean"] or 0.0
            text = f"{100 * mean:.1f}"
            text = f"**{text}**" if mean == best[column] > 0 else text
            text += "" if cell["deviation"] is None else f" ± {100 * cell['deviation']:.1f}"
            cells.append(text + ("*" if cell["p"] is not None and cell["p"] < SIGNIFICANT else ""))
        lines.append(_row([system, *cells]))
    for name, row in baselines.items():
        means = [row[column]["mean"] if column in row else None for column in columns]
        lines.append(_row([f"baseline: {name}", *("" if mean is None else f"{100 * mean:.1f}" for mean in means)]))
    return lines


def _by_table(values: dict[str, dict[str, float]]) -> list[str]:
    systems = list(next(iter(values.values())))
    rows = {**values, "mean": {s: float(np.mean([row[s] for row in values.values()])) for s in systems}}
    lines = ["The mean over tasks and seeds.", "", _row(["value", *systems]), _row(["---"] * (len(systems) + 1))]
    for value, row in rows.items():
        best = max(row.values())
        cells = [f"**{100 * x:.1f}**" if x == best else f"{100 * x:.1f}" for x in row.values()]
        lines.append(_row([value, *cells]))
    return lines


def _tried_table(tried: dict[str, dict[str, float]], chosen: dict[str, str]) -> list[str]:
    names = _unique(name for found in tried.values() for name in found)
    lines = ["Average accuracy on the validation rows with the first seed. Bold is what was taken for all seeds.", ""]
    lines += [_row(["system", *(f"`{name}`" for name in names)]), _row(["---"] * (len(names) + 1))]
    for system, found in tried.items():
        cells = [f"{100 * found[name]:.1f}" if name in found else "" for name in names]
        cells = [f"**{cell}**" if name == chosen[system] else cell for name, cell in zip(names, cells, strict=True)]
        lines.append(_row([system, *cells]))
    return lines


def _ablations(records: Sequence[Record], systems: list[str]) -> dict[str, dict[str, float | None]]:
    """Each ablation's averages, and what they lose."""
    full, result = systems[0], {}
    for system in systems:
        row: dict[str, float | None] = {}
        for metric in METRICS:
            here, there = ([_value(r, "average", metric) for r in records if r["system"] == s] for s in (system, full))
            row[metric] = float(np.mean(here))
            row[f"{metric} lost"] = float(np.mean(there) - np.mean(here))
            row[f"{metric} p"] = None if system == full else welch(here, there)
        result[system] = row
    return result


def _ablation_table(rows: dict[str, dict[str, float | None]]) -> list[str]:
    lines = [_row(["system", *(f"{title}, average" for title in METRICS.values())]), _row(["---"] * 4)]
    for number, (system, row) in enumerate(rows.items()):
        cells = []
        for metric in METRICS:
            p = row[f"{metric} p"]
            change = "" if number == 0 else f" ({-100 * (row[f'{metric} lost'] or 0.0):+.1f})"
            cells.append(f"{100 * (row[metric] or 0.0):.1f}{change}{'*' if p is not None and p < SIGNIFICANT else ''}")
        lines.append(_row([system, *cells]))
    return lines


def _cost_table(table: dict[str, dict[str, float]]) -> list[str]:
    lines = [
        _row(["system", "parameters (M)", "beside the towers (M)", "MFLOP a pair", "training (s)"]),
        _row(["---"] * 5),
    ]
    for system, cost in table.items():
        cells = [f"{cost['parameters'] / 1e6:.2f}", f"{cost['beside towers'] / 1e6:.3f}", f"{cost['flops'] / 1e6:.1f}"]
        lines.append(_row([system, *cells, f"{cost['seconds']:.0f}"]))
    return lines


def _weights(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """For each system with modality weights the text's mean weight in each task, over rows that have both."""
    result = {}
    for system, part in _by_system(records):
        found = [r["weights"] for r in part if r["weights"]]
        if found:
            result[system] = {task: float(np.mean([w[task]["text"] for w in found])) for task in found[0]}
    return result


def _weight_table(weights: dict[str, dict[str, float]]) -> list[str]:
    tasks = list(next(iter(weights.values())))
    lines = ["The text's weight; the image's is the rest.", "", _row(["system", *tasks])]
    lines.append(_row(["---"] * (len(tasks) + 1)))
    return lines + [_row([system, *(f"{row[task]:.2f}" for task in tasks)]) for system, row in weights.items()]


def _loss_table(curves: dict[str, dict[str, dict[str, list[Any]]]]) -> list[str]:
    """Points of average accuracy lost at a middle level of each kind."""
    lines = [
        "Points of average accuracy lost, with the level of damage in brackets: a share of rows, or a strength.",
        "",
    ]
    first = next(iter(curves.values()))
    middle = {kind: len(next(iter(s.values()))["levels"]) // 2 for kind, s in curves.items()}
    heads = [f"{kind} ({next(iter(s.values()))['levels'][middle[kind]]:g})" for kind, s in curves.items()]
    lines += [_row(["system", *heads]), _row(["---"] * (len(heads) + 1))]
    for system in first:
        lost = [
            s[system]["accuracy"][0] - s[system]["accuracy"][middle[kind]] for kind, s in curves.items() if system in s
        ]
        lines.append(_row([system, *(f"{100 * value:.1f}" for value in lost)]))
    return lines


def _draw_accuracy(curves: dict[str, dict[str, dict[str, list[Any]]]], path: Path) -> None:
    figure, axes = _panels(list(curves))
    systems = _unique(system for lines in curves.values() for system in lines)
    for axis, lines in zip(axes, curves.values(), strict=True):
        for number, system in enumerate(systems):
            line = lines[system]
            style = {"color": _colour(number), "linestyle": "-" if number % 2 == 0 else "--", "label": system}
            axis.errorbar(line["levels"], line["accuracy"], line["deviation"], elinewidth=0.6, **style)
        axis.set_ylabel("average accuracy")
    _save(figure, axes[0], path)


def _draw_weights(curves: dict[str, dict[str, dict[str, list[Any]]]], path: Path) -> bool:
    """The first system with weights; False if there is none."""
    systems = [s for s, line in next(iter(curves.values())).items() if line["text_weight"] is not None]
    if not systems:
        return False
    figure, axes = _panels(list(curves))
    for axis, lines in zip(axes, curves.values(), strict=True):
        line = lines[systems[0]]
        for number, (task, weights) in enumerate(line["text_weight"].items()):  # type: ignore[attr-defined]
            axis.plot(line["levels"], weights, color=_colour(number), marker=".", label=f" {one_line(task)}")
        axis.set_ylim(-0.02, 1.02)
        axis.set_ylabel(f"the text's weight in {systems[0]}")
    _save(figure, axes[0], path)
    return True


def _panels(kinds: list[str]) -> tuple[Figure, list[Axes]]:
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 1.0), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in axes[len(kinds) :]:
        axis.set_axis_off()
    for axis, kind in zip(axes, kinds, strict=False):
        axis.set_title(kind, fontsize=10)
        axis.set_xlabel("strength" if kind in ("image-blur", "image-noise") else "share of rows")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[: len(kinds)]


def _colour(number: int) -> Any:
    return colormaps["tab20"](number % 20)


def _save(figure: Figure, first: Axes, path: Path) -> None:
    handles, labels = first.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar in a name is a dollar
    save_figure(figure, path)

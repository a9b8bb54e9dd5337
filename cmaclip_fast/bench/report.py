"""A run of the benchmark as a page of Markdown, a JSON file and a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

from cmaclip_fast.bench.peers import SYSTEMS
from cmaclip_fast.bench.results import Curve, Memory, Part, Pipeline, Report, Steps, Table
from cmaclip_fast.bench.timing import Spread
from cmaclip_fast.files import replacing, write_json, write_text

PAGE, NUMBERS, PICTURE = "performance.md", "performance.json", "performance.png"
MEBI = 2**20


def write_report(report: Report, folder: Path) -> None:
    """Writes the three files; the page shows the picture."""
    write_json(folder / NUMBERS, asdict(report))
    with replacing(folder / PICTURE) as temporary:
        draw(report).savefig(temporary, format="png", dpi=110)
    write_text(folder / PAGE, markdown(report))


def markdown(report: Report) -> str:
    """The page: machine, one table a workload, memory, operators, scale, input pipeline."""
    parts = [machine(report), f"![Speed against the plain implementation, and how cost grows]({PICTURE})"]
    parts += [table(one) for one in report.tables]
    if report.steps is not None:
        parts.append(gains(report.steps))
    if report.memory:
        parts.append(memory(report.memory))
    if report.parts:
        parts.append(operators(report.parts))
    if report.curves:
        parts.append("## How cost grows\n\n" + "\n\n".join(curve(one) for one in report.curves))
    if report.pipeline is not None:
        parts.append(pipeline(report.pipeline))
    return "\n\n".join(parts) + "\n"


def rows(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    marks = ["---", *["--:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, marks, *lines))


def machine(report: Report) -> str:
    about = report.machine
    gpus = ", ".join(gpu["name"] for gpu in about.get("gpus", []))
    processor, load = about.get("processor", {}), about.get("load", {})
    packages = ", ".join(f"{name} {number}" for name, number in about.get("packages", {}).items() if number)
    lines = [
        f"{report.date}, {gpus if report.device.startswith('cuda') else processor.get('name', '')}"
        f" ({processor.get('cores')} cores, {about.get('instructions')}), {report.threads} threads, {report.dtype}.",
        f"Python {about.get('python')}, {packages}.",
    ]
    if load.get("before") is not None:
        lines.append(
            f"Load before the run {load['before']:.2f}, after it {load['after']:.2f}: what is above 0 before was other"
            " work, which disturbs the times."
        )
    if report.quick:
        lines.append("A quick run: few rounds, few systems.")
    return "\n".join(lines)


def spread(value: Spread, digits: int) -> str:
    return f"{value.median:.{digits}f} ({value.p20:.{digits}f} to {value.p80:.{digits}f})"


def milliseconds(value: Spread) -> str:
    return spread(value, 0 if value.median >= 1000 else 1 if value.median >= 10 else 3)


def table(one: Table) -> str:
    against = SYSTEMS[one.baseline].title
    lines = [
        [
            row.title,
            spread(row.speedup, 2),
            milliseconds(row.milliseconds),
            f"{row.pairs_per_second:.2f}",
            f"{row.useful_gflops:.1f}",
            f"{row.limit_share:.2f}",
            str(row.rounds),
        ]
        for row in one.rows
    ]
    lines += [[f"{title} ({reason})", *[""] * 6] for title, reason in one.not_run.items()]
    padded = ", ".join(f"{count:.2f} padded to {length}" for length, count in one.padded_gflop.items())
    text = [
        f"## {one.workload}",
        f"Texts of {one.mean_length:.1f} tokens on average. A pair needs {one.useful_gflop:.2f} GFLOP; {padded}."
        f" The machine multiplies matrices at {one.limit_gflops:.0f} GFLOP/s.",
        rows(
            (
                "system",
                f"speed over '{against}'",
                "ms",
                "pairs/s",
                "useful GFLOP/s",
                "of the limit",
                "rounds",
            ),
            lines,
        ),
    ]
    prepared = [f"{row.title}: {what} {seconds:.1f} s" for row in one.rows for what, seconds in row.prepared.items()]
    if prepared:
        text.append("Once before: " + "; ".join(prepared) + ".")
    shown = {row.title for row in one.rows} | set(one.not_run)
    able = [system.title for system in SYSTEMS.values() if system.trains or not one.training]
    missing = [title for title in able if title not in shown]
    if missing:
        text.append("Left out of this table, for the time that it takes: " + ", ".join(missing) + ".")
    return "\n\n".join(text)


def gains(found: Steps) -> str:
    first, *others = found.steps
    lines = [[first.name, f"{first.gflop:.2f}", "", "", spread(first.speedup, 2)]]
    lines += [
        [one.name, f"{one.gflop:.2f}", f"{one.predicted:.2f}", f"{one.gained:.2f}", spread(one.speedup, 2)]
        for one in others
    ]
    headings = ("step", "GFLOP a pair", "gain, predicted", "gain, measured", "speed over the plain one")
    return "\n\n".join(
        [
            "## What each step gains",
            f"{found.workload}; each step does one thing more than the one above. Predicted is the ratio of"
            " operations.",
            rows(headings, lines),
        ]
    )


def mebibytes(size: float | None) -> str:
    return "not measured" if size is None else f"{size / MEBI:.0f}"


def memory(found: Sequence[Memory]) -> str:
    blocks = ["## Memory of a training step"]
    for workload in dict.fromkeys(one.workload for one in found):
        own = [one for one in found if one.workload == workload]
        plain = next((one.step for one in own if one.system == "plain"), None)
        lines = [
            [
                one.title,
                mebibytes(one.step),
                "" if not plain or one.step is None else f"{one.step / plain:.2f}",
                mebibytes(one.forward_backward),
                mebibytes(None if one.forward_backward is None else one.forward_backward / one.batch),
                mebibytes(one.gradients),
                mebibytes(one.state),
            ]
            for one in own
        ]
        headings = (
            "system",
            "step, MiB",
            "of the plain one's",
            "forward and backward, MiB",
            "of it a pair, MiB",
            "gradients, MiB",
            "before the step, MiB",
        )
        blocks += [workload + ":", rows(headings, lines)]
    return "\n\n".join(blocks)


def operators(parts: Sequence[Part]) -> str:
    lines = [
        [one.operator, one.what, f"{one.ratio:.2f}", milliseconds(one.ours), milliseconds(one.loop)] for one in parts
    ]
    headings = ("operator", "", "speed over the loop", "ms", "loop of modules, ms")
    return "## Operators of many tasks\n\n" + rows(headings, lines)


def curve(one: Curve) -> str:
    """Milliseconds a pair at each value."""
    systems = list(one.milliseconds)
    lines = [
        [f"{value:,}", *(f"{one.milliseconds[name][i] / one.batch[i]:.3f}" for name in systems)]
        for i, value in enumerate(one.values)
    ]
    exponents = ", ".join(f"{name} {slope:.2f}" for name, slope in one.exponent.items())
    return "\n\n".join(
        [
            f"### {one.axis}: {one.title}",
            rows((one.axis, *(f"{name}, ms a pair" for name in systems)), lines),
            f"Exponent of a batch's time over the two largest values (1 is linear): {exponents}.",
        ]
    )


def pipeline(one: Pipeline) -> str:
    lines = [[name, f"{rate:.1f}", str(one.processes[name])] for name, rate in one.model.items()]
    return "\n\n".join(
        [
            "## Input pipeline",
            f"One loader process reads, decodes, resizes and normalises {one.loader:.0f} pictures a second.",
            rows(("model", "pairs/s", "loader processes to keep it busy"), lines),
            f"Assumed: {one.assumed}.",
        ]
    )


def draw(report: Report) -> Figure:
    """Speed of every system at every workload above, the curves below."""
    figure = Figure(figsize=(13, 9), layout="constrained")
    grid = figure.add_gridspec(2, max(1, len(report.curves)), height_ratios=(3, 2))
    bars(figure.add_subplot(grid[0, :]), report.tables)
    for column, one in enumerate(report.curves):
        lines(figure.add_subplot(grid[1, column]), one)
    return figure


def bars(axes: Axes, tables: Sequence[Table]) -> None:
    names = [name for name in SYSTEMS if any(one.row(name) for one in tables)]
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        found = [(place, row) for place, one in enumerate(tables) if (row := one.row(name))]
        places = [place + (index - (len(names) - 1) / 2) * width for place, _ in found]
        heights = [row.speedup.median for _, row in found]
        below = [max(row.speedup.median - row.speedup.p20, 0) for _, row in found]
        above = [max(row.speedup.p80 - row.speedup.median, 0) for _, row in found]
        colour = "black" if name == "ours" else f"C{index}"
        errors: dict[str, Any] = {"yerr": (below, above), "error_kw": {"elinewidth": 0.8, "ecolor": "grey"}}
        axes.bar(places, heights, width, label=SYSTEMS[name].title, color=colour, **errors)
    axes.axhline(1, color="grey", linewidth=0.8)
    labels = [one.workload.replace(", ", "\n") for one in tables]
    axes.set_xticks(range(len(tables)), labels, fontsize=7)
    axes.set_ylabel("speed over the plain implementation")
    if names:
        axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16))


def lines(axes: Axes, one: Curve) -> None:
    for index, (name, taken) in enumerate(one.milliseconds.items()):
        costs = [time / pairs for time, pairs in zip(taken, one.batch, strict=True)]
        axes.plot(one.values, costs, marker="o", label=name, color="black" if index == 0 else f"C{index}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(one.values, [f"{value:,}" for value in one.values], fontsize=7)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(one.axis)
    axes.set_ylabel("ms a pair")
    axes.set_title(textwrap.fill(one.title, 36), fontsize=8)
    axes.legend(fontsize=7)

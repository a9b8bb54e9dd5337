"""Draws the layers of the package, from its own import rules: `python -m benchmarks.layers docs/architecture.svg`."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {
    "cli": "reads arguments, prints",
    "serving": "HTTP service and its page",
    "bench": "times the model against its peers",
    "training": "table → artifact; comparison of systems",
    "classifier": "Classifier, engine, artifact, bulk prediction",
    "pages": "reports as HTML and Markdown",
    "evaluation": "metrics, views, cost",
    "systems": "nn.Modules: Batch → Output, one file each",
    "nn": "packed layers, towers, heads, drop-in",
    "data": "tables → Batches",
    "env": "what this machine can run",
    "ops": "one file an operator: contract, dispatch, reference",
    "kernels": "Triton",
    "progress": "console",
    "working": "unfinished runs, locks",
    "files": "atomic writing",
    "untrusted": "reading files from outside",
    "signals": "Ctrl-C, SIGTERM",
    "types": "Batch, Output",
    "errors": "InputError",
}


def layers() -> list[list[str]]:
    """The layers of the import contract, the highest first; modules of one layer do not import each other."""
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    rows = [row.split(" | ") for row in rules["contracts"][0]["layers"]]
    return [[name.strip("()") for name in row] for row in rows if row != ["_build"]]


def draw(path: Path) -> None:
    rows = layers()
    rcParams["svg.hashsalt"] = "layers"  # the same file at each run
    figure = Figure(figsize=(8, 0.52 * len(rows)), layout="tight")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-0.03, 1)
    axes.set_ylim(-len(rows), 0.1)
    for level, row in enumerate(rows):
        width = 1 / len(row)
        for place, name in enumerate(row):
            corner = (place * width + 0.005, -level - 0.9)
            axes.add_patch(
                FancyBboxPatch(corner, width - 0.01, 0.72, boxstyle="round,pad=0,rounding_size=0.02", fc="#eef3f8")
            )
            words = f"$\\bf{{{name}}}$   {ABOUT[name]}"
            axes.text(corner[0] + width / 2 - 0.005, corner[1] + 0.36, words, ha="center", va="center", fontsize=8)
    axes.annotate("", (-0.02, -len(rows) + 0.1), (-0.02, -0.1), arrowprops={"arrowstyle": "->", "color": "#555"})
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))

"""Trains `tiny` on the embedded data for some seeds, explains a few test rows, and prints what it reached.

    python -m benchmarks.accuracy --seeds 0 --seeds 1 --runs runs --write docs/results.md

A seed whose folder is there already is not trained again; a run that was interrupted goes on.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import textwrap
from pathlib import Path
from typing import Annotated, Any

import pandas
import torch
import typer
from rich.markdown import Markdown
from rich.table import Table

from benchmarks.page import as_table, insert
from cmaclip_fast.classifier.artifact import METRICS, load_model, versions
from cmaclip_fast.classifier.classifier import Classifier
from cmaclip_fast.classifier.explanation import explain
from cmaclip_fast.data import read_table
from cmaclip_fast.evaluation.promise import Promise, sentences
from cmaclip_fast.pages.explanation import render_explanation
from cmaclip_fast.progress import Console
from cmaclip_fast.training.run import CHECKPOINT, TrainingRun, train
from cmaclip_fast.working import partial_directory

TARGETS = {"category": 0.50, "subcategory": 0.40, "color": 0.85}
BASELINE = {"category": (0.436, 0.482, 0.559), "subcategory": (0.356, 0.328, 0.473), "color": (0.479, 0.750, 0.793)}
"""The data card's logistic regression: TF-IDF of the title, features of a pretrained network, both."""
EXPLAINED = (0, 1, 2, 3, 4, 5)

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "clipart" / "rows.csv"

console = Console()


def main(
    seeds: Annotated[list[int], typer.Option(help="Seeds to train.")],
    runs: Annotated[Path, typer.Option(help="Folder of the artefacts.")] = Path("runs"),
    write: Annotated[Path | None, typer.Option(help="Also put the results between the marks of this page.")] = None,
) -> None:
    records = [record(runs / f"openclipart-{seed}", seed) for seed in seeds]
    console.print(summary(records, seeds))
    for seed in seeds:
        folder = runs / f"openclipart-{seed}"
        console.print(f"seed {seed}: report {folder / 'report.html'}", soft_wrap=True, highlight=False)
        console.print(
            f"seed {seed}: a few test rows explained {folder / 'explain.html'}", soft_wrap=True, highlight=False
        )
    predicted = example(runs / f"openclipart-{seeds[0]}")
    console.print(f"{EXAMPLE.relative_to(ROOT)}, seed {seeds[0]}:", highlight=False)
    console.print(Markdown(predicted))
    for seed, of_seed in zip(seeds, records, strict=True):
        for sentence in said(of_seed):
            console.print(f"seed {seed}: {sentence}", soft_wrap=True, highlight=False)
    if write is not None:
        insert(write, "make results", markdown(records, seeds))
        insert(ROOT / "README.md", "make demo", predicted)
        insert(ROOT / "README.md", "make results", short(records))
        console.print(f"wrote {write} and README.md", highlight=False)


def record(folder: Path, seed: int) -> dict[str, Any]:
    """What `metrics.json` says of a seed, trained first where it has not been."""
    if not (folder / METRICS).is_file():
        table = read_table("openclipart")
        resume = (partial_directory(folder) / CHECKPOINT).is_file()
        train(TrainingRun(table=table, output=folder, training_options={"seed": seed}, resume=resume), console)
    page = folder / "explain.html"
    if not page.is_file():
        rows = read_table("openclipart", split="test").select(EXPLAINED)
        render_explanation(explain(load_model(folder), rows), page, "What the model looked at", {"model": str(folder)})
    return json.loads((folder / METRICS).read_text(encoding="utf-8"))


def said(record: dict[str, Any]) -> list[str]:
    """For each task how many test rows can be published without a look, and how many need a person."""
    found = {
        task: Promise(one["target_precision"], one["rows"], one["accepted"], one["right"])
        for task, one in record["decisions"].items()
    }
    return sentences(found)


def example(folder: Path) -> str:
    """What the model of a folder says of the rows that the README begins with, as Markdown."""
    table = pandas.read_csv(EXAMPLE, dtype=str)
    found = Classifier.load(folder).predict(table, image="image", text="title", image_dir=EXAMPLE.parent)
    for task in ("category", "color"):
        best = [top[0]["label"] for top in found[f"{task}_top"]]
        found[task] = found[task].where(found[f"{task}_status"] == "accepted", [f"unsure ({name})" for name in best])
    names = [name for task in ("category", "color") for name in columns(task)]
    rows = zip(table["id"], *(found[name] for name in names), strict=True)
    return as_table(["id", *names], rows)


def columns(task: str) -> list[str]:
    return [task, f"{task}_probability", f"{task}_text_weight", f"{task}_image_weight"]


def mean(records: list[dict[str, Any]], view: str, task: str, metric: str) -> float:
    return statistics.fmean(record["test"][view][task][metric] for record in records)


def deviation(records: list[dict[str, Any]], view: str, task: str, metric: str) -> float:
    return statistics.stdev(r["test"][view][task][metric] for r in records) if len(records) > 1 else 0.0


HEADINGS = (
    "task",
    "accuracy",
    "goal",
    "text alone",
    "image alone",
    "macro F1",
    "recall at 90 % precision",
    "text weight",
    "baseline, pretrained features",
)


def cells(records: list[dict[str, Any]], task: str) -> list[str]:
    spread = f" ± {deviation(records, 'both', task, 'accuracy'):.3f}" if len(records) > 1 else ""
    return [
        task,
        f"{mean(records, 'both', task, 'accuracy'):.3f}{spread}",
        f"{TARGETS[task]:.2f}",
        f"{mean(records, 'text alone', task, 'accuracy'):.3f}",
        f"{mean(records, 'image alone', task, 'accuracy'):.3f}",
        f"{mean(records, 'both', task, 'macro_f1'):.3f}",
        f"{mean(records, 'both', task, 'recall_at_precision'):.3f}",
        f"{statistics.fmean(r['modality_weights'][task]['text'] for r in records):.2f}",
        f"{BASELINE[task][2]:.3f}",
    ]


def short(records: list[dict[str, Any]]) -> str:
    """The README's table: accuracy with both modalities and with each alone, and the text's weight."""
    views = ("both", "text alone", "image alone")
    rows = []
    for task in TARGETS:
        weight = statistics.fmean(record["modality_weights"][task]["text"] for record in records)
        rows.append([task, *(f"{mean(records, view, task, 'accuracy'):.3f}" for view in views), f"{weight:.2f}"])
    return as_table(["task", *views, "weight of the text"], rows)


def summary(records: list[dict[str, Any]], seeds: list[int]) -> Table:
    title = f"openclipart, test rows, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    # headings are broken, so that 80 columns are enough
    headings = [textwrap.fill(heading, 9, break_long_words=False) for heading in HEADINGS]
    table = Table(*headings, title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for task in TARGETS:
        table.add_row(*cells(records, task))
    return table


def markdown(records: list[dict[str, Any]], seeds: list[int]) -> str:
    minutes = statistics.fmean(record["seconds"] for record in records) / 60
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "`make results`: `tiny`, trained on the train split alone, no pretrained weights; accuracy",
        f"on the 626 test rows, mean and deviation of the seeds {', '.join(map(str, seeds))}. The label `color` is",
        "derived from the pixels, not annotated. *Text alone* and *image alone*: the same model, the other modality",
        "hidden. The baseline is the data card's logistic regression on TF-IDF and on features of a network pretrained",
        "on ImageNet, which this model does not have.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(cells(records, task)) + " |" for task in TARGETS),
        "",
        f"Training took {minutes:.1f} minutes a seed on {os.cpu_count()} cores ({platform.machine()}, "
        f"{torch.backends.cpu.get_cpu_capability()}); {made}; {datetime.date.today()}.",
        "",
        "| seed | " + " | ".join(TARGETS) + " | best epoch | minutes |",
        "|" + "---|" * (len(TARGETS) + 3),
    ]
    for seed, one in zip(seeds, records, strict=True):
        scores = " | ".join(f"{one['test']['both'][task]['accuracy']:.3f}" for task in TARGETS)
        lines.append(f"| {seed} | {scores} | {one['best_epoch']} | {one['seconds'] / 60:.1f} |")
    beaten = [
        f"- `{task}`: {mean(records, 'both', task, 'accuracy'):.4f} with both, "
        f"{mean(records, view, task, 'accuracy'):.4f} with {view}"
        for task in TARGETS
        for view in ("text alone", "image alone")
        if mean(records, "both", task, "accuracy") <= mean(records, view, task, "accuracy")
    ]
    if beaten:
        lines += ["", "Not reached, both modalities above each alone:", "", *beaten]
    slow = [f"seed {seed}" for seed, one in zip(seeds, records, strict=True) if one["seconds"] > 600]
    if slow:
        lines += ["", f"Not reached, at most 10 minutes of training: {', '.join(slow)}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)

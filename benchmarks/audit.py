"""Damages 5 % of the rows on purpose, trains on them, audits the same rows, and counts what was found: `make audit`.

    python -m benchmarks.audit --runs runs --write docs/tables/audit.md

Labels are replaced by another class, or texts by another row's. The model is small and quickly trained, and has seen
the damaged rows as if they were right, as a user's would have. A model that is there already is not trained again.
"""

from __future__ import annotations

import datetime
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.page import as_table
from cmaclip_fast.classifier.artifact import METRICS, versions
from cmaclip_fast.classifier.audit import AuditSettings, audit
from cmaclip_fast.classifier.classifier import Classifier
from cmaclip_fast.classifier.findings import Finding
from cmaclip_fast.data import read_table
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.table import Table
from cmaclip_fast.progress import Console
from cmaclip_fast.training.run import TrainingRun, train

STUDIES = (("openclipart", "color"), ("emoji", "category"))
DAMAGED = 0.05
SHARES = (0.05, 0.10)
GOAL = 0.6
MODEL = {"image_size": 48}
TRAINING = {"epochs": 6, "small_epochs": 0.0}

console = Console()


@dataclass(frozen=True)
class Damage:
    """A table on disk with some rows damaged.

    Attributes:
        hit: `[N]` bool, the damaged rows.
        able: `[N]` bool, the rows that could have been.
    """

    table: Table
    hit: np.ndarray
    able: np.ndarray


def main(
    runs: Annotated[Path, typer.Option(help="Folder of the damaged tables and the models.")] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Of the damage and of the training.")] = 0,
    write: Annotated[Path | None, typer.Option(help="The page to write.")] = None,
) -> None:
    """Count the damaged rows among the first of the audit's lists."""
    runs.mkdir(parents=True, exist_ok=True)
    labels, texts = [], []
    for data, task in STUDIES:
        flipped = flip_labels(data, task, runs / f"audit-labels-{data}-{seed}.parquet", seed)
        found = findings(flipped, runs / f"audit-labels-{data}-{seed}", seed, "label", [task])
        likely = [finding.row for finding in found if finding.likely]
        precision = float(flipped.hit[likely].mean()) if likely else 0.0
        flagged = f"{len(likely)}, {flipped.hit[likely].sum() / flipped.hit.sum():.2f}, {precision:.2f}"
        labels.append(
            [
                f"{data} `{task}`",
                int(flipped.able.sum()),
                int(flipped.hit.sum()),
                *recalls(found, flipped),
                *by_split(found, flipped),
                flagged,
            ]
        )
        console.print(as_table(LABELS, labels[-1:]), highlight=False)
    for data, _ in STUDIES:
        swapped = swap_texts(data, runs / f"audit-texts-{data}-{seed}.parquet", seed)
        found = findings(swapped, runs / f"audit-texts-{data}-{seed}", seed, "mismatch", None)
        texts.append([data, int(swapped.able.sum()), int(swapped.hit.sum()), *recalls(found, swapped)])
        console.print(as_table(TEXTS, texts[-1:]), highlight=False)
    if write is not None:
        write.write_text(page(labels, texts, seed), encoding="utf-8")


def flip_labels(data: str, task: str, path: Path, seed: int) -> Damage:
    """Another class, each as likely, for some of the labelled rows."""
    source = read_table(data)
    labels = source.labels(task)
    able = np.array([label is not None for label in labels])
    hit = chosen(able, seed)
    classes = sorted({label for label in labels if label is not None})
    chance = np.random.default_rng([seed, 1])
    for row in np.flatnonzero(hit):
        labels[row] = str(chance.choice([name for name in classes if name != labels[row]]))
    return Damage(rewritten(source, task, labels, path), hit, able)


def swap_texts(data: str, path: Path, seed: int) -> Damage:
    """Among some of the rows with a text and a picture, each text goes to another row."""
    source = read_table(data)
    texts = source.texts()
    able = np.array([text is not None and source.has_image(row) for row, text in enumerate(texts)])
    hit = chosen(able, seed)
    rows = np.random.default_rng([seed, 1]).permutation(np.flatnonzero(hit))
    column = source.columns.text
    assert column is not None
    moved = list(texts)
    for row, other in zip(rows, np.roll(rows, 1), strict=True):
        moved[row] = texts[other]
    return Damage(rewritten(source, column, moved, path), hit, able)


def chosen(able: np.ndarray, seed: int) -> np.ndarray:
    rows = np.flatnonzero(able)
    hit = np.zeros(len(able), dtype=bool)
    hit[np.random.default_rng(seed).choice(rows, round(DAMAGED * len(rows)), replace=False)] = True
    return hit


def rewritten(source: Table, column: str, values: list[str | None], path: Path) -> Table:
    """The table as a file, with other values in a column."""
    rows = source._source.table
    rows = rows.set_column(rows.column_names.index(column), column, pa.array(values, pa.string()))
    pq.write_table(rows, path)
    return read_table(str(path), source.columns)


def findings(damage: Damage, folder: Path, seed: int, kind: str, tasks: list[str] | None) -> list[Finding]:
    """What the audit of a model that was trained on the damaged rows finds in them."""
    if not (folder / METRICS).is_file():
        options = {**TRAINING, "seed": seed}
        run = TrainingRun(
            table=damage.table, output=folder, model_options=MODEL, training_options=options, report=False
        )
        train(replace(run, overwrite=True), console)
    model = Classifier.load(folder).engine
    classes = {task: names for task, names in model.tasks.items() if tasks is None or task in tasks}
    examples = Examples(damage.table, classes, model.preprocessing, model.tokenizer, unknown="ignore")
    return audit(model, examples, AuditSettings(kinds=(kind,), seed=seed))


def recalls(found: list[Finding], damage: Damage) -> list[float]:
    """The share of the damaged rows among the first of the list, which is as long as shares of the rows."""
    return [recall(found, damage, share, damage.able) for share in SHARES]


def by_split(found: list[Finding], damage: Damage) -> list[float]:
    """The recall in the first 10 % of the list of the rows that were trained on, and of that of all others."""
    trained = np.array([split == "train" for split in damage.table.splits()])
    return [recall(found, damage, SHARES[-1], damage.able & part) for part in (trained, ~trained)]


def recall(found: list[Finding], damage: Damage, share: float, part: np.ndarray) -> float:
    """The share of the damaged rows of a part that are among the first of the part's list."""
    order = [finding.row for finding in sorted(found, key=lambda finding: -finding.score) if part[finding.row]]
    return float(damage.hit[order[: round(share * part.sum())]].sum() / (damage.hit & part).sum())


FIRST = [f"recall in the first {100 * share:g} %" for share in SHARES]
SPLITS = ["training rows, first 10 %", "other rows, first 10 %"]
LABELS = ["data and task", "labelled rows", "flipped", *FIRST, *SPLITS, "*likely wrong*: rows, recall, precision"]
TEXTS = ["data", "pairs", "swapped", *FIRST]


def page(labels: list[list[object]], texts: list[list[object]], seed: int) -> str:
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    missed = [str(line[0]) for line in labels if float(str(line[4])) < GOAL]
    goal = f"Not reached on {', '.join(missed)}." if missed else "Reached on both."
    lines = [
        "# Audit",
        "",
        "Written by `make audit`.",
        "",
        f"{100 * DAMAGED:g} % of the rows were damaged by chance (seed {seed}), `tiny` was trained on the train",
        f"split of the damaged table ({TRAINING['epochs']} epochs, pictures of {MODEL['image_size']} pixels), and the",
        "audit was run on all rows. A list in random order has a recall of 0.10 in its first 10 %.",
        "",
        "## Labels",
        "",
        f"Each flipped label is another class, all alike. The goal is a recall of {GOAL} in the first 10 %. {goal}",
        "What is not a flip may be an error of the data set all the same, so that the precision is a lower bound.",
        "",
        as_table(LABELS, labels),
        "",
        "## Texts",
        "",
        "The texts of the damaged rows were exchanged among them. The towers of `tiny` are not trained to compare",
        "texts and pictures, so that mismatches are found by what each says of the tasks alone, no better.",
        "",
        as_table(TEXTS, texts),
        "",
        f"{os.cpu_count()} cores ({platform.machine()}); {made}; {datetime.date.today()}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)

"""Systems x data sets x seeds under one training budget, measured alike; a run that is finished is not repeated."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from cmaclip_fast.artifact import load_model, partial_directory, versions
from cmaclip_fast.comparison_pictures import draw_attention
from cmaclip_fast.cost import forward_flops, parameters
from cmaclip_fast.data.check import RowPolicy, check_rows
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.noise import Kind, Noise, NoisyTable, add_noise
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.split import split_table
from cmaclip_fast.data.table import Table
from cmaclip_fast.data.tokenizer import TrainedTokenizer
from cmaclip_fast.errors import InputError
from cmaclip_fast.evaluation import Classified, classify
from cmaclip_fast.explanation import explain
from cmaclip_fast.files import write_json
from cmaclip_fast.systems import create_system, find_system
from cmaclip_fast.systems.base import System
from cmaclip_fast.training import CHECKPOINT, TrainingRun, mean_weights, train

SYSTEMS = (
    "cma-clip",
    "cma-clip-without-sequence-attention",
    "cma-clip-without-modality-attention",
    "cma-clip-without-attention",
    "clip",
    "clip-zero-shot",
    "vit",
    "bert",
    "mmbt",
    "embracenet",
    "coca",
    "perceiver-io",
    "one-stream",
    "kaleidobert",
)
"""What is compared unless others are named; the first is what the others are tested against."""

SHARES = (0.25, 0.5, 0.75, 1.0)
SHOWN_ROWS = 6
"""Test rows whose attention maps are drawn."""
STRENGTHS = {"image-blur": (0.02, 0.05, 0.1, 0.2), "image-noise": (0.1, 0.25, 0.5, 1.0)}
"""Levels at which a kind of damage is measured: shares of rows, or of `STRENGTHS` strengths."""

QUICK_ROWS = {"train": 512, "validation": 128, "test": 384}
QUICK_TRAINING = {"epochs": 6, "batch_size": 32, "small_epochs": 0.0}
QUICK_MODEL = {"image_size": 48}
QUICK_KINDS: tuple[Kind, ...] = ("text-replace", "text-drop", "image-replace", "image-drop")
"""The quick setting: fewer rows, small pictures, a short training; it shows that all works, and which way things go."""


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        tables: the rows of each data set, by its name.
        output: the folder for records, models and the page.
        systems: names of systems or variants; the first is the one that the others are tested against.
        seeds: at least two give deviations.
        model, pretrained: the towers of all systems.
        model_options: of the systems that have them.
        training_options: the budget, the same for all.
        kinds: of damage to the test rows.
        training_noise: of the training rows, the same for all systems.
        rows: at most so many rows of each split; None takes all.
        target_precision: for recall at a fixed precision.
        on_bad_rows: as in `TrainingRun`.
        keep_models: keep each run's artefact.
    """

    tables: dict[str, Table]
    output: Path
    systems: tuple[str, ...] = SYSTEMS
    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = "tiny"
    pretrained: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    training_options: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[Kind, ...] = get_args(Kind)
    training_noise: Noise | None = None
    rows: dict[str, int] | None = None
    target_precision: float = 0.9
    on_bad_rows: RowPolicy = "error"
    keep_models: bool = False

    def settings(self, table: Table) -> dict[str, Any]:
        """What a record holds of how it was made; a record of other settings is not taken for this one."""
        texts = zlib.crc32(repr(table.texts()).encode())
        return {
            "rows": [len(table), texts],
            "tasks": list(table.columns.tasks),
            "model": self.model,
            "pretrained": self.pretrained,
            "model_options": self.model_options,
            "training_options": self.training_options,
            "training_noise": None if self.training_noise is None else vars(self.training_noise),
            "kinds": list(self.kinds),
            "limit": self.rows,
            "target_precision": self.target_precision,
        }


class KeptPictures(Table):
    """The same rows, their pictures made square and kept, so that each is decoded once for all runs."""

    def __init__(self, table: Table, preprocessing: ImagePreprocessing) -> None:
        super().__init__(table._source, table._rows, table._masked)
        self._preprocessing = preprocessing
        self._kept: dict[int, Image.Image | None] = {}

    def image(self, index: int, background: str = "white") -> Image.Image | None:
        if index not in self._kept:
            picture = super().image(index, background)
            square = None if picture is None else self._preprocessing.pixels(picture)
            self._kept[index] = None if square is None else Image.fromarray(square.permute(1, 2, 0).numpy())
        return self._kept[index]


def compare(
    comparison: Comparison, console: Console | None = None, finished: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Trains and measures whatever is not there yet; gives all records.

    Args:
        finished: called with the number of runs done and in all.

    Raises:
        InputError: an unknown system, bad data or options, or a record of other settings in the output folder.
    """
    console = console or Console(stderr=True)
    for name in comparison.systems:
        find_system(name)
    _check_repeats("--systems", comparison.systems)
    _check_repeats("--seeds", comparison.seeds)
    records: list[dict[str, Any]] = []
    total = len(comparison.tables) * len(comparison.systems) * len(comparison.seeds)
    for data, table in comparison.tables.items():
        settings = comparison.settings(table)
        splits: dict[str, Table] | None = None
        # seed by seed, so that an interrupted comparison has all systems of the seeds it has
        for seed in comparison.seeds:
            for system in comparison.systems:
                path = record_path(comparison.output, data, system, seed)
                record = read_record(path, settings)
                if record is None:
                    splits = splits or prepare(comparison, table)
                    console.print(f"{len(records) + 1}/{total}: {system} on {data}, seed {seed}", highlight=False)
                    record = _run(comparison, table, splits, data, system, seed, console)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_json(path, {**record, "settings": settings})
                records.append(record)
                if finished is not None:
                    finished(len(records), total)
    return records


def record_path(output: Path, data: str, system: str, seed: int) -> Path:
    """Where a run's record is kept."""
    return output / "records" / data / f"{system}-{seed}.json"


def attention_path(output: Path, data: str, system: str) -> Path:
    """Where the attention maps of a system with such maps are kept; those of the first seed."""
    return output / "attention" / data / f"{system}.png"


def read_record(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished run, or None.

    Raises:
        InputError: it is damaged, or was made with other settings.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = record.pop("settings")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError):
        raise InputError(f"{path}: damaged: remove it, and its run is repeated") from None
    now = json.loads(json.dumps(settings))
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise InputError(f"{path}: was made with other settings ({', '.join(changed)}): name another --output")
    return dict(record)


def _check_repeats(option: str, values: Sequence[object]) -> None:
    if not values:
        raise InputError(f"{option}: name at least one")
    for value in values:
        if list(values).count(value) > 1:
            raise InputError(f"{option}: {value} is named twice")


def prepare(comparison: Comparison, table: Table) -> dict[str, Table]:
    """The checked rows of each split, not more than wanted; where no column splits them, the same for every seed."""
    splits: dict[str, Table] = {}
    preprocessing = _preprocessing(comparison, table)
    for split, part in split_table(table).items():
        if len(part) == 0:
            raise InputError(f"{table.name}: no rows for split '{split}': add rows, or name another split column")
        limit = (comparison.rows or {}).get(split)
        if limit is not None and limit < len(part):
            part = part.select(np.sort(np.random.default_rng(0).permutation(len(part))[:limit]))
        checked, _ = check_rows(part, comparison.on_bad_rows)
        splits[split] = KeptPictures(checked, preprocessing)
    if comparison.training_noise is not None:
        splits["train"] = add_noise(splits["train"], comparison.training_noise)
    return splits


def _preprocessing(comparison: Comparison, table: Table) -> ImagePreprocessing:
    """What all systems read, since they have the same towers."""
    options = _known("vit", comparison.model_options)
    tasks = {task: ["any", "other"] for task in table.columns.tasks}
    own = comparison.model != "tiny" or options.get("text_tower") is not None
    # its words do not matter here, and a small vocabulary is soon built
    tokenizer = None if own else TrainedTokenizer.train(["any"], context_length=8)
    return create_system("vit", comparison.model, tasks, tokenizer=tokenizer, **options).preprocessing


def _known(system: str, options: dict[str, Any]) -> dict[str, Any]:
    fields = find_system(system)[0].Config.model_fields
    return {name: value for name, value in options.items() if name in fields}


def _run(
    comparison: Comparison,
    table: Table,
    splits: dict[str, Table],
    data: str,
    system: str,
    seed: int,
    console: Console,
) -> dict[str, Any]:
    folder = comparison.output / "models" / data / f"{system}-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)  # trained, but killed before it was measured
    run = TrainingRun(
        table,
        folder,
        system=system,
        model=comparison.model,
        pretrained=comparison.pretrained,
        model_options=_known(system, comparison.model_options),
        training_options={**comparison.training_options, "seed": seed},
        target_precision=comparison.target_precision,
        resume=(partial_directory(folder) / CHECKPOINT).is_file(),
        splits=splits,
        report=comparison.keep_models,
    )
    result = train(run, Console(quiet=True))
    model = load_model(folder)
    if seed == comparison.seeds[0]:
        picture = attention_path(comparison.output, data, system)
        views = explain(model, splits["test"].select(range(min(SHOWN_ROWS, len(splits["test"])))))
        draw_attention(views, picture)
    record = {
        "data": data,
        "system": system,
        "title": model.title,
        "seed": seed,
        "seconds": result.seconds,
        "test": result.metrics,
        **measure(model, splits["test"], comparison),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    if not comparison.keep_models:
        shutil.rmtree(folder)
    return record


def measure(model: System, test: Table, comparison: Comparison) -> dict[str, Any]:
    """Cost, modality weights and robustness of a trained system on the test rows."""
    clean = _classify(model, test)
    first = _examples(model, test).batch(range(min(16, len(test))))
    return {
        "parameters": parameters(model),
        "flops": forward_flops(model, first),
        "weights": mean_weights(clean),
        "noise": {kind: curve(model, test, kind, clean, comparison.target_precision) for kind in comparison.kinds},
    }


def _examples(model: System, table: Table) -> Examples:
    return Examples(table, model.tasks, model.preprocessing, model.tokenizer, unknown="ignore")


def _classify(model: System, table: Table) -> Classified:
    return classify(model, _examples(model, table), batch_size=128)


def curve(model: System, test: Table, kind: Kind, clean: Classified, target_precision: float) -> list[dict[str, Any]]:
    """Metrics of the test rows under growing damage of one kind, from none on.

    Which rows are hit grows with the share, and what happens to a row does not depend on it, so the answers to all
    damaged rows serve for every share.
    """
    points = [_point(0.0, clean, target_precision)]
    if kind in STRENGTHS:
        for level in STRENGTHS[kind]:
            points.append(_point(level, _classify(model, add_noise(test, Noise(kind, level))), target_precision))
        return points
    damaged = _classify(model, add_noise(test, Noise(kind, 1.0)))
    for share in SHARES:
        noisy = NoisyTable(test, Noise(kind, share))
        mixed = _mixed(clean, damaged, torch.from_numpy(noisy._hit))
        points.append(_point(share, mixed, target_precision))
    return points


def _mixed(clean: Classified, damaged: Classified, hit: torch.Tensor) -> Classified:
    """The answers to `damaged` where `hit [N]`, else to `clean`."""

    def choose(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.where(hit[:, None], other, one)

    weights = None
    if clean.weights is not None and damaged.weights is not None:
        weights = {task: choose(w, damaged.weights[task]) for task, w in clean.weights.items()}
    return replace(
        clean,
        probabilities={task: choose(p, damaged.probabilities[task]) for task, p in clean.probabilities.items()},
        weights=weights,
        present=choose(clean.present, damaged.present),
    )


def _point(level: float, answers: Classified, target_precision: float) -> dict[str, Any]:
    tasks = {
        task: {name: value for name, value in m.headline().items() if name != "rows"}
        for task, m in answers.metrics(target_precision).items()
        if m.rows
    }
    text = None if answers.weights is None else {t: float(w[:, 0].mean()) for t, w in answers.weights.items()}
    return {"level": level, "tasks": tasks, "text_weight": text}

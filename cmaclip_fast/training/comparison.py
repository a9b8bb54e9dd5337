"""Systems x data sets x seeds under one training budget, measured alike; a run that is finished is not repeated."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.progress import Progress, TimeElapsedColumn

from cmaclip_fast import signals
from cmaclip_fast.classifier.artifact import METRICS, load_model, versions
from cmaclip_fast.classifier.explanation import explain
from cmaclip_fast.data.check import RowPolicy, check_rows
from cmaclip_fast.data.classes import class_names
from cmaclip_fast.data.files import near
from cmaclip_fast.data.fingerprint import fingerprint
from cmaclip_fast.data.folds import split_by_folds
from cmaclip_fast.data.kept import KeptPictures
from cmaclip_fast.data.noise import Kind, Noise, add_noise
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.split import split_table
from cmaclip_fast.data.table import Table
from cmaclip_fast.data.tokenizer import TrainedTokenizer
from cmaclip_fast.errors import InputError, listed
from cmaclip_fast.evaluation.baselines import baselines
from cmaclip_fast.files import cannot, write_json
from cmaclip_fast.pages.comparison import NUMBERS, PAGE
from cmaclip_fast.pages.comparison_pictures import draw_attention
from cmaclip_fast.progress import Console
from cmaclip_fast.systems.build import create_system
from cmaclip_fast.systems.presets import TINY, preset
from cmaclip_fast.systems.registry import find_system
from cmaclip_fast.training.curves import measure
from cmaclip_fast.training.records import RECORDS, is_ours, read_record
from cmaclip_fast.training.run import CHECKPOINT, TrainingRun, train
from cmaclip_fast.working import locked, partial_directory

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

LOCK = ".lock"

FORMAT = 4
"""Of a record; one of another format is not read."""

SHOWN_ROWS = 6
"""Test rows whose attention maps are drawn."""

ALIKE = {"mismatch": 0.0}
"""Of the training options, unless they are asked for: what only systems with modality weights can use is off."""

QUICK_ROWS = {"train": 1024, "validation": 384, "test": 512}

QUICK_TRAINING = {"epochs": 6, "batch_size": 32, "small_epochs": 0.0}

QUICK_KINDS: tuple[Kind, ...] = ("text-replace", "text-drop", "image-replace", "image-drop")
"""The quick setting: fewer rows, small pictures, a short training; it shows that all works, and which way things go."""


@dataclass(frozen=True)
class Try:
    """Options that differ from those of the comparison, and the name that they are shown under."""

    name: str
    model_options: dict[str, Any] = field(default_factory=dict)
    training_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training and what is measured after it."""

    data: str
    system: str
    seed: int
    tried: Try | None = None

    def __str__(self) -> str:
        return f"{self.system} on {self.data}, seed {self.seed}" + (f", {self.tried.name}" if self.tried else "")


@dataclass(frozen=True, kw_only=True)
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
        tries: settings that each system is trained with on the first seed; the one with the best validation accuracy
            is used for all its seeds. Empty tries nothing.
        kinds: of damage to the test rows.
        training_noise: of the training rows, the same for all systems.
        train_on: a column and a value: train and validate on the rows that have it, test on all.
        by: a column whose values are also measured one by one.
        rows: maximum rows of each split; None uses all.
        folds: for a data set, the fold of each row: seed n is tested on fold n (modulo their number) and chosen on the
            next one. The data set's own split is then ignored.
        target_precision: for recall at a fixed precision.
        on_bad_rows: as in `TrainingRun`.
        keep_models: keep each run's artefact.
        device: as in `TrainingRun`.
    """

    tables: dict[str, Table]
    output: Path
    systems: tuple[str, ...] = SYSTEMS
    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = TINY
    pretrained: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    training_options: dict[str, Any] = field(default_factory=dict)
    tries: tuple[Try, ...] = ()
    kinds: tuple[Kind, ...] = get_args(Kind)
    training_noise: Noise | None = None
    train_on: tuple[str, str] | None = None
    by: str | None = None
    rows: dict[str, int] | None = None
    folds: dict[str, list[int]] = field(default_factory=dict)
    target_precision: float = 0.9
    on_bad_rows: RowPolicy = "error"
    keep_models: bool = False
    device: str = "auto"

    @cached_property
    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of each data set; taken once, before its pictures are read."""
        return {name: fingerprint(table) for name, table in self.tables.items()}

    def settings(self, run: Run) -> dict[str, Any]:
        """The settings stored with a record; a record with other settings is not reused."""
        options = self.options(run)
        return {
            "format": FORMAT,
            **self.fingerprints[run.data],
            "model": self.model,
            "pretrained": self.pretrained,
            "model_options": options[0],
            "training_options": options[1],
            "training_noise": None if self.training_noise is None else vars(self.training_noise),
            "train_on": None if self.train_on is None else list(self.train_on),
            "by": self.by,
            "kinds": list(self.kinds),
            "limit": self.rows,
            "folds": self.folds.get(run.data),
            "target_precision": self.target_precision,
        }

    def options(self, run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's and the training's options of a run."""
        tried = run.tried or Try("")
        model = {**self.model_options, **tried.model_options}
        return model, {**ALIKE, **self.training_options, **tried.training_options}

    def candidates(self, data: str, system: str) -> list[Run]:
        """The first seed with everything that is tried; what does not concern this system only once."""
        if not self.tries:
            return [Run(data, system, self.seeds[0])]
        different: dict[str, Run] = {}
        for tried in self.tries:
            run = Run(data, system, self.seeds[0], tried)
            model, training = self.options(run)
            different.setdefault(repr([_known(system, model), training]), run)
        return list(different.values())


def compare(
    comparison: Comparison,
    console: Console | None = None,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """Trains and measures whatever is not there yet; gives the records of the runs that count.

    With `comparison.tries` these are, of every system, the runs with what was best on the validation rows.

    Args:
        console: for the progress bar, and a line for each run that ended.
        jobs: processes side by side, which share PyTorch's threads.

    Raises:
        InputError: an unknown system, column or value, bad data or options, a record of other settings in the output
            folder, or another comparison that runs in it.
    """
    console = console or Console(stderr=True)
    for name in comparison.systems:
        find_system(name)
    _check_repeats("--systems", comparison.systems)
    _check_repeats("--seeds", comparison.seeds)
    for table in comparison.tables.values():
        _check_columns(comparison, table)
    pairs = [(data, system) for data in comparison.tables for system in comparison.systems]
    candidates = {pair: comparison.candidates(*pair) for pair in pairs}
    others = comparison.seeds[1:]
    total = sum(map(len, candidates.values())) + len(pairs) * len(others)

    bar = Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True)
    with _alone(comparison.output), bar, _workers(comparison, jobs) as workers:
        task = bar.add_task("comparing", total=total)

        def note(run: Run, new: bool) -> None:
            bar.advance(task)
            if new:
                bar.console.print(f"{bar.tasks[task].completed:.0f}/{total}: {run}", highlight=False, soft_wrap=True)

        run_all = partial(_all, comparison=comparison, bench=_Bench(comparison), workers=workers, note=note)

        # seed by seed, so that an interrupted comparison has all systems of the seeds it has
        first = run_all([run for runs in candidates.values() for run in runs])
        best = {pair: max(runs, key=lambda run: first[str(run)]["validation"]) for pair, runs in candidates.items()}
        rest = [replace(best[pair], seed=seed) for seed in others for pair in pairs]
        found = first | run_all(rest)
    records = []
    for data in comparison.tables:
        for seed in comparison.seeds:
            for system in comparison.systems:
                record = found[str(replace(best[data, system], seed=seed))]
                if comparison.tries:
                    runs = candidates[data, system]
                    record["tried"] = {run.tried.name: first[str(run)]["validation"] for run in runs if run.tried}
                records.append(record)
    return records


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Holds the folder, so that two commands do not train the same run in it."""
    for name in (PAGE, NUMBERS):
        if (output / name).exists() and not ((output / RECORDS).is_dir() or is_ours(output / NUMBERS)):
            raise InputError(f"{output}: holds '{name}' but no comparison of ours: name another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot("written", output, error) from error
    busy = f"{output}: another comparison runs in it: wait for it, or name another --output (--jobs runs several)"
    with locked(output / LOCK, busy):
        yield


@contextmanager
def _workers(comparison: Comparison, jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    if jobs < 2:
        yield None
        return
    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(comparison, threads)
    )
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()  # they end after their step, and keep it
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_worker: _Bench


def _start_worker(comparison: Comparison, threads: int) -> None:
    global _worker
    signals.install()
    torch.set_num_threads(threads)
    _worker = _Bench(comparison)


def _work(run: Run) -> dict[str, Any]:
    return _worker.run(run)


def _all(
    runs: Sequence[Run],
    comparison: Comparison,
    bench: _Bench,
    workers: ProcessPoolExecutor | None,
    note: Callable[[Run, bool], None],
) -> dict[str, dict[str, Any]]:
    """The records of `runs` by their names, read where they are there; `note` hears of each, and whether it is new."""
    records, missing = {}, []
    for run in runs:
        record = read_record(record_path(comparison.output, run), comparison.settings(run))
        if record is None:
            missing.append(run)
        else:
            records[str(run)] = record
            note(run, False)
    if workers is None:
        for run in missing:
            records[str(run)] = bench.run(run)
            note(run, True)
        return records
    futures = {workers.submit(_work, run): run for run in missing}
    for future in as_completed(futures):
        records[str(futures[future])] = future.result()
        note(futures[future], True)
    return records


class _Bench:
    """Trains and measures in one process; the rows of a data set are read once."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._splits: dict[tuple[str, int], dict[str, Table]] = {}
        self._simple: dict[tuple[str, int], dict[str, Any]] = {}

    def run(self, run: Run) -> dict[str, Any]:
        fold = run.seed if run.data in self._comparison.folds else 0
        if (run.data, fold) not in self._splits:
            self._splits[run.data, fold] = prepare(self._comparison, run.data, fold)
        path = record_path(self._comparison.output, run)
        record = _run(self._comparison, self._splits[run.data, fold], run)
        record["baselines"] = self._baselines(run.data, fold)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**record, "settings": self._comparison.settings(run)})
        return record

    def _baselines(self, data: str, fold: int) -> dict[str, Any]:
        """Each baseline's numbers on the test rows; the same for all seeds that share their rows."""
        if (data, fold) not in self._simple:
            splits = self._splits[data, fold]
            classes = class_names(splits["train"], splits["train"].columns.tasks)
            target = self._comparison.target_precision
            found = baselines(splits["train"], {"test": splits["test"]}, classes, target)
            self._simple[data, fold] = {name: of["test"] for name, of in found.items()}
        return self._simple[data, fold]


def record_path(output: Path, run: Run) -> Path:
    """Where a run's record is kept."""
    return output / RECORDS / run.data / f"{_file_name(run)}.json"


def _file_name(run: Run) -> str:
    tried = "" if run.tried is None else "-" + re.sub(r"[^A-Za-z0-9._=]+", "-", run.tried.name)
    return f"{run.system}{tried}-{run.seed}"


def _check_repeats(option: str, values: Sequence[object]) -> None:
    if not values:
        raise InputError(f"{option}: name at least one")
    for value in values:
        if list(values).count(value) > 1:
            raise InputError(f"{option}: {value} is named twice")


def _check_columns(comparison: Comparison, table: Table) -> None:
    for option, column in (("--by", comparison.by), ("--train-on", comparison.train_on and comparison.train_on[0])):
        if column is not None and column not in (names := table.column_names):
            raise InputError(
                f"{option} {column}: {table.name} has no such column{near(column, names)}: {listed(names)}"
            )
    if comparison.train_on is not None:
        column, value = comparison.train_on
        values = sorted({found for found in table.labels(column) if found is not None})
        if value not in values:
            raise InputError(f"--train-on {column}={value}: {table.name} has no such value{near(value, values)}")


def prepare(comparison: Comparison, data: str, fold: int = 0) -> dict[str, Table]:
    """The checked rows of each split, at most `comparison.rows`; the same for every seed where there are no folds."""
    table = comparison.tables[data]
    splits: dict[str, Table] = {}
    preprocessing = _preprocessing(comparison, table)
    folds = comparison.folds.get(data)
    parts = split_table(table) if folds is None else split_by_folds(table, folds, fold)
    for split, part in parts.items():
        if len(part) == 0:
            raise InputError(f"{table.name}: no rows for split '{split}': add rows, or name another split column")
        if comparison.train_on is not None and split != "test":
            column, value = comparison.train_on
            part = part.select([row for row, found in enumerate(part.labels(column)) if found == value])
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
    own = not preset(comparison.model).is_ours or options.get("text_tower") is not None
    # its words do not matter here, and a small vocabulary is soon built
    tokenizer = None if own else TrainedTokenizer.train(["any"], context_length=8)
    return create_system("vit", comparison.model, tasks, tokenizer=tokenizer, **options).preprocessing


def _known(system: str, options: dict[str, Any]) -> dict[str, Any]:
    fields = find_system(system)[0].Config.model_fields
    return {name: value for name, value in options.items() if name in fields}


def _run(comparison: Comparison, splits: dict[str, Table], run: Run) -> dict[str, Any]:
    folder = comparison.output / "models" / run.data / _file_name(run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    model_options, training_options = comparison.options(run)
    training = TrainingRun(
        table=comparison.tables[run.data],
        output=folder,
        system=run.system,
        model=comparison.model,
        pretrained=comparison.pretrained,
        model_options=_known(run.system, model_options),
        training_options={**training_options, "seed": run.seed},
        target_precision=comparison.target_precision,
        overwrite=True,  # one that was trained, but not measured before a kill
        device=comparison.device,
        splits=splits,
        report=comparison.keep_models,
        baselines=False,  # the same for all systems: measured once
    )
    quiet = Console(quiet=True)
    try:
        resume = (partial_directory(folder) / CHECKPOINT).is_file()
        result = train(replace(training, resume=resume), quiet)
    except InputError:
        if not resume:
            raise
        result = train(training, quiet)  # what there was is damaged, or of other settings
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    accuracies = [of_task["accuracy"] for of_task in metrics["validation"].values() if of_task["rows"]]
    model = load_model(folder)
    picture = record_path(comparison.output, run).with_suffix(".png")
    if run.seed == comparison.seeds[0]:
        views = explain(model, splits["test"].select(range(min(SHOWN_ROWS, len(splits["test"])))))
        draw_attention(views, picture)
    record = {
        "data": run.data,
        "system": run.system,
        "title": model.title,
        "seed": run.seed,
        "chosen": None if run.tried is None else run.tried.name,
        "seconds": result.seconds,
        "validation": sum(accuracies) / max(len(accuracies), 1),
        "attention": picture.relative_to(comparison.output).as_posix() if picture.is_file() else None,
        "test": result.metrics,
        "decisions": metrics["decisions"],
        "calibration": metrics["calibration"],
        **measure(model, splits["test"], comparison.kinds, comparison.by, comparison.target_precision),
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    if not comparison.keep_models:
        shutil.rmtree(folder)
    return record

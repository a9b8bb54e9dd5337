"""From a table to an artefact: reads, checks and splits the data, trains, measures, and writes the folder."""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cmaclip_fast.classifier.artifact import (
    FILES,
    LOG,
    METRICS,
    REPORT,
    DataColumns,
    check_replaceable,
    load_config,
    load_metrics,
    save_model,
    versions,
)
from cmaclip_fast.classifier.engine import choose_device
from cmaclip_fast.data.check import RowPolicy, check_rows
from cmaclip_fast.data.classes import class_names
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.fingerprint import file_digest, fingerprint
from cmaclip_fast.data.named import absolute
from cmaclip_fast.data.split import split_table
from cmaclip_fast.data.table import Table
from cmaclip_fast.data.tokenizer import Tokenizer, TrainedTokenizer
from cmaclip_fast.errors import InputError
from cmaclip_fast.evaluation.baselines import baselines, below_text
from cmaclip_fast.evaluation.promise import sentences, sentences_of_absence
from cmaclip_fast.files import cannot, status_of, write_json
from cmaclip_fast.pages.report import render_report
from cmaclip_fast.progress import Console
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.build import build_system, system_config
from cmaclip_fast.systems.presets import TINY, preset
from cmaclip_fast.systems.registry import find_system
from cmaclip_fast.training.checkpoint import Progression
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.grow import Start, described, grow
from cmaclip_fast.training.log import log, log_file
from cmaclip_fast.training.loop import fit, mixed_precision
from cmaclip_fast.training.measure import Measured, measure, report_view
from cmaclip_fast.working import WorkingFolder

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """Settings of a training run.

    Attributes:
        table: all rows.
        output: the artefact folder to make.
        system: a name of `systems.systems()`, or of `systems.VARIANTS`.
        model: `tiny` or an open_clip model name.
        pretrained: an open_clip tag or a checkpoint; None for random weights.
        model_options: fields of the system's `Config` that differ from the defaults.
        training_options: fields of `TrainingConfig` that differ from the defaults.
        split_column: where there is another than `split`.
        on_bad_rows: what a bad row leads to (see `check_rows`).
        start: an artefact whose weights, tokenizer and preprocessing the training starts from. System and model are
            then its own; `classes` grow by those that are new, and tasks that the table lacks go.
        target_precision: of the accepted answers, and for recall at a fixed precision.
        overwrite: replace an existing output folder.
        resume: continue an interrupted run towards `output` from its checkpoint.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        splits: the rows of `table` checked and split already, as `split_table` gives them; None does both.
        report: write `report.html`.
        baselines: measure the most frequent class and a TF-IDF regression beside the model.
    """

    table: Table
    output: Path
    system: str = "cma-clip"
    model: str = TINY
    pretrained: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    training_options: dict[str, Any] = field(default_factory=dict)
    split_column: str | None = None
    on_bad_rows: RowPolicy = "error"
    start: Path | None = None
    target_precision: float = 0.9
    overwrite: bool = False
    resume: bool = False
    device: str = "auto"
    splits: dict[str, Table] | None = None
    report: bool = True
    baselines: bool = True

    def config(self) -> TrainingConfig:
        """The training configuration, checked.

        Raises:
            InputError: an unknown option or a value out of range.
        """
        defaults = preset(self.model).training
        if self.model_options.get("image_tower") is not None:
            defaults = {**defaults, "small_epochs": 0.0}  # such a tower reads pictures of one size
        try:
            return TrainingConfig.model_validate({**defaults, **self.training_options})
        except ValueError as error:
            raise InputError(f"training options: {' '.join(str(error).split())}") from None


@dataclass
class Result:
    """The result of a training run.

    Attributes:
        directory: the artefact.
        metrics: what `metrics.json` holds: for each view of the test rows, each task's headline numbers.
        baselines: each baseline's, on the test rows.
        seconds: spent in epochs.
    """

    directory: Path
    metrics: dict[str, dict[str, dict[str, float]]]
    baselines: dict[str, dict[str, dict[str, float]]]
    seconds: float


def train(run: TrainingRun, console: Console | None = None) -> Result:
    """Trains a model and writes its artefact; see `TrainingRun`.

    Raises:
        InputError: bad options or data, found before training begins; an output folder that exists.
    """
    console = console or Console(stderr=True)
    start = None if run.start is None else Start.read(run.start)
    if start is not None:
        run = _started(run, start)
    config = run.config()
    device = choose_device(run.device)
    config = config.model_copy(update={"mixed_precision": mixed_precision(config, device)})
    system, chosen = find_system(run.system)
    model_options = system_config(system, run.model, {**chosen, **run.model_options})
    if not run.table.columns.tasks:
        raise InputError(f"{run.table.name}: name at least one column of labels with --task")
    _check_modalities(run, system, config)
    _check_names(run)
    with contextlib.ExitStack() as stack:
        folder = WorkingFolder(run.output, "cmaclip train", "|".join(map(re.escape, (*FILES, CHECKPOINT))), CHECKPOINT)
        stack.enter_context(folder.held())
        complete = _check_output(run, folder)
        if complete is not None:
            console.print(f"{run.output} is complete already: nothing to resume")
            return complete
        stack.enter_context(folder.opened(run.resume, run.overwrite))
        work = folder.path
        stack.enter_context(log_file(work / LOG, console))
        started = time.perf_counter()
        tables, counts = _prepare(run, config)
        known = None if start is None else start.config.tasks
        classes = class_names(tables["train"], run.table.columns.tasks, known)
        torch.manual_seed(config.seed)
        if start is None:
            tokenizer = _tokenizer(model_options, tables["train"])
            model = build_system(system, model_options, classes, run.pretrained, tokenizer)
        else:
            model = grow(start.system, classes)
            for line in described(start.config.tasks, classes):
                log.info("from %s: %s", start.directory, line)
        used = run.table.columns
        model.taxonomies, model.multi_label, model.applies = used.taxonomies, used.multi_label, used.applies or ()
        folder.same_run(_settings(run, config, model, tables) | {"from": None if start is None else start.digest})
        if folder.finished is not None:
            folder.finish(folder.finished)
            return _result(run.output)
        examples = {
            split: Examples(
                table,
                classes,
                model.preprocessing,
                model.tokenizer,
                augmentation=config.augmentation if split == "train" else None,
                seed=config.seed,
                unknown="error" if split == "train" else "ignore",
            )
            for split, table in tables.items()
        }
        parameters = sum(p.numel() for p in model.parameters())
        sizes = ", ".join(f"{split} {len(table)}" for split, table in tables.items())
        log.info("data %s: %s rows; model %s: %.1f M parameters", run.table.name, sizes, run.model, parameters / 1e6)
        if model.uses_labels or run.pretrained is None:
            progression = fit(
                model,
                examples["train"],
                examples["validation"],
                config,
                checkpoint=work / CHECKPOINT,
                console=console,
                target_precision=run.target_precision,
                device=device,
            )
        else:
            progression = Progression()  # pretrained towers that learn from no label are taken as they are
        for split, part in examples.items():
            if part.truncated:
                counts[f"truncated_text ({split})"] = part.truncated
            for task, ignored in part.ignored.items():
                if ignored:
                    counts[f"class of {task} without training rows ({split})"] = ignored
        if counts:
            log.info("rows: %s", ", ".join(f"{kind} {number}" for kind, number in counts.items()))
        log.info("best epoch %d of %d, %.0f s", progression.best_epoch, progression.epoch, progression.seconds)

        model.eval()
        measured = measure(model, examples, config, run.target_precision, progression, counts)
        _log_decisions(measured)
        measured.decisions.save(work)
        if run.baselines:
            of_rows = {split: tables[split] for split in ("validation", "test")}
            simple = baselines(tables["train"], of_rows, classes, run.target_precision, config.seed)
            measured.record["baselines"] = {name: of["test"] for name, of in simple.items()}
            for task, accuracies in below_text(measured.record["validation"], simple, "validation").items():
                log.warning(
                    "%s: validation accuracy %.3f, below the %.3f of a TF-IDF regression on the text alone: "
                    "train longer, with another rate, or from pretrained towers",
                    task,
                    *accuracies,
                )
        write_json(work / METRICS, measured.record)
        columns = DataColumns(
            image=run.table.columns.image,
            text=run.table.columns.text,
            tasks=list(run.table.columns.tasks),
            split=run.split_column or run.table.columns.split,
            image_dir=None if run.table.image_dir is None else str(run.table.image_dir.resolve()),
            taxonomies=used.taxonomies,
            multi_label=used.multi_label,
            label_separator=used.label_separator,
            na_value=used.na_value,
            applies=used.applies or (),
        )
        save_model(work, model, columns, absolute(run.table.name), config.model_dump(mode="json"))
        seconds = time.perf_counter() - started
        if run.report:
            facts = {
                "model": f"{run.model}, {parameters / 1e6:.1f} M parameters",
                "data": f"{run.table.name}, {len(run.table)} rows",
                "best epoch": f"{progression.best_epoch} of {progression.epoch}",
                "seed": str(config.seed),
                "training": f"{progression.seconds / 60:.1f} min",
                "in all": f"{seconds / 60:.1f} min",
            }
            title = f"{model.title} on {Path(run.table.name).name}"
            view = report_view(title, facts, model, examples["test"], measured, run.target_precision)
            render_report(view, work / REPORT)
        log.info("wrote %s", run.output)
        folder.finish(True)
    return Result(run.output, measured.record["test"], measured.record.get("baselines", {}), progression.seconds)


def _log_decisions(measured: Measured) -> None:
    for task, found in measured.decisions.thresholds.items():
        if found.threshold is None:
            log.warning(
                "%s: no threshold is shown to reach a precision of %g on %d validation rows: all answers are unsure",
                task,
                found.target_precision,
                found.rows,
            )
        if found.per_class:
            left = len(measured.decisions.tasks[task]) - len(found.classes)
            log.info(
                "%s: %d classes have too few validation rows for a threshold of their own and take the task's",
                task,
                left,
            )
    for sentence in (*sentences(measured.promises), *sentences_of_absence(measured.record["not_applicable"])):
        log.info("test rows: %s", sentence)


def _started(run: TrainingRun, start: Start) -> TrainingRun:
    """The run with the system and the model that it starts from.

    Raises:
        InputError: other ones are asked for.
    """
    asked = {
        "--pretrained": run.pretrained is not None,
        "--model": run.model not in (TINY, start.config.model["name"]),
        "--system": run.system not in ("cma-clip", start.config.system),
    }
    asked |= {f"option {name}": True for name in run.model_options}
    for option, given in asked.items():
        if given:
            raise InputError(f"{option}: system and model are those of '{start.directory}': leave it out")
    columns, before = run.table.columns, start.config.columns.multi_label
    for task in columns.tasks:
        if task in start.config.tasks and (task in columns.multi_label) != (task in before):
            remedy = f"pass --multi-label {task}" if task in before else "do not name it by --multi-label"
            raise InputError(f"task '{task}': has other labels than in '{start.directory}': {remedy}, or rename it")
    return replace(run, system=start.config.system, model=start.config.model["name"], model_options=start.config.model)


def _check_modalities(run: TrainingRun, system: type[System], config: TrainingConfig) -> None:
    """Whether the table has what the system is to learn from."""
    has = (run.table.columns.text is not None, run.table.columns.image is not None)
    if config.contrastive_epochs and not all(system.modalities):
        raise InputError(f"contrastive epochs: '{run.system}' reads one modality alone: leave the epochs out")
    if (config.contrastive_epochs or not system.uses_labels) and not all(has):
        raise InputError("contrastive training needs pictures and texts: name both columns, or leave it out")
    for reads, there, option in zip(system.modalities, has, ("--text", "--image"), strict=True):
        if reads and not there and not all(system.modalities):
            raise InputError(f"'{run.system}' reads nothing else: name a column with {option}")


def _check_names(run: TrainingRun) -> None:
    """Whether `config.json` can name where the data are, and the output can be made, before hours are spent."""
    for path in (run.table.name, *filter(None, [run.table.image_dir])):
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise InputError(f"{str(path)!a}: the name is not UTF-8: rename it") from None
    status_of(run.output)
    try:
        run.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot("written", run.output, error) from error


def _check_output(run: TrainingRun, folder: WorkingFolder) -> Result | None:
    """Refuses to replace what is no artefact; gives the result of a run that is complete, when asked to resume it."""
    if status_of(run.output) is None:
        return None
    if run.resume and not folder.path.exists() and (run.output / METRICS).is_file():
        load_config(run.output)
        return _result(run.output)
    if not run.overwrite:
        raise InputError(f"{run.output}: exists already: name another --output, or pass --overwrite to replace it")
    check_replaceable(run.output, [*run.table.files, *filter(None, [run.table.image_dir])])
    return None


def _result(directory: Path) -> Result:
    """What `metrics.json` of a finished run says."""
    metrics = load_metrics(directory)
    return Result(directory, metrics.test, metrics.baselines, metrics.seconds)


def _prepare(run: TrainingRun, config: TrainingConfig) -> tuple[dict[str, Table], dict[str, int]]:
    """The checked rows, split; and how many rows were bad in what way."""
    if run.splits is not None:
        return run.splits, {}
    counts: Counter[str] = Counter()
    tables = {}
    # split before rows are dropped, so that the same split can be made again whatever is done with bad rows
    for split, part in split_table(run.table, split_column=run.split_column, seed=config.seed).items():
        table, bad = check_rows(part, run.on_bad_rows) if len(part) else (part, {})
        counts.update(bad)
        tables[split] = table
        if len(table) == 0:
            raise InputError(f"{run.table.name}: no rows for split '{split}': add rows, or name another split column")
    return tables, dict(counts)


def _tokenizer(config: Any, table: Table) -> Tokenizer | None:
    """A small vocabulary from the training texts, for our own towers; None for the named model's tokenizer."""
    texts = [text for text in table.texts() if text is not None]
    if not preset(config.name).is_ours or config.text_tower is not None or not texts:
        return None
    return TrainedTokenizer.train(texts, vocab_size=8192, context_length=config.context_length or 32, min_frequency=1)


def _settings(run: TrainingRun, config: TrainingConfig, model: System, tables: dict[str, Table]) -> dict[str, Any]:
    """All that decides what a run ends in: a resumed run must have the same."""
    rows = {split: fingerprint(table) for split, table in tables.items()}
    return {
        "data": absolute(run.table.name),
        **{name: {split: of.get(name) for split, of in rows.items()} for name in rows["train"]},
        "split column": run.split_column,
        "system": model.system,
        "pretrained": run.pretrained,
        "pretrained weights": _weights_digests(run),
        "target_precision": run.target_precision,
        "model": model.config.model_dump(mode="json"),
        "training": config.model_dump(mode="json", exclude={"workers"}),  # which changes the speed alone
        "tasks": model.tasks,
        "versions": {name: number for name, number in versions().items() if name != "python"},
    }


def _weights_digests(run: TrainingRun) -> list[str]:
    """Of the files that the model's towers start from."""
    if run.start is not None:
        return []
    text, image = (run.model_options.get(name) for name in ("text_tower", "image_tower"))
    paths = [Path(name) for name in (run.pretrained, str(image).partition(":")[2]) if name]
    if isinstance(text, str | Path) and Path(text).is_dir():
        paths += sorted(Path(text).iterdir())
    return [file_digest(path) for path in paths if path.is_file()]

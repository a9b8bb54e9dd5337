"""A trained model, and the rows that a command runs it on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cmaclip_fast.cli.output import err
from cmaclip_fast.errors import InputError

if TYPE_CHECKING:
    from cmaclip_fast.classifier.artifact import ArtifactConfig
    from cmaclip_fast.classifier.classifier import Classifier
    from cmaclip_fast.classifier.engine import Engine
    from cmaclip_fast.data.examples import Examples
    from cmaclip_fast.data.source import Source
    from cmaclip_fast.data.table import Table


def _tell(message: str) -> None:
    err.print(message, soft_wrap=True, highlight=False, markup=False)


def chosen_rows(source: Source, config: ArtifactConfig) -> Table:
    """The rows, pictures not yet read; what the command line does not name is as in training."""
    return source.unchecked(config.trained_on(), _tell)


def checked_rows(source: Source, config: ArtifactConfig) -> tuple[Table, dict[str, int]]:
    """The checked rows, and how many were bad in what way."""
    return source.checked(config.trained_on(), _tell)


def files_read(directory: Path, table: Table) -> list[Path]:
    """The files that a command reads and therefore must not overwrite."""
    from cmaclip_fast.classifier.artifact import FILES

    return [*table.files, *(directory / name for name in FILES)]


def load(directory: Path, device: str, min_precision: float | None = None) -> tuple[Classifier, ArtifactConfig]:
    from cmaclip_fast.classifier.artifact import load_config
    from cmaclip_fast.classifier.classifier import Classifier

    return Classifier.load(directory, device, min_precision=min_precision), load_config(directory)


def examples_of(
    model: Engine, table: Table, unknown: Literal["error", "ignore"], tasks: list[str] | None = None
) -> Examples:
    from cmaclip_fast.data.examples import Examples
    from cmaclip_fast.data.files import near

    for task in tasks or []:
        if task not in model.tasks:
            raise InputError(f"--task {task}: the model has no such task{near(task, list(model.tasks))}")
    wanted = tasks or table.columns.tasks
    classes = {task: names for task, names in model.tasks.items() if task in wanted and task in table.columns.tasks}
    return Examples(table, classes, model.preprocessing, model.tokenizer, unknown=unknown)

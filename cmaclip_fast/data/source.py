"""The rows that a command works on, from the options that name a table, its columns and a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from cmaclip_fast.data.check import RowPolicy, check_rows
from cmaclip_fast.data.images import MAX_IMAGE_PIXELS
from cmaclip_fast.data.named import Columns, Taxonomy, absolute, applies_task
from cmaclip_fast.data.split import NAMES, split_table
from cmaclip_fast.data.table import Table, read_table
from cmaclip_fast.errors import InputError


class DataColumns(BaseModel):
    """Where the training data had its pictures, texts and labels; the defaults of later commands."""

    image: str | None
    text: str | None
    tasks: list[str]
    split: str | None = None
    image_dir: str | None = None
    taxonomies: tuple[Taxonomy, ...] = ()
    multi_label: tuple[str, ...] = ()
    label_separator: str | None = None
    na_value: str | None = None
    applies: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainedOn:
    """The data a model was trained on.

    Attributes:
        source: as `--data` named it.
        columns: those that were used.
        seed: of the random split.
    """

    source: str
    columns: DataColumns
    seed: int


def read_columns(
    data: str,
    *,
    max_image_pixels: int,
    image: str | None = None,
    text: str | None = None,
    tasks: list[str] | None = None,
    keys: list[str] | None = None,
    image_dir: Path | None = None,
    split_column: str | None = None,
    split: str | None = None,
    any_columns: bool = False,
    taxonomies: tuple[Taxonomy, ...] = (),
    multi_label: tuple[str, ...] = (),
    label_separator: str | None = None,
    na_value: str | None = None,
) -> Table:
    """`read_table` with each column named by an argument.

    Raises:
        InputError: as `read_table`; a separator that is blank or has no column, or an NA value that is blank.
    """
    if label_separator is not None and not (label_separator.strip() and multi_label):
        raise InputError("label separator: is for columns of several labels: name them with --multi-label, or leave it")
    if na_value is not None and not na_value.strip():
        raise InputError("NA value: is empty, which means unlabelled: name the value that says not applicable")
    na_value = na_value and na_value.strip()
    columns = Columns(
        image,
        text,
        tuple(tasks or ()),
        tuple(keys or ()),
        split_column,
        taxonomies,
        multi_label,
        label_separator,
        na_value,
    )
    return read_table(
        data, columns, image_dir=image_dir, split=split, max_image_pixels=max_image_pixels, any_columns=any_columns
    )


@dataclass(frozen=True, kw_only=True)
class Source:
    """The rows that a trained model is to be run on, as the command line names them.

    Of other data than those of training, `tasks` None uses the model's where there are columns for them, and an empty
    list none.
    """

    data: str | None = None
    image: str | None = None
    text: str | None = None
    tasks: list[str] | None = None
    keys: list[str] | None = None
    image_dir: Path | None = None
    split: str
    split_column: str | None = None
    on_bad_rows: RowPolicy = "error"
    max_image_pixels: int = MAX_IMAGE_PIXELS
    label_separator: str | None = None

    def checked(self, trained: TrainedOn, tell: Callable[[str], None]) -> tuple[Table, dict[str, int]]:
        """The checked rows, and how many were bad in what way; what is not named is as in training."""
        return check_rows(self.unchecked(trained, tell), self.on_bad_rows)

    def unchecked(self, trained: TrainedOn, tell: Callable[[str], None]) -> Table:
        """The rows of the split, pictures not yet read. Training data are split as they were for training.

        Args:
            tell: is given what a user should know: an absent column, an absent split.
        """
        known = trained.columns
        again = self.data is None or absolute(self.data) == trained.source
        source = self.data or trained.source
        image_dir = self.image_dir or (Path(known.image_dir) if again and known.image_dir else None)
        split_column = self.split_column or (known.split if again else None)
        found = read_columns(source, image_dir=image_dir, max_image_pixels=self.max_image_pixels, any_columns=True)
        columns = found.column_names
        image, text = (
            given or (name if name in columns else None)
            for given, name in ((self.image, known.image), (self.text, known.text))
        )
        for name, there in ((known.image, image), (known.text, text)):
            if name is not None and there is None:
                tell(f"{source}: no column '{name}', which the model was trained with: treated as missing")
        taxonomies = tuple(taxonomy for taxonomy in known.taxonomies if again or taxonomy.column in columns)
        levels = {task for taxonomy in known.taxonomies for task in taxonomy.levels_in(known.tasks)}
        derived = {applies_task(task): task for task in known.applies}
        wanted = known.tasks if again or not self.tasks else self.tasks
        tasks = [task for task in dict.fromkeys(derived.get(task, task) for task in wanted) if task not in levels]
        if not again and not self.tasks:
            tasks = [task for task in tasks if task in columns and self.tasks is None]
        used = Columns(
            image,
            text,
            tuple(tasks),
            tuple(self.keys or ()),
            split_column,
            taxonomies,
            tuple(task for task in known.multi_label if task in tasks),
            self.label_separator or known.label_separator,
            known.na_value,
            known.applies,
        )
        table = found.with_columns(used)
        if self.split == "all":
            return table
        if again and self.split in NAMES:
            part = split_table(table, split_column=split_column, seed=trained.seed)[self.split]
            if len(part) == 0:
                raise InputError(f"{source}: no row of split '{self.split}': name another --split, or all")
            return part
        if table.columns.split is None:
            tell(f"{source}: no split column: all {len(table)} rows are used")
            return table
        return found.with_columns(used, self.split)

"""Tasks that are made from columns: the levels of a taxonomy, and whether a task applies to a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pyarrow as pa

from cmaclip_fast.data.files import near
from cmaclip_fast.data.labels import ClassLists, applicability, label
from cmaclip_fast.data.named import APPLIES, Columns, applies_task
from cmaclip_fast.data.values import column_texts, is_bytes, storage
from cmaclip_fast.errors import InputError, listed


def add_levels(name: str, table: pa.Table, columns: Columns) -> tuple[pa.Table, Columns]:
    """A column and a task for each level of each taxonomy."""
    tasks = list(columns.tasks)
    taxonomies = []
    for taxonomy in columns.taxonomies:
        if taxonomy.column not in table.column_names:
            names = table.column_names
            raise InputError(
                f"{name}: no column '{taxonomy.column}' for a taxonomy{near(taxonomy.column, names)}; "
                f"columns: {listed(names)}"
            )
        check_kind(name, table.schema, taxonomy.column)
        paths = [label(value) for value in column_texts(table.column(taxonomy.column))]
        paths = [None if path == columns.na_value else path for path in paths]
        deepest = max((len(taxonomy.names(path)) for path in paths if path is not None), default=0)
        for level in range(1, (taxonomy.levels or max(deepest, 1)) + 1):
            task = taxonomy.task(level)
            if task in table.column_names:
                raise InputError(f"{name}: column '{task}' has the name of a level of '{taxonomy.column}'; rename it")
            upto = pa.array([path and taxonomy.upto(path, level) for path in paths], pa.string())
            table = table.append_column(task, upto)
            tasks.append(task)
        taxonomies.append(replace(taxonomy, levels=len(taxonomy.levels_in(tasks))))
    tasks += [column for column in columns.multi_label if column not in tasks]
    return table, replace(columns, tasks=tuple(tasks), taxonomies=tuple(taxonomies))


def add_applicability(
    name: str, table: pa.Table, columns: Columns, labels: Mapping[str, Sequence[str | None] | ClassLists]
) -> tuple[pa.Table, Columns]:
    """A column and a task for whether a task applies: for those of `columns.applies`, or with rows that they do not.

    Args:
        labels: for each row of a task its class, `columns.na_value`, or None; or a list of classes.
    """
    found = {task: applicability(values, columns.na_value) for task, values in labels.items()}
    wanted = [task for task, values in found.items() if APPLIES[0] in values]
    if columns.applies is not None:
        wanted = [task for task in columns.applies if task in found]
    for task in wanted:
        derived = applies_task(task)
        if derived in table.column_names:
            raise InputError(f"{name}: column '{derived}' has the name of whether '{task}' applies; rename it")
        table = table.append_column(derived, pa.array(found[task], pa.string()))
    if not wanted:
        return table, columns
    tasks = (*columns.tasks, *map(applies_task, wanted))
    return table, replace(columns, tasks=tasks, applies=tuple(wanted))


def check_kind(name: str, schema: pa.Schema, column: str) -> None:
    kind = storage(schema.field(column).type)
    if pa.types.is_nested(kind) or is_bytes(kind):
        raise InputError(f"{name}: column '{column}' holds {kind}, not text or classes; name another")

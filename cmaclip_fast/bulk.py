"""Labels for a whole table as Parquet: part by part, so that an interrupted run goes on, here or on a Ray cluster."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cmaclip_fast.artifact import CONFIG, WEIGHTS, load_model, partial_directory
from cmaclip_fast.data.check import RowPolicy, tally, usable_rows
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.kept import KeptPictures
from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError
from cmaclip_fast.evaluation import run
from cmaclip_fast.files import check_output_file, note_settings
from cmaclip_fast.layouts import lay_out
from cmaclip_fast.prediction import Prediction, output_schema, read_output
from cmaclip_fast.progress import Console, rate_bar
from cmaclip_fast.systems.base import System

Engine = Literal["local", "ray"]

PART_ROWS = 512
"""Rows that are labelled, and kept, at a time."""

GROUP_ROWS = 65_536
"""Rows of a row group of the file."""

RUN = "run.json"
COUNTS = b"counts"

Span = tuple[int, int]


@dataclass(frozen=True)
class BulkRun:
    """What is labelled, and how.

    Attributes:
        model: a folder that training wrote.
        table: its rows; their key columns go into the file, or `row`, the row in its file, where there are none.
        output: the Parquet file to write.
        policy: what a bad row leads to.
        batch_size: rows the model takes at a time.
        device: of the model; None takes a GPU if there is one.
        engine: `local` works in this process; `ray` on the Ray cluster that RAY_ADDRESS names, or on this machine.
        workers: models side by side under `ray`; None is one for each GPU, or for each machine.
        resume: go on with a run towards `output` that did not end.
        overwrite: replace a file, or drop an unfinished run, that is there.
    """

    model: Path
    table: Table
    output: Path
    policy: RowPolicy = "error"
    batch_size: int = 64
    device: str | None = None
    engine: Engine = "local"
    workers: int | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Part:
    """The predictions of the rows from `start` on.

    Attributes:
        rows: the rows that were labelled, of those of the part.
        columns: what is said of them, without their keys.
        counts: how many rows were bad in what way, and how many texts were truncated.
    """

    start: int
    rows: list[int]
    columns: pa.Table
    counts: dict[str, int]


class Labeller:
    """Labels parts of a table with a model; a worker of either engine."""

    def __init__(self, bulk: BulkRun) -> None:
        self._bulk = bulk
        self._device = bulk.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model: System = load_model(bulk.model, self._device)
        self._schema = output_schema(pa.schema([]), self._model.tasks)
        lay_out(self._model.parameters())

    def label(self, start: int, stop: int) -> Part:
        """
        Raises:
            InputError: a bad row, if such rows end the run.
        """
        return self._classify(*self._read(start, stop))

    def label_all(self, spans: Iterable[Span], note: Callable[[int], None]) -> Iterator[Part]:
        """One part after the other; while the model is busy with one, the pictures of the next are read.

        `note` hears of the rows of each batch.
        """
        with ThreadPoolExecutor(1) as reader:
            waiting = None
            for span in spans:
                ready, waiting = waiting, reader.submit(self._read, *span)
                if ready is not None:
                    yield self._classify(*ready.result(), note)
            if waiting is not None:
                yield self._classify(*waiting.result(), note)

    def _read(self, start: int, stop: int) -> tuple[int, list[int], Examples | None, Counter[str]]:
        rows = list(range(start, stop))
        kept = KeptPictures(self._bulk.table.select(rows), self._model.preprocessing)
        table, used, bad = usable_rows(kept, self._bulk.policy)
        counts = Counter(bad)
        if len(table) == 0:
            return start, [], None, counts
        examples = Examples(table, {}, self._model.preprocessing, self._model.tokenizer)
        if examples.truncated:
            counts["truncated text"] = examples.truncated
        return start, [rows[i] for i in used], examples, counts

    def _classify(
        self,
        start: int,
        rows: list[int],
        examples: Examples | None,
        counts: Counter[str],
        note: Callable[[int], None] = lambda rows: None,
    ) -> Part:
        records: list[dict[str, Any]] = []
        if examples is not None:
            for batch, result in run(self._model, examples, self._bulk.batch_size, self._device):
                records += map(_flatten, read_output(result, self._model.tasks, self._model.taxonomies))
                note(len(batch))
        return Part(start, rows, pa.Table.from_pylist(records, schema=self._schema), dict(counts))


def predict_table(bulk: BulkRun, tasks: dict[str, list[str]], console: Console | None = None) -> dict[str, int]:
    """Labels every row of a table and writes them as Parquet, whole or not at all.

    What is labelled is kept in `OUTPUT.partial` until all is, so that a run that did not end is gone on with.

    Args:
        tasks: the model's.
        console: for the progress bar.

    Returns:
        `rows`, how many were written, and how many were bad in what way.

    Raises:
        InputError: a bad row, or none that can be used; a key column with the name of an output column; a file, or an
            unfinished run, that is there already, or none to go on with.
    """
    _check_output(bulk)
    table = bulk.table
    keys = pa.Table.from_pylist([table.keys(i) or {"row": table.row_number(i)} for i in range(len(table))])
    taken = set(keys.column_names) & set(output_schema(pa.schema([]), tasks).names)
    if taken:
        raise InputError(
            f"key column '{sorted(taken)[0]}' has the name of an output column: choose other --key columns"
        )
    schema = output_schema(keys.schema, tasks)
    partial = partial_directory(bulk.output)
    _same_run(partial / RUN, bulk)
    try:
        spans = [(start, min(start + PART_ROWS, len(table))) for start in range(0, len(table), PART_ROWS)]
        missing = [span for span in spans if not _part_path(partial, span[0]).is_file()]
        with rate_bar(console or Console(stderr=True), "rows") as bar:
            done = len(table) - sum(stop - start for start, stop in missing)
            task = bar.add_task("predicting", total=len(table), completed=done)
            for part in _work(bulk, missing, lambda rows: bar.advance(task, rows)):
                _write_part(_part_path(partial, part.start), part, keys, schema)
                done += min(PART_ROWS, len(table) - part.start)
                bar.update(task, completed=done)
        counts = _join([_part_path(partial, start) for start, _ in spans], schema, bulk)
    except BaseException as error:
        if not list(partial.glob("part-*.parquet")):
            shutil.rmtree(partial)
        elif isinstance(error, InputError):
            raise InputError(f"{error}; what is labelled is kept: go on with --resume") from error
        raise
    shutil.rmtree(partial)
    return counts


def _check_output(bulk: BulkRun) -> None:
    check_output_file(bulk.output, bulk.overwrite)
    partial = partial_directory(bulk.output)
    if partial.exists() and not (partial / RUN).is_file() and any(partial.iterdir()):
        raise InputError(f"{partial}: is no unfinished run of ours: move it away, or name another --output")
    if bulk.resume and not partial.exists():
        raise InputError(f"{partial}: no unfinished run to resume: leave out --resume")
    if not bulk.resume and partial.exists():
        if not bulk.overwrite:
            raise InputError(
                f"{partial}: an unfinished run is there: go on with --resume, or pass --overwrite to drop it"
            )
        shutil.rmtree(partial)


def _same_run(path: Path, bulk: BulkRun) -> None:
    """Notes what is being labelled, and by what; on resuming, refuses to go on with anything else."""
    table, texts = bulk.table, 0
    for row in range(len(table)):
        texts = zlib.crc32(repr(table.text(row)).encode(), texts)
    now = {
        "model": [_checksum(bulk.model / name) for name in (CONFIG, WEIGHTS)],
        "rows": [len(table), texts],
        "columns": [table.columns.image, table.columns.text, *table.columns.keys],
        "on_bad_rows": bulk.policy,
        "part_rows": PART_ROWS,
    }
    note_settings(path, now)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _work(bulk: BulkRun, spans: list[Span], note: Callable[[int], None]) -> Iterator[Part]:
    if not spans:
        return iter(())
    return _ray(bulk, spans) if bulk.engine == "ray" else Labeller(bulk).label_all(spans, note)


def _ray(bulk: BulkRun, spans: list[Span]) -> Iterator[Part]:
    """Parts as Ray's actors finish them. Tried with several on one machine without a GPU."""
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent unless asked for
        import ray
        from ray.exceptions import RayActorError, RayTaskError
        from ray.util import ActorPool
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'cmaclip_fast[ray]'") from None
    started = not ray.is_initialized()
    ray.init(ignore_reinit_error=True, logging_level=logging.ERROR, log_to_driver=False)
    try:
        # what does not fit would wait for ever
        resources = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        gpus, cpus = (int(sum(found.get(kind, 0) for found in resources)) for kind in ("GPU", "CPU"))
        threads, needs = 1, {}
        if gpus and bulk.device != "cpu":
            workers = min(len(spans), bulk.workers or gpus)
            needs["num_gpus"] = 1 / math.ceil(workers / gpus)
        else:
            workers = min(len(spans), bulk.workers or len(resources), cpus)
            smallest = int(min(found["CPU"] for found in resources))
            threads = max(1, smallest // math.ceil(workers / len(resources)))
            needs["num_cpus"] = threads
        actor = ray.remote(_Actor).options(**needs)
        shared = ray.put(bulk)
        pool = ActorPool([actor.remote(shared, threads) for _ in range(workers)])
        yield from pool.map_unordered(lambda worker, span: worker.label.remote(*span), spans)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise InputError(f"a worker of Ray died ({' '.join(str(error).split())[:200]}): see to its machine") from error
    finally:
        if started:
            ray.shutdown()


class _Actor(Labeller):
    def __init__(self, bulk: BulkRun, threads: int) -> None:
        torch.set_num_threads(threads)
        super().__init__(bulk)


def _part_path(partial: Path, start: int) -> Path:
    return partial / f"part-{start:012d}.parquet"


def _write_part(path: Path, part: Part, keys: pa.Table, schema: pa.Schema) -> None:
    rows = keys.take(pa.array(part.rows, pa.int64()))
    for field in part.columns.schema:
        rows = rows.append_column(field, part.columns.column(field.name))
    temporary = path.with_name(path.name + ".tmp")
    counts = schema.with_metadata({COUNTS: json.dumps(part.counts).encode()})
    pq.write_table(rows.cast(counts), temporary)
    os.replace(temporary, path)


def _join(parts: list[Path], schema: pa.Schema, bulk: BulkRun) -> dict[str, int]:
    """Makes one file of all parts; gives the sums of what they counted."""
    counts: Counter[str] = Counter()
    group: list[pa.Table] = []
    temporary = bulk.output.with_name(bulk.output.name + ".tmp")
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for path in parts:
                table = pq.read_table(path)
                counts += Counter(json.loads(table.schema.metadata[COUNTS]))
                counts["rows"] += len(table)
                group.append(table.replace_schema_metadata(None))
                if sum(map(len, group)) >= GROUP_ROWS or path is parts[-1]:
                    writer.write_table(pa.concat_tables(group).cast(schema))
                    group.clear()
        if not counts["rows"]:
            for path in parts:
                path.unlink()  # they would be gone on with when the rows are mended
            raise InputError(f"{bulk.table.name}: no usable row is left ({tally(counts)}); mend the rows")
        os.replace(temporary, bulk.output)
    finally:
        temporary.unlink(missing_ok=True)
    return dict(counts)


def _flatten(row: dict[str, Prediction]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for task, prediction in row.items():
        record[task] = prediction.label
        record[f"{task}_probability"] = prediction.probability
        record[f"{task}_top"] = [{"label": label, "probability": p} for label, p in prediction.top]
        record[f"{task}_text_weight"] = prediction.text_weight
        record[f"{task}_image_weight"] = prediction.image_weight
    return record

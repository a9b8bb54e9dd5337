"""Labels for a whole table as Parquet, part by part, so that a run can be resumed; here or on a Ray cluster."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cmaclip_fast import signals
from cmaclip_fast.classifier.artifact import CALIBRATION, CONFIG, FILES, SCORES, THRESHOLDS, WEIGHTS, versions
from cmaclip_fast.classifier.labeller import Labeller, Part, Span
from cmaclip_fast.classifier.prediction import output_schema
from cmaclip_fast.data.check import RowPolicy, tally
from cmaclip_fast.data.fingerprint import digest, file_digest, fingerprint, picture_digest
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError
from cmaclip_fast.files import check_output_file, replacing
from cmaclip_fast.progress import Console, rate_bar
from cmaclip_fast.working import WorkingFolder

Engine = Literal["local", "ray"]

PART_ROWS = 512
"""Rows that are labelled, and kept, at a time."""

GROUP_ROWS = 65_536
"""Rows of a row group of the file."""

RESTARTS = 5
"""How often a worker of Ray is replaced, and a part begun again, before the run ends."""

_POLL_SECONDS = 0.5

_RAY_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

RESULT = "joined.parquet"
PART = b"part"


@dataclass(frozen=True, kw_only=True)
class BulkRun:
    """Settings of a prediction run.

    Attributes:
        model: a folder that training wrote.
        table: its rows; their key columns go into the file, or `row`, the row in its file, where there are none.
        output: the Parquet file to write.
        policy: what a bad row leads to.
        batch_size: rows the model takes at a time.
        device: of the model; None takes a GPU if there is one.
        engine: `local` works in this process; `ray` on the Ray cluster that RAY_ADDRESS names, or on this machine.
        workers: models side by side under `ray`; None is one for each GPU, or for each machine.
        resume: continue an interrupted run towards `output`.
        overwrite: replace a file, or drop an unfinished run, that is there.
        profile: print where the time went; of the engine `local` alone.
        min_precision: of the answers that are accepted; None is what the model was trained for.
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
    profile: bool = False
    min_precision: float | None = None


def predict_table(
    bulk: BulkRun,
    tasks: dict[str, list[str]],
    taxonomies: Sequence[Taxonomy] = (),
    console: Console | None = None,
    multi_label: Collection[str] = (),
) -> dict[str, int]:
    """Labels every row of a table and writes them as Parquet, whole or not at all.

    Finished parts are kept in `OUTPUT.partial` until all are, so that an interrupted run can be resumed.

    Args:
        tasks, taxonomies, multi_label: the model's.
        console: for the progress bar.

    Returns:
        `rows`, how many were written, and how many were bad in what way.

    Raises:
        InputError: a bad row, or none that can be used; a key column with the name of an output column; a file, or an
            unfinished run, that is there already, or none to resume.
    """
    table = bulk.table
    keys = table.key_columns()
    if not keys.column_names:
        keys = pa.table({"row": [table.row_number(i) for i in range(len(table))]})
    taken = set(keys.column_names) & set(output_schema(pa.schema([]), tasks, taxonomies, multi_label).names)
    if taken:
        raise InputError(
            f"key column '{sorted(taken)[0]}' has the name of an output column: choose other --key columns"
        )
    folder = WorkingFolder(
        bulk.output, "cmaclip predict", rf"part-\d{{12}}\.parquet|{re.escape(RESULT)}", r"part-.*", RESULT
    )
    with folder.held():
        _check_output(bulk)
        with folder.opened(bulk.resume, bulk.overwrite):
            folder.same_run(_settings(bulk))
            counts = folder.finished
            if counts is None:
                parts = _Parts(bulk, folder.path, keys, output_schema(keys.schema, tasks, taxonomies, multi_label))
                console = console or Console(stderr=True)
                missing = parts.missing(console)
                try:
                    _label(bulk, parts, missing, console)
                    counts = parts.join()
                except InputError as error:
                    if folder.is_worth_keeping():
                        raise InputError(f"{error}; what is labelled is kept: resume with --resume") from error
                    raise
            folder.finish(counts)
    return dict(counts)


def _check_output(bulk: BulkRun) -> None:
    """
    Raises:
        InputError: the file is there already, cannot be written, or is one that is read.
    """
    check_output_file(bulk.output, bulk.overwrite, [*bulk.table.files, *(bulk.model / name for name in FILES)])


def _settings(bulk: BulkRun) -> dict[str, Any]:
    """All that decides what a run ends in but the pictures' files, which `_Parts` looks after."""
    settings = fingerprint(bulk.table, with_files=False)
    settings["model"] = [file_digest(bulk.model / name) for name in (CONFIG, WEIGHTS, CALIBRATION, THRESHOLDS, SCORES)]
    settings["min_precision"] = bulk.min_precision
    # the bound decides which rows are bad, which matters where these do not end the run
    settings["on_bad_rows"] = [bulk.policy, None if bulk.policy == "error" else bulk.table.max_image_pixels]
    settings["part_rows"] = PART_ROWS
    settings["versions"] = {name: number for name, number in versions().items() if name != "python"}
    return settings


def _label(bulk: BulkRun, parts: _Parts, missing: list[Span], console: Console) -> None:
    """Labels and keeps what is missing."""
    with signals.steps(), rate_bar(console, "rows") as bar:
        done = len(bulk.table) - sum(stop - start for start, stop in missing)
        task = bar.add_task("predicting", total=len(bulk.table), completed=done)

        def note(rows: int) -> None:
            bar.advance(task, rows)
            signals.check()

        with closing(_work(bulk, missing, note, console)) as found:
            for part in found:
                parts.write(part)
                done += min(PART_ROWS, len(bulk.table) - part.start)
                bar.update(task, completed=done)
                signals.check()


class _Parts:
    """The parts of a run in its working folder: a Parquet file each, which tells of which rows and pictures it is."""

    def __init__(self, bulk: BulkRun, folder: Path, keys: pa.Table, schema: pa.Schema) -> None:
        self._bulk = bulk
        self._folder = folder
        self._keys = keys
        self._schema = schema
        rows = len(bulk.table)
        self._spans = [(start, min(start + PART_ROWS, rows)) for start in range(0, rows, PART_ROWS)]
        # before any picture is read: one that changes meanwhile is seen later
        self._pictures = {start: picture_digest(bulk.table, start, stop) for start, stop in self._spans}

    def missing(self, console: Console) -> list[Span]:
        """The rows that are still to be labelled; a damaged part is reported and dropped.

        Raises:
            InputError: pictures of rows that are labelled have changed.
        """
        missing = []
        for start, stop in self._spans:
            path = self._path(start)
            if not path.exists():
                missing.append((start, stop))
                continue
            try:
                _, said = self._read(start)
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())[:100]
                said_so = f"{path}: is damaged ({reason}): rows {start + 1} to {stop} are labelled again"
                console.print(said_so, soft_wrap=True, highlight=False, markup=False)
                path.unlink()
                missing.append((start, stop))
                continue
            if said["pictures"] != self._pictures[start]:
                raise InputError(
                    f"{self._bulk.table.name}: pictures of rows {start + 1} to {stop} changed after they were labelled "
                    f"({self._folder}): restore them, or pass --overwrite in place of --resume to start again"
                )
        return missing

    def write(self, part: Part) -> None:
        """Keeps a part."""
        rows = self._keys.take(pa.array(part.rows, pa.int64()))
        for field in part.columns.schema:
            rows = rows.append_column(field, part.columns.column(field.name))
        rows = rows.cast(self._schema)
        said = {"counts": part.counts, "pictures": self._pictures[part.start]}
        said["content"] = self._content(part.start, rows, said)
        with replacing(self._path(part.start)) as temporary:
            pq.write_table(rows.replace_schema_metadata({PART: json.dumps(said).encode()}), temporary)

    def join(self) -> dict[str, int]:
        """Makes one file of all parts; gives the sums of what they counted.

        Raises:
            InputError: no row could be labelled.
        """
        counts: Counter[str] = Counter()
        group: list[pa.Table] = []
        with replacing(self._folder / RESULT) as temporary, pq.ParquetWriter(temporary, self._schema) as writer:
            for start, _ in self._spans:
                rows, said = self._read(start)
                counts += Counter(said["counts"])
                counts["rows"] += len(rows)
                group.append(rows)
                if sum(map(len, group)) >= GROUP_ROWS or start == self._spans[-1][0]:
                    writer.write_table(pa.concat_tables(group))
                    group.clear()
        if not counts["rows"]:
            for path in self._folder.glob("*.parquet"):
                path.unlink()  # they would be resumed from when the rows are fixed
            raise InputError(f"{self._bulk.table.name}: no usable row is left ({tally(counts)}); fix the rows")
        return dict(counts)

    def _read(self, start: int) -> tuple[pa.Table, dict[str, Any]]:
        """A part without its note, and the note."""
        table = pq.read_table(self._path(start))
        said = json.loads(table.schema.metadata[PART])
        rows = table.replace_schema_metadata(None).cast(self._schema)
        if said["content"] != self._content(start, rows, said):
            raise ValueError("its content is not what was written")
        return rows, said

    def _content(self, start: int, rows: pa.Table, said: dict[str, Any]) -> str:
        return digest([start, sorted(said["counts"].items()), said["pictures"], *rows.to_pylist()])

    def _path(self, start: int) -> Path:
        return self._folder / f"part-{start:012d}.parquet"


def _work(bulk: BulkRun, spans: list[Span], note: Callable[[int], None], console: Console) -> Generator[Part]:
    if not spans:
        return
    if bulk.engine == "ray":
        yield from _ray(bulk, spans)
        return
    labeller = Labeller(bulk.model, bulk.table, bulk.policy, bulk.batch_size, bulk.device, bulk.min_precision)
    yield from labeller.label_all(spans, note)
    if bulk.profile:
        console.print(str(labeller.profile), highlight=False, soft_wrap=True)


def _ray(bulk: BulkRun, spans: list[Span]) -> Iterator[Part]:
    """Parts as Ray's actors finish them. Tried with several on one machine without a GPU."""
    ray = _import_ray()
    from ray.exceptions import RayActorError, RayTaskError
    from ray.util import ActorPool

    started = not ray.is_initialized()
    if started:
        _start_ray(ray)
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
        # one that dies is replaced and its part done again, but not for ever: the model may be what kills it
        actor = ray.remote(_Actor).options(max_restarts=RESTARTS, max_task_retries=RESTARTS, **needs)
        shared = ray.put(bulk)
        pool = ActorPool([actor.remote(shared, threads) for _ in range(workers)])
        for span in spans:
            pool.submit(lambda worker, span: worker.label.remote(*span), span)
        while pool.has_next():
            signals.check()
            with suppress(TimeoutError):
                yield pool.get_next_unordered(timeout=_POLL_SECONDS)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
    except RayActorError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"a worker of Ray died more than {RESTARTS} times ({reason}): check its machine") from error
    finally:
        if started:
            ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent unless asked for
    try:
        import ray
    except ImportError:
        raise InputError("--engine ray needs Ray: pip install 'cmaclip_fast[ray]'") from None
    return ray


def _start_ray(ray: Any) -> None:
    """Connects to the cluster that RAY_ADDRESS names, or starts one on this machine that only it can reach."""
    options: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        options["include_dashboard"] = False
        # Ray listens where its node's address is, and takes loopback for that only where it is told to make no cluster
        if os.environ.setdefault(_RAY_CLUSTER, "0") == "0":
            ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # the variable was read when Ray was imported
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own there


class _Actor(Labeller):
    def __init__(self, bulk: BulkRun, threads: int) -> None:
        torch.set_num_threads(threads)
        super().__init__(bulk.model, bulk.table, bulk.policy, bulk.batch_size, bulk.device, bulk.min_precision)

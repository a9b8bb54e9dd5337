"""Labels the rows of a table part by part; rows are read, and answers written, while the model computes."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch

from cmaclip_fast import signals
from cmaclip_fast.classifier.classifier import Classifier
from cmaclip_fast.classifier.prediction import flatten, output_schema
from cmaclip_fast.data.check import RowPolicy, usable_rows
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.kept import KeptPictures
from cmaclip_fast.data.table import Table
from cmaclip_fast.types import Batch, Output

T = TypeVar("T")
Span = tuple[int, int]

AHEAD = 4
"""Batches that are ready before the model needs them, and answers that wait to be written."""

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Part:
    """The predictions of the rows from `start` on.

    Attributes:
        rows: the rows of the part that were labelled.
        columns: their predictions, without their keys.
        counts: how many rows were bad in what way, and how many texts were truncated.
    """

    start: int
    rows: list[int]
    columns: pa.Table
    counts: dict[str, int]


@dataclass
class Profile:
    """Where the time of the model's thread went, in seconds.

    Attributes:
        computing: in the model.
        waiting: for rows to be read, decoded and tokenized.
        blocked: for answers to be taken away and written.
        loading: the model, before the first row.
    """

    computing: float = 0.0
    waiting: float = 0.0
    blocked: float = 0.0
    loading: float = 0.0

    @property
    def busy(self) -> float:
        """The share of the time, after loading, that the model was computing."""
        return self.computing / max(self.computing + self.waiting + self.blocked, 1e-9)

    def __str__(self) -> str:
        return (
            f"model busy {self.busy:.1%}: computing {self.computing:.1f} s, waiting for rows {self.waiting:.1f} s, "
            f"for answers to be written {self.blocked:.1f} s; loading the model {self.loading:.1f} s"
        )


@dataclass(frozen=True)
class _Step:
    """A batch of a part, and after the model its output; both None where no row of the part can be used."""

    start: int
    rows: list[int]
    counts: Counter[str]
    is_last: bool
    batch: Batch | None = None
    output: Output | None = None


class Labeller:
    """Labels parts of a table with a model; a worker of either engine.

    Attributes:
        profile: of `label_all`.
    """

    def __init__(
        self,
        model: Path,
        table: Table,
        policy: RowPolicy,
        batch_size: int,
        device: str | None,
        min_precision: float | None = None,
    ) -> None:
        self._table = table
        self._policy = policy
        self._batch_size = batch_size
        started = time.perf_counter()
        placed = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._classifier = Classifier.load(model, placed, min_precision=min_precision)
        self._engine = self._classifier.engine
        self.profile = Profile(loading=time.perf_counter() - started)
        engine = self._engine
        self._schema = output_schema(pa.schema([]), engine.tasks, engine.taxonomies, engine.multi_label)

    def label(self, start: int, stop: int) -> Part:
        """The predictions of the rows `start` to `stop`.

        Raises:
            InputError: a bad row, if such rows end the run.
        """
        (part,) = self.label_all([(start, stop)])
        return part

    def label_all(self, spans: Iterable[Span], note: Callable[[int], None] = lambda rows: None) -> Iterator[Part]:
        """One part after the other.

        A thread reads and tokenizes rows and decodes pictures, one runs the model, and the caller's makes its output
        into columns, so that the model need not wait for either.

        Args:
            note: called with the number of rows of each batch.

        Raises:
            InputError: a bad row, if such rows end the run, after the parts before it.
        """
        records: list[dict[str, Any]] = []
        with closing(ahead(self._answered(spans), AHEAD)) as steps:
            for step in steps:
                records += self._records(step)
                if step.batch is not None:
                    note(len(step.batch))
                if step.is_last:
                    columns = pa.Table.from_pylist(records, schema=self._schema)
                    records = []
                    yield Part(step.start, step.rows, columns, dict(step.counts))

    def _records(self, step: _Step) -> list[dict[str, Any]]:
        """The values of the columns for each row of a step; in the caller's thread."""
        if step.output is None:
            return []
        return [flatten(row, self._engine.taxonomies) for row in self._classifier.read(step.output)]

    def _answered(self, spans: Iterable[Span]) -> Iterator[_Step]:
        """Runs the model; in a thread of its own."""
        profile = self.profile
        with closing(ahead(self._read(spans), AHEAD)) as steps, torch.inference_mode():
            asked = time.perf_counter()
            for step in steps:
                given = time.perf_counter()
                profile.waiting += given - asked
                if step.batch is not None:
                    output = self._engine(step.batch)
                    step = _Step(step.start, step.rows, step.counts, step.is_last, step.batch, output)
                done = time.perf_counter()
                profile.computing += done - given
                yield step
                asked = time.perf_counter()
                profile.blocked += asked - done

    def _read(self, spans: Iterable[Span]) -> Iterator[_Step]:
        """Reads rows, decodes their pictures in several threads, tokenizes, and makes batches."""
        engine, size = self._engine, self._batch_size
        for start, stop in spans:
            rows = list(range(start, stop))
            kept = KeptPictures(self._table.select(rows), engine.preprocessing)
            table, used, bad = usable_rows(kept, self._policy, lambda done, rows: signals.check())
            counts = Counter(bad)
            if len(table) == 0:
                yield _Step(start, [], counts, is_last=True)
                continue
            examples = Examples(table, {}, engine.preprocessing, engine.tokenizer)
            if examples.truncated:
                counts["truncated text"] = examples.truncated
            labelled = [rows[index] for index in used]
            for first in range(0, len(examples), size):
                batch = examples.batch(range(first, min(first + size, len(examples))))
                yield _Step(start, labelled, counts, first + size >= len(examples), batch)


def ahead(items: Iterator[T], number: int) -> Generator[T]:
    """The items of an iterator that runs in a thread of its own, up to `number` items ahead.

    An error of the iterator is raised after the items before it. Close the generator to end the thread early.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(number)
    closed = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not closed.is_set():
            try:
                ready.put((kind, value), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                pass
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    break
            put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = threading.Thread(target=work, name="cmaclip-ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        closed.set()
        thread.join()

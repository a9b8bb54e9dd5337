"""A model that answers many requests at a time: decoding, batching, reloading."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmaclip_fast.classifier.artifact import CONFIG, WEIGHTS
from cmaclip_fast.classifier.classifier import Classifier
from cmaclip_fast.classifier.pairs import read_text
from cmaclip_fast.data.images import ImageProblem, read_image
from cmaclip_fast.errors import InputError
from cmaclip_fast.serving.batching import Batcher
from cmaclip_fast.serving.errors import Refused, full
from cmaclip_fast.serving.metrics import Metrics
from cmaclip_fast.serving.settings import Settings

Given = tuple[bytes | None, str | None]
"""A picture's file and a text, as a client sent them."""

Prepared = tuple[Tensor | None, str | None]
"""The pixels as the model sees them, and the text."""

TABLES = 2
"""Uploaded tables that are labelled at a time."""

WARM_ROWS = 32
"""Rows of the larger of two batches that a model runs when it is loaded: weights are laid out for few and for many."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that answers; requests keep the one that they began with."""

    classifier: Classifier
    name: str
    version: str


def load(directory: Path, device: str, precision: str, min_precision: float | None = None) -> Loaded:
    """A model that has answered once, so that its weights are laid out before a client waits for it.

    Raises:
        InputError: as `Classifier.load`.
    """
    classifier = Classifier.load(directory, device, precision, min_precision=min_precision)
    side = classifier.preprocessing.size
    for rows in (1, WARM_ROWS):
        classifier.predict([torch.zeros(3, side, side, dtype=torch.uint8)] * rows, ["a"] * rows)
    return Loaded(classifier, directory.resolve().name, _version(directory))


def _version(directory: Path) -> str:
    """Of the settings and, by their file's size and time, of the weights."""
    weights = (directory / WEIGHTS).stat()
    said = f"{weights.st_size} {weights.st_mtime_ns} ".encode() + (directory / CONFIG).read_bytes()
    return hashlib.sha256(said).hexdigest()[:12]


class Service:
    """What the endpoints call. To be used within one event loop, from `start` to `close`.

    Attributes:
        model: that answers the requests which come now.
        settings, metrics: of this service.
        stopping: whether it takes no more requests.
    """

    def __init__(self, model: Loaded, settings: Settings, again: Callable[[], Loaded] | None = None) -> None:
        """
        Args:
            again: loads the model anew, for `reload`.
        """
        self.model, self.settings = model, settings
        self.metrics = Metrics()
        self.stopping = False
        self._again = again
        self._reloading = asyncio.Lock()
        self._tables = 0
        self._decoders = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cmaclip-decode")
        self._batcher: Batcher | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self._batcher is not None and not self.stopping

    def start(self) -> None:
        self._batcher = Batcher(
            _run, self.settings.batch_rows, self.settings.limits.queue_rows, self.metrics.batch.observe
        )
        self._batcher.start()
        self.metrics.waiting.set_function(lambda: self._batcher.waiting if self._batcher else 0)
        self.metrics.ready.set_function(lambda: float(self.is_ready))

    async def close(self) -> None:
        """Returns when all that was accepted is answered."""
        self.stopping = True
        if self._batcher is not None:
            await self._batcher.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def reload(self) -> bool:
        """Loads the artifact anew; the model before answers until then, and goes on if the new one cannot be loaded.

        Returns:
            Whether the model was replaced.
        """
        if self._again is None:
            return False
        async with self._reloading:
            try:
                self.model = await asyncio.to_thread(self._again)
            except (InputError, OSError) as error:
                self.metrics.loads.labels("failed").inc()
                log.error("the model was not loaded anew", extra={"fields": {"reason": str(error)}})
                return False
        self.metrics.loads.labels("loaded").inc()
        log.info("the model was loaded anew", extra={"fields": {"version": self.model.version}})
        return True

    async def answer(self, kind: str, rows: list[Given]) -> list[Any]:
        """What `Classifier` says of the rows of a request.

        Args:
            kind: `predict`, `embed` or `explain`, a method of `Classifier`.

        Raises:
            Refused: a row that cannot be used, a full queue, or no answer in time.
        """
        until = time.monotonic() + self.settings.limits.seconds
        model, batcher = self.model, self._running()
        batcher.check_room(len(rows))
        prepared = []
        for found in await self.prepare(model, rows):
            if isinstance(found, Refused):
                raise found
            prepared.append(found)
        answers = await batcher.submit((kind, model), prepared, until - time.monotonic())
        self.metrics.rows.labels(kind).inc(len(rows))
        return answers

    async def answer_each(self, model: Loaded, kind: str, rows: list[Given]) -> list[Any]:
        """As `answer`, with the `Refused` of a row that cannot be used in its place; waits where the queue is full.

        Args:
            model: of all parts of a table.

        Raises:
            Refused: no answer in time.
        """
        until = time.monotonic() + self.settings.limits.seconds
        batcher = self._running()
        found: list[Any] = await self.prepare(model, rows)
        usable = [row for row in found if not isinstance(row, Refused)]
        while usable:
            try:
                answers = iter(await batcher.submit((kind, model), usable, until - time.monotonic()))
                break
            except Refused as error:
                if error.status != 429 or time.monotonic() > until:
                    raise
                await asyncio.sleep(0.05)
        self.metrics.rows.labels(kind).inc(len(usable))
        return [row if isinstance(row, Refused) else next(answers) for row in found]

    @asynccontextmanager
    async def one_table(self) -> AsyncIterator[None]:
        """A few tables at a time: each is held in memory as a whole, and takes the model for long.

        Raises:
            Refused: there are that many.
        """
        if self._tables >= TABLES:
            raise full(f"{self._tables} tables are being labelled", 5)
        self._tables += 1
        try:
            yield
        finally:
            self._tables -= 1

    async def prepare(self, model: Loaded, rows: list[Given]) -> list[Prepared | Refused]:
        """The rows as the model takes them, or why one cannot be used."""
        loop = asyncio.get_running_loop()
        limits = self.settings.limits
        work = [
            partial(_prepare, model.classifier, limits.pixels, limits.text_characters, *row) for row in enumerate(rows)
        ]
        return await asyncio.gather(
            *(
                loop.run_in_executor(self._decoders, one) if image else _at_once(one)
                for one, (image, _) in zip(work, rows, strict=True)
            )
        )

    def _running(self) -> Batcher:
        if self._batcher is None or self.stopping:
            raise Refused(503, "stopping", "the service is starting or being stopped: try again", retry_after=1)
        return self._batcher


async def _at_once(work: Callable[[], Prepared | Refused]) -> Prepared | Refused:
    return work()


def _prepare(classifier: Classifier, pixels: int, characters: int, number: int, row: Given) -> Prepared | Refused:
    content, given = row
    try:
        text = read_text(number, given)
    except InputError as error:
        return Refused(422, "bad_text", str(error), number)
    if text is not None and len(text) > characters:
        said = f"row {number}: the text has {len(text):,} characters, over the limit of {characters:,}: shorten it"
        return Refused(422, "long_text", said, number)
    if not content and text is None:
        return Refused(422, "empty_row", f"row {number}: neither image nor text: give at least one", number)
    if not content:
        return None, text
    try:
        preprocessing = classifier.preprocessing
        return preprocessing.pixels(read_image(content, pixels, preprocessing.background)), text
    except ImageProblem as problem:
        said = str(problem).replace(", or raise max_image_pixels", "")
        return Refused(422, problem.kind, f"row {number}: the picture {said}", number)


def _run(kind: tuple[str, Loaded], rows: list[Prepared]) -> list[Any]:
    """In the model's thread: pictures are pixels already, which the classifier takes as they are."""
    name, model = kind
    method = getattr(model.classifier, name)
    if len(rows) == 1:
        return [method(*rows[0])]
    images, texts = (list(side) for side in zip(*rows, strict=True))
    return list(method(images, texts, batch_size=len(rows)))

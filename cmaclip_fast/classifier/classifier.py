"""The one way to run a trained model: from pictures and texts to labels, probabilities, embeddings, explanations."""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from cmaclip_fast.classifier.artifact import DataColumns, load_config, load_model
from cmaclip_fast.classifier.decisions import Decisions
from cmaclip_fast.classifier.engine import Engine, choose_device, choose_dtype
from cmaclip_fast.classifier.explanation import row_view
from cmaclip_fast.classifier.pairs import Pairs, as_pairs, read_picture, read_text
from cmaclip_fast.classifier.prediction import Prediction, flatten, output_schema, read_output
from cmaclip_fast.errors import InputError
from cmaclip_fast.pages.views import ExampleView
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.taxonomy import task_probabilities
from cmaclip_fast.types import Batch, Output

T = TypeVar("T")

_TOKENIZING = threading.Lock()
"""Tokenizers of Hugging Face change their settings at each call, so two threads may not call one at once."""


@dataclass
class _Part:
    """A batch of pairs that was run; its images are the pixels, uint8, as the image tower sees them."""

    texts: list[str | None]
    batch: Batch
    output: Output


class Classifier:
    """A trained model with all that it needs to label pairs of a picture and a text.

    Any number of threads may call one classifier. The system that it is made from is not changed by it: a system in
    training mode stays in that mode, and is run in evaluation mode all the same. Weights that are changed in place
    afterwards are used as they then are, as long as device and dtype are those of the system.

    Attributes:
        system: the module.
        engine: what runs it.
        tasks: for each task the names of its classes.
        preprocessing, tokenizer: how a picture and a text become tensors.
        columns: where the training data had pictures and texts; None for a model that was not loaded.
        decisions: calibration and thresholds; None for a model that was not loaded.
        calibrated: whether probabilities are calibrated.
    """

    def __init__(
        self,
        system: System,
        *,
        device: str | torch.device | None = None,
        precision: str = "auto",
        columns: DataColumns | None = None,
        decisions: Decisions | None = None,
        calibrated: bool = True,
    ) -> None:
        """Use `Classifier.load` for a folder that `cmaclip train` wrote.

        Args:
            device: `auto` (a GPU if available), `cpu`, `cuda` or `cuda:N`; None is the system's own.
            precision: of the weights: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 on a GPU that computes in
                it, else float32.
            columns: where the training data had pictures and texts.
            decisions: what calibrates probabilities and accepts answers; None does neither.
            calibrated: give calibrated probabilities; False gives the model's own. Labels and statuses are the same.

        Raises:
            InputError: an unknown device or precision, or a model that is no `System`.
        """
        if not isinstance(system, System):
            raise InputError(f"a Classifier is made from a System, not from {type(system).__name__}: see create_model")
        self.system = system
        self.engine = Engine(system, device, precision)
        self.tasks, self.preprocessing, self.tokenizer = system.tasks, system.preprocessing, system.tokenizer
        self.columns = columns
        self.decisions = decisions
        self.calibrated = calibrated
        self._made_with = (device, precision)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        device: str | torch.device = "auto",
        precision: str = "auto",
        *,
        min_precision: float | None = None,
        calibrated: bool = True,
    ) -> Classifier:
        """The classifier of a folder that `cmaclip train` wrote.

        Args:
            device, precision, calibrated: as for `Classifier`.
            min_precision: of the answers that are accepted, in (0, 1]; None is what the model was trained for. The
                thresholds for it are chosen from the answers for the validation rows that are kept in the folder.

        Raises:
            InputError: the folder is missing, incomplete, damaged, or not of this version's format; an unknown device
                or precision.
        """
        placed, folder = choose_device(device), Path(directory)
        # what the engine converts stays off the GPU
        as_it_is = choose_dtype(precision, placed) == torch.float32
        system, columns = load_model(folder, placed if as_it_is else "cpu"), load_config(folder).columns
        decisions = Decisions.load(folder, system)
        if min_precision is not None:
            decisions = decisions.with_min_precision(min_precision)
        return cls(
            system, device=placed, precision=precision, columns=columns, decisions=decisions, calibrated=calibrated
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (self.system, *self._made_with, self.columns, self.decisions, self.calibrated)

    def read(self, output: Output) -> list[dict[str, Prediction]]:
        """The predictions of each row of a batch, from the engine's output for it."""
        system = self.system
        return read_output(output, self.tasks, system.taxonomies, self.decisions, self.calibrated, system.multi_label)

    def probabilities(self, output: Output) -> dict[str, Tensor]:
        """The probabilities of all classes, `[B, C_task]` float32 for each task, from the engine's output."""
        if self.decisions is not None and self.calibrated:
            return self.decisions.probabilities(output.logits)
        return task_probabilities(output.logits, self.tasks, self.system.taxonomies, self.system.multi_label)

    def predict(
        self,
        images: Any,
        texts: Any = None,
        *,
        image: str | None = None,
        text: str | None = None,
        image_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
    ) -> Any:
        """Labels pairs of a picture and a text.

        A picture is a PIL image, a path, the bytes of an encoded picture, an array, a tensor, or a file opened in
        binary mode. An array is `[H, W]`, `[H, W, C]` or `[C, H, W]` with 1, 3 or 4 channels (grey, RGB, RGBA), uint8
        or float from 0 to 1; where both orders are possible an array is `[H, W, C]`, a tensor `[C, H, W]`. A text is a
        str. Either side of a pair, but not both, may be absent: None, NaN, `pandas.NA`, or empty.

        Args:
            images: a sequence of pictures, or a single one; None if all are absent. Without `texts` also a
                `pandas.DataFrame`, a `datasets.Dataset`, or a sequence or iterator of (picture, text) pairs.
            texts: a sequence of texts, or a single one; None if all are absent.
            image, text: the columns of a table; by default those of the training data.
            image_dir: the folder that relative paths start from; by default the working folder.
            batch_size: pairs that are run at a time.

        Returns:
            For a pair a dict with the `Prediction` of each task: its label, status, probability, five best classes
            and modality weights. For one pair that dict; for a sequence or a data set a list of them; for an iterator,
            as `images`, `texts` or both, an iterator of them, which reads up to two batches ahead. For a DataFrame a
            DataFrame with its index and the columns that `cmaclip predict` writes: for each task `TASK` (missing where
            the answer is not accepted; a list of a multi-label task), `TASK_status`, `TASK_probability`, `TASK_top`,
            `TASK_text_weight` and `TASK_image_weight`, and for each taxonomy its column with the path down to the
            lowest accepted level.

        Raises:
            InputError: unequal numbers of images and texts, a pair with neither, a picture that cannot be read, a
                value of another type, or a missing column. The message names the pair, counted from 0.
        """
        pairs = self._pairs(images, texts, image, text, batch_size)

        def read(part: _Part) -> Iterable[Any]:
            return self.read(part.output)

        answers = self._answers(pairs, read, image_dir, batch_size)
        if pairs.form != "frame":
            return answers
        taxonomies = self.system.taxonomies
        schema = output_schema(pa.schema([]), self.tasks, taxonomies, self.system.multi_label)
        frame = pa.Table.from_pylist([flatten(row, taxonomies) for row in answers], schema=schema).to_pandas()
        frame.index = pairs.index
        return frame

    def predict_proba(
        self,
        images: Any,
        texts: Any = None,
        *,
        image: str | None = None,
        text: str | None = None,
        image_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
    ) -> Any:
        """The probabilities of all classes.

        Args:
            images, texts, image, text, image_dir, batch_size: as for `predict`.

        Returns:
            A dict with an array `[N, C]` float32 for each task, classes in the order of `tasks`. For one pair the
            arrays are `[C]`; for an iterator it is an iterator of such dicts. For a DataFrame it is a DataFrame with
            its index and a column `TASK=CLASS` for each class of each task.

        Raises:
            InputError: as `predict`.
        """
        pairs = self._pairs(images, texts, image, text, batch_size)

        def read(part: _Part) -> Iterable[dict[str, np.ndarray]]:
            found = self.probabilities(part.output)
            arrays = {task: values.cpu().numpy() for task, values in found.items()}
            return [{task: values[row] for task, values in arrays.items()} for row in range(len(part.texts))]

        rows = self._answers(pairs, read, image_dir, batch_size)
        if pairs.form in ("one", "stream"):
            return rows
        arrays = {
            task: np.stack([row[task] for row in rows]) if rows else np.zeros((0, len(names)), np.float32)
            for task, names in self.tasks.items()
        }
        if pairs.form == "list":
            return arrays
        import pandas

        columns = [f"{task}={name}" for task, names in self.tasks.items() for name in names]
        return pandas.DataFrame(np.concatenate(list(arrays.values()), axis=1), index=pairs.index, columns=columns)

    def embed(
        self,
        images: Any,
        texts: Any = None,
        *,
        image: str | None = None,
        text: str | None = None,
        image_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
    ) -> Any:
        """A vector for each pair: the mean of its text's and its image's embedding, or the one that is there.

        The embeddings are those that the task heads read; of a system without such the towers' global tokens.

        Args:
            images, texts, image, text, image_dir, batch_size: as for `predict`.

        Returns:
            An array `[N, D]` float32, not normalised; for one pair `[D]`; for an iterator an iterator of `[D]`.

        Raises:
            InputError: as `predict`; a system that has neither.
        """
        pairs = self._pairs(images, texts, image, text, batch_size)

        def read(part: _Part) -> Iterable[np.ndarray]:
            output = part.output
            vectors = output.towers if output.embedding is None else output.embedding
            if vectors is None:
                raise InputError(f"{self.system.title}: this system has no embeddings: use predict_proba")
            there = part.batch.present & torch.tensor(self.system.modalities)
            share = (there / there.sum(1, keepdim=True).clamp(min=1))[..., None].to(vectors.device)
            return torch.where(share > 0, vectors.float() * share, 0).sum(1).cpu().numpy()  # type: ignore[no-any-return]

        rows = self._answers(pairs, read, image_dir, batch_size)
        if pairs.form in ("one", "stream"):
            return rows
        return np.stack(rows) if rows else np.zeros((0, getattr(self.system.config, "width", 0)), np.float32)

    def explain(
        self,
        images: Any,
        texts: Any = None,
        *,
        image: str | None = None,
        text: str | None = None,
        image_dir: str | os.PathLike[str] | None = None,
        batch_size: int = 32,
    ) -> Any:
        """What the model looked at: predictions, modality weights and attention maps, as `render_explanation` takes.

        The maps are those of the last layer that reads text and image together, averaged over heads; a system without
        such a layer, or whose image tokens are no grid of patches, has none.

        Args:
            images, texts, image, text, image_dir, batch_size: as for `predict`.

        Returns:
            An `ExampleView`; a list of them for a sequence or a table, an iterator for an iterator. Rows are counted
            from 1.

        Raises:
            InputError: as `predict`.
        """
        pairs = self._pairs(images, texts, image, text, batch_size)

        def read(part: _Part) -> Iterable[ExampleView]:
            predictions = self.read(part.output)
            for row, (said, value) in enumerate(zip(predictions, part.texts, strict=True)):
                picture = None
                if part.batch.present[row, 1]:
                    picture = Image.fromarray(part.batch.images[row].permute(1, 2, 0).numpy())
                yield row_view(self.engine.module, part.batch, part.output, row, said, picture, value)

        def numbered(parts: Iterable[_Part]) -> Iterator[ExampleView]:
            for number, view in enumerate(_each(read, parts), 1):
                view.row = number
                yield view

        return self._shaped(pairs, numbered(self._run(pairs, image_dir, batch_size, with_attention=True)))

    def _pairs(self, images: Any, texts: Any, image: str | None, text: str | None, batch_size: int) -> Pairs:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size {batch_size!r}: give a whole number from 1 up")
        if self.columns is not None:
            known = getattr(images, "columns", None) if texts is None else None
            known = getattr(images, "column_names", None) if known is None and texts is None else known
            image = image or self._known_column(self.columns.image, known)
            text = text or self._known_column(self.columns.text, known)
        return as_pairs(images, texts, image, text)

    @staticmethod
    def _known_column(name: str | None, there: Iterable[Any] | None) -> str | None:
        if name is None or there is None or name in list(there):
            return name
        warnings.warn(
            f"no column '{name}', which the model was trained with: treated as missing", UserWarning, stacklevel=4
        )
        return None

    def _answers(
        self,
        pairs: Pairs,
        read: Callable[[_Part], Iterable[T]],
        image_dir: str | os.PathLike[str] | None,
        batch_size: int,
    ) -> Any:
        return self._shaped(pairs, _each(read, self._run(pairs, image_dir, batch_size)))

    @staticmethod
    def _shaped(pairs: Pairs, rows: Iterator[T]) -> Any:
        """One answer, an iterator of answers, or a list of them, as the pairs were given."""
        if pairs.form == "one":
            (row,) = rows
            return row
        return rows if pairs.form == "stream" else list(rows)

    def _run(
        self,
        pairs: Pairs,
        image_dir: str | os.PathLike[str] | None,
        batch_size: int,
        with_attention: bool = False,
    ) -> Iterator[_Part]:
        """The pairs in batches; while the model runs one, the pictures of the next are decoded."""
        folder = None if image_dir is None else Path(image_dir).expanduser()
        if pairs.form == "one":
            texts, batch = self._read(list(enumerate(pairs.items)), folder)
            yield _Part(texts, batch, self.engine(batch, with_attention))
            return
        failures: list[Exception] = []
        numbered = enumerate(_until_failure(pairs.items, failures))
        # of a GPU, the output of one batch is read while it computes the next
        running: deque[_Part] = deque()
        behind = 1 if self.engine.is_asynchronous else 0
        pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="cmaclip-decode")
        try:
            reading = self._begin(numbered, batch_size, folder, pool)
            while reading is not None:
                texts, batch = reading()
                reading = self._begin(numbered, batch_size, folder, pool)
                running.append(_Part(texts, batch, self.engine(batch, with_attention)))
                while len(running) > (behind if reading is not None else 0):
                    yield running.popleft()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise failures[0]

    def _begin(
        self, numbered: Iterator[tuple[int, tuple[Any, Any]]], batch_size: int, folder: Path | None, pool: Executor
    ) -> Callable[[], tuple[list[str | None], Batch]] | None:
        """Starts to read a batch: a function that waits for it, or None if there are no more pairs."""
        chosen = list(islice(numbered, batch_size))
        if not chosen:
            return None
        waiting = [pool.submit(self._pixels, number, picture, folder) for number, (picture, _) in chosen]
        return lambda: self._assemble(chosen, (future.result() for future in waiting))

    def _read(self, chosen: list[tuple[int, tuple[Any, Any]]], folder: Path | None) -> tuple[list[str | None], Batch]:
        return self._assemble(chosen, (self._pixels(number, picture, folder) for number, (picture, _) in chosen))

    def _assemble(
        self, chosen: list[tuple[int, tuple[Any, Any]]], pictures: Iterable[Tensor | None]
    ) -> tuple[list[str | None], Batch]:
        texts = [read_text(number, text) for number, (_, text) in chosen]
        size = self.preprocessing.size
        images = torch.zeros(len(chosen), 3, size, size, dtype=torch.uint8)
        present = torch.zeros(len(chosen), 2, dtype=torch.bool)
        for row, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            if picture is None and text is None:
                raise InputError(f"pair {chosen[row][0]}: neither image nor text: give at least one")
            present[row] = torch.tensor([text is not None, picture is not None])
            if picture is not None:
                images[row] = picture
        with _TOKENIZING:
            tokens, lengths, _ = self.tokenizer.encode(texts)
        return texts, Batch(images, tokens, lengths, present)

    def _pixels(self, number: int, picture: Any, folder: Path | None) -> Tensor | None:
        found = read_picture(number, picture, self.preprocessing.background, folder)
        return None if found is None else self.preprocessing.pixels(found)


def _each(read: Callable[[_Part], Iterable[T]], parts: Iterable[_Part]) -> Iterator[T]:
    for part in parts:
        yield from read(part)


def _until_failure(items: Iterable[T], failures: list[Exception]) -> Iterator[T]:
    """The items up to an error, which is kept, so that what came before it can be answered first."""
    try:
        yield from items
    except Exception as error:
        failures.append(error)


def _make(
    system: System,
    device: str | torch.device | None,
    precision: str,
    columns: DataColumns | None,
    decisions: Decisions | None,
    calibrated: bool,
) -> Classifier:
    return Classifier(
        system, device=device, precision=precision, columns=columns, decisions=decisions, calibrated=calibrated
    )

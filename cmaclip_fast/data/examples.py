"""Rows of a table as Batches, the same ones whatever the number of loader processes, in a resumed run too."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cmaclip_fast.data.augment import IMAGE_DRAWS, Augmentation, augment_images, drop_tokens
from cmaclip_fast.data.classes import encode
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.table import Table
from cmaclip_fast.data.tokenizer import Tokenizer
from cmaclip_fast.types import Batch

CACHE_BYTES = 2 * 1024**3
"""The largest cache of decoded pictures that `cache_images="auto"` makes."""


class Examples(Dataset[Batch]):
    """The rows of a table, ready for a model.

    Texts are tokenized once, here; pictures are decoded and made square once where they are cached, else each time.
    With `augmentation` a row changes with `set_epoch`, by numbers drawn from (seed, epoch, row) alone.

    Args:
        classes: for each task its class names, in the order of their numbers; a task may be left out.
        cache_images: keep pictures as uint8 `[N, 3, S, S]`; `auto` does where that takes at most `CACHE_BYTES`.
        unknown: what to do with a class that is not in `classes`, as in `encode`.
        progress: called with the pictures cached and the rows in all.

    Attributes:
        truncated: how many texts were longer than the context.
        ignored: for each task, how many rows had an unknown class that was ignored.
        has_images: whether any row has a picture.
        side: pixels a side of augmented pictures; None is that of the preprocessing.

    Raises:
        InputError: a picture cannot be read, or a class is unknown.
    """

    def __init__(
        self,
        table: Table,
        classes: dict[str, list[str]],
        preprocessing: ImagePreprocessing,
        tokenizer: Tokenizer,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        cache_images: bool | Literal["auto"] = "auto",
        unknown: Literal["error", "ignore"] = "error",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.table = table
        self.preprocessing = preprocessing
        self.tokenizer = tokenizer
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0
        self.side: int | None = None
        texts = table.texts()
        tokens, lengths, self.truncated = tokenizer.encode(texts)
        self._tokens, self._lengths = tokens.int().numpy(), lengths.numpy()
        self.has_images = any(table.has_image(row) for row in range(len(table)))
        self._has_text = np.array([text is not None for text in texts], dtype=bool)
        encoded = {task: encode(table, task, names, unknown) for task, names in classes.items()}
        self._labels = {task: labels for task, (labels, _) in encoded.items()}
        self.ignored = {task: ignored for task, (_, ignored) in encoded.items()}
        size = 3 * preprocessing.size**2 * len(table)
        wanted = size <= CACHE_BYTES if cache_images == "auto" else cache_images
        self._cache = self._decode_all(progress) if wanted and table.columns.image is not None else None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def labels(self) -> dict[str, Tensor]:
        """For each task what `encode` gives: `[N]` int64, or of a multi-label task `[N, C_task]` int8."""
        return self._labels

    def set_epoch(self, epoch: int) -> None:
        """Other random changes of the rows, and another order in the loaders that shuffle them."""
        self.epoch = epoch

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows as one Batch, in the given order."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        pixels, has_image = self._pixels(index)
        tokens, lengths = self._tokens[index.numpy()], self._lengths[index.numpy()]
        if self.augmentation is None:
            images = self.preprocessing.normalise(pixels)
        else:
            draws = self._draws(index)
            pixels = (
                pixels[:, :, : self.side, : self.side]
                if not self.has_images
                else augment_images(
                    pixels,
                    torch.from_numpy(draws[:, :IMAGE_DRAWS]),
                    self.augmentation,
                    self.preprocessing.background_rgb,
                    self.side,
                )
            )
            images = self.preprocessing.normalise(pixels)
            if self.augmentation.word_dropout:
                tokens, lengths = drop_tokens(
                    tokens, lengths, draws[:, IMAGE_DRAWS:], self.augmentation.word_dropout, self.tokenizer.pad
                )
        present = torch.stack([torch.from_numpy(self._has_text)[index], has_image], dim=1)
        labels = {task: labels[index] for task, labels in self._labels.items()}
        return Batch(images, torch.from_numpy(tokens).long(), torch.from_numpy(lengths), present, labels, index)

    def __getitem__(self, row: int) -> Batch:
        return self.batch([row])

    def __getitems__(self, rows: list[int]) -> Batch:
        """Called by a DataLoader: a whole batch at once is many times faster than row by row."""
        return self.batch(rows)

    def _pixels(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, 3, S, S]` uint8, zeros where absent, and `[B]` bool, whether there is a picture."""
        if self._cache is not None:
            pixels, has_image = self._cache
            return pixels[index], has_image[index]
        found = [self._decode(row) for row in index.tolist()]
        blank = torch.zeros(3, self.preprocessing.size, self.preprocessing.size, dtype=torch.uint8)
        pixels = torch.stack([blank if picture is None else picture for picture in found])
        return pixels, torch.tensor([picture is not None for picture in found])

    def _decode(self, row: int) -> Tensor | None:
        image = self.table.image(row, self.preprocessing.background)
        return None if image is None else self.preprocessing.pixels(image)

    def _decode_all(self, progress: Callable[[int, int], None] | None) -> tuple[Tensor, Tensor]:
        side, rows_at_once = self.preprocessing.size, 256
        pixels = torch.zeros(len(self), 3, side, side, dtype=torch.uint8)
        has_image = torch.zeros(len(self), dtype=torch.bool)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self), rows_at_once):
                rows = range(start, min(start + rows_at_once, len(self)))
                for row, picture in zip(rows, pool.map(self._decode, rows), strict=True):
                    if picture is not None:
                        pixels[row], has_image[row] = picture, True
                if progress is not None:
                    progress(rows.stop, len(self))
        return pixels, has_image

    def _draws(self, index: Tensor) -> np.ndarray:
        """`[B, IMAGE_DRAWS + L]` float32 in 0 to 1, a function of seed, epoch and row alone."""
        count = IMAGE_DRAWS + self.tokenizer.context_length
        key = [self.seed, self.epoch]
        streams = (np.random.Generator(np.random.Philox(key=key, counter=[0, row, 0, 0])) for row in index.tolist())
        return np.stack([stream.random(count, dtype=np.float32) for stream in streams])


def collate(items: Batch | Sequence[Batch]) -> Batch:
    """Batches joined to one; a Batch stays what it is."""
    if isinstance(items, Batch):
        return items
    rows = [item.rows for item in items if item.rows is not None]
    return Batch(
        torch.cat([item.images for item in items]),
        torch.cat([item.tokens for item in items]),
        torch.cat([item.text_lengths for item in items]),
        torch.cat([item.present for item in items]),
        {task: torch.cat([item.labels[task] for item in items]) for task in items[0].labels},
        torch.cat(rows) if len(rows) == len(items) else None,
    )


class EpochSampler(Sampler[int]):
    """Row numbers in order, or in an order that depends on the seed and the epoch of the examples alone.

    With `weights [N]`, which sum to 1, as many rows are drawn by them, with repetition.
    """

    def __init__(self, examples: Examples, shuffle: bool, seed: int, weights: np.ndarray | None = None) -> None:
        self._examples = examples
        self._weights = weights
        self._shuffle = shuffle
        self._seed = seed

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[int]:
        if not self._shuffle:
            return iter(range(len(self)))
        generator = np.random.default_rng([self._seed, self._examples.epoch])
        if self._weights is not None:
            return iter(generator.choice(len(self), len(self), p=self._weights).tolist())
        return iter(generator.permutation(len(self)).tolist())


def make_loader(
    examples: Examples,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    pin_memory: bool = False,
    row_weights: np.ndarray | None = None,
) -> DataLoader[Batch]:
    """Batches of the examples. Call `examples.set_epoch` before each pass; `workers` changes the speed alone."""
    return DataLoader(
        examples,
        batch_size=batch_size,
        sampler=EpochSampler(examples, shuffle, seed, row_weights),
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),  # else each pass draws from the generator that dropout uses
    )

"""What is timed: models, batches and text lengths, the same ones in every run."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import open_clip
import torch

from cmaclip_fast.data.table import read_table
from cmaclip_fast.systems.build import create_model
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch

FUSION_WIDTH, FUSION_DEPTH = 512, 4
TASKS = {"colour": 19, "pattern": 61, "style": 12}
"""Tasks and their numbers of classes."""
SMALL = "cmaclip-small"
"""An open_clip model of next to no cost, for what does not depend on the towers."""
PRODUCT_MEAN, PRODUCT_DEVIATION = 20.0, 8.0
SHORTEST = 3
"""A start token, a word, an end token."""


class Texts(str, Enum):
    """How long the texts of a batch are, start and end tokens counted."""

    product = "product titles"
    clipart = "openclipart titles"
    full = "77 tokens"


@dataclass(frozen=True)
class Workload:
    """One table of the report.

    Attributes:
        tower: an open_clip model name.
        batch: pairs at a time.
        training: a whole training step, else inference.
    """

    tower: str
    texts: Texts
    batch: int
    training: bool = False

    @property
    def name(self) -> str:
        return f"{self.tower}, {'training' if self.training else 'inference'} at batch {self.batch}, {self.texts.value}"


def class_names(tasks: dict[str, int]) -> dict[str, list[str]]:
    return {task: [str(number) for number in range(classes)] for task, classes in tasks.items()}


def make_model(tower: str, tasks: dict[str, int] | None = None, depth: int = FUSION_DEPTH, **options: Any) -> CMACLIP:
    """A model with random weights, the same ones in every run."""
    if tower == SMALL and SMALL not in open_clip.list_models():
        open_clip.add_model_config(Path(__file__).parent / "configs")
    torch.manual_seed(0)
    options = {"width": FUSION_WIDTH, "depth": depth, "fusion_start": "random", **options}
    return create_model(tower, class_names(tasks or TASKS), **options)


def text_lengths(texts: Texts, count: int, model: CMACLIP, seed: int = 0) -> list[int]:
    """Tokens of `count` texts: evenly spaced quantiles of the distribution, in random order.

    So even a small batch has the mean and the spread of the whole.
    """
    longest = model.tokenizer.context_length
    if texts is Texts.full:
        return [longest] * count
    quantiles = (torch.arange(count) + 0.5) / count
    if texts is Texts.product:
        normal = torch.distributions.Normal(PRODUCT_MEAN, PRODUCT_DEVIATION)
        lengths = normal.icdf(quantiles).round().clamp(SHORTEST, longest)
    else:
        lengths = torch.tensor(_clipart_lengths(model.tokenizer)).sort().values
        lengths = lengths[(quantiles * len(lengths)).long()]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [int(length) for length in lengths[order]]


@functools.lru_cache(maxsize=2)
def _clipart_lengths(tokenizer: object) -> list[int]:
    titles = sorted({title for title in read_table("openclipart").texts() if title})
    return tokenizer.encode(titles)[1].tolist()  # type: ignore[attr-defined, no-any-return]


def make_batch(model: CMACLIP, lengths: list[int], seed: int = 0) -> Batch:
    """Pairs with both sides present: random pixels, and random words between a start and an end token.

    No two texts or pictures are equal, so that nothing is gained by finding those that are.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, size, tokenizer = len(lengths), model.preprocessing.size, model.tokenizer
    tokens = torch.full((rows, tokenizer.context_length), tokenizer.pad, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, 0] = tokenizer.bos
        tokens[row, 1 : length - 1] = torch.randint(
            1, min(tokenizer.bos, tokenizer.eot), (length - 2,), generator=generator
        )
        tokens[row, length - 1] = tokenizer.eot
    return Batch(
        torch.randn(rows, 3, size, size, generator=generator),
        tokens,
        torch.tensor(lengths, dtype=torch.int32),
        torch.ones(rows, 2, dtype=torch.bool),
        {task: torch.randint(len(names), (rows,), generator=generator) for task, names in model.tasks.items()},
    )


def make_batches(model: CMACLIP, workload: Workload) -> list[Batch]:
    """The batches that the runs of a workload take in turn: eight single pairs, or one larger batch."""
    count = 8 if workload.batch == 1 else 1
    lengths = text_lengths(workload.texts, count * workload.batch, model)
    starts = range(0, len(lengths), workload.batch)
    return [make_batch(model, lengths[start : start + workload.batch], seed=start + 1) for start in starts]

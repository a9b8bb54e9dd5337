"""A tiny batch of pairs, some with one side absent, and every system built for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cmaclip_fast import Batch
from cmaclip_fast.data import TrainedTokenizer
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.build import create_system
from cmaclip_fast.systems.registry import VARIANTS, systems

TASKS = {"colour": ["blue", "green", "red"], "style/cut": ["long", "short"]}
TEXTS = ["a long red dress", "short blue coat", "green skirt", "a short red coat", None, "blue dress", "long skirt"]
IMAGES = [True, True, True, True, True, False, True]
SIZE = 32
# a user's own system may be registered by a test, so what comes with the package is listed before
NAMES = [*sorted(systems()), "cma-clip-without-attention", "fashionbert", "oscar"]


def make_tokenizer() -> TrainedTokenizer:
    return TrainedTokenizer.train([text for text in TEXTS if text] * 3, context_length=10)


def make(name: str, **options: Any) -> System:
    """The named system on small towers, the same weights every time."""
    torch.manual_seed(0)
    small = {"image_size": SIZE, "width": 32}
    if "heads" in systems()[VARIANTS.get(name, (name, {}))[0]].Config.model_fields:
        small["heads"] = 4
    if name.startswith("cma-clip") and name != "cma-clip-random-start":
        small["fusion_start"] = "random"  # from zero there would be nothing to test
    return create_system(name, "tiny", TASKS, tokenizer=make_tokenizer(), **(small | options)).eval()


def make_batch(texts: list[str | None] = TEXTS, images: list[bool] = IMAGES) -> Batch:
    """Pictures of noise; labels by row, one of them missing."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(len(texts), 3, SIZE, SIZE, generator=generator)
    tokens, lengths, _ = make_tokenizer().encode(texts)
    present = torch.tensor([[text is not None, there] for text, there in zip(texts, images, strict=True)])
    rows = torch.arange(len(texts))
    labels = {"colour": rows % 3, "style/cut": rows % 2}
    labels["colour"][-1] = -1
    return Batch(pixels, tokens, lengths, present, labels, rows)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param

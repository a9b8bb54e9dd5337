"""Batches of training: the same whatever the number of processes, which is chosen from measured times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cmaclip_fast.data import Columns, TrainedTokenizer, read_table
from cmaclip_fast.data.augment import Augmentation
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.errors import InputError
from cmaclip_fast.training import loading, loop
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.loading import MEASURED, Loading, choose_workers

ROWS, BATCH = 64, 4


@pytest.fixture
def examples(tmp_path: Path) -> Examples:
    generator = np.random.default_rng(0)
    lines = ["picture,title,kind"]
    for row in range(ROWS):
        pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{row}.png")
        lines.append(f"{row}.png,title {row},{'ab'[row % 2]}")
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    table = read_table(tmp_path / "rows.csv", Columns(image="picture", text="title", tasks=("kind",)))
    tokenizer = TrainedTokenizer.train(table.texts(), context_length=6, min_frequency=1)
    preprocessing = ImagePreprocessing(size=8)
    return Examples(
        table, {"kind": ["a", "b"]}, preprocessing, tokenizer, Augmentation(word_dropout=0.3), cache_images=False
    )


def loaded(examples: Examples, monkeypatch: pytest.MonkeyPatch, workers: Any, chosen: int = 0) -> list[Any]:
    monkeypatch.setattr(loading, "choose_workers", lambda *_: chosen)
    config = TrainingConfig(batch_size=BATCH, workers=workers, seed=3)
    accelerator = loop._accelerator(config, torch.device("cpu"))
    batches = Loading(examples, config, accelerator)
    found = []
    for epoch in range(2):
        for batch in batches.epoch(epoch):
            with accelerator.accumulate():
                found.append((epoch, batch.rows.tolist(), batch.images.sum().item(), batch.tokens.tolist()))
        assert accelerator.sync_gradients, "the last batch of an epoch ends a step"
    assert batches.workers == (chosen if workers == "auto" else workers)
    return found


@pytest.mark.parametrize(("workers", "chosen"), [("auto", 0), ("auto", 2), (1, 0)])
def test_the_same_batches_whatever_the_workers(
    examples: Examples, monkeypatch: pytest.MonkeyPatch, workers: Any, chosen: int
) -> None:
    plain = loaded(examples, monkeypatch, 0)
    assert len(plain) == 2 * ROWS // BATCH > 2 * MEASURED
    assert loaded(examples, monkeypatch, workers, chosen) == plain


@pytest.mark.parametrize(
    ("load", "step", "cores", "expected"),
    [
        (0.001, 0.1, 8, 0),  # cached pictures: a process would cost more than it saves
        (0.05, 0.1, 8, 1),
        (0.3, 0.1, 8, 4),
        (5.0, 0.1, 8, 7),
        (5.0, 0.1, 1, 0),
        (0.1, 0.0, 4, 3),
    ],
)
def test_as_many_workers_as_keep_up(load: float, step: float, cores: int, expected: int) -> None:
    assert choose_workers(load, step, cores) == expected


def test_automatic_precision_on_a_cpu_is_float32() -> None:
    assert loop.mixed_precision(TrainingConfig(), torch.device("cpu")) == "no"
    with pytest.raises(InputError, match="needs a GPU"):
        loop.mixed_precision(TrainingConfig(mixed_precision="fp16"), torch.device("cpu"))


def test_fast_products_are_of_a_gpu_alone_and_end_with_training() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with loop._fast_products(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == before[0]
    with pytest.raises(RuntimeError), loop._fast_products(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        raise RuntimeError
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before

"""Batches: what is in them, and that they are the same however they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmaclip_fast.data import (
    Augmentation,
    Columns,
    Examples,
    ImagePreprocessing,
    Table,
    TrainedTokenizer,
    class_names,
    collate,
    make_loader,
    read_table,
)
from cmaclip_fast.data import examples as module
from cmaclip_fast.errors import InputError
from cmaclip_fast.types import Batch

STRONG = Augmentation(erasing=0.5, word_dropout=0.3)
PREPROCESSING = ImagePreprocessing(size=16, mean=(0, 0, 0), std=(1, 1, 1))


@pytest.fixture
def table(write_csv: Callable[..., Path], picture: Callable[..., Path]) -> Table:
    for name, colour in (("a", "red"), ("b", "lime"), ("c", "blue")):
        picture(f"{name}.png", colour)
    rows = [["a.png", "one two three", "x"], ["b.png", "", "y"], ["", "four five six seven", ""], ["c.png", "one", "x"]]
    columns = Columns("image", "title", ("label",))
    return read_table(write_csv([["image", "title", "label"], *rows * 5]), columns)


def _examples(table: Table, augmentation: Augmentation | None = None, **options: object) -> Examples:
    tokenizer = TrainedTokenizer.train(table.texts(), "word", context_length=6, min_frequency=1)
    return Examples(table, class_names(table, ["label"]), PREPROCESSING, tokenizer, augmentation, **options)


def _equal(left: Batch, right: Batch) -> bool:
    tensors = ("images", "tokens", "text_lengths", "present", "rows")
    same = all(torch.equal(getattr(left, name), getattr(right, name)) for name in tensors)
    return same and all(torch.equal(left.labels[task], right.labels[task]) for task in left.labels)


def test_a_batch(table: Table) -> None:
    examples = _examples(table)
    batch = examples.batch([0, 1, 2, 3])
    assert batch.images.shape == (4, 3, 16, 16) and batch.images.dtype == torch.float32
    assert batch.tokens.shape == (4, 6) and batch.tokens.dtype == torch.int64
    assert batch.text_lengths.tolist() == [5, 2, 6, 3] and batch.text_lengths.dtype == torch.int32
    assert batch.present.tolist() == [[True, True], [False, True], [True, False], [True, True]]
    assert batch.labels["label"].tolist() == [0, 1, -1, 0] and batch.rows.tolist() == [0, 1, 2, 3]
    assert batch.images[:, :, 8, 8].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert examples.truncated == 0 and len(examples) == 20


def test_truncated_texts_are_counted(table: Table) -> None:
    tokenizer = TrainedTokenizer.train(table.texts(), "word", context_length=4, min_frequency=1)
    assert Examples(table, {}, PREPROCESSING, tokenizer).truncated == 10


def test_items_collate_to_the_batch(table: Table) -> None:
    examples = _examples(table, STRONG)
    assert _equal(collate([examples[i] for i in (4, 0, 7)]), examples.batch([4, 0, 7]))
    assert _equal(collate(examples.batch([1, 2])), examples.batch([1, 2]))


def test_one_modality(table: Table, write_csv: Callable[..., Path]) -> None:
    path = table.name
    text = _examples(read_table(path, Columns(None, "title", ("label",)))).batch([0, 1])
    assert text.present.tolist() == [[True, False], [False, False]]
    image = read_table(path, Columns("image", None, ("label",)))
    tokenizer = TrainedTokenizer.train(["a b"], "word", min_frequency=1)
    assert Examples(image, {}, PREPROCESSING, tokenizer).batch([0, 2]).present.tolist() == [
        [False, True],
        [False, False],
    ]


def test_augmentation_is_a_function_of_seed_epoch_and_row(table: Table) -> None:
    first, second = _examples(table, STRONG, seed=3), _examples(table, STRONG, seed=3, cache_images=False)
    assert _equal(first.batch([0, 3, 4]), second.batch([0, 3, 4]))
    assert torch.equal(first.batch([0, 3]).images[1], first.batch([3, 2, 0]).images[0]), "place in the batch matters"
    before = first.batch([0, 3])
    first.set_epoch(1)
    assert not torch.equal(first.batch([0, 3]).images, before.images)
    first.set_epoch(0)
    assert _equal(first.batch([0, 3]), before), "a resumed epoch must be the same epoch"
    assert not torch.equal(_examples(table, STRONG, seed=4).batch([0, 3]).images, before.images)
    assert not torch.equal(before.images[0], first.batch([4]).images[0]), "equal rows must change each its own way"


def test_absent_pictures_stay_absent_when_augmented(table: Table) -> None:
    batch = _examples(table, STRONG).batch([2])
    assert batch.present.tolist() == [[True, False]] and torch.isfinite(batch.images).all()


def test_a_table_without_pictures_is_not_augmented(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "augment_images", None)
    examples = _examples(read_table(table.name, Columns(None, "title", ("label",))), STRONG)
    examples.side = 8
    assert not examples.has_images and examples.batch([0, 1]).images.shape == (2, 3, 8, 8)


def test_loaders_agree_whatever_the_workers(table: Table) -> None:
    examples = _examples(table, STRONG)
    for epoch in (0, 1):
        examples.set_epoch(epoch)
        alone = list(make_loader(examples, 6, shuffle=True, seed=5))
        helped = list(make_loader(examples, 6, shuffle=True, seed=5, workers=2))
        assert len(alone) == len(helped) == 4
        assert all(_equal(left, right) for left, right in zip(alone, helped, strict=True))


def test_order(table: Table) -> None:
    examples = _examples(table)
    loader = make_loader(examples, 6, shuffle=True, seed=5)

    def rows() -> list[int]:
        return torch.cat([batch.rows for batch in loader]).tolist()

    first = rows()
    assert sorted(first) == list(range(20)) and first == rows()
    examples.set_epoch(1)
    assert rows() != first
    assert [len(batch) for batch in make_loader(examples, 6, shuffle=True, drop_last=True)] == [6, 6, 6]
    straight = make_loader(examples, 6, shuffle=False)
    assert torch.cat([batch.rows for batch in straight]).tolist() == list(range(20))


def test_loading_leaves_the_generator_of_the_model_alone(table: Table) -> None:
    examples = _examples(table, STRONG)
    state = torch.get_rng_state()
    list(make_loader(examples, 6, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_cache_by_size(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _examples(table)._cache is not None
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * 16 * 16 * 20 - 1)
    assert _examples(table)._cache is None
    assert _examples(table, cache_images=True)._cache is not None


def test_bad_input(table: Table, write_csv: Callable[..., Path]) -> None:
    tokenizer = TrainedTokenizer.train(["a"], "word", min_frequency=1)
    with pytest.raises(InputError, match="row 2, column 'label': class 'y' is not one of"):
        Examples(table, {"label": ["x"]}, PREPROCESSING, tokenizer)
    assert Examples(table, {"label": ["x"]}, PREPROCESSING, tokenizer, unknown="ignore").ignored == {"label": 5}
    gone = read_table(write_csv([["image"], ["gone.png"]], "gone.csv"), Columns("image"))
    with pytest.raises(InputError, match=r"row 1, column 'image': picture 'gone.png' does not exist"):
        Examples(gone, {}, PREPROCESSING, tokenizer)

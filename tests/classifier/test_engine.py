"""What the engine does on a GPU, as far as a CPU can show it: which batches become graphs, and the order of answers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cmaclip_fast import Batch, Classifier, Output
from cmaclip_fast.classifier import engine
from cmaclip_fast.classifier.engine import Engine

from .conftest import TEXTS, make_model, make_pictures


class Recorded:
    """In the place of a CUDA graph."""

    made = 0

    def __init__(self, run: Callable[[Batch], Output], batch: Batch) -> None:
        Recorded.made += 1
        self.run = run

    def __call__(self, batch: Batch) -> Output:
        return self.run(batch)


def test_a_size_that_recurs_is_recorded_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_Graph", Recorded)
    monkeypatch.setattr(engine, "_GRAPHS", 2)
    monkeypatch.setattr(Recorded, "made", 0)
    model = make_model().eval()
    graphs, made = engine._Graphs(model), []

    def run(rows: int) -> None:
        tokens, lengths, _ = model.tokenizer.encode(["red dress"] * rows)
        batch = Batch(torch.randn(rows, 3, 32, 32), tokens, lengths, torch.ones(rows, 2, dtype=torch.bool))
        expected = model(batch).logits["colour"]
        found = graphs(batch, tokens.numel()).logits["colour"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        made.append(Recorded.made)

    with torch.inference_mode():
        for rows in (1, 2, 1, 1, 2, 3, 1):
            run(rows)
    assert made == [0, 0, 1, 1, 2, 2, 2] and len(graphs._kept) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_answers_are_in_order_where_calls_return_early(
    monkeypatch: pytest.MonkeyPatch, stream: bool, batch_size: int
) -> None:
    classifier, pictures = Classifier(make_model()), make_pictures()
    expected = [one["colour"].label for one in classifier.predict(pictures, TEXTS)]
    monkeypatch.setattr(Engine, "is_asynchronous", True)
    given = (iter(pictures), TEXTS) if stream else (pictures, TEXTS)
    assert [one["colour"].label for one in classifier.predict(*given, batch_size=batch_size)] == expected

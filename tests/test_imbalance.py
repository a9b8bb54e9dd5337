"""Classes of unequal size: weights, adjusted logits, balanced sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmaclip_fast import InputError
from cmaclip_fast.data import Columns, TrainedTokenizer, read_table
from cmaclip_fast.data.examples import EpochSampler, Examples
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.imbalance import class_counts, class_weights, log_priors, read_class_weights, row_weights
from cmaclip_fast.training.objective import Objective

from .test_fitting import batch_of, model

__all__ = ["model"]
TASKS = {"colour": ["blue", "red"], "cut": ["long", "none", "short"]}
LABELS = {"colour": torch.tensor([0, 0, 0, 1, -1, -1]), "cut": torch.tensor([0, 2, 2, 2, 2, -1])}
COUNTS = class_counts(LABELS, TASKS)


def test_counts_leave_out_unlabelled_rows() -> None:
    assert {task: rows.tolist() for task, rows in COUNTS.items()} == {"colour": [3, 1], "cut": [1, 0, 4]}


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    labels = LABELS["colour"][:4].numpy()
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    found = class_weights("balanced", {"colour": COUNTS["colour"]}, {"colour": TASKS["colour"]})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_effective_numbers_by_hand() -> None:
    found = class_weights("effective-number", COUNTS, TASKS, beta=0.5)
    raw = [(1 - 0.5) / (1 - 0.5**n) for n in (3, 1)]
    scale = 4 / (3 * raw[0] + raw[1])
    torch.testing.assert_close(found[:2], torch.tensor([raw[0] * scale, raw[1] * scale]))
    assert found[3] == 1, "a class without rows"
    rows = torch.cat(list(COUNTS.values()))
    for part in (slice(0, 2), slice(2, 5)):
        assert float((rows[part] * found[part]).sum() / rows[part].sum()) == pytest.approx(1)


def test_given_weights() -> None:
    found = class_weights({"cut": {"short": 2.5}}, {}, TASKS)
    assert found.tolist() == [1, 1, 1, 1, 2.5]


@pytest.mark.tried("call from Python", ends="one line")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"color": {}}, "no task 'color'.*colour"),
        ({"colour": {"rd": 1}}, "no class 'rd'.*red"),
        ({"colour": {"red": -1}}, "from 0 up"),
        ({"colour": {"red": float("inf")}}, "from 0 up"),
        ({"colour": {"red": float("nan")}}, "from 0 up"),
        ({"colour": {"red": 0, "blue": 0}}, "weight 0"),
    ],
)
def test_weights_that_cannot_be_used(given: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        class_weights(given, {}, TASKS)
    assert "\n" not in str(error.value)


@pytest.mark.tried("table", ends="one line that names the file")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing"),
        (b"", "not valid JSON"),
        (b"[]", "not an object"),
        (b'{"colour": 1}', "'colour' is not an object"),
        (b'{"colour": {"red": "2"}}', "no number"),
        (b'{"colour": {"red": true}}', "no number"),
        (b'{"colour": {"red": NaN}}', "not valid JSON"),
        (b'{"colour": {"red": 1}, "colour": {}}', "twice"),
    ],
)
def test_a_bad_file_of_weights(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "weights.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        read_class_weights(path)
    assert str(path) in str(error.value) and "train again" not in str(error.value)


def test_a_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps({"colour": {"red": 2}}))
    assert read_class_weights(path) == {"colour": {"red": 2.0}}


def test_log_priors() -> None:
    expected = [3 / 4, 1 / 4, 1 / 5.5, 0.5 / 5.5, 4 / 5.5]
    torch.testing.assert_close(log_priors(COUNTS).exp(), torch.tensor(expected))


def test_rows_are_drawn_so_that_tasks_and_classes_come_equally_often() -> None:
    weights = row_weights(LABELS, COUNTS)
    assert weights.sum() == pytest.approx(1) and weights[5] == 0
    for labels in LABELS.values():
        shares = [weights_of_class(weights, labels, number) for number in labels.unique() if number >= 0]
        assert len(shares) == 2
    one_task = row_weights({"colour": LABELS["colour"]}, {"colour": COUNTS["colour"]})
    np.testing.assert_allclose(one_task, [1 / 6, 1 / 6, 1 / 6, 1 / 2, 0, 0])


def weights_of_class(weights: np.ndarray, labels: torch.Tensor, number: torch.Tensor) -> float:
    return float(weights[(labels == number).numpy()].sum())


def test_the_sampler_repeats_an_epoch_and_balances(tmp_path: Path) -> None:
    rows = [f"title {row},{'rare' if row % 10 == 0 else 'common'}" for row in range(200)]
    (tmp_path / "rows.csv").write_text("\n".join(["title,kind", *rows]) + "\n")
    table = read_table(tmp_path / "rows.csv", Columns(text="title", tasks=("kind",)))
    classes = {"kind": ["common", "rare"]}
    tokenizer = TrainedTokenizer.train(table.texts(), context_length=6)
    examples = Examples(table, classes, ImagePreprocessing(size=8), tokenizer)
    weights = row_weights(examples.labels, class_counts(examples.labels, classes))
    sampler = EpochSampler(examples, shuffle=True, seed=1, weights=weights)
    first = list(sampler)
    assert list(sampler) == first and len(first) == 200
    examples.set_epoch(1)
    assert list(sampler) != first
    drawn = []
    for epoch in range(20):
        examples.set_epoch(epoch)
        drawn += list(sampler)
    rare = np.mean([row % 10 == 0 for row in drawn])
    assert abs(rare - 0.5) < 0.03


@pytest.mark.parametrize(
    "options",
    [
        {"class_weights": {"colour": {"red": 3.0}}},
        {"class_weights": "balanced"},
        {"logit_adjustment": 1.5},
        {"class_weights": "effective-number", "logit_adjustment": 1.0},
    ],
)
def test_the_loss_is_that_of_plain_pytorch(model: Any, options: dict) -> None:
    quiet = {"text_dropout": 0.0, "image_dropout": 0.0, "auxiliary_weight": 0.5}
    config = TrainingConfig(**quiet, **options)
    batch = batch_of(30)
    batch.labels["cut"][:22] = 0
    counts = class_counts(batch.labels, model.tasks)
    objective = Objective(model.eval(), config, counts=counts)
    loss, report = objective(batch)
    output = model(batch)
    weights = class_weights(config.class_weights, counts, model.tasks) if config.class_weights else torch.ones(4)
    priors = config.logit_adjustment * log_priors(counts)

    def plain(logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = []
        for number, task in enumerate(model.tasks):
            part = slice(2 * number, 2 * number + 2)
            losses.append(F.cross_entropy(logits[task] + priors[part], labels[task], weights[part], ignore_index=-1))
        return torch.stack(losses).mean()

    expected = plain(output.logits, batch.labels)
    torch.testing.assert_close(report, expected.detach())
    total = expected
    for modality in (0, 1):
        hidden = {task: of.where(batch.present[:, modality], -1) for task, of in batch.labels.items()}
        total = total + 0.5 * plain(model.by_task(model.auxiliary_logits(output, modality)), hidden)
    torch.testing.assert_close(loss, total)

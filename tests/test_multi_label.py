"""Tasks of several classes a row, and tasks that do not apply: labels, loss, metrics, decisions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_recall_curve

from cmaclip_fast import InputError
from cmaclip_fast.classifier.decisions import Decisions
from cmaclip_fast.classifier.prediction import Prediction, flatten, output_schema, read_output
from cmaclip_fast.data import Columns, Table, class_names, read_table, split_table
from cmaclip_fast.data.classes import encode, labelled
from cmaclip_fast.data.fingerprint import fingerprint
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.evaluation.calibration import fit_calibrations
from cmaclip_fast.evaluation.evaluate import Classified
from cmaclip_fast.evaluation.metrics import multi_label_metrics, pair_curve
from cmaclip_fast.evaluation.promise import Promise, sentences, sentences_of_absence
from cmaclip_fast.evaluation.thresholds import MIN_CLASS_ROWS, choose_label_thresholds, choose_threshold
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.imbalance import class_counts, class_weights, log_priors, row_weights
from cmaclip_fast.training.objective import Objective
from cmaclip_fast.types import Output

from .test_fitting import batch_of, model

__all__ = ["model"]
TAGS = {"tags": ["blue", "green", "red"]}
CELLS: list[Any] = [["red", " blue ", "red"], ["green"], None, [], ["blue", None, ""], ["red"]]
LISTS = [["red", "blue"], ["green"], None, None, ["blue"], ["red"]]
MULTI = Columns(text="title", multi_label=("tags",))


def rows(cells: list[Any]) -> list[dict[str, Any]]:
    return [{"title": f"row {number}", "tags": cell} for number, cell in enumerate(cells)]


def write(folder: Path, kind: str, cells: list[Any]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(cells)))
    elif kind == "parquet":
        pd.DataFrame(rows(cells)).to_parquet(path)
    else:
        texts = ["" if cell is None else "|".join(str(name or "") for name in cell) or "|" for cell in cells]
        pd.DataFrame(rows(texts)).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_lists_of_every_form_read_alike(kind: str, tmp_path: Path) -> None:
    columns = Columns(text="title", multi_label=("tags",), label_separator="|" if kind == "csv" else None)
    table = read_table(write(tmp_path, kind, CELLS), columns)
    assert table.columns.tasks == ("tags", "tags_applies") and table.columns.applies == ("tags",)
    assert table.label_lists("tags") == LISTS
    assert table.labels("tags_applies") == ["yes", "yes", None, "no", "yes", "yes"]
    assert class_names(table, table.columns.tasks) == TAGS | {"tags_applies": ["no", "yes"]}
    encoded, ignored = encode(table, "tags", TAGS["tags"])
    unknown = [-1, -1, -1]
    assert encoded.tolist() == [[1, 0, 1], [0, 1, 0], unknown, unknown, [1, 0, 0], [0, 0, 1]] and ignored == 0
    assert encoded.dtype == torch.int8 and labelled(encoded).tolist() == [True, True, False, False, True, True]


def test_numbers_and_mixed_values_are_text(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "jsonl", [["S", 38], [1.0, True], [38]]), MULTI)
    assert table.label_lists("tags") == [["S", "38"], ["1", "True"], ["38"]]
    assert table.columns.applies is None and table.columns.tasks == ("tags",)


def test_classes_that_the_model_does_not_know(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "jsonl", [["red", "pink"], ["pink"], ["blue"]]), MULTI)
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1, column 'tags': class 'pink'"):
        encode(table, "tags", TAGS["tags"])
    encoded, ignored = encode(table, "tags", TAGS["tags"], "ignore")
    assert encoded.tolist() == [[0, 0, 1], [-1, -1, -1], [1, 0, 0]] and ignored == 2


def test_rows_are_split_by_their_rarest_class(tmp_path: Path) -> None:
    cells = [["common", "rare"] if row % 4 == 0 else ["common", f"other {row % 3}"] for row in range(200)]
    splits = split_table(read_table(write(tmp_path, "jsonl", cells), MULTI))
    assert [len(part) for part in splits.values()] == [160, 20, 20]
    for name, number in (("train", 40), ("validation", 5), ("test", 5)):
        assert sum("rare" in (names or ()) for names in splits[name].label_lists("tags")) == number


def test_the_fingerprint_changes_with_a_list(tmp_path: Path) -> None:
    first = fingerprint(read_table(write(tmp_path, "jsonl", [["a"], ["b"]]), MULTI))
    assert fingerprint(read_table(write(tmp_path, "jsonl", [["a"], ["b", "a"]]), MULTI)) != first


BAD = {
    "text in JSON": ("jsonl", [["red"], "blue"], {}, r"rows\.jsonl, row 2, column 'tags': 'blue' is not a list"),
    "text alone": ("jsonl", ["red", "blue"], {}, r"rows\.jsonl, row 1, column 'tags': 'red' is not a list"),
    "a number": (
        "jsonl",
        [3, 4],
        {},
        r"row 1, column 'tags': '3' is not a list; write lists, or give the --label-separator",
    ),
    "lists of lists": ("parquet", [[["a"]], [["b"]]], {}, r"column 'tags': holds list.*name another"),
    "objects": ("jsonl", [{"a": 1}, {"a": 2}], {}, r"'tags': .*struct"),
    "a separator that is not there": ("csv", [["red"], ["blue"]], {"label_separator": ";"}, r"no cell holds .*';'"),
    "an NA value that is not there": ("jsonl", [["a"], ["b"]], {"na_value": "n/a"}, r"'n/a' is in no cell of tags"),
    "an NA value beside classes": (
        "jsonl",
        [["a", "n/a"]],
        {"na_value": "n/a"},
        "row 1, column 'tags': 'n/a'.*beside",
    ),
}


@pytest.mark.tried("table", ends="one line that names the file")
@pytest.mark.parametrize("case", BAD)
def test_labels_that_are_no_lists(case: str, tmp_path: Path) -> None:
    kind, cells, options, said = BAD[case]
    path = write(tmp_path, kind, cells)
    with pytest.raises(InputError, match=said) as error:
        read_table(path, Columns(text="title", multi_label=("tags",), **options))
    assert "\n" not in str(error.value)


def with_na(folder: Path) -> Table:
    data = {
        "title": ["a", "b", "c", "d", "e"],
        "cut": ["long", "n/a", None, "short", "n/a"],
        "tags": ["x|y", "n/a", "x", None, "y"],
        "kind": ["a > x", "n/a", "b", "a > y", None],
        "colour": ["red", "blue", "red", None, "blue"],
    }
    pd.DataFrame(data).to_csv(folder / "rows.csv", index=False)
    tree = (Taxonomy("kind"),)
    return read_table(
        folder / "rows.csv", Columns(None, "title", ("cut", "colour"), (), None, tree, ("tags",), "|", "n/a")
    )


def test_not_applicable_is_a_task_of_its_own(tmp_path: Path) -> None:
    table = with_na(tmp_path)
    derived = ("tags_applies", "cut_applies", "kind_1_applies")
    assert table.columns.tasks == ("cut", "colour", "kind_1", "kind_2", "tags", *derived)
    assert table.labels("cut") == ["long", None, None, "short", None]
    assert table.labels("cut_applies") == ["yes", "no", None, "yes", "no"]
    assert table.label_lists("tags") == [["x", "y"], None, ["x"], None, ["y"]]
    assert table.labels("tags_applies") == ["yes", "no", "yes", None, "yes"]
    assert table.labels("kind_1") == ["a", None, "b", "a", None]
    assert table.labels("kind_1_applies") == ["yes", "no", "yes", "yes", None]
    assert table.labels("colour") == ["red", "blue", "red", None, "blue"]


def test_later_tables_have_the_tasks_of_training(tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("title,cut,tags\na,long,x\n")
    columns = Columns(
        text="title", tasks=("cut",), multi_label=("tags",), label_separator="|", na_value="n/a", applies=("cut",)
    )
    table = read_table(tmp_path / "more.csv", columns)
    assert table.columns.tasks == ("cut", "tags", "cut_applies") and table.labels("cut_applies") == ["yes"]


def test_a_column_with_the_name_of_the_derived_task(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("title,cut,cut_applies\na,n/a,x\nb,long,x\n")
    with pytest.raises(InputError, match="'cut_applies' has the name"):
        read_table(tmp_path / "rows.csv", Columns(text="title", tasks=("cut",), na_value="n/a"))


def several(batch: Any) -> torch.Tensor:
    """Makes `cut` a task of several classes: -1 in a third of the rows."""
    number = len(batch)
    targets = torch.stack([torch.arange(number) % 2, torch.arange(number) // 2 % 2], dim=1).to(torch.int8)
    targets[::3] = -1
    batch.labels["cut"] = targets
    return targets


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_weights": {"cut": {"long": 3.0}}},
        {"class_weights": "balanced", "logit_adjustment": 1.0},
        {"gamma_positive": 2.0, "gamma_negative": 2.0},
        {"gamma_positive": 0.5, "gamma_negative": 4.0, "margin": 0.05},
    ],
)
def test_the_loss_is_that_of_plain_pytorch(model: Any, options: dict) -> None:
    model.multi_label = ("cut",)
    config = TrainingConfig(text_dropout=0.0, image_dropout=0.0, auxiliary_weight=0.5, **options)
    batch = batch_of(30)
    several(batch)
    counts = class_counts(batch.labels, model.tasks)
    loss, report = Objective(model.eval(), config, counts=counts)(batch)
    output = model(batch)
    weights = class_weights(config.class_weights, counts, model.tasks) if config.class_weights else torch.ones(4)
    prior = config.logit_adjustment * log_priors({"colour": counts["colour"]})

    def binary(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        p = logits.sigmoid()
        q = (p - config.margin).clamp_min(0)
        cost = torch.where(
            targets == 1,
            -((1 - p) ** config.gamma_positive) * F.logsigmoid(logits),
            -(q**config.gamma_negative) * torch.log1p(-q),
        )
        weight = weights[2:].expand_as(cost).where(targets >= 0, 0)
        return (weight * cost).sum() / weight.sum()

    def plain(logits: dict[str, torch.Tensor], shown: torch.Tensor) -> torch.Tensor:
        colour = F.cross_entropy(
            logits["colour"] + prior, batch.labels["colour"].where(shown, -1), weights[:2], ignore_index=-1
        )
        return (colour + binary(logits["cut"], batch.labels["cut"].where(shown[:, None], -1))) / 2

    expected = plain(output.logits, torch.ones(30, dtype=torch.bool))
    torch.testing.assert_close(report, expected.detach())
    total = expected
    for modality in (0, 1):
        total = total + 0.5 * plain(model.by_task(model.auxiliary_logits(output, modality)), batch.present[:, modality])
    torch.testing.assert_close(loss, total)


def test_binary_cross_entropy_of_pytorch(model: Any) -> None:
    model.multi_label = ("cut",)
    batch = batch_of(30)
    targets = several(batch)
    batch.labels["colour"][:] = -1
    config = TrainingConfig(text_dropout=0.0, image_dropout=0.0, auxiliary_weight=0.0)
    _, report = Objective(model.eval(), config)(batch)
    known = targets[:, 0] >= 0
    expected = F.binary_cross_entropy_with_logits(model(batch).logits["cut"][known], targets[known].float())
    torch.testing.assert_close(report, expected.detach() / 2)


def test_a_moved_text_teaches_only_what_is_judged_by_the_picture(model: Any) -> None:
    model.multi_label = ("cut",)
    objective = Objective(model, TrainingConfig(mismatch=0.4))
    batch = batch_of(400)
    given = torch.arange(400)[:, None].expand(-1, 4)
    _, text_rows = objective._mismatch(batch)
    by_image, by_text = batch.present * torch.tensor([0.2, 0.8]), batch.present * torch.tensor([0.8, 0.2])
    output = Output({}, {"colour": by_image, "cut": by_text})
    found = objective._labels(given, text_rows, batch, output, objective.class_owners)
    torn = batch.present.all(1) & (text_rows != torch.arange(400))
    assert torn.any() and (found[torn][:, :2] >= 0).all() and (found[torn][:, 2:] == -1).all()
    assert (found[~torn] >= 0).all()


def test_counts_and_sampling() -> None:
    labels = {"tags": torch.tensor([[1, 0, 1], [1, 1, 0], [-1, -1, -1], [1, 0, 0]], dtype=torch.int8)}
    counts = class_counts(labels, TAGS)
    assert counts["tags"].tolist() == [3, 1, 1]
    found = row_weights(labels, counts)
    np.testing.assert_allclose(found, [(1 / 3 + 1) / 3, (1 / 3 + 1) / 3, 0, (1 / 3) / 3])
    assert log_priors(counts, ("tags",)).tolist() == [0, 0, 0]


def drawn(number: int, classes: int = 3, factor: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `factor` times as large as those that the labels are drawn by; every seventh row is unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(number, classes, generator=generator) * 2 - 0.5
    labels = torch.bernoulli(logits.sigmoid(), generator=generator).to(torch.int8)
    labels[::7] = -1
    return factor * logits, labels


def test_metrics_are_those_of_scikit_learn() -> None:
    logits, labels = drawn(300, classes=5)
    labels[:, 4] = labels[:, 4].clamp(max=0)  # a class without rows
    scores = logits.sigmoid()
    found = multi_label_metrics(scores, labels, 0.8)
    known = labels[:, 0] >= 0
    truth, p = (labels[known] == 1).numpy(), scores[known].numpy()
    said = p >= 0.5
    assert found.rows == len(truth)
    assert found.accuracy == pytest.approx(accuracy_score(truth, said))
    assert found.micro_f1 == pytest.approx(f1_score(truth, said, average="micro"))
    assert found.macro_f1 == pytest.approx(f1_score(truth, said, average="macro", zero_division=0))
    assert found.mean_average_precision == pytest.approx(
        average_precision_score(truth[:, :4], p[:, :4], average="macro"), abs=1e-6
    )
    precision, recall, _ = precision_recall_curve(truth.ravel(), p.ravel())
    assert found.recall_at_precision == pytest.approx(recall[precision >= 0.8].max())
    for number, line in enumerate(found.per_class(["a", "b", "c", "d", "e"])):
        assert line["rows"] == truth[:, number].sum()
        if number == 4:
            assert line["average_precision"] is None and line["recall_at_precision"] is None
            continue
        assert line["f1"] == pytest.approx(f1_score(truth[:, number], said[:, number]))
        assert line["average_precision"] == pytest.approx(average_precision_score(truth[:, number], p[:, number]))
        of_class, at, _ = precision_recall_curve(truth[:, number], p[:, number])
        assert line["recall_at_precision"] == pytest.approx(at[of_class >= 0.8].max())
    curve = pair_curve(scores, labels)
    assert torch.isclose(curve[0], torch.tensor(precision, dtype=torch.float32)).all()
    assert curve[1].max() == 1


@pytest.mark.parametrize("labels", [torch.full((4, 3), -1), torch.zeros(4, 3)])
def test_metrics_without_a_labelled_row_or_class(labels: torch.Tensor) -> None:
    found = multi_label_metrics(torch.rand(4, 3) * 0.4, labels.to(torch.int8)).headline()
    assert all(math.isfinite(value) for value in found.values()) and found["mean_average_precision"] == 0


def test_answers_in_figures() -> None:
    logits, labels = drawn(200)
    scores = logits.sigmoid()
    likelihood = torch.where(labels == 1, scores, 1 - scores).log().mean(1).exp()
    best = scores.max(1)
    answers = Classified(
        {"tags": best.indices},
        {"tags": best.values},
        {"tags": labels},
        {"tags": likelihood},
        None,
        torch.ones(200, 2, dtype=torch.bool),
        scores={"tags": scores},
    )
    known = labels[:, 0] >= 0
    expected = F.binary_cross_entropy(scores[known], labels[known].float())
    assert answers.loss() == pytest.approx(float(expected), rel=1e-5)
    assert answers.headlines()["tags"] == multi_label_metrics(scores, labels).headline()
    half = answers.select(torch.arange(100))
    assert torch.equal(half.scores["tags"], scores[:100])
    assert answers.reliabilities()["tags"].error < 0.06


@pytest.mark.parametrize("method", ["temperature", "vector"])
def test_calibration_finds_the_scale_the_labels_were_drawn_with(method: Any) -> None:
    logits, labels = drawn(20_000, factor=3.0)
    (found,) = fit_calibrations({"tags": logits}, {"tags": labels}, TAGS, method=method).values()
    assert len(found.temperature) == len(found.bias or (0,)) == (3 if method == "vector" else 1)
    assert found.temperature == pytest.approx([3.0] * len(found.temperature), rel=0.1)
    assert found.bias == pytest.approx([0.0] * len(found.bias), abs=0.1)


def test_classes_with_enough_rows_have_their_own_thresholds() -> None:
    scores = torch.linspace(0.99, 0.01, 200)[:, None].repeat(1, 3)
    has = torch.zeros(200, 3, dtype=torch.bool)
    has[:80, 0] = True
    has[: MIN_CLASS_ROWS - 1, 1] = True
    has[:80:2, 2] = True
    found = choose_label_thresholds(scores, has, 0.9)
    assert set(found) == {0, 2} and found[2].value is None
    assert found[0] == choose_threshold(scores[:, 0], has[:, 0], 0.9)
    few = scores.clone()
    few[20:, 0] = 0.1  # predicted too seldom to show the target
    assert 0 not in choose_label_thresholds(few, has, 0.9)


def made(tasks: dict[str, list[str]], applies: tuple[str, ...] = (), taxonomies: Any = ()) -> Any:
    return SimpleNamespace(tasks=tasks, taxonomies=taxonomies, multi_label=("tags",), applies=applies)


def fitted(number: int = 3000, target: float = 0.9) -> Decisions:
    logits, labels = drawn(number)
    labels[6:, 1] = labels[6:, 1].clamp(max=0)  # green has few rows
    logits[:, 1] -= 4
    return Decisions.fit(made(TAGS), {"tags": logits}, {"tags": labels}, target)


def test_classes_are_accepted_one_by_one() -> None:
    decisions = fitted()
    thresholds = decisions.thresholds["tags"]
    assert set(thresholds.classes) == {"blue", "red"} and thresholds.per_class
    own = [thresholds.classes["blue"], thresholds.threshold, thresholds.classes["red"]]
    assert all(value is not None for value in own)
    at = torch.tensor([own])
    assert decisions.accepted({"tags": at[:, 0]}, {"tags": at.argmax(1)}, {"tags": at})["tags"].all()
    assert not decisions.accepted({"tags": at[:, 0]}, {"tags": at.argmax(1)}, {"tags": at - 1e-4})["tags"].any()
    logits = torch.tensor([[6.0, -6.0, 7.0], [0.3, -6.0, -6.0], [-6.0, -6.0, -6.0]])
    both, likely, none = (row["tags"] for row in read_output(Output({"tags": logits}), TAGS, (), decisions))
    assert (both.label, both.status, both.likely) == (("red", "blue"), "accepted", ("red", "blue"))
    assert both.probability == both.top[0][1] and [name for name, _ in both.top] == ["red", "blue", "green"]
    assert (likely.label, likely.status, likely.likely) == (None, "unsure", ("blue",))
    assert (none.label, none.status, none.likely) == (None, "unsure", ())
    raw = read_output(Output({"tags": logits}), TAGS, (), decisions, calibrated=False)
    assert [row["tags"].label for row in raw] == [("red", "blue"), None, None]
    assert raw[1]["tags"].probability == pytest.approx(float(logits[1].sigmoid()[0]))
    undecided = read_output(Output({"tags": logits}), TAGS, multi_label=("tags",))
    assert [(row["tags"].status, row["tags"].label) for row in undecided] == [
        (None, ("red", "blue")),
        (None, ("blue",)),
        (None, ()),
    ]


def test_decisions_survive_a_folder_and_serve_another_precision(tmp_path: Path) -> None:
    decisions = fitted()
    decisions.save(tmp_path)
    loaded = Decisions.load(tmp_path, made(TAGS))
    assert loaded.calibrations == decisions.calibrations and loaded.thresholds == decisions.thresholds
    assert loaded.with_min_precision(0.97).thresholds == fitted(target=0.97).thresholds
    with pytest.raises(InputError, match="scores"):
        Decisions.load(tmp_path, SimpleNamespace(tasks=TAGS, taxonomies=(), multi_label=(), applies=()))


def test_the_promise_counts_accepted_classes_and_covered_rows() -> None:
    decisions = fitted()
    logits, labels = drawn(2000, seed=1)
    logits[:, 1] -= 4
    labels[:, 1] = labels[:, 1].clamp(max=0)
    scores = decisions.probabilities({"tags": logits})["tags"]
    best = scores.max(1)
    answers = Classified(
        {"tags": best.indices},
        {"tags": best.values},
        {"tags": labels},
        {},
        None,
        torch.ones(2000, 2, dtype=torch.bool),
        scores={"tags": scores},
    )
    (found,) = decisions.promises(answers).values()
    taken = decisions.accepted(answers.confidence, answers.predicted, answers.scores)["tags"]
    known = labels[:, 0] >= 0
    assert found.rows == known.sum() and found.accepted == taken[known].any(1).sum()
    assert found.answers == taken[known].sum() > found.accepted
    assert found.precision == pytest.approx(float((labels[known] == 1)[taken[known]].float().mean()))
    assert found.coverage == found.accepted / found.rows
    assert found.verdict == "kept" or "within chance" in found.verdict
    assert found.record()["answers"] == found.answers
    (said,) = sentences({"tags": Promise(0.9, 100, 50, 72, 80)})
    assert "50 of 100 rows (50%)" in said and "90.0% of their 80 labels right" in said


def test_columns_of_predictions() -> None:
    assert output_schema(pa.schema([]), TAGS, (), ("tags",)).field("tags").type == pa.list_(pa.string())
    said = Prediction(("red", "blue"), "accepted", 0.9, (("red", 0.9),), None, None)
    assert flatten({"tags": said})["tags"] == ["red", "blue"]


KINDS = {
    "kind_1": ["a", "b"],
    "kind_2": ["a > x", "a > y", "b"],
    "tags": TAGS["tags"],
    "kind_1_applies": ["no", "yes"],
    "tags_applies": ["no", "yes"],
}


def gated() -> Decisions:
    """Sure of everything on rows alike."""
    generator = torch.Generator().manual_seed(0)
    number = 400
    below = torch.randint(3, (number,), generator=generator)
    tags = torch.randint(2, (number, 3), generator=generator).to(torch.int8)
    answers = torch.randint(4, (number,), generator=generator)  # a quarter of the rows has nothing
    labels = {
        "kind_1": torch.tensor([0, 0, 1])[below].where(answers > 0, -1),
        "kind_2": below.where(answers > 0, -1),
        "tags": tags.where(answers[:, None] > 0, -1),
        "kind_1_applies": (answers > 0).long(),
        "tags_applies": (answers > 0).long(),
    }
    logits = {
        task: 8 * (of.float() - 0.5) if of.ndim == 2 else 8.0 * F.one_hot(of.clamp_min(0), len(KINDS[task]))
        for task, of in labels.items()
    }
    return Decisions.fit(made(KINDS, ("kind_1", "tags"), (Taxonomy("kind"),)), logits, labels)


def test_what_does_not_apply_has_no_label_and_its_own_status() -> None:
    decisions = gated()
    sure, half = [0.0, 8.0], [0.0, 0.1]
    gates = torch.tensor([sure, sure[::-1], half])  # it applies; it does not; who knows
    logits = {
        "kind_1": torch.tensor([[8.0, 0.0]] * 3),
        "kind_2": torch.tensor([[8.0, 0.0, 0.0]] * 3),
        "tags": torch.tensor([[6.0, -6.0, -6.0]] * 3),
        "kind_1_applies": gates,
        "tags_applies": gates,
    }
    yes, no, unsure = read_output(Output(logits), KINDS, [Taxonomy("kind")], decisions)
    for task, label in {"kind_1": "a", "kind_2": "a > x", "tags": ("blue",)}.items():
        assert (yes[task].status, yes[task].label) == ("accepted", label)
        assert (no[task].status, no[task].label) == ("not_applicable", None)
        assert (unsure[task].status, unsure[task].label) == ("unsure", None)
    assert (yes["tags_applies"].label, no["tags_applies"].label) == ("yes", "no")
    assert no["tags_applies"].status == "accepted" and unsure["tags_applies"].status == "unsure"
    assert no["tags"].top[0][0] == "blue"


def test_thresholds_below_a_question_are_chosen_where_it_is_answered_with_yes() -> None:
    decisions = gated()
    scores = decisions.scores["tags"]
    opened = (decisions.scores["tags_applies"].predicted == 1) & labelled(scores.labels)
    found = choose_threshold(scores.confidence[opened].flatten(), (scores.labels[opened] == 1).flatten(), 0.9)
    assert decisions.thresholds["tags"].threshold == found.value
    assert list(decisions.thresholds) == list(KINDS)


def test_precision_and_recall_of_not_applicable() -> None:
    predicted = torch.tensor([0, 0, 1, 1, 0])
    labels = torch.tensor([0, 1, 0, 1, -1])
    answers = Classified(
        {"tags_applies": predicted}, {}, {"tags_applies": labels}, {}, None, torch.ones(5, 2, dtype=torch.bool)
    )
    found = answers.not_applicable(("tags",))
    assert found == {"tags": {"precision": 0.5, "recall": 0.5, "rows": 2}}
    (said,) = sentences_of_absence(found)
    assert "2 rows" in said and "50.0%" in said
    none = answers.select(torch.tensor([3])).not_applicable(("tags",))["tags"]
    assert math.isnan(none["precision"]) and math.isnan(none["recall"]) and none["rows"] == 0

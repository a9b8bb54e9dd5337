"""Calibration, thresholds and their promise: against searches, by hand, and by simulation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom

from cmaclip_fast import InputError
from cmaclip_fast.classifier.decisions import Decisions
from cmaclip_fast.classifier.prediction import deepest, read_output
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.evaluation.calibration import Calibration, Reliability, calibrated_probabilities, fit_calibrations
from cmaclip_fast.evaluation.hierarchy import hierarchical_metrics
from cmaclip_fast.evaluation.promise import Promise, sentences
from cmaclip_fast.evaluation.thresholds import (
    MIN_CLASS_ROWS,
    choose_class_thresholds,
    choose_threshold,
    precision_bound,
    rows_needed,
)
from cmaclip_fast.types import Output

COLOURS = {"colour": ["blue", "green", "red"]}
KINDS = {"kind_1": ["a", "b"], "kind_2": ["a > x", "a > y", "b"]}
KIND = Taxonomy("kind")


def overconfident(rows: int, classes: int = 3, factor: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `factor` times as large as those that the labels are drawn by."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * 1.5
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return factor * logits, labels


def test_the_temperature_is_the_one_the_labels_were_drawn_with() -> None:
    logits, labels = overconfident(20_000)
    labels[::7] = -1
    (found,) = fit_calibrations({"colour": logits}, {"colour": labels}, COLOURS).values()
    assert found.temperature == pytest.approx((3.0,), rel=0.05) and found.bias == ()
    known = labels >= 0
    losses = {t: float(F.cross_entropy(logits[known] / t, labels[known])) for t in np.arange(1, 6, 0.05)}
    assert found.temperature[0] == pytest.approx(min(losses, key=losses.__getitem__), abs=0.05)


def test_calibration_makes_confidences_true_and_keeps_the_answers() -> None:
    logits, labels = overconfident(20_000)
    found = fit_calibrations({"colour": logits[::2]}, {"colour": labels[::2]}, COLOURS)
    before, after = logits[1::2].softmax(1), found["colour"](logits[1::2]).softmax(1)
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert Reliability.of(*before.max(1), labels[1::2]).error > 0.1
    assert Reliability.of(*after.max(1), labels[1::2]).error < 0.02


def test_vector_scaling_finds_scales_and_biases_of_classes() -> None:
    logits, labels = overconfident(20_000, factor=1.0)
    shifted = logits * torch.tensor([1.0, 2.0, 4.0]) - torch.tensor([0.0, 1.0, -2.0])
    (found,) = fit_calibrations({"colour": shifted}, {"colour": labels}, COLOURS, method="vector").values()
    assert F.cross_entropy(found(shifted), labels) == pytest.approx(float(F.cross_entropy(logits, labels)), abs=2e-3)
    (one,) = fit_calibrations({"colour": shifted}, {"colour": labels}, COLOURS).values()
    assert F.cross_entropy(found(shifted), labels) < F.cross_entropy(one(shifted), labels) - 0.02


def test_a_task_without_labels_stays_as_it_is() -> None:
    logits = {"colour": torch.randn(4, 3), "kind": torch.randn(4, 2)}
    tasks = COLOURS | {"kind": ["a", "b"]}
    found = fit_calibrations(logits, {"colour": torch.full((4,), -1)}, tasks)
    assert found == {}
    probabilities = calibrated_probabilities(logits, tasks, (), found)
    assert torch.equal(probabilities["kind"], logits["kind"].softmax(1))


def test_levels_of_a_taxonomy_are_calibrated_from_the_top() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 20_000
    top, below = torch.randn(rows, 2, generator=generator) * 2, torch.randn(rows, 3, generator=generator) * 2
    true = calibrated_probabilities({"kind_1": top, "kind_2": below}, KINDS, [KIND])["kind_2"]
    labels = torch.multinomial(true / true.sum(1, keepdim=True), 1, generator=generator)[:, 0]
    found = fit_calibrations(
        {"kind_1": 2 * top, "kind_2": 4 * below},
        {"kind_1": torch.tensor([0, 0, 1])[labels], "kind_2": labels},
        KINDS,
        [KIND],
        "vector",
    )
    assert found["kind_1"].temperature == pytest.approx((2.0,), rel=0.1)
    assert found["kind_2"].temperature == pytest.approx((4.0,), rel=0.15)


def test_the_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.9] * 15 + [0.6] * 15)
    right = torch.tensor([1] * 12 + [0] * 3 + [1] * 6 + [0] * 9)
    found = Reliability.of(confidence, right, torch.ones(30, dtype=torch.long))
    assert found.rows.tolist() == [2] * 15
    # sorted: the six right among those of 0.6 first, in bins of two, one of which is half of 0.6 and half of 0.9
    expected = (3 * 0.4 + 4 * 0.6 + abs(0.75 - 0.5) + 5.5 * 0.1 + 1.5 * 0.9) / 15
    assert found.error == pytest.approx(expected, abs=0.05)
    assert math.isnan(Reliability.of(torch.zeros(2), torch.zeros(2), torch.full((2,), -1)).error)


@pytest.mark.parametrize("rows", [150, 600, 5000])
def test_perfect_confidences_show_the_error_of_chance(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(200):
        confidence = torch.rand(rows, generator=generator)
        right = (torch.rand(rows, generator=generator) < confidence).long()
        found.append(Reliability.of(confidence, right, torch.ones(rows, dtype=torch.long)))
    expected = np.mean([one.chance for one in found])
    assert np.mean([one.error for one in found]) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("right, rows", [(0, 5), (1, 1), (22, 22), (45, 50), (950, 1000)])
def test_the_bound_is_where_so_many_hits_become_as_rare_as_the_error(right: int, rows: int) -> None:
    bound = float(precision_bound(right, rows, 0.1))
    assert 0 <= bound < right / rows or right == bound == 0
    if right:
        assert binom.sf(right - 1, rows, bound) == pytest.approx(0.1, abs=1e-9)


@pytest.mark.parametrize("target", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_rows_needed(target: float) -> None:
    fewest = rows_needed(target, 0.1)
    assert precision_bound(fewest, fewest, 0.1) >= target > precision_bound(fewest - 1, fewest - 1, 0.1)


def test_a_threshold_accepts_what_is_shown_and_no_more() -> None:
    confidence = torch.linspace(1, 0, 1001)[:-1]
    right = confidence > 0.5  # right for certain down to 0.5, then never
    found = choose_threshold(confidence, right, 0.9)
    assert found.value is not None and 0.4 < found.value < 0.52
    taken = confidence >= found.value
    assert (found.rows, found.accepted, found.right) == (1000, int(taken.sum()), int((taken & right).sum()))
    assert precision_bound(found.right, found.accepted, 0.1) >= 0.9


def test_a_wrong_answer_at_the_top_does_not_cost_a_task_that_is_nearly_always_right() -> None:
    confidence = torch.linspace(1, 0.5, 400)
    right = torch.arange(400) % 25 != 3  # 96 of 100, and one of the first four is wrong
    found = choose_threshold(confidence, right, 0.9)
    assert found.accepted == 400 and found.right == int(right.sum())


def test_rows_of_the_same_confidence_are_accepted_together() -> None:
    confidence = torch.cat([torch.full((60,), 0.8), torch.full((60,), 0.4)])
    right = torch.cat([torch.ones(60), torch.zeros(60)]).bool()
    found = choose_threshold(confidence, right, 0.9)
    assert found.value == pytest.approx(0.8) and found.accepted == 60


@pytest.mark.parametrize("rows, target", [(0, 0.9), (21, 0.9), (1000, 1.0)])
def test_nothing_is_accepted_where_nothing_can_be_shown(rows: int, target: float) -> None:
    found = choose_threshold(torch.rand(rows), torch.ones(rows, dtype=torch.bool), target)
    assert (found.value, found.accepted) == (None, 0)


@pytest.mark.parametrize("rows, accuracy", [(200, 0.6), (400, 0.8)])
def test_the_promise_is_broken_in_at_most_one_case_of_ten(rows: int, accuracy: float) -> None:
    """The raw estimate, the largest set whose precision reaches the target, breaks it in about half of the cases."""
    chance = np.random.default_rng(0)
    population = np.sort(chance.beta(2 * accuracy, 2 * (1 - accuracy), 100_000))
    precision = population[::-1].cumsum()[::-1] / np.arange(len(population), 0, -1)
    broken = {"shown": 0, "raw": 0}
    cases = 200
    for _ in range(cases):
        p = chance.beta(2 * accuracy, 2 * (1 - accuracy), rows)
        right = chance.random(rows) < p
        found = choose_threshold(torch.tensor(p), torch.tensor(right), 0.9)
        if found.value is not None:
            broken["shown"] += precision[np.searchsorted(population, found.value)] < 0.9
        order = np.argsort(-p)
        reached = np.flatnonzero(right[order].cumsum() / np.arange(1, rows + 1) >= 0.9)
        if len(reached):
            broken["raw"] += precision[np.searchsorted(population, p[order][reached[-1]])] < 0.9
    assert broken["shown"] <= 0.1 * cases < 0.25 * cases < broken["raw"]


def test_classes_with_enough_rows_have_their_own_thresholds() -> None:
    predicted = torch.tensor([0] * 100 + [1] * 100 + [2] * 10)
    confidence = torch.cat([torch.linspace(0.9, 0.5, 100)] * 2 + [torch.full((10,), 0.9)])
    labels = predicted.clone()
    labels[100:200:2] = 0  # the second class is right in half of the rows
    found = choose_class_thresholds(confidence, predicted, labels, 0.9)
    assert set(found) == {0, 1}
    assert found[0].value == pytest.approx(0.5) and found[1].value is None
    few = torch.where(labels == 0, 1, labels)
    few[: MIN_CLASS_ROWS - 1] = 0
    assert 0 not in choose_class_thresholds(confidence, predicted, few, 0.9)


def made(tasks: dict[str, list[str]], taxonomies: Any = ()) -> Any:
    return SimpleNamespace(tasks=tasks, taxonomies=taxonomies, multi_label=(), applies=())


def fitted(per_class: bool = False, target: float = 0.9) -> Decisions:
    logits, labels = overconfident(2000)
    return Decisions.fit(made(COLOURS), {"colour": logits}, {"colour": labels}, target, per_class)


def test_predictions_say_what_is_accepted() -> None:
    decisions = fitted()
    threshold = decisions.thresholds["colour"].threshold
    assert threshold is not None
    logits = torch.tensor([[18.0, 0.0, 0.0], [3.0, 2.9, 0.0]])
    sure, unsure = read_output(Output(logits={"colour": logits}), COLOURS, (), decisions)
    calibrated = decisions.calibrations["colour"](logits).softmax(1)
    assert calibrated[0, 0] > threshold > calibrated[1, 0]
    assert (sure["colour"].status, sure["colour"].label) == ("accepted", "blue")
    assert (unsure["colour"].status, unsure["colour"].label) == ("unsure", None)
    assert unsure["colour"].top[0] == ("blue", pytest.approx(float(calibrated[1, 0])))
    raw = read_output(Output(logits={"colour": logits}), COLOURS, (), decisions, calibrated=False)
    assert [row["colour"].status for row in raw] == ["accepted", "unsure"]
    assert raw[1]["colour"].probability == pytest.approx(float(logits[1].softmax(0)[0]))
    undecided = read_output(Output(logits={"colour": logits}), COLOURS)
    assert [(row["colour"].status, row["colour"].label) for row in undecided] == [(None, "blue")] * 2


def test_a_higher_precision_accepts_less_without_training_again() -> None:
    decisions = fitted()
    higher, lower = decisions.with_min_precision(0.97), decisions.with_min_precision(0.6)
    accepted = [d.thresholds["colour"].accepted for d in (higher, decisions, lower)]
    assert accepted[0] < accepted[1] < accepted[2]
    assert higher.target_precision == 0.97 and higher.thresholds == fitted(target=0.97).thresholds
    for wrong in (0.0, -1.0, 1.01, math.nan):
        with pytest.raises(InputError, match="min_precision"):
            decisions.with_min_precision(wrong)


def test_classes_are_accepted_by_their_own_thresholds() -> None:
    decisions = fitted(per_class=True, target=0.7)
    own = decisions.thresholds["colour"].classes
    assert own.keys() == set(COLOURS["colour"]) and all(value is not None for value in own.values())
    confidence = torch.tensor([own["blue"], own["green"], own["red"]])  # exactly at each
    at = decisions.accepted({"colour": confidence}, {"colour": torch.arange(3)})["colour"]
    below = decisions.accepted({"colour": confidence - 1e-4}, {"colour": torch.arange(3)})["colour"]
    assert at.all() and not below.any()


@pytest.mark.parametrize("per_class", [False, True])
def test_decisions_survive_a_folder(per_class: bool, tmp_path: Any) -> None:
    decisions = fitted(per_class)
    decisions.save(tmp_path)
    loaded = Decisions.load(tmp_path, made(COLOURS))
    assert loaded.calibrations == decisions.calibrations and loaded.thresholds == decisions.thresholds
    assert loaded.with_min_precision(0.8).thresholds == decisions.with_min_precision(0.8).thresholds


def test_a_lower_level_is_accepted_below_accepted_ones_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (3000,), generator=generator)
    above = torch.tensor([0, 0, 1])[labels]
    easy = torch.rand(3000, 2, generator=generator) < 0.7  # of the rows, some at both levels
    logits = {
        "kind_1": torch.randn(3000, 2, generator=generator) + 6 * easy[:, :1] * F.one_hot(above, 2),
        "kind_2": torch.randn(3000, 3, generator=generator) + 6 * easy[:, 1:] * F.one_hot(labels, 3),
    }
    decisions = Decisions.fit(made(KINDS, [KIND]), logits, {"kind_1": above, "kind_2": labels})
    rows = read_output(Output(logits=logits), KINDS, [KIND], decisions)
    statuses = {(row["kind_1"].status, row["kind_2"].status) for row in rows}
    assert statuses == {("accepted", "accepted"), ("accepted", "unsure"), ("unsure", "unsure")}
    right = {level: 0 for level in KINDS}
    for row, one, two in zip(rows, above.tolist(), labels.tolist(), strict=True):
        path = deepest(row, KIND)
        assert path == (row["kind_2"].label or row["kind_1"].label)
        right["kind_1"] += row["kind_1"].label == KINDS["kind_1"][one]
        right["kind_2"] += row["kind_2"].label == KINDS["kind_2"][two]
    for level, found in decisions.thresholds.items():
        assert found.right == right[level] and found.right / found.accepted >= 0.9
        assert found.accepted == sum(row[level].status == "accepted" for row in rows)


def test_hierarchical_metrics_by_hand() -> None:
    labels = {"kind_1": torch.tensor([0, 0, 1, 0]), "kind_2": torch.tensor([0, 1, 2, -1])}
    said = {"kind_1": torch.tensor([0, 0, 0, 0]), "kind_2": torch.tensor([0, 0, 1, 0])}
    whole = hierarchical_metrics(KIND, KINDS, said, labels)
    # a > x for a > x; a > x for a > y; a > y for b
    assert whole == {"precision": 3 / 6, "recall": 3 / 5, "f1": 6 / 11, "rows": 3}
    accepted = {"kind_1": torch.tensor([1, 1, 0, 1]).bool(), "kind_2": torch.tensor([1, 0, 0, 1]).bool()}
    cut = hierarchical_metrics(KIND, KINDS, said, labels, accepted)
    assert cut == {"precision": 1.0, "recall": 3 / 5, "f1": 6 / 8, "rows": 3}


def test_the_promise_says_by_how_much_it_is_missed() -> None:
    assert Promise(0.9, 100, 50, 46).verdict == "kept"
    assert Promise(0.9, 100, 50, 44).verdict == "missed by 2.0 points, within chance"
    assert Promise(0.9, 1000, 500, 400).verdict == "missed by 10.0 points"
    assert Promise(0.9, 100, 0, 0).verdict == "nothing accepted"
    (kept,) = sentences({"colour": Promise(0.9, 100, 50, 46)})
    assert kept.startswith("colour: 50 of 100 rows (50%) can be published without a look, 92.0% of them right")
    assert kept.endswith("50 need a person")
    (none,) = sentences({"colour": Promise(0.9, 100, 0, 0)})
    assert "all 100 rows need a person" in none


def test_a_calibration_of_another_number_of_classes_does_not_fit() -> None:
    assert Calibration((2.0,)).fits(3) and Calibration((1.0, 2.0, 3.0), (0.0, 0.0, 0.0)).fits(3)
    assert not Calibration((1.0, 2.0)).fits(3) and not Calibration((1.0,), (0.0,)).fits(3)

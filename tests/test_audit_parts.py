"""What an audit is made of: cross-validated labels, near-duplicates, and rows to label next."""

from __future__ import annotations

import numpy as np
import pytest

from cmaclip_fast.evaluation.duplicates import both, conflicts, normalised, picture_groups, text_groups, together
from cmaclip_fast.evaluation.fit import disagreement, misfits
from cmaclip_fast.evaluation.label_errors import judge
from cmaclip_fast.evaluation.next_rows import next_rows


def blobs(rows: int = 120, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(0)
    labels = np.arange(rows) % classes
    return chance.normal(size=(rows, 8)) + 4 * np.eye(8)[labels], labels


def test_wrong_labels_are_judged_wrong() -> None:
    features, labels = blobs()
    wrong = np.arange(0, 120, 20)
    given = labels.copy()
    given[wrong] = (labels[wrong] + 1) % 3
    given[7] = -1
    found = judge(features, given, np.arange(120))
    assert found is not None and set(found.rows) == set(range(120)) - {7}
    assert set(found.rows[np.argsort(found.quality)[: len(wrong)]]) == set(wrong)
    assert set(found.rows[found.likely]) == set(wrong)
    assert (found.suggested == labels[found.rows]).mean() > 0.95


def test_a_row_is_judged_without_its_duplicates() -> None:
    features, labels = blobs()
    copies = np.repeat(features[:1], 30, axis=0)
    features, wrong = np.concatenate([features, copies]), (labels[0] + 1) % 3
    given = np.concatenate([labels, np.full(30, wrong)])
    groups = np.concatenate([np.arange(120), np.full(30, 120)])
    apart, grouped = (judge(features, given, of) for of in (np.arange(150), groups))
    assert apart is not None and grouped is not None
    assert (grouped.suggested[grouped.rows >= 120] == labels[0]).all()
    assert (apart.suggested[apart.rows >= 120] == wrong).all()


def test_rare_classes_are_not_judged() -> None:
    features, labels = blobs()
    labels[5] = 3
    found = judge(features, labels, np.arange(120))
    assert found is not None and 5 not in found.rows and not (found.suggested == 3).any()
    assert judge(features, np.zeros(120, dtype=int), np.arange(120)) is None
    assert judge(features, labels, np.zeros(120, dtype=int)) is None
    assert judge(features[:4], np.arange(4), np.arange(4)) is None


def test_texts_are_alike_but_for_case_and_punctuation() -> None:
    assert normalised("Red  DRESS, (new)!") == normalised("red dress new") != normalised("red dress")
    assert normalised("\u2603!") == "\u2603!"
    groups = text_groups(["A dress", "a dress.", None, "jeans", None])
    assert groups[0] == groups[1] >= 0 and (groups[2:] == -1).all()
    assert (text_groups(["photo"] * 500 + ["a", "a"])[:500] == -1).all()


def test_pictures_that_are_nearly_the_same() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    pictures[30] = (pictures[3].astype(int) + np.random.default_rng(1).integers(-2, 3, (16, 16, 3))).clip(0, 255)
    pictures[31], pictures[32] = 200, 210
    pictures[33:35] = 200
    present = np.ones(40, dtype=bool)
    present[34] = False
    groups = picture_groups(pictures, present)
    assert groups[3] == groups[30] >= 0 and groups[31] == groups[33] >= 0
    assert {int(row) for row in np.flatnonzero(groups >= 0)} == {3, 30, 31, 33}
    assert (picture_groups(np.zeros((40, 16, 16, 3), dtype=np.uint8), np.ones(40, dtype=bool)) == -1).all()
    assert (picture_groups(pictures, np.zeros(40, dtype=bool)) == -1).all()


def test_groups_together_and_both() -> None:
    text, picture = np.array([0, 0, -1, 1, 1, -1]), np.array([-1, 5, 5, 6, 6, -1])
    joined = together(text, picture)
    assert joined[0] == joined[1] == joined[2] and joined[3] == joined[4] and len(set(joined)) == 3
    shared = both(text, picture)
    assert shared[3] == shared[4] >= 0 and (shared[[0, 2, 5]] == -1).all()


@pytest.mark.parametrize("strict", [True, False])
def test_labels_that_often_differ_are_no_conflict(strict: bool) -> None:
    groups, labels = np.repeat(np.arange(20), 2), np.tile([0, 1], 20)
    quality = np.tile([0.9, 0.2], 20)
    found = list(conflicts(groups, labels, quality, strict))
    assert [(one.row, one.related) for one in found] == ([(row + 1, row) for row in range(0, 40, 2)] if strict else [])
    labels[:36] = 0
    found = list(conflicts(groups, labels, quality, strict))
    assert [(one.row, one.related) for one in found] == [(37, 36), (39, 38)]
    assert found[0].agreement == pytest.approx(38 / 40)


def test_the_label_of_most_stays() -> None:
    found = list(conflicts(np.zeros(4, dtype=int), np.array([1, 0, 0, -1]), np.array([0.9, 0.1, 0.2, 0.5]), True))
    assert [(one.row, one.related) for one in found] == [(0, 2)]


def test_disagreement_is_in_bits() -> None:
    one, other = np.array([[1.0, 0.0], [0.5, 0.5]]), np.array([[0.0, 1.0], [0.5, 0.5]])
    assert disagreement(one, other).tolist() == pytest.approx([1.0, 0.0])
    found = misfits(np.array([0.1, 0.75, 0.2]), np.array([0.8, 0.9, 0.7]))
    assert found.places.tolist() == [1] and found.tells_apart
    assert misfits(np.array([0.5, 0.5]), np.array([0.5, 0.5])).area == 0.5


def test_rows_to_label_next_are_uncertain_and_unlike_each_other() -> None:
    features = np.repeat(np.eye(4), 25, axis=0) + np.random.default_rng(0).normal(scale=0.01, size=(100, 4))
    uncertainty = np.concatenate([np.full(75, 0.8), np.full(25, 0.001)])
    uncertainty[10] = 0.9
    chosen = next_rows(features, uncertainty, 3)
    assert chosen[0] == 10 and {row // 25 for row in chosen} == {0, 1, 2}
    assert len(set(next_rows(features, uncertainty, 1000))) == 100 and next_rows(features[:0], uncertainty[:0], 5) == []

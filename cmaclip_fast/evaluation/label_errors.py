"""Rows whose label looks wrong: cross-validated probabilities from fixed features, judged by cleanlab."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from cmaclip_fast.errors import InputError

UNLABELLED = -1

_COMPONENTS = 128
_INVERSE_PENALTY = 0.01
"""Of the logistic regression: strong, so that a wrong label does not bend the boundary around its own row."""


@dataclass(frozen=True)
class Judged:
    """The labels of one task as cross-validation judges them.

    Attributes:
        rows: `[M]`, the rows that could be judged: labelled, with their class among the rows that the fold learnt from.
        quality: `[M]`, the probability of the given label, 0 to 1; low where the label looks wrong.
        suggested: `[M]`, the most probable class.
        probability: `[M]`, of that class.
        margin: `[M]`, the probability of that class over the second's.
        likely: `[M]` bool, cleanlab's verdict that the label is wrong (confident learning, arXiv 1911.00068).
    """

    rows: np.ndarray
    quality: np.ndarray
    suggested: np.ndarray
    probability: np.ndarray
    margin: np.ndarray
    likely: np.ndarray


def check_cleanlab() -> None:
    """
    Raises:
        InputError: cleanlab is missing.
    """
    try:
        import cleanlab.filter  # noqa: F401
    except ImportError:
        raise InputError("the audit of labels needs cleanlab: pip install 'cmaclip_fast[audit]'") from None


def judge(
    features: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    folds: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Judged | None:
    """Judges each label by a classifier that has not seen it, nor any row of its group.

    Args:
        features: `[N, D]`.
        labels: `[N]`, class numbers, -1 where unlabelled.
        groups: `[N]`; rows of one group, such as duplicates, are in one fold.
        folds: at most; fewer where there are fewer groups.
        progress: called with the folds done and their number.

    Returns:
        None where nothing can be judged: fewer than two classes, or fewer than two groups.

    Raises:
        InputError: cleanlab is missing.
    """
    check_cleanlab()
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    labelled = np.flatnonzero(labels != UNLABELLED)
    classes, given = np.unique(labels[labelled], return_inverse=True)
    folds = min(folds, len(np.unique(groups[labelled])))
    if len(classes) < 2 or folds < 2:
        return None
    probabilities = np.zeros((len(labelled), len(classes)))
    known = np.zeros(len(labelled), dtype=bool)
    splits = _split(given, groups[labelled], folds, seed)
    for done, (learnt, judged) in enumerate(splits, 1):
        there = np.unique(given[learnt])
        if len(there) > 1:
            model = _model(len(learnt), features.shape[1], seed).fit(features[labelled[learnt]], given[learnt])
            probabilities[np.ix_(judged, there)] = model.predict_proba(features[labelled[judged]])
            known[judged] = np.isin(given[judged], there)
        if progress is not None:
            progress(done, folds)
    if not known.any():
        return None
    kept, given, rows = probabilities[known], given[known], labelled[known]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are rare among the rows
        quality = get_label_quality_scores(given, kept, method="self_confidence")
        likely = _likely(find_label_issues, given, kept)
    ordered = np.sort(kept, axis=1)
    return Judged(
        rows=rows,
        quality=np.asarray(quality, dtype=np.float64),
        suggested=classes[kept.argmax(1)],
        probability=ordered[:, -1],
        margin=ordered[:, -1] - ordered[:, -2],
        likely=likely,
    )


def _split(given: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of rows to learn from, and to judge; classes spread evenly over the folds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer rows than folds
        smallest = min(folds, int(np.bincount(given).max()))
        if smallest < 2:
            return iter(())
        yielded = list(StratifiedGroupKFold(smallest, shuffle=True, random_state=seed).split(given, given, groups))
    return iter(yielded)


def _model(rows: int, width: int, seed: int) -> Pipeline:
    steps: list[object] = [StandardScaler()]
    if width > _COMPONENTS < rows:
        steps.append(PCA(_COMPONENTS, random_state=seed))
    return make_pipeline(*steps, LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000))


def _likely(find: Callable[..., np.ndarray], given: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """cleanlab's mask, over the classes that are left among the judged rows."""
    there = np.unique(given)
    if len(there) < 2:
        return np.zeros(len(given), dtype=bool)
    left = probabilities[:, there]
    left = left / left.sum(1, keepdims=True).clip(min=1e-12)
    return np.asarray(find(np.searchsorted(there, given), left, n_jobs=1), dtype=bool)

"""Simple baselines for every table of results: the most frequent class, and TF-IDF logistic regression on the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from cmaclip_fast.data.classes import encode
from cmaclip_fast.data.table import Table
from cmaclip_fast.evaluation.metrics import headline_metrics

MAX_ROWS, MAX_PRODUCT = 20_000, 2**19
"""The regression is trained on at most so many rows, drawn at random, and left out for tasks with more rows times
classes, which would take minutes."""

Headlines = dict[str, dict[str, float]]
"""Each task's headline numbers (see `TaskMetrics.headline`)."""


MAJORITY, TEXT = "majority class", "TF-IDF on the text"


def baselines(
    train: Table, tables: dict[str, Table], tasks: dict[str, list[str]], target_precision: float = 0.9, seed: int = 0
) -> dict[str, dict[str, Headlines]]:
    """Baselines for a model, measured on each of `tables`; multi-label tasks are left out.

    The regression reads words and pairs of words, and groups of 2 to 5 letters within words. Rows without a text get
    the classes of the empty text.

    Args:
        train: the training rows.
        tables: the tables to measure on, by name.
        tasks: the classes of each task.
        seed: chooses the rows, where there are more than `MAX_ROWS`.

    Returns:
        For each baseline, `majority class` and `TF-IDF on the text`, and each table, the headlines of the tasks that
        it covers; without a text column the second is left out.
    """
    tasks = {task: classes for task, classes in tasks.items() if task not in train.columns.multi_label}
    found: dict[str, dict[str, Headlines]] = {MAJORITY: {name: {} for name in tables}}
    measured = {
        name: {task: encode(table, task, classes, "ignore")[0] for task, classes in tasks.items()}
        for name, table in tables.items()
    }
    learned = {task: encode(train, task, classes)[0] for task, classes in tasks.items()}
    for task, labels in learned.items():
        common = Counter(labels[labels >= 0].tolist()).most_common(1)[0][0]
        share = float((labels[labels >= 0] == common).float().mean())
        for name, of in measured.items():
            size = len(of[task])
            found[MAJORITY][name][task] = headline_metrics(
                torch.full((size,), share), torch.full((size,), common), of[task], target_precision
            )
    if train.columns.text is None:
        return found
    found[TEXT] = {name: {} for name in tables}
    rows = np.arange(len(train))
    if len(rows) > MAX_ROWS:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MAX_ROWS])
    features = _Features([_text(text) for text in train.select(rows).texts()])
    of_tables = {name: features([_text(text) for text in table.texts()]) for name, table in tables.items()}
    for task, classes in tasks.items():
        known = learned[task][rows].numpy()
        labelled = known >= 0
        if len(classes) * labelled.sum() > MAX_PRODUCT or len(np.unique(known[labelled])) < 2:
            continue
        model = LogisticRegression(C=10, max_iter=1000).fit(features.training[labelled], known[labelled])
        for name, values in of_tables.items():
            confidence, best = torch.from_numpy(model.predict_proba(values)).float().max(1)
            predicted = torch.from_numpy(model.classes_)[best]
            found[TEXT][name][task] = headline_metrics(confidence, predicted, measured[name][task], target_precision)
    return found


def below_text(model: Headlines, found: dict[str, dict[str, Headlines]], table: str) -> dict[str, tuple[float, float]]:
    """The tasks where the model is less accurate than the regression on the text: both accuracies.

    Args:
        model: the model's headlines on one of the tables.
        found: what `baselines` gave.
        table: its name.
    """
    simple = found.get(TEXT, {}).get(table, {})
    return {
        task: (model[task]["accuracy"], numbers["accuracy"])
        for task, numbers in simple.items()
        if numbers["rows"] and model[task]["accuracy"] < numbers["accuracy"]
    }


class _Features:
    """TF-IDF of words and of groups of letters, side by side."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._vectorizers = [
            TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", sublinear_tf=True, max_features=200_000),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, max_features=200_000),
        ]
        texts = [*texts, "a"]  # so that there is a word, whatever the texts are
        self.training = hstack([v.fit_transform(texts) for v in self._vectorizers]).tocsr()[:-1]

    def __call__(self, texts: Sequence[str]) -> object:
        return hstack([vectorizer.transform(texts) for vectorizer in self._vectorizers]).tocsr()


def _text(text: str | None) -> str:
    return text or ""

"""What in a table a trained model finds worth a look: labels, duplicates, pairs that do not fit, rows to label next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cmaclip_fast.classifier.engine import Engine
from cmaclip_fast.classifier.findings import KINDS, Finding
from cmaclip_fast.classifier.seen import look
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.errors import InputError
from cmaclip_fast.evaluation.duplicates import both, conflicts, picture_groups, text_groups, together
from cmaclip_fast.evaluation.fit import Misfits, disagreement, misfits, telling_tasks
from cmaclip_fast.evaluation.label_errors import UNLABELLED, Judged, check_cleanlab, judge
from cmaclip_fast.evaluation.next_rows import next_rows

Tell = Callable[[str], None]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class AuditSettings:
    """How an audit is done.

    Attributes:
        kinds: those of `KINDS` to look for.
        folds: of the cross-validation.
        next_rows: how many rows to propose for labelling.
        batch_size: of the model.
        seed: of the folds.
    """

    kinds: tuple[str, ...] = KINDS
    folds: int = 5
    next_rows: int = 100
    batch_size: int = 64
    seed: int = 0


def audit(
    model: Engine,
    examples: Examples,
    settings: AuditSettings | None = None,
    tell: Tell = lambda message: None,
    progress: Progress | None = None,
) -> list[Finding]:
    """The findings, kind by kind and task by task, those with the highest scores first.

    Args:
        examples: the rows, with the tasks to look at; unlabelled rows may be among them.
        tell: is given what could not be looked for, and why.
        progress: called with what is being done, the steps done and their number.

    Raises:
        InputError: cleanlab is missing, or nothing can be looked for.
    """
    settings = settings or AuditSettings()
    if {"label", "duplicate"} & set(settings.kinds):
        check_cleanlab()
    return _Audit(model, examples, settings, tell, progress).findings()


class _Audit:
    def __init__(
        self, model: Engine, examples: Examples, settings: AuditSettings, tell: Tell, progress: Progress | None
    ) -> None:
        self._model, self._examples, self._settings = model, examples, settings
        self._tell = tell
        self._progress = progress or (lambda what, done, total: None)
        # a table without columns of labels is one of unlabelled rows
        none = {task: np.full(len(examples), UNLABELLED) for task in model.tasks if task not in model.multi_label}
        judged = {task: labels.numpy() for task, labels in examples.labels.items() if task not in model.multi_label}
        for task in examples.labels.keys() - judged.keys():
            tell(f"task '{task}': has several labels a row, which are not judged")
        self._labels = judged or none
        if not self._labels:
            raise InputError("the model has only tasks with several labels a row, which the audit does not judge")
        self._tasks = {task: model.tasks[task] for task in self._labels}

    def findings(self) -> list[Finding]:
        settings, kinds = self._settings, set(self._settings.kinds)
        self._seen = look(self._model, self._examples, settings.batch_size, "mismatch" in kinds, self._progress)
        self._text = text_groups(self._examples.table.texts())
        self._picture = picture_groups(self._seen.thumbnails, self._seen.has_picture)
        self._some_unlabelled = any((labels == UNLABELLED).any() for labels in self._labels.values())
        needed = kinds & {"label", "duplicate"} or ("next" in kinds and not self._some_unlabelled)
        self._judged = self._judge() if needed else {}
        of_kind: dict[str, Callable[[], Iterator[Finding]]] = {
            "label": self._label,
            "duplicate": self._duplicate,
            "mismatch": self._mismatch,
            "next": self._next,
        }
        if not self._judged and kinds <= {"label", "duplicate"}:
            raise InputError(
                f"{self._examples.table.name}: no task has labels of two classes or more: name another --task, or "
                "look for mismatches and rows to label alone"
            )
        return [finding for kind in KINDS if kind in kinds for finding in of_kind[kind]()]

    def _judge(self) -> dict[str, Judged]:
        groups = together(self._text, self._picture)
        judged: dict[str, Judged] = {}
        for task, labels in self._labels.items():

            def step(done: int, total: int, task: str = task) -> None:
                self._progress(f"cross-validating {task}", done, total)

            found = judge(self._seen.features, labels, groups, self._settings.folds, self._settings.seed, step)
            if found is not None:
                judged[task] = found
            if found is None or len(found.rows) < (labels != UNLABELLED).sum():
                self._tell(self._unjudged(task, labels, found))
        return judged

    def _unjudged(self, task: str, labels: np.ndarray, found: Judged | None) -> str:
        labelled = int((labels != UNLABELLED).sum())
        if labelled == 0:
            return f"task '{task}': no labelled row: its labels are not judged"
        if found is None:
            classes = len(np.unique(labels[labels != UNLABELLED]))
            few = "one class alone" if classes == 1 else "too few rows of each class"
            return f"task '{task}': {few} among {labelled} labelled rows: its labels are not judged"
        return f"task '{task}': {labelled - len(found.rows)} rows of too rare classes are not judged"

    def _label(self) -> Iterator[Finding]:
        for task, judged in self._judged.items():
            names, labels = self._tasks[task], self._labels[task]
            for place in np.argsort(judged.quality, kind="stable").tolist():
                row, said = int(judged.rows[place]), int(judged.suggested[place])
                if said == labels[row]:
                    continue
                yield Finding(
                    "label",
                    task,
                    row,
                    1 - float(judged.quality[place]),
                    names[labels[row]],
                    names[said],
                    bool(judged.likely[place]),
                    note=f"{judged.probability[place]:.0%} for the suggested label",
                )

    def _duplicate(self) -> Iterator[Finding]:
        groupings = {
            "same text and picture": both(self._text, self._picture),
            "same picture": self._picture,
            "same text": self._text,
        }
        for task, labels in self._labels.items():
            quality = np.full(len(labels), 0.5)
            if task in self._judged:
                quality[self._judged[task].rows] = self._judged[task].quality
            listed: set[int] = set()
            found = []
            for how, groups in groupings.items():
                strict = how == "same text and picture"
                for conflict in conflicts(groups, labels, quality, strict):
                    if conflict.row in listed:
                        continue
                    listed.add(conflict.row)
                    given, other = (self._tasks[task][labels[row]] for row in (conflict.row, conflict.related))
                    found.append(
                        Finding(
                            "duplicate",
                            task,
                            conflict.row,
                            1.0 if strict else conflict.agreement,
                            given,
                            other,
                            related=conflict.related,
                            note=how,
                        )
                    )
            yield from sorted(found, key=lambda finding: -finding.score)

    def _mismatch(self) -> Iterator[Finding]:
        seen, chance = self._seen, np.random.default_rng(self._settings.seed)
        rows = np.flatnonzero(seen.present.all(1))
        if not all(self._model.module.modalities) or len(rows) < 2:
            self._tell("no pairs of text and picture that the model reads both of: mismatches are not looked for")
            return
        order = chance.permutation(rows)
        rows, other = order, np.roll(order, 1)  # of every row another one, never its own
        if seen.contrastive is not None:
            text, image = seen.contrastive
            found = misfits((1 - (text[rows] * image[rows]).sum(1)) / 2, (1 - (text[other] * image[rows]).sum(1)) / 2)
            if found.tells_apart:
                yield from self._by_similarity(rows, found)
                return
        own = {task: disagreement(text[rows], image[rows]) for task, (text, image) in seen.alone.items()}
        strange = {task: disagreement(text[other], image[rows]) for task, (text, image) in seen.alone.items()}
        telling = telling_tasks(own, strange)
        if not telling:
            self._tell("text and picture do not say enough of the same task: mismatches are not looked for")
            return
        own = {task: own[task] for task in telling}
        found = misfits(
            np.max([own[task] for task in telling], axis=0), np.max([strange[task] for task in telling], axis=0)
        )
        yield from self._by_disagreement(rows, own, found)

    def _by_similarity(self, rows: np.ndarray, found: Misfits) -> Iterator[Finding]:
        for place in found.places.tolist():
            score = float(found.scores[place])
            yield Finding("mismatch", None, int(rows[place]), score, note=f"similarity {1 - 2 * score:.2f}")

    def _by_disagreement(self, rows: np.ndarray, own: dict[str, np.ndarray], found: Misfits) -> Iterator[Finding]:
        """Each row with the task in which its text and picture disagree most."""
        for place in found.places.tolist():
            row, task = int(rows[place]), max(own, key=lambda task: float(own[task][place]))
            names = self._model.tasks[task]
            text, image = (names[int(side[row].argmax())] for side in self._seen.alone[task])
            label = int(self._labels[task][row]) if task in self._labels else UNLABELLED
            given = None if label == UNLABELLED else names[label]
            score = float(found.scores[place])
            yield Finding("mismatch", task, row, score, given, note=f"text: {text}, picture: {image}")

    def _next(self) -> Iterator[Finding]:
        """Unlabelled rows by what the model says of them; where all are labelled, the rows that are least certain."""
        seen = self._seen
        uncertain = np.full((len(self._tasks), len(self._examples)), -1.0)
        said = np.zeros((len(self._tasks), len(self._examples)), dtype=np.int64)
        for number, (task, labels) in enumerate(self._labels.items()):
            judged = self._judged.get(task)
            if self._some_unlabelled:
                rows = np.flatnonzero(labels == UNLABELLED)
                uncertain[number, rows], said[number, rows] = 1 - seen.margin[task][rows], seen.predicted[task][rows]
            else:
                uncertain[number], said[number] = 1 - seen.margin[task], seen.predicted[task]
                if judged is not None:
                    uncertain[number, judged.rows], said[number, judged.rows] = 1 - judged.margin, judged.suggested
        if not len(uncertain):
            return
        most = uncertain.max(0)
        rows = np.flatnonzero(most >= 0)
        tasks = list(self._tasks)
        for place in next_rows(seen.features[rows], most[rows], self._settings.next_rows):
            row = int(rows[place])
            number = int(uncertain[:, row].argmax())
            task = tasks[number]
            label = int(self._labels[task][row])
            given = None if label == UNLABELLED else self._tasks[task][label]
            suggested = self._tasks[task][said[number, row]]
            note = "unlabelled" if given is None else "labelled, but uncertain"
            yield Finding("next", task, row, float(most[row]), given, suggested, note=note)

"""`cmaclip audit`: damage done on purpose is found, bad input ends in one line, and the page is safe and whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest

from cmaclip_fast.classifier import audit as auditing
from cmaclip_fast.classifier.audit import AuditSettings
from cmaclip_fast.classifier.classifier import Classifier
from cmaclip_fast.classifier.seen import look
from cmaclip_fast.data import read_table
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.data.named import Columns
from tests.test_report import HOSTILE, Page

from .conftest import COLOURS, Done, write_data

Run = Callable[..., Done]
one_line = pytest.mark.tried("table", ends="one line, exit 2")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pandas.DataFrame:
    """More rows of the kind that the artefact was trained on."""
    table = write_data(tmp_path_factory.mktemp("more"), rows=200, seed=3)
    frame = pandas.read_csv(table, dtype=str, keep_default_na=False)
    frame["picture"] = [name and str(table.parent / name) for name in frame["picture"]]
    return frame


@pytest.fixture
def audit(cmaclip: Run, artifact: Path, tmp_path: Path) -> Callable[..., tuple[Done, pandas.DataFrame]]:
    """Audits a table, and reads what was found."""

    def run(frame: pandas.DataFrame, *more: object) -> tuple[Done, pandas.DataFrame]:
        frame.to_csv(tmp_path / "rows.csv", index=False)
        output = tmp_path / "found.parquet"
        done = cmaclip("audit", artifact, "--data", tmp_path / "rows.csv", "--key", "id", "--output", output, *more)
        return done, pq.read_table(output).to_pandas() if done.code == 0 else pandas.DataFrame()

    return run


def refused(done: Done, *parts: str) -> None:
    assert done.code == 2 and "Traceback" not in done.err, done
    line = done.err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(part in line for part in parts), line


def test_flipped_labels_come_first(audit: Callable[..., tuple[Done, pandas.DataFrame]], rows: pandas.DataFrame) -> None:
    labelled = rows.index[rows["colour"] != ""][::20]
    flipped = rows.copy()
    names = list(COLOURS)
    for row in labelled:
        flipped.loc[row, "colour"] = names[(names.index(rows.loc[row, "colour"]) + 1) % 3]
    done, found = audit(flipped, "--kind", "label", "--task", "colour")
    assert set(found["kind"]) == {"label"} and set(found["task"]) == {"colour"}
    first = found.head(round(0.1 * (rows["colour"] != "").sum()))
    hit = first[first["id"].isin(rows.loc[labelled, "id"])]
    assert len(hit) >= 0.6 * len(labelled)
    right = rows.set_index("id")["colour"]
    assert (hit["suggested"] == right[hit["id"]].to_numpy()).mean() > 0.6
    assert (found["given"] != found["suggested"]).all() and found["score"].is_monotonic_decreasing
    assert found["rank"].tolist() == list(range(1, len(found) + 1))
    assert first["likely"].mean() > found["likely"].mean() or found["likely"].all()
    assert "likely wrong" in done.out


def test_duplicates_with_different_labels(
    audit: Callable[..., tuple[Done, pandas.DataFrame]], rows: pandas.DataFrame
) -> None:
    whole = rows[(rows[["picture", "title", "colour"]] != "").all(axis=1)]
    again = whole.head(2).copy()
    again["id"] = ["again-same", "again-other"]
    again["title"] = again["title"].str.upper() + "!"
    other = next(name for name in COLOURS if name != again["colour"].iloc[1])
    again.iloc[1, again.columns.get_loc("colour")] = other
    _, found = audit(pandas.concat([rows, again]), "--kind", "duplicate", "--task", "colour")
    strict = found[found["note"] == "same text and picture"]
    assert len(strict) == 1
    pair = strict.iloc[0]
    assert {pair["id"], pair["related_id"]} == {"again-other", whole["id"].iloc[1]}
    assert {pair["given"], pair["suggested"]} == {other, whole["colour"].iloc[1]}
    assert {pair["row"], pair["related_row"]} == {whole.index[1] + 1, len(rows) + 2}


@pytest.mark.parametrize("compared", ["by the tasks", "by the towers", "by neither"])
def test_texts_that_do_not_fit(compared: str, artifact: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Classifier.load(artifact, "cpu").engine
    table = read_table(str(shapes), Columns("picture", "title", ("colour",), ("id",)))
    examples = Examples(table, {"colour": engine.tasks["colour"]}, engine.preprocessing, engine.tokenizer)
    seen = look(engine, examples, 32, True, lambda what, done, total: None)
    assert seen.contrastive is not None and set(seen.alone) == {"colour", "shape"}
    pairs = np.flatnonzero(seen.present.all(1))
    wrong = pairs[::10]
    chance = np.random.default_rng(0)
    said = np.eye(3)[chance.integers(0, 3, len(table))] * 0.9 + 0.03
    unrelated = np.eye(2)[chance.integers(0, 2, (2, len(table)))]
    read = said.copy()
    read[wrong] = np.roll(said[wrong], 1, axis=1)
    vectors = chance.normal(size=(len(table), 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    described = vectors.copy()
    described[wrong] *= -1
    seen.contrastive = (described, vectors) if compared == "by the towers" else (vectors[::-1], vectors)
    telling = (read, said) if compared == "by the tasks" else (np.full_like(said, 1 / 3), said)
    seen.alone = {"colour": telling, "shape": (unrelated[0], unrelated[1])}
    monkeypatch.setattr(auditing, "look", lambda *arguments: seen)
    told: list[str] = []
    found = auditing.audit(engine, examples, AuditSettings(("mismatch",)), told.append)
    if compared == "by neither":
        assert not found and "mismatches are not looked for" in told[0]
        return
    assert {finding.row for finding in found[: len(wrong)]} == set(wrong.tolist()) and not told
    assert {finding.task for finding in found} == ({"colour"} if compared == "by the tasks" else {None})
    first = found[0]
    names = engine.tasks["colour"]
    if compared == "by the tasks":
        expected = f"text: {names[read[first.row].argmax()]}, picture: {names[said[first.row].argmax()]}"
        assert first.note == expected
    else:
        assert first.note == "similarity -1.00" and first.score == pytest.approx(1)


def test_unlabelled_rows_are_proposed(
    audit: Callable[..., tuple[Done, pandas.DataFrame]], rows: pandas.DataFrame
) -> None:
    _, found = audit(rows, "--kind", "next", "--next", 7)
    assert len(found) == 7 and found["id"].is_unique
    assert set(found["id"]) <= set(rows.loc[rows["colour"] == "", "id"]) and found["given"].isna().all()
    done, found = audit(rows.drop(columns=["colour", "shape"]), "--next", 7, "--overwrite")
    assert set(found["kind"]) <= {"mismatch", "next"} and (found["kind"] == "next").sum() == 7
    assert "'colour': no labelled row" in done.err


def test_uncertain_rows_where_all_are_labelled(
    audit: Callable[..., tuple[Done, pandas.DataFrame]], rows: pandas.DataFrame
) -> None:
    _, found = audit(rows[rows["colour"] != ""], "--kind", "next", "--next", 5)
    assert len(found) == 5 and found["given"].notna().all() and set(found["note"]) == {"labelled, but uncertain"}


def test_the_page(audit: Callable[..., tuple[Done, pandas.DataFrame]], rows: pandas.DataFrame, tmp_path: Path) -> None:
    hostile = rows.copy()
    hostile["title"] = [title and f"{title} {HOSTILE}" for title in rows["title"]]
    hostile["id"] = rows["id"] + HOSTILE
    done, found = audit(hostile, "--limit", 4)
    html = (tmp_path / "found.html").read_text(encoding="utf-8")
    assert f"page: {tmp_path / 'found.html'}" in done.out
    page = Page(html)
    assert not page.unbalanced and HOSTILE in page.words
    assert page.count("script") == 1 and page.count("table", class_="sortable") == 1
    for _, attributes in page.elements:
        for name in ("src", "href", "data"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), attributes
        assert not [name for name in attributes if name.startswith("on")]
    shown = found.groupby(["kind", "task"], dropna=False).size().clip(upper=4).sum()
    keys = [attributes["data-key"] for tag, attributes in page.elements if "data-key" in attributes]
    assert len(keys) == shown and set(keys) <= set(hostile["id"])
    assert page.count("img") > 0 and "default-src 'none'" in html
    assert not re.search(r"https?://(?!www\.w3\.org)", html)


def test_no_page(audit: Callable[..., tuple[Done, pandas.DataFrame]], rows: pandas.DataFrame, tmp_path: Path) -> None:
    audit(rows, "--no-page", "--kind", "label")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.parquet", "rows.csv"]


@one_line
@pytest.mark.parametrize("column", ["none", "one class"])
def test_nothing_to_judge(
    column: str, audit: Callable[..., tuple[Done, pandas.DataFrame]], rows: pandas.DataFrame, tmp_path: Path
) -> None:
    poor = rows.assign(colour="" if column == "none" else "red")
    done, _ = audit(poor, "--kind", "label", "--kind", "duplicate", "--task", "colour")
    refused(done, "rows.csv", "two classes", "--task")
    said = "'colour': no labelled row" if column == "none" else "'colour': one class alone among 200 labelled rows"
    assert said in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@one_line
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--task", "color"], "did you mean 'colour'"),
        (["--key", "given"], "'given'"),
        (["--key", "row"], "'row'"),
        (["--split", "nothing"], "no row of split 'nothing'"),
    ],
)
def test_bad_names(
    more: list[str],
    said: str,
    audit: Callable[..., tuple[Done, pandas.DataFrame]],
    rows: pandas.DataFrame,
    tmp_path: Path,
) -> None:
    done, _ = audit(rows.assign(given="1", row="1"), *more)
    refused(done, said)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


@pytest.mark.tried("output folder", ends="one line, exit 2, the file stays as it is")
@pytest.mark.parametrize("there", ["found.parquet", "found.html"])
def test_output_that_exists(
    there: str, audit: Callable[..., tuple[Done, pandas.DataFrame]], rows: pandas.DataFrame, tmp_path: Path
) -> None:
    (tmp_path / there).write_text("mine")
    refused(audit(rows, "--kind", "next")[0], there, "--overwrite")
    assert (tmp_path / there).read_text() == "mine"
    done, found = audit(rows, "--kind", "next", "--overwrite")
    assert done.code == 0 and len(found)


@pytest.mark.tried("output folder", ends="one line, exit 2, the file stays as it is")
def test_output_that_is_read(cmaclip: Run, artifact: Path, shapes: Path) -> None:
    before = shapes.read_bytes()
    refused(cmaclip("audit", artifact, "--output", shapes, "--overwrite", "--no-page"), "is read by this command")
    assert shapes.read_bytes() == before


@one_line
def test_output_with_the_name_of_the_page(cmaclip: Run, artifact: Path, tmp_path: Path) -> None:
    refused(cmaclip("audit", artifact, "--output", tmp_path / "found.html"), "found.html", ".parquet")


@one_line
def test_without_cleanlab(cmaclip: Run, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    done = cmaclip("audit", artifact, "--output", tmp_path / "found.parquet")
    refused(done, "pip install 'cmaclip_fast[audit]'")
    assert not list(tmp_path.iterdir())
    assert cmaclip("audit", artifact, "--output", tmp_path / "found.parquet", "--kind", "mismatch").code == 0

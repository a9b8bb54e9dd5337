"""Tables with thousands of classes, and cells of a million characters, through every command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from .conftest import QUICK, Done

Run = Callable[..., Done]

SMALL = [*QUICK[:-4], "--batch-size", "256", "--epochs", "1"]
ROWS, MANY, FEW = 3000, 1500, 10
LONG = 10**6


def write_classes(path: Path, classes: int) -> Path:
    rows = (f"hat {row % 40},class {row % classes},{'xyz'[row % 3]}\n" for row in range(ROWS))
    path.write_text("title,kind,group\n" + "".join(rows))
    return path


def train(cmaclip: Run, table: Path, *more: object) -> Path:
    output = table.with_suffix("")
    done = cmaclip("train", "--data", table, "--text", "title", "--task", "kind", "--output", output, *SMALL, *more)
    assert done.code == 0, done.err
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classes")


@pytest.fixture
def many(folder: Path, cmaclip: Run) -> Path:
    """An artefact of 1,500 classes, trained after one of ten."""
    for name, classes in {"few": FEW, "many": MANY}.items():
        table = folder / f"{name}.csv"
        if not table.exists():
            started = time.process_time()
            train(cmaclip, write_classes(table, classes))
            (folder / f"{name}.seconds").write_text(str(time.process_time() - started))
    return folder / "many"


@pytest.mark.tried("table", ends="seconds more than with ten classes, a small report")
def test_training_with_many_classes(many: Path) -> None:
    few_seconds, many_seconds = (float((many.parent / f"{n}.seconds").read_text()) for n in ("few", "many"))
    assert many_seconds < few_seconds + 10
    page = (many / "report.html").read_text()
    assert len(page) < 500_000 and "of 1,500)" in page
    classes = json.loads((many / "metrics.json").read_text())["classes"]["kind"]
    assert len(classes) == MANY


@pytest.mark.tried("table", ends="a short answer")
@pytest.mark.parametrize("command", ["show", "evaluate", "by class", "predict", "explain"])
def test_commands_with_many_classes(command: str, many: Path, cmaclip: Run, tmp_path: Path) -> None:
    table = many.with_suffix(".csv")
    output = tmp_path / {"predict": "p.parquet"}.get(command, "p.html")
    done = cmaclip(
        *{
            "show": ["data", "show", table, "--text", "title", "--task", "kind"],
            "evaluate": ["evaluate", many],
            "by class": ["evaluate", many, "--split", "all", "--by", "kind", "--json", tmp_path / "n.json"],
            "predict": ["predict", many, "--data", table, "--output", output],
            "explain": ["explain", many, "--row", 1, "--output", output],
        }[command]
    )
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) < 120 and len(done.out) < 20_000
    if command == "show":
        assert "1500 classes" in done.out and "and 1,488 more" in done.out
    if command == "by class":
        assert "the 100 values of 1,500 with the most rows" in " ".join(done.out.split())
        assert len(json.loads((tmp_path / "n.json").read_text())["by"]["kind"]) == MANY
    if command == "predict":
        assert pq.read_metadata(output).num_rows == ROWS and output.stat().st_size < 10 * ROWS * 100
    if command == "explain":
        assert output.stat().st_size < 200_000


CELLS = {
    "one word": "".join(chr(97 + number * number % 23) for number in range(LONG)),
    "blanks before a word": " " * LONG + "red",
    "lines": "red\n" * (LONG // 4),
    "escapes": "\x1b[31m" * (LONG // 5),
}


@pytest.mark.tried("table", ends="cut before it is tokenized, shown clipped, keys as they went in")
@pytest.mark.parametrize("cell", CELLS)
def test_a_long_cell(cell: str, cmaclip: Run, tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    rows = [{"sku": f"s{row}", "title": f"hat {row}", "kind": "ab"[row % 2], "split": "train"} for row in range(40)]
    for row in (1, 21, 22, 38):
        rows[row]["title"] = CELLS[cell]
    rows[3]["sku"] = rows[4]["kind"] = rows[5]["kind"] = rows[38]["kind"] = CELLS[cell].strip()
    for row in range(20, 40):
        rows[row]["split"] = ("validation", "test")[row % 2]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.process_time()
    artefact = train(cmaclip, table, "--batch-size", 16)
    page, labels = tmp_path / "p.html", tmp_path / "p.parquet"
    for command in (
        ["data", "show", table, "--text", "title", "--task", "kind"],
        ["evaluate", artefact, "--by", "title", "--noise", "text-shuffle:1"],
        ["explain", artefact, "--row", 2, "--row", 4, "--split", "all", "--key", "sku", "--output", page],
        ["predict", artefact, "--data", table, "--key", "sku", "--output", labels],
    ):
        done = cmaclip(*command)
        assert done.code == 0, done.err
        assert len(done.out) + len(done.err) < 20_000
    assert time.process_time() - started < 60
    assert page.stat().st_size < 200_000 and (artefact / "report.html").stat().st_size < 300_000
    assert pq.read_table(labels)["sku"].to_pylist() == [row["sku"] for row in rows]


@pytest.mark.tried("table", ends="one short line, exit 2")
@pytest.mark.parametrize("where", ["a label", "a split", "a column name", "a key column", "a picture", "many columns"])
def test_a_long_cell_in_an_error(where: str, many: Path, cmaclip: Run, tmp_path: Path) -> None:
    table, long = tmp_path / "t.csv", "x" * LONG
    header, row, options = "title,kind,split", "hat,class 1,test", ["--text", "title"]
    if where == "a label":
        row = f"hat,{long},test"
    if where == "a split":
        row = f"hat,class 1,{long}"
    if where == "a column name":
        header, row = f"{header},{long}", f"{row},1"
        options = ["--text", "titel"]
    if where == "a key column":
        options = ["--text", long]
    if where == "a picture":
        header, row, options = f"{header},picture", f"{row},{long}", ["--text", "title", "--image", "picture"]
    if where == "many columns":
        header = ",".join([header, *(f"column {number}" for number in range(10_000))])
        row, options = row + ",1" * 10_000, ["--text", "titel"]
    table.write_text(f"{header}\n{row}\n")
    done = cmaclip("evaluate", many, "--data", table, *options)
    assert done.code == 2 and "Traceback" not in done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ") and len(done.err) < 3000

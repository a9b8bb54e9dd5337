"""Named data sets and what is measured on parts of a table, through the command."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from .conftest import QUICK, Done, write_data

Run = Callable[..., Done]


def test_by_measures_each_value_of_a_column(cmaclip: Run, artifact: Path, tmp_path: Path) -> None:
    done = cmaclip("evaluate", artifact, "--by", "shape", "--json", tmp_path / "m.json")
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "m.json").read_text())
    groups = written["by"]["shape"]
    assert set(groups) == {"circle", "square"} and set(groups["circle"]) == set(written["views"])
    for view, tasks in written["views"].items():
        for task, whole in tasks.items():
            parts = [group[view][task] for group in groups.values()]
            assert sum(part["rows"] for part in parts) == whole["rows"]
            right = sum(part["accuracy"] * part["rows"] for part in parts)
            assert right == pytest.approx(whole["accuracy"] * whole["rows"])
    assert "colour accuracy" in done.out and "circle" in done.out


def test_by_counts_rows_without_a_value(cmaclip: Run, artifact: Path, tmp_path: Path) -> None:
    done = cmaclip("evaluate", artifact, "--by", "colour", "--json", tmp_path / "m.json")
    assert done.code == 0, done.err
    groups = json.loads((tmp_path / "m.json").read_text())["by"]["colour"]
    if "none" in groups:
        assert groups["none"]["both"]["colour"]["rows"] == 0
    wrong = cmaclip("evaluate", artifact, "--by", "color")
    assert wrong.code == 2 and "--by color" in wrong.err and "did you mean 'colour'?" in wrong.err


def test_a_set_that_is_not_built(cmaclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMACLIP_DATA", str(tmp_path))
    for command in (["train", "--output", tmp_path / "run", "--data"], ["data", "show"]):
        for name in ("emoji", "emoji:de"):
            done = cmaclip(*command, name)
            assert done.code == 2 and "run `cmaclip data build emoji`" in done.err
            assert len(done.err.strip().splitlines()) == 1
    assert "emoji is not built yet: cmaclip data build emoji" in cmaclip("data", "list").out


def test_help_of_build_shows_an_example(cmaclip: Run) -> None:
    assert "cmaclip data build emoji" in " ".join(cmaclip("data", "build", "--help").out.split())


def test_public_sets_are_listed(cmaclip: Run) -> None:
    listed = cmaclip("data", "list").out
    assert all(name in listed for name in ("emoji", "upmc-food101:FOLDER", "fashion-gen:FOLDER", "glami-1m:FOLDER"))


def test_build_needs_its_packages(cmaclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMACLIP_DATA", str(tmp_path / "home"))
    done = cmaclip("data", "build", "emoji", "--packages", tmp_path)
    assert done.code == 2 and "emoji-datasource-google-16.0.0.tgz: no such file" in done.err
    (tmp_path / "emoji-datasource-google-16.0.0.tgz").write_bytes(b"not the package")
    done = cmaclip("data", "build", "emoji", "--packages", tmp_path)
    assert done.code == 2 and "emoji-datasource-google-16.0.0.tgz: checksum" in done.err
    done = cmaclip("data", "build", "emojis")
    assert done.code == 2 and "did you mean 'emoji'?" in done.err
    assert not (tmp_path / "home").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    done = cmaclip("data", "build", "emoji")
    assert done.code == 2 and "npm: not found: install Node.js" in done.err


def test_a_taxonomy_is_trained_and_predicted_along_its_paths(cmaclip: Run, tmp_path: Path) -> None:
    table = write_data(tmp_path)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        colour = f" > {row['colour']}" if row["colour"] else ""
        row["kind"] = f"angular > square{colour}" if row["shape"] == "square" else f"round{colour}"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    run = tmp_path / "run"
    done = cmaclip(
        "train", "--data", table, "--image", "picture", "--text", "title", "--task", "colour", "--taxonomy", "kind",
        "--output", run, *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    config = json.loads((run / "config.json").read_text())
    assert list(config["tasks"]) == ["colour", "kind_1", "kind_2", "kind_3"]
    assert config["tasks"]["kind_1"] == ["angular", "round"]
    trained = json.loads((run / "metrics.json").read_text())["test"]["both"]

    for data in ([], ["--data", table]):
        done = cmaclip("evaluate", run, *data, "--json", tmp_path / "m.json")
        assert done.code == 0, done.err
        measured = json.loads((tmp_path / "m.json").read_text())["tasks"]
        assert measured["kind_3"] == pytest.approx(trained["kind_3"])
        assert "hierarchical precision" in done.out

    done = cmaclip("predict", run, "--data", table, "--output", tmp_path / "labels.parquet")
    assert done.code == 0, done.err
    for row in pq.read_table(tmp_path / "labels.parquet").to_pylist():
        one, two, three = (row[f"kind_{level}_top"][0]["label"].split(" > ") for level in (1, 2, 3))
        assert two[:1] == one and three[:2] == two
        accepted = [row[f"kind_{level}"] for level in (1, 2, 3)]
        assert row["kind"] == next((path for path in reversed(accepted) if path), None)
        assert all(above or not below for above, below in pairwise(accepted))
        assert row["kind_1_probability"] + 1e-6 >= row["kind_2_probability"] >= row["kind_3_probability"] - 1e-6
    explained = cmaclip("explain", run, "--row", 1, "--output", tmp_path / "page.html")
    assert explained.code == 0, explained.err

    other = tmp_path / "other.csv"
    other.write_text("title,kind,picture\nsquare,angular > square > red > dark,\n")
    done = cmaclip("evaluate", run, "--data", other, "--task", "kind_1", "--json", tmp_path / "m.json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "m.json").read_text())["tasks"]["kind_1"]["rows"] == 1
    done = cmaclip("train", "--data", table, "--taxonomy", "sort", "--text", "title", "--output", tmp_path / "x")
    assert done.code == 2 and "no column 'sort' for a taxonomy" in done.err

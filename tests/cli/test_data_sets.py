"""Named data sets and what is measured on parts of a table, through the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Done

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

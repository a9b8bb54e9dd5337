"""Bad input ends in one line that names the cause and the remedy, exit code 2, and nothing half-written."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from .conftest import COLUMNS, QUICK, Done, write_data

Run = Callable[..., Done]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small table of the test's own, to be damaged."""
    return write_data(tmp_path / "data", rows=48)


@pytest.fixture
def train(cmaclip: Run, tmp_path: Path) -> Callable[..., Done]:
    def run(table: Path, *more: object, columns: list[str] = COLUMNS) -> Done:
        return cmaclip("train", "--data", table, *columns, "--output", tmp_path / "run", *QUICK, *more)

    return run


def refused(done: Done, *parts: str) -> None:
    assert done.code == 2, done
    line = done.err.strip().splitlines()[-1]
    assert line.startswith("error: "), done.err
    for part in parts:
        assert part in line, line
    assert "Traceback" not in done.err


def replace_line(table: Path, row: int, old: str, new: str) -> None:
    lines = table.read_text().splitlines()
    assert old in lines[row]
    lines[row] = lines[row].replace(old, new)
    table.write_text("\n".join(lines) + "\n")


def test_missing_column(train: Callable[..., Done], data: Path, tmp_path: Path) -> None:
    columns = ["--image", "picture", "--text", "titel", "--task", "colour"]
    refused(train(data, columns=columns), "shapes.csv", "'titel'", "title")
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()


def test_missing_file(train: Callable[..., Done], tmp_path: Path) -> None:
    refused(train(tmp_path / "nothing.csv"), "nothing.csv")


def test_empty_table(train: Callable[..., Done], tmp_path: Path) -> None:
    table = tmp_path / "empty.csv"
    table.write_text("id,picture,title,colour,shape\n")
    refused(train(table), "empty.csv", "no row")


def test_no_task(train: Callable[..., Done], data: Path) -> None:
    refused(train(data, columns=["--text", "title"]), "shapes.csv", "--task")


def test_row_with_neither_text_nor_picture(train: Callable[..., Done], data: Path, tmp_path: Path) -> None:
    replace_line(data, 6, "item-5,,a nice", "item-5,,")
    text = data.read_text().splitlines()
    text[6] = ",".join(["item-5", "", "", *text[6].split(",")[3:]])
    data.write_text("\n".join(text) + "\n")
    refused(train(data), "shapes.csv", "row 6", "neither text nor picture")
    done = train(data, "--on-bad-rows", "skip")
    assert done.code == 0 and "empty_row 1" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("how", ["truncated", "no picture"])
def test_unreadable_picture(train: Callable[..., Done], data: Path, tmp_path: Path, how: str) -> None:
    picture = data.parent / "pictures" / "3.png"
    content = picture.read_bytes()
    picture.write_bytes(content[: len(content) // 2] if how == "truncated" else b"not a picture")
    refused(train(data), "shapes.csv", "row 4", "'picture'", "3.png")
    assert not (tmp_path / "run").exists()
    done = train(data, "--on-bad-rows", "mask")
    assert done.code == 0 and "unreadable_image 1" in (tmp_path / "run" / "train.log").read_text()


def test_picture_over_the_bound(
    cmaclip: Run, train: Callable[..., Done], data: Path, artifact: Path, tmp_path: Path
) -> None:
    Image.new("1", (10_000, 10_000)).save(data.parent / "pictures" / "3.png")
    refused(train(data), "shapes.csv", "row 4", "100,000,000", "max")
    output = tmp_path / "labels.parquet"
    arguments = ["predict", artifact, "--data", data, "--output", output]
    refused(cmaclip(*arguments), "row 4", "100,000,000")
    assert not output.exists()
    done = cmaclip(*arguments, "--max-image-pixels", 200_000_000)
    assert done.code == 0, done.err


def test_long_text_is_truncated_and_counted(train: Callable[..., Done], data: Path, tmp_path: Path) -> None:
    replace_line(data, 1, "a nice", "word " * 100)
    done = train(data)
    assert done.code == 0 and "truncated_text (train) 1" in (tmp_path / "run" / "train.log").read_text()


def test_unknown_class_at_evaluation(cmaclip: Run, artifact: Path, data: Path) -> None:
    replace_line(data, 5, "green", "purple")
    refused(cmaclip("evaluate", artifact, "--data", data), "row 5", "'colour'", "'purple'")
    done = cmaclip("evaluate", artifact, "--data", data, "--ignore-unknown-classes")
    assert done.code == 0 and "unknown class of colour: 1" in done.err


def test_output_that_exists(
    cmaclip: Run, train: Callable[..., Done], data: Path, artifact: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    refused(train(data), "exists already", "--overwrite")
    assert (tmp_path / "run" / "precious.txt").read_text() == "mine"
    page = tmp_path / "page.html"
    page.write_text("mine")
    refused(cmaclip("explain", artifact, "--row", 1, "--output", page), "exists already")
    assert page.read_text() == "mine"


def test_failed_overwrite_keeps_the_old_run(
    train: Callable[..., Done], data: Path, artifact: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifact, tmp_path / "run")
    (data.parent / "pictures" / "3.png").write_bytes(b"not a picture")
    refused(train(data, "--overwrite"), "row 4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]
    assert not filecmp.dircmp(artifact, tmp_path / "run").diff_files


def test_unknown_option_and_model(train: Callable[..., Done], data: Path) -> None:
    refused(train(data, "--option", "depht=3"), "depht", "depth")
    refused(train(data, "--option", "depth=0"), "depth")
    refused(train(data, "--model", "ViT-B-23"), "ViT-B-23", "ViT-B-32")


def test_resume_without_a_run(train: Callable[..., Done], data: Path) -> None:
    refused(train(data, "--resume"), "no unfinished run")


@pytest.mark.parametrize("damage", ["no folder", "no config", "broken config", "later format", "broken weights"])
def test_damaged_artefact(cmaclip: Run, artifact: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy"
    if damage != "no folder":
        shutil.copytree(artifact, copy)
    if damage == "no config":
        (copy / "config.json").unlink()
    if damage == "broken config":
        (copy / "config.json").write_text("{")
    if damage == "later format":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"format": 99}))
    if damage == "broken weights":
        (copy / "model.safetensors").write_bytes(b"\0" * 100)
    refused(cmaclip("evaluate", copy), "copy")


def test_noise_that_is_none(cmaclip: Run, artifact: Path) -> None:
    refused(cmaclip("evaluate", artifact, "--noise", "text-dorp:0.5"), "text-dorp", "text-drop")
    refused(cmaclip("evaluate", artifact, "--noise", "text-drop:5"), "0 to 1")


def test_missing_output_folder(cmaclip: Run, artifact: Path, data: Path, tmp_path: Path) -> None:
    refused(cmaclip("predict", artifact, "--data", data, "--output", tmp_path / "no" / "x.parquet"), "no such folder")


def test_key_that_collides(cmaclip: Run, artifact: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.parquet"
    refused(cmaclip("predict", artifact, "--data", data, "--key", "colour", "--output", output), "'colour'", "--key")
    assert list(tmp_path.glob("x.parquet*")) == []

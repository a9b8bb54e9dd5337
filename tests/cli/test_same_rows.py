"""A trained model is measured on the rows that were its test rows, however they were split and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from cmaclip_fast import Classifier

from .conftest import COLUMNS, QUICK, Done, write_data

Run = Callable[..., Done]


def scores(path: Path) -> dict[str, dict[str, float]]:
    return json.loads(path.read_text())["tasks"]


def trained(folder: Path) -> dict[str, dict[str, float]]:
    return json.loads((folder / "metrics.json").read_text())["test"]["both"]


def test_random_split_is_made_again(cmaclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_data(tmp_path / "data", split=False)
    (table.parent / "pictures" / "3.png").write_bytes(b"not a picture")
    run = tmp_path / "run"
    options = ["--on-bad-rows", "mask"]
    done = cmaclip("train", "--data", table, *COLUMNS, "--output", run, *QUICK, "--seed", 3, *options)
    assert done.code == 0, done.err
    monkeypatch.chdir(table.parent)
    for number, named in enumerate(([], ["--data", table.name], ["--data", table])):
        file = tmp_path / f"{number}.json"
        done = cmaclip("evaluate", run, *named, "--json", file, *options)
        assert done.code == 0, done.err
        for task, numbers in scores(file).items():
            assert numbers == pytest.approx(trained(run)[task])
    one = tmp_path / "one.json"
    assert cmaclip("evaluate", run, "--task", "shape", "--json", one, *options).code == 0
    assert list(scores(one)) == ["shape"] and scores(one)["shape"] == pytest.approx(trained(run)["shape"])


def test_split_column_of_training_is_remembered(cmaclip: Run, tmp_path: Path) -> None:
    table = write_data(tmp_path / "data")
    table.write_text(table.read_text().replace(",split", ",fold", 1))
    run, file = tmp_path / "run", tmp_path / "m.json"
    done = cmaclip("train", "--data", table, *COLUMNS, "--split-column", "fold", "--output", run, *QUICK)
    assert done.code == 0, done.err
    assert cmaclip("evaluate", run, "--json", file).code == 0
    assert scores(file)["shape"]["rows"] == 16
    for task, numbers in scores(file).items():
        assert numbers == pytest.approx(trained(run)[task])


def test_other_data_without_split_or_labels(cmaclip: Run, artifact: Path, tmp_path: Path) -> None:
    table = write_data(tmp_path / "data", rows=24, split=False)
    done = cmaclip("evaluate", artifact, "--data", table)
    assert done.code == 0 and "all 24 rows" in done.err
    lines = [",".join(line.split(",")[:3]) for line in table.read_text().splitlines()]
    table.write_text("\n".join(lines) + "\n")
    assert cmaclip("explain", artifact, "--data", table, "--row", 2, "--output", tmp_path / "x.html").code == 0
    assert cmaclip("predict", artifact, "--data", table, "--output", tmp_path / "x.parquet").code == 0
    nothing = cmaclip("evaluate", artifact, "--data", table)
    assert nothing.code == 2 and "no labelled row" in nothing.err


def test_a_column_that_is_not_there_is_said(cmaclip: Run, artifact: Path, tmp_path: Path) -> None:
    table = write_data(tmp_path / "data", rows=24)
    table.write_text(table.read_text().replace("picture,", "photo,", 1))
    done = cmaclip("predict", artifact, "--data", table, "--on-bad-rows", "skip", "--output", tmp_path / "x.parquet")
    assert done.code == 0 and "no column 'picture'" in done.err


def test_class_that_only_test_rows_have(cmaclip: Run, tmp_path: Path) -> None:
    table = write_data(tmp_path / "data")
    lines = table.read_text().splitlines()
    assert lines[5].endswith("test")
    lines[5] = lines[5].replace("square", "star").replace("circle", "star")
    table.write_text("\n".join(lines) + "\n")
    done = cmaclip("train", "--data", table, *COLUMNS, "--output", tmp_path / "run", *QUICK)
    assert done.code == 0, done.err
    assert "class of shape without training rows (test) 1" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "heads=3"], "multiple of heads"),
        (["--option", "context_length=2"], "context_length"),
        (["--option", "name=x"], "name=x"),
        (["--option", "seed=4"], "seed=4"),
        (["--option", "text_dropout=0.8", "--option", "image_dropout=0.8"], "over 1"),
        (["--mixed-precision", "fp16"], "fp16"),
    ],
)
def test_options_that_do_not_fit(
    cmaclip: Run, shapes: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    if message == "fp16" and torch.cuda.is_available():
        pytest.skip("fp16 is fine where there is a GPU")
    done = cmaclip("train", "--data", shapes, *COLUMNS, "--output", tmp_path / "run", *QUICK, *arguments)
    assert done.code == 2 and message in done.err.splitlines()[-1], done
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_checked_before_the_work(cmaclip: Run, artifact: Path, shapes: Path, tmp_path: Path) -> None:
    for done in (
        cmaclip("evaluate", artifact, "--json", tmp_path / "no" / "m.json"),
        cmaclip("predict", artifact, "--data", shapes, "--output", tmp_path, "--overwrite"),
        cmaclip("evaluate", artifact, "--device", "abacus"),
        cmaclip("evaluate", artifact, "--task", "colours"),
    ):
        assert done.code == 2 and done.err.startswith("error: "), done


def test_a_folder_of_somebody_elses_is_not_removed(cmaclip: Run, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "precious.txt").write_text("mine")
    done = cmaclip("train", "--data", shapes, *COLUMNS, "--output", tmp_path / "run", *QUICK, "--overwrite")
    assert done.code == 2 and "holds 'precious.txt', which is not of an unfinished run" in done.err
    assert (tmp_path / "run.partial" / "precious.txt").read_text() == "mine"


def test_transparent_pictures_are_read_alike_from_memory_and_file(artifact: Path, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    picture.paste((220, 30, 30, 255), (8, 8, 30, 30))
    picture.save(tmp_path / "p.png")
    classifier = Classifier.load(artifact)
    first, second = classifier.predict([picture, tmp_path / "p.png"], [None, None])
    assert first["colour"].probability == pytest.approx(second["colour"].probability, abs=1e-6)
    white = Image.new("RGB", (40, 40), "white")
    white.paste((220, 30, 30), (8, 8, 30, 30))
    third = classifier.predict(white)
    assert first["colour"].probability == pytest.approx(third["colour"].probability, abs=1e-6)

"""An unfinished run is resumed with what it was begun with, or not at all; what is damaged is told or done again."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cmaclip_fast.classifier import bulk
from cmaclip_fast.classifier.artifact import load_model
from cmaclip_fast.data import Columns, read_table
from cmaclip_fast.data.fingerprint import fingerprint
from cmaclip_fast.data.noise import Noise, add_noise
from cmaclip_fast.training import loop as fitting

from .conftest import COLUMNS, QUICK, Done, write_data

Run = Callable[..., Done]
refused = pytest.mark.tried("resume", ends="one line, exit 2, what was done is kept")


class Kept:
    """A folder that is made once, and for each test put back as it was, its name and the times of its files too."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._copy = folder, folder.with_name(folder.name + "-copy")

    def restored(self, make: Callable[[], None]) -> Path:
        if not self._copy.exists():
            self.folder.mkdir()
            make()
            shutil.copytree(self.folder, self._copy)
        shutil.rmtree(self.folder)
        shutil.copytree(self._copy, self.folder)
        return self.folder


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    base = tmp_path_factory.mktemp("kept")
    return {name: Kept(base / name) for name in ("prediction", "training")}


def stop_prediction(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    begun: list[int] = []
    records = bulk.Labeller._records

    def stopping(self: bulk.Labeller, step: Any) -> list[dict[str, Any]]:
        if step.start not in begun:
            if len(begun) == after:
                raise KeyboardInterrupt
            begun.append(step.start)
        return records(self, step)

    monkeypatch.setattr(bulk.Labeller, "_records", stopping)
    return begun


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PART_ROWS", 16)


@pytest.fixture
def prediction(
    cmaclip: Run, artifact: Path, kept: dict[str, Kept], small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> list[object]:
    """A prediction that ended after two parts of three; its arguments without `--resume`."""
    folder = kept["prediction"].folder
    data = folder / "data" / "shapes.csv"
    arguments = ["predict", artifact, "--data", data.with_suffix(".parquet"), "--image", "picture", "--key", "number"]
    arguments += ["--text", "title", "--output", folder / "labels.parquet"]

    def make() -> None:
        as_parquet(write_data(data.parent, rows=48))
        with monkeypatch.context() as patch:
            stop_prediction(patch, after=2)
            assert cmaclip(*arguments).code == 130

    kept["prediction"].restored(make)
    return arguments


def as_parquet(data: Path, change: Callable[[pa.Table], pa.Table] = lambda table: table) -> None:
    """`shapes.csv` as Parquet, with a number for each row and a second column of paths."""
    with data.open() as file:
        rows = list(csv.DictReader(file))
    table = pa.Table.from_pylist([{name: value or None for name, value in row.items()} for row in rows])
    table = table.append_column("number", pa.array(range(len(table)), pa.int64()))
    table = table.append_column("copy", table.column("picture"))
    pq.write_table(change(table), data.with_suffix(".parquet"))


def set_column(name: str, change: Callable[[pa.Array], pa.Array]) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(
        table.column_names.index(name), name, change(table.column(name).combine_chunks())
    )


def swapped(values: pa.Array) -> pa.Array:
    """The first two values change places."""
    return values.take(pa.array([1, 0, *range(2, len(values))]))


CHANGES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "a text": (set_column("title", swapped), "texts"),
    "a text that is absent": (set_column("title", lambda v: pa.array([None, *v.to_pylist()[1:]])), "texts"),
    "the paths of pictures": (set_column("picture", swapped), "pictures"),
    "keys": (set_column("number", swapped), "keys"),
    "the type of keys, to another integer": (set_column("number", lambda v: v.cast(pa.int32())), "keys"),
    "the type of keys, to text": (set_column("number", lambda v: v.cast(pa.string())), "keys"),
    "the order of the rows": (lambda t: t.take(pa.array([*range(1, len(t)), 0])), "keys"),
    "fewer rows": (lambda t: t.slice(0, 40), "number of rows"),
    "more rows": (lambda t: pa.concat_tables([t, t.slice(0, 3)]), "number of rows"),
}


@refused
@pytest.mark.parametrize("what", CHANGES)
def test_prediction_of_another_table(cmaclip: Run, prediction: list[object], what: str) -> None:
    folder, data = place(prediction)
    change, named = CHANGES[what]
    as_parquet(data, change)
    done = cmaclip(*prediction, "--resume")
    assert done.code == 2 and "other settings" in done.err and named in done.err, done.err
    assert len(list((folder / "labels.parquet.partial").glob("part-*"))) == 2
    as_parquet(data)
    assert cmaclip(*prediction, "--resume").code == 0


@refused
@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--image", "copy"], "columns"),
        (["--text", "id"], "texts"),
        (["--key", "id"], "keys"),
        (["--image-dir", "."], "image_dir"),
        (["--split", "train"], "number of rows"),
        (["--on-bad-rows", "mask"], "on_bad_rows"),
    ],
)
def test_prediction_with_other_options(
    cmaclip: Run, prediction: list[object], more: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, data = place(prediction)
    monkeypatch.chdir(data.parent)
    done = cmaclip(*prediction, *more, "--resume")
    assert done.code == 2 and "other settings" in done.err and named in done.err, done.err


@refused
def test_prediction_with_another_model(cmaclip: Run, prediction: list[object], artifact: Path) -> None:
    folder, _ = place(prediction)
    shutil.copytree(artifact, folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config))
    done = cmaclip("predict", folder / "model", *prediction[2:], "--resume")
    assert done.code == 2 and "other settings (model)" in done.err


@refused
@pytest.mark.parametrize("how", ["another picture", "touched", "removed"])
def test_pictures_that_were_labelled_must_stay(cmaclip: Run, prediction: list[object], how: str) -> None:
    _, data = place(prediction)
    picture = data.parent / "pictures" / "3.png"
    if how == "another picture":
        Image.new("RGB", (50, 50), "blue").save(picture)
    elif how == "touched":
        os.utime(picture, (1, 1))
    else:
        picture.unlink()
    done = cmaclip(*prediction, "--resume")
    assert done.code == 2 and "pictures of rows 1 to 16 changed" in done.err, done.err


@refused
def test_bytes_of_pictures(tmp_path: Path) -> None:
    def fingerprints(colour: str) -> dict[str, object]:
        Image.new("RGB", (8, 8), colour).save(tmp_path / "one.png")
        content = (tmp_path / "one.png").read_bytes()
        pq.write_table(pa.table({"t": ["a"] * 3, "p": [None, content, b"x"]}), tmp_path / "bytes.parquet")
        return fingerprint(read_table(tmp_path / "bytes.parquet", Columns("p", "t")))

    first, again, other = fingerprints("red"), fingerprints("red"), fingerprints("blue")
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {"pictures"}


def test_a_fingerprint_is_of_what_is_used(shapes: Path) -> None:
    columns = Columns("picture", "title", ("colour", "shape"), ("id",))
    table = read_table(shapes, columns)
    first = fingerprint(table)
    assert first == fingerprint(read_table(shapes, columns))
    changed = {
        "masked": fingerprint(table.mask_images([0])),
        "noise": fingerprint(add_noise(table, Noise("image-blur", 0.1))),
        "more noise": fingerprint(add_noise(table, Noise("image-blur", 0.2))),
        "order": fingerprint(table.select([1, 0, *range(2, len(table))])),
        "column": fingerprint(read_table(shapes, replace(columns, keys=("picture",)))),
    }
    found = [json.dumps(value, sort_keys=True, default=str) for value in (first, *changed.values())]
    assert len(set(found)) == len(found)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a byte less": lambda content: content[:-3],
    "a bit changed": lambda content: (
        content[: len(content) // 3] + bytes([content[len(content) // 3] ^ 4]) + content[len(content) // 3 + 1 :]
    ),
    "a bit changed near the end": lambda content: content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
    "of another kind": lambda content: b"[1, 2]",
    "not text": lambda content: b"\xff\xfe\x00",
}


@pytest.mark.tried("resume", ends="one line and exit 2, or the damaged part is done again to the same result")
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["run.json", "part-000000000016.parquet"])
def test_a_damaged_file_of_a_prediction(
    cmaclip: Run, prediction: list[object], name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = place(prediction)
    path = folder / "labels.parquet.partial" / name
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    begun = stop_prediction(monkeypatch, after=99)
    done = cmaclip(*prediction, "--resume")
    if name == "run.json":
        assert done.code == 2 and "run.json: is damaged" in done.err and "--overwrite" in done.err
        done = cmaclip(*prediction, "--overwrite")
        assert begun == [0, 16, 32]
    elif how != "a bit changed near the end":  # there it is in the footer, which the rows do not need
        assert begun == [16, 32] and "is damaged" in done.err
    assert done.code == 0 and "Traceback" not in done.err, done.err
    whole = folder / "whole.parquet"
    assert cmaclip(*prediction[:-1], whole).code == 0
    assert pq.read_table(folder / "labels.parquet").equals(pq.read_table(whole))


@pytest.mark.tried("resume", ends="the part is done again to the same result")
def test_a_part_of_other_rows(cmaclip: Run, prediction: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = place(prediction)
    partial = folder / "labels.parquet.partial"
    shutil.copyfile(partial / "part-000000000000.parquet", partial / "part-000000000016.parquet")
    begun = stop_prediction(monkeypatch, after=99)
    assert cmaclip(*prediction, "--resume").code == 0 and begun == [16, 32]
    assert pq.read_table(folder / "labels.parquet")["number"].to_pylist() == list(range(48))


@pytest.mark.tried("resume", ends="cleaned up, the same result as without")
def test_stray_temporary_files(cmaclip: Run, prediction: list[object]) -> None:
    folder, _ = place(prediction)
    (folder / "labels.parquet.partial" / ".cmaclip-0123456789ab.tmp").write_bytes(b"half a")
    assert cmaclip(*prediction, "--resume").code == 0
    assert pq.read_table(folder / "labels.parquet")["number"].to_pylist() == list(range(48))
    assert sorted(path.name for path in folder.iterdir()) == ["data", "labels.parquet"]


@pytest.fixture
def training(cmaclip: Run, kept: dict[str, Kept], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A training that ended in its second epoch; its arguments without `--resume`."""
    folder = kept["training"].folder
    data = folder / "data" / "shapes.csv"
    arguments = ["train", "--data", data, *COLUMNS, "--output", folder / "run", *QUICK]
    calls, validate = [], fitting.validate

    def stopping(*rest: object) -> dict[str, float]:
        calls.append(rest)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*rest)  # type: ignore[arg-type]

    def make() -> None:
        write_data(data.parent, rows=48)
        with monkeypatch.context() as patch:
            patch.setattr(fitting, "validate", stopping)
            assert cmaclip(*arguments).code == 130

    kept["training"].restored(make)
    return arguments


def place(arguments: list[object]) -> tuple[Path, Path]:
    """The folder that all is in, and the table."""
    folder = Path(str(arguments[arguments.index("--output") + 1])).parent
    return folder, folder / "data" / "shapes.csv"


TRAINING_CHANGES: dict[str, tuple[str, str, str]] = {
    "a title": ("a nice square", "a fine square", "texts"),
    "a label": (",square,train", ",circle,train", "labels"),
    "a key": ("item-0,", "item-zero,", "keys"),
    "a path": ("pictures/0.png", "pictures/1.png", "pictures"),
    "a split": (",train\n", ",test\n", "number of rows"),
}


@refused
@pytest.mark.parametrize("what", [*TRAINING_CHANGES, "a picture", "an option", "workers alone"])
def test_training_on_another_table(cmaclip: Run, training: list[object], what: str) -> None:
    folder, data = place(training)
    more: list[object] = []
    if what in TRAINING_CHANGES:
        old, new, named = TRAINING_CHANGES[what]
        text = data.read_text().replace("\r\n", "\n")
        assert old in text
        data.write_text(text.replace(old, new, 1))
    elif what == "a picture":
        named = "pictures"
        Image.new("RGB", (50, 50), "blue").save(data.parent / "pictures" / "3.png")
    else:
        named = "training"
        more = ["--seed", 3] if what == "an option" else ["--workers", 1]
    done = cmaclip(*training, *more, "--resume")
    if what == "workers alone":
        assert done.code == 0, done.err
        return
    assert done.code == 2 and "other settings" in done.err and named in done.err, done.err
    assert (folder / "run.partial" / "checkpoint.safetensors").exists()


@pytest.mark.tried("resume", ends="one line and exit 2; --overwrite starts anew")
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["run.json", "checkpoint.safetensors"])
def test_a_damaged_file_of_a_training(cmaclip: Run, training: list[object], name: str, how: str) -> None:
    folder, _ = place(training)
    path = folder / "run.partial" / name
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    done = cmaclip(*training, "--resume")
    line = done.err.strip().splitlines()[-1]
    assert done.code == 2 and name in line and "--overwrite" in line and "Traceback" not in done.err, done.err
    if how == "half":
        plain = cmaclip(*training)
        assert plain.code == 2 and "--overwrite" in plain.err
        assert cmaclip(*training, "--overwrite").code == 0
        assert sorted(entry.name for entry in folder.iterdir()) == ["data", "run"]


@pytest.mark.tried("resume", ends="the same result as without the interruption, the old artefact until then")
def test_an_interrupted_overwrite_is_resumed(cmaclip: Run, training: list[object], artifact: Path) -> None:
    folder, _ = place(training)
    shutil.copytree(artifact, folder / "run")
    refused = cmaclip(*training, "--resume")
    assert refused.code == 2 and "exists already" in refused.err
    done = cmaclip(*training, "--resume", "--overwrite")
    assert done.code == 0 and "resumed after epoch 1" in done.err
    assert len(json.loads((folder / "run" / "metrics.json").read_text())["history"]) == 2
    old, new = load_model(artifact).state_dict(), load_model(folder / "run").state_dict()
    assert any(not torch.equal(old[name], new[name]) for name in old if old[name].shape == new[name].shape)
    assert sorted(entry.name for entry in folder.iterdir()) == ["data", "run"]

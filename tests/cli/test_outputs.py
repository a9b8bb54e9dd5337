"""What may be written and replaced: artefacts and files of ours, nothing else, with the modes that the umask gives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from cmaclip_fast import InputError
from cmaclip_fast.classifier.artifact import FILES, check_replaceable, load_config
from cmaclip_fast.files import check_output_file, replacing, write_json, write_tensors, write_text

from .conftest import COLUMNS, QUICK, Done, write_data

Run = Callable[..., Done]
refused_folder = pytest.mark.tried("output folder", ends="one line, exit 2, nothing removed")
refused_file = pytest.mark.tried("output folder", ends="one line, exit 2, the file stays as it is")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(done: Done, *parts: str) -> None:
    assert done.code == 2 and "Traceback" not in done.err, done
    line = done.err.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(part in line for part in parts), line


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", rows=12)


@pytest.fixture
def train(cmaclip: Run, data: Path) -> Callable[..., Done]:
    def run(output: object, *more: object) -> Done:
        return cmaclip("train", "--data", data, *COLUMNS, "--output", output, *QUICK, *more)

    return run


FOREIGN = {
    "a folder of other files": lambda folder: (folder / "notes.txt").write_text("mine"),
    "a folder with a config.json": lambda folder: (folder / "config.json").write_text('{"format": 1}'),
    "a folder with a folder in it": lambda folder: (folder / "deep" / "deeper").mkdir(parents=True),
    "a folder with a hidden file": lambda folder: (folder / ".hidden").write_text("mine"),
}
ADDED = {
    "an artefact with a file of the user's": lambda folder: (folder / "notes.txt").write_text("mine"),
    "an artefact with a folder in it": lambda folder: (folder / "predictions").mkdir(),
    "an artefact whose log is a link": lambda folder: (
        (folder / "train.log").unlink(),
        (folder / "train.log").symlink_to("/etc/hostname"),
    ),
    "an artefact with a damaged config.json": lambda folder: (folder / "config.json").write_text('{"format": '),
    "an artefact with a config.json of another kind": lambda folder: (folder / "config.json").write_text("[1]"),
    "an artefact without config.json": lambda folder: (folder / "config.json").unlink(),
}


@refused_folder
@pytest.mark.parametrize("what", [*FOREIGN, *ADDED])
def test_only_an_artefact_is_replaced(train: Callable[..., Done], artifact: Path, tmp_path: Path, what: str) -> None:
    output = tmp_path / "run"
    if what in FOREIGN:
        output.mkdir()
        FOREIGN[what](output)
    else:
        shutil.copytree(artifact, output)
        ADDED[what](output)
    before = content(output)
    one_line(train(output, "--overwrite"), str(output), "--output")
    assert content(output) == before and sorted(p.name for p in tmp_path.iterdir()) == ["data", "run"]


@refused_folder
@pytest.mark.parametrize("where", ["the data", "above the data", "a link to an artefact", "a file", "a broken link"])
def test_folders_that_must_stay(train: Callable[..., Done], artifact: Path, data: Path, where: str) -> None:
    top = data.parent.parent
    output = {"the data": data.parent, "above the data": top}.get(where, top / "run")
    if where == "a link to an artefact":
        shutil.copytree(artifact, top / "real")
        output.symlink_to(top / "real")
    if where == "a file":
        output.write_text("mine")
    if where == "a broken link":
        output.symlink_to(top / "nowhere")
    before = content(top)
    one_line(train(output, "--overwrite"), str(output))
    assert content(top) == before


@refused_folder
@pytest.mark.parametrize("name", [".", "..", "", "/", "x/..", "n" * 252, "n" * 300, os.fsdecode(b"\xff\xfe")])
def test_names_that_no_output_can_have(
    train: Callable[..., Done], data: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    before = content(data.parent)
    one_line(train(name, "--overwrite"))
    assert content(data.parent) == before


@refused_folder
@pytest.mark.parametrize("holds", ["the working directory", "the home folder", "a table", "a folder of pictures"])
def test_an_artefact_that_holds_something_else_in_use(
    artifact: Path, tmp_path: Path, holds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(artifact, tmp_path / "run")
    check_replaceable(tmp_path / "run")
    inputs = []
    if holds == "the working directory":
        monkeypatch.chdir(tmp_path / "run")
    elif holds == "the home folder":
        monkeypatch.setenv("HOME", str(tmp_path / "run"))
    else:
        inputs = [tmp_path / "run" / ("metrics.json" if holds == "a table" else "")]
    with pytest.raises(InputError, match="so it is not replaced"):
        check_replaceable(tmp_path / "run", inputs)


@refused_folder
@pytest.mark.parametrize("command", ["train", "predict"])
@pytest.mark.parametrize(
    "what", ["a foreign folder", "a file", "a link", "names of ours but no run.json", "a subfolder"]
)
def test_the_working_folder_of_somebody_else(
    cmaclip: Run, train: Callable[..., Done], artifact: Path, data: Path, tmp_path: Path, command: str, what: str
) -> None:
    partial = tmp_path / "out.partial"
    if what == "a file":
        partial.write_text("mine")
    elif what == "a link":
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to(tmp_path / "elsewhere")
    else:
        partial.mkdir()
        if what == "a foreign folder":
            (partial / "notes.txt").write_text("mine")
        elif what == "names of ours but no run.json":
            (partial / ("train.log" if command == "train" else "part-000000000000.parquet")).write_text("mine")
        else:
            (partial / "run.json").mkdir()
    before = content(tmp_path)
    for more in (["--overwrite"], ["--resume"], []):
        if command == "train":
            done = train(tmp_path / "out", *more)
        else:
            done = cmaclip("predict", artifact, "--data", data, "--output", tmp_path / "out", *more)
        one_line(done, str(partial), "--output")
    assert content(tmp_path) == before


@refused_folder
@pytest.mark.parametrize("what", ["a lock file of another program", "a folder"])
def test_the_name_of_the_lock_is_taken(train: Callable[..., Done], tmp_path: Path, what: str) -> None:
    lock = tmp_path / "run.lock"
    if what == "a folder":
        lock.mkdir()
    else:
        lock.write_text("[[package]]")
    before = content(tmp_path)
    one_line(train(tmp_path / "run"), "run.lock")
    assert content(tmp_path) == before


@pytest.mark.tried("output folder", ends="one line, exit 2; the first run goes on")
@pytest.mark.parametrize("command", ["train", "predict"])
def test_two_runs_to_one_output(
    cmaclip: Run, train: Callable[..., Done], artifact: Path, data: Path, tmp_path: Path, command: str
) -> None:
    with FileLock(tmp_path / "out.lock"):
        if command == "train":
            done = train(tmp_path / "out")
        else:
            done = cmaclip("predict", artifact, "--data", data, "--output", tmp_path / "out")
        one_line(done, "another run writes it", "--output")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.lock"]


def commands(artifact: Path, data: Path) -> dict[str, list[object]]:
    return {
        "predict": ["predict", artifact, "--data", data, "--overwrite", "--output"],
        "explain": ["explain", artifact, "--data", data, "--split", "all", "--row", 1, "--overwrite", "--output"],
        "evaluate": ["evaluate", artifact, "--data", data, "--json"],
    }


@refused_file
@pytest.mark.parametrize("command", ["predict", "explain", "evaluate"])
@pytest.mark.parametrize(
    "what", ["a folder", "a link", "a broken link", "a device", "a pipe", "the table", "the model", "below a file"]
)
def test_files_that_are_not_replaced(
    cmaclip: Run, artifact: Path, data: Path, tmp_path: Path, command: str, what: str
) -> None:
    output = tmp_path / "out"
    model = tmp_path / "model"
    shutil.copytree(artifact, model)
    if what == "a folder":
        output.mkdir()
    elif what == "a link":
        (tmp_path / "real").write_text("mine")
        output.symlink_to(tmp_path / "real")
    elif what == "a broken link":
        output.symlink_to(tmp_path / "nowhere")
    elif what == "a device":
        output = Path("/dev/full")
    elif what == "a pipe":
        os.mkfifo(output)
    elif what == "the table":
        output = data
    elif what == "the model":
        output = model / "config.json"
    else:
        output = data / "out"
    before, kind = content(tmp_path), output.lstat().st_mode if os.path.lexists(output) else None
    one_line(cmaclip(*commands(model, data)[command], output), str(output))
    assert content(tmp_path) == before
    assert kind == (output.lstat().st_mode if os.path.lexists(output) else None)


def test_a_name_of_255_bytes_is_written_where_no_working_folder_is_needed(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_text(path, "x")
    assert path.read_text() == "x" and [entry.name for entry in tmp_path.iterdir()] == [path.name]


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """No file may be larger than 1000 bytes, as on a disk that is full.

    The limit holds for the whole process, and pytest's own output may be a file: nothing but the write that is tested
    belongs inside.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.tried("output folder", ends="one line that names the file; the old file stays")
@pytest.mark.parametrize("kind", ["text", "json", "tensors"])
def test_a_full_disk(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(InputError, match=r"file: cannot be written .*free some space") as caught, small_files():
        if kind == "text":
            write_text(path, "x" * 5000)
        elif kind == "json":
            write_json(path, ["x" * 5000])
        else:
            write_tensors(path, {"x": torch.zeros(5000)})
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.tried("output folder", ends="one line that names the file")
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO, errno.EBUSY, errno.EDQUOT])
def test_a_folder_that_cannot_be_written(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(InputError, match=rf"file: cannot be written \({os.strerror(code)}\)"):
        write_text(tmp_path / "file", "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.tried("output folder", ends="one line, exit 2, found before work begins")
def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(InputError, match="may not be written"):
        check_output_file(tmp_path / "file", overwrite=False)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "tensors", {"x": torch.zeros(3)})
        write_text(tmp_path / "text", "x")
        with replacing(tmp_path / "other") as temporary:
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~mask}


def test_all_of_an_artefact_can_be_read_by_others(artifact: Path) -> None:
    assert {path.name for path in artifact.iterdir()} == set(FILES)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in artifact.iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


@pytest.mark.tried("output folder", ends="null in place of NaN")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_nan(tmp_path: Path, value: float) -> None:
    write_json(tmp_path / "m.json", {"a": [value, {"b": (value, 1.5)}], "c": "NaN"})

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    said = json.loads((tmp_path / "m.json").read_text(), parse_constant=no_constant)
    assert said == {"a": [None, {"b": [None, 1.5]}], "c": "NaN"}


def test_an_artefact_is_replaced_while_it_is_read(
    train: Callable[..., Done], artifact: Path, data: Path, tmp_path: Path
) -> None:
    """Whoever has opened a file of the old artefact goes on reading it; whoever opens one later sees the new one."""
    output = tmp_path / "run"
    write_data(data.parent, rows=48)
    shutil.copytree(artifact, output)
    old = load_config(output)
    with (output / "config.json").open() as opened:
        done = train(output, "--overwrite", "--seed", 5)
        assert done.code == 0, done.err
        assert json.load(opened)["training"] == old.training
    assert load_config(output).training["seed"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]
    assert {path.name for path in output.iterdir()} == set(FILES)


@refused_folder
@pytest.mark.parametrize("name", ["comparison.md", "comparison.json"])
def test_compare_into_a_folder_of_other_files(cmaclip: Run, data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    columns = ["--image", "picture", "--text", "title", "--task", "shape"]
    done = cmaclip("compare", "--data", data, *columns, "--systems", "bert", "--quick", "--output", tmp_path / "out")
    one_line(done, name, "--output")
    assert content(tmp_path / "out") == {name: b"mine"}


@refused_folder
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_a_built_data_set_leaves_the_users_readme(cmaclip: Run, tmp_path: Path, more: list[str]) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    one_line(cmaclip("data", "build", "emoji", "--output", tmp_path, "--packages", tmp_path, *more), "README.md")
    assert content(tmp_path) == {"README.md": b"# My project\n"}

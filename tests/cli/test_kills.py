"""A run that is killed at any of its file operations, or ended by a signal: nothing is lost that was whole."""

from __future__ import annotations

import builtins
import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from cmaclip_fast import CMACLIP, InputError, signals, working
from cmaclip_fast.classifier import bulk
from cmaclip_fast.classifier.artifact import FILES, load_config, load_model
from cmaclip_fast.training import loop as fitting
from cmaclip_fast.working import RUN, WorkingFolder

from .conftest import COLUMNS, QUICK, Done, write_data

Run = Callable[..., Done]
WORDS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir", "open", "chmod")


@pytest.fixture(autouse=True)
def as_from_a_terminal() -> Iterator[None]:
    """The signals are not ignored, as they would be under `nohup` or in a background job."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in signals.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a process that is killed at its file operation `number`; whether it came to that."""
    child = os.fork()
    if child == 0:
        left = [number]

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        try:
            builtins.open = io.open = counted(open)  # type: ignore[assignment]
            for name in OPERATIONS:
                setattr(os, name, counted(getattr(os, name)))
            working.exchange = counted(working.exchange)  # type: ignore[assignment]
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def next_run(work: Callable[[bool], None], output: Path, after: str) -> None:
    """Resumes, where there is something to resume, or begins anew."""
    resume = after == "resume" and (working.partial_directory(output) / RUN).exists()
    try:
        work(resume)
    except InputError as error:
        assert resume and "no unfinished run" in str(error)  # the output had its name, and the rest was being removed
        work(False)


@pytest.fixture(params=["swap", "no swap"])
def swap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the system can swap two folders in one step."""

    def cannot(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if request.param == "no swap":
        monkeypatch.setattr(working, "exchange", cannot)
    return str(request.param)


def make(output: Path, artifact: Path, source: str, resume: bool = False) -> None:
    """What `train` does with its files; `source` tells one artefact from another."""
    folder = WorkingFolder(output, "cmaclip train", "|".join((*FILES, "checkpoint")), "checkpoint")
    with folder.held(), folder.opened(resume, overwrite=True):
        folder.same_run({"source": source})
        if folder.finished is None:
            (folder.path / "checkpoint").write_text("work")
            for name in FILES:
                (folder.path / name).write_text(source)
            config = json.loads((artifact / "config.json").read_text())
            (folder.path / "config.json").write_text(json.dumps(config | {"source": source}))
        folder.finish(True)


@pytest.mark.tried("kill or signal", ends="the old or the new artefact is whole, the next run cleans up")
@pytest.mark.parametrize("after", ["resume", "anew"])
@pytest.mark.parametrize("there", [False, True])
def test_an_artefact_is_whole_wherever_training_is_killed(
    artifact: Path, tmp_path: Path, swap: str, there: bool, after: str
) -> None:
    output = tmp_path / "run"
    if there:
        make(output, artifact, "old")
    number = 0
    while killed_at(number, lambda: make(output, artifact, "new")):
        if there and (swap == "swap" or output.exists()):
            assert load_config(output).source in ("old", "new")
        elif output.exists():
            assert load_config(output).source == "new"
        next_run(partial(make, output, artifact, "new"), output, after)
        assert load_config(output).source == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["run"], number
        assert {path.name for path in output.iterdir()} == set(FILES), number
        shutil.rmtree(output)
        if there:
            make(output, artifact, "old")
        number += 1
    assert number > 15 and load_config(output).source == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.tried("kill or signal", ends="the old or the new file is whole, the next run cleans up")
@pytest.mark.parametrize("after", ["resume", "anew"])
@pytest.mark.parametrize("there", [False, True])
def test_a_file_is_whole_wherever_prediction_is_killed(tmp_path: Path, there: bool, after: str) -> None:
    output = tmp_path / "labels.parquet"

    def work(resume: bool = False) -> None:
        folder = WorkingFolder(output, "cmaclip predict", r"part-\d|result", r"part-\d", "result")
        with folder.held(), folder.opened(resume, overwrite=True):
            folder.same_run({"a": 1})
            if folder.finished is None:
                for part in range(2):
                    (folder.path / f"part-{part}").write_text(str(part))
                (folder.path / "result").write_text("new")
            folder.finish({"rows": 2})

    def begin() -> None:
        output.unlink(missing_ok=True)
        if there:
            output.write_text("old")

    begin()
    number = 0
    while killed_at(number, work):
        assert (output.read_text() in ("old", "new")) if there else (not output.exists() or output.read_text() == "new")
        next_run(work, output, after)
        assert output.read_text() == "new" and [path.name for path in tmp_path.iterdir()] == [output.name], number
        begin()
        number += 1
    assert number > 10 and output.read_text() == "new"


def test_two_folders_are_swapped_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    working.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        working.exchange(tmp_path / "a", tmp_path / "c")


@pytest.mark.tried("kill or signal", ends="the lock is free")
def test_a_lock_ends_with_its_process_and_is_not_inherited(tmp_path: Path) -> None:
    lock, ready = tmp_path / "x.lock", tmp_path / "ready"

    def hold() -> None:
        with working.locked(lock, "busy"):
            if os.fork() == 0:
                time.sleep(60)  # as a loader's process that outlives the run for a while
            ready.write_text("")
            time.sleep(60)

    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        hold()
        os._exit(0)
    while not ready.exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="busy"), working.locked(lock, "busy"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        with working.locked(lock, "busy"):
            pass
        assert not lock.exists()
    finally:
        os.killpg(child, signal.SIGKILL)


@pytest.fixture
def training(shapes: Path, tmp_path: Path) -> list[object]:
    return ["train", "--data", shapes, *COLUMNS, "--output", tmp_path / "run", *QUICK]


def send_in_step(monkeypatch: pytest.MonkeyPatch, name: str, at: int, children: bool = False) -> list[int]:
    """Sends the signal to this process in its training step `at`, and to its loaders; lists the steps that ended."""
    ended: list[int] = []
    forward = fitting.Objective.forward

    def sending(self: fitting.Objective, *arguments: object) -> object:
        if len(ended) == at:
            os.kill(os.getpid(), getattr(signal, name))
            for child in multiprocessing.active_children() if children else ():
                assert child.pid is not None
                os.kill(child.pid, getattr(signal, name))
        found = forward(self, *arguments)  # type: ignore[arg-type]
        ended.append(len(ended))
        return found

    monkeypatch.setattr(fitting.Objective, "forward", sending)
    return ended


@pytest.mark.tried(
    "kill or signal", ends="the step ends, finished epochs are kept, 128 + N, resumes to the same result"
)
@pytest.mark.parametrize(("name", "loaders"), [("SIGHUP", False), ("SIGTERM", True), ("SIGINT", True)])
def test_a_signal_ends_training_after_its_step(
    cmaclip: Run,
    artifact: Path,
    training: list[object],
    tmp_path: Path,
    name: str,
    loaders: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        ended = send_in_step(patch, name, at=5, children=loaders)  # of 4 in an epoch
        done = cmaclip(*training, "--workers", int(loaders))
    assert done.code == WORDS[name] and "--resume" in done.err and "Traceback" not in done.err, done.err
    assert len(ended) == 6 and not (tmp_path / "run").exists()
    assert signal.getsignal(getattr(signal, name)) is before
    again = cmaclip(*training, "--resume")
    assert again.code == 0 and "resumed after epoch 1" in again.err, again.err
    expected, found = load_model(artifact).state_dict(), load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.tried("kill or signal", ends="128 + N; the same command starts anew, with --resume and without")
@pytest.mark.parametrize("more", [["--resume"], []])
def test_a_signal_in_the_first_epoch(
    cmaclip: Run, training: list[object], tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        send_in_step(patch, "SIGTERM", at=1)
        assert cmaclip(*training).code == 143
    assert cmaclip(*training, *more).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.tried("kill or signal", ends="the batch ends, finished parts are kept, 128 + N, resumes to the same file")
@pytest.mark.parametrize("name", list(WORDS))
def test_a_signal_ends_prediction_after_its_batch(
    cmaclip: Run, artifact: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PART_ROWS", 16)
    command = ["predict", artifact, "--data", write_data(tmp_path / "data", rows=50), "--key", "id"]
    assert cmaclip(*command, "--output", tmp_path / "whole.parquet").code == 0
    records, begun = bulk.Labeller._records, []

    def sending(self: bulk.Labeller, step: Any) -> list[dict[str, Any]]:
        begun.append(step.start)
        if len(begun) == 3:
            os.kill(os.getpid(), getattr(signal, name))
        return records(self, step)

    output = tmp_path / "labels.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(bulk.Labeller, "_records", sending)
        done = cmaclip(*command, "--output", output)
    assert done.code == WORDS[name] and "--resume" in done.err and "Traceback" not in done.err
    kept = sorted(path.name for path in tmp_path.glob("labels*/*"))
    assert kept == ["part-000000000000.parquet", "part-000000000016.parquet", "run.json"] and not output.exists()
    assert cmaclip(*command, "--output", output, "--resume").code == 0
    assert pq.read_table(output).equals(pq.read_table(tmp_path / "whole.parquet"))


@pytest.mark.tried("kill or signal", ends="128 + N, without a traceback, nothing half-written")
@pytest.mark.parametrize("name", list(WORDS))
@pytest.mark.parametrize("command", ["evaluate", "explain"])
def test_a_signal_ends_other_commands_at_once(
    cmaclip: Run, artifact: Path, tmp_path: Path, command: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = CMACLIP.forward

    def sending(self: CMACLIP, *arguments: object) -> object:
        os.kill(os.getpid(), getattr(signal, name))
        return forward(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CMACLIP, "forward", sending)
    more = ["--json", tmp_path / "out"] if command == "evaluate" else ["--row", 1, "--output", tmp_path / "out"]
    done = cmaclip(command, artifact, *more)
    assert done.code == WORDS[name] and "Traceback" not in done.err and list(tmp_path.iterdir()) == []


@pytest.mark.tried("kill or signal", ends="128 + N, without a traceback, nothing half-written")
def test_a_signal_ends_the_building_of_a_data_set(
    cmaclip: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmaclip_fast.data import emoji

    monkeypatch.setattr(emoji, "_check", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(emoji, "from_folder", lambda folder: lambda package, into: into / "x")
    done = cmaclip("data", "build", "emoji", "--output", tmp_path / "out", "--packages", tmp_path)
    assert done.code == 143 and "Traceback" not in done.err and list(tmp_path.iterdir()) == []


@pytest.mark.tried("kill or signal", ends="the second one ends the process at once")
def test_a_second_signal_does_not_wait() -> None:
    child = os.fork()
    if child == 0:
        signals.install()
        with signals.steps():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # so soon that it is the same one, as `timeout` sends it
            time.sleep(2 * signals._ONE_SECONDS)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def test_signals_that_are_ignored_stay_so_and_other_threads_set_none() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is signals._handle
    finally:
        signal.signal(signal.SIGHUP, before)
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.append(signals.install()))
    thread.start()
    thread.join()
    assert found == [{}] and signal.getsignal(signal.SIGTERM) is not signals._handle

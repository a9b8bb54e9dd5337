"""`cmaclip serve` as a process: how it starts, is stopped, and what it says when it cannot start."""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import cmaclip_fast
from cmaclip_fast import serving
from cmaclip_fast.cli import app as cli
from cmaclip_fast.serving.settings import Settings

SLOW = """
import sys, time
from cmaclip_fast.serving import service
run = service._run
def slow(*arguments):
    time.sleep(1.0)
    return run(*arguments)
service._run = slow
from cmaclip_fast.cli.app import main
main()
"""


@contextmanager
def process(folder: Path, *arguments: str, script: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service in a process of its own, and its address."""
    start = ["-c", script] if script else ["-m", "cmaclip_fast.cli.app"]
    command = [sys.executable, *start, "serve", str(folder), "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            line = run.stdout.readline()
            found = re.search(r"http://\S+", line)
            assert found, line + (run.stderr.read() if run.stderr else "")
            yield run, found[0].rstrip("/")
        finally:
            run.kill()


def ended(run: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """The log of a service that has ended without an error."""
    _, err = run.communicate(timeout=30)
    assert run.returncode == 0, err
    return [json.loads(line) for line in err.splitlines()]


@pytest.mark.tried("kill or signal", ends="all accepted requests answered, exit code 0")
def test_sigterm_answers_what_was_accepted(folder: Path) -> None:
    with process(folder, script=SLOW) as (run, address):
        answers: list[int] = []

        def ask() -> None:
            answers.append(httpx.post(f"{address}/predict", json={"rows": [{"text": "a"}]}, timeout=30).status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(100):  # all three are in progress; the one that asks is the fourth
            if "cmaclip_requests_in_progress 4.0" in httpx.get(f"{address}/metrics").text:
                break
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        log = ended(run)
        assert answers == [200] * 3
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
    assert [entry["status"] for entry in log if entry.get("route") == "/predict"] == [200] * 3
    assert [entry["at_once"] for entry in log if entry["event"] == "stopping"] == [False]


@pytest.mark.tried("kill or signal", ends="the new artefact, or the old one where it is damaged; exit code 0")
def test_it_is_reloaded_by_sighup_and_ended_by_sigint(folder: Path, tmp_path: Path) -> None:
    copy, token = Path(shutil.copytree(folder, tmp_path / "copy")), tmp_path / "token"
    token.write_text("0123456789abcdef\n")
    token.chmod(0o644)
    with process(copy, "--host", "0.0.0.0", "--token-file", str(token)) as (run, address):
        assert run.stderr is not None
        assert run.stderr.readline().startswith(f"warning: {token}: other users can read it")

        def said(status: int) -> dict[str, Any]:
            """The next line of the log that is about no request for the model."""
            while (entry := json.loads(run.stderr.readline())).get("route") == "/model":  # type: ignore[union-attr]
                assert entry["status"] == status
            return dict(entry)

        with httpx.Client(base_url=address.replace("0.0.0.0", "127.0.0.1"), timeout=30) as client:
            assert client.get("/model").status_code == 401
            client.headers["Authorization"] = "Bearer 0123456789abcdef"
            assert json.loads(run.stderr.readline())["status"] == 401
            before = client.get("/model").json()["version"]
            os.utime(copy / "model.safetensors", (1, 1))
            run.send_signal(signal.SIGHUP)
            assert said(200)["event"] == "the model was loaded anew"
            assert client.get("/model").json()["version"] != before
            (copy / "config.json").write_text("{")
            run.send_signal(signal.SIGHUP)
            failed = said(200)
            assert failed["event"] == "the model was not loaded anew" and "config.json" in failed["reason"]
            assert client.post("/predict", json={"rows": [{"text": "a"}]}).status_code == 200
        run.send_signal(signal.SIGINT)
        request, stopping = ended(run)
    assert {"method": "POST", "route": "/predict", "status": 200, "level": "info"}.items() <= request.items()
    assert stopping["event"] == "stopping" and "0123456789abcdef" not in str([request, stopping, failed])


Fail = Callable[..., str]


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fail:
    """Runs `cmaclip serve` in this process, which must end with one line: that line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["cmaclip", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert end.value.code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
        return said.err

    return run


def test_a_port_in_use_is_named(folder: Path, fails: Fail) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: Address already in use: choose another --port" in fails(folder, "--port", port)


def test_an_unknown_host_is_named(folder: Path, fails: Fail) -> None:
    assert "--host 300.1.1.1: " in fails(folder, "--host", "300.1.1.1")
    assert "192.0.2.1:0: " in fails(folder, "--host", "192.0.2.1", "--port", 0)


def test_a_folder_without_a_model_is_named(tmp_path: Path, fails: Fail) -> None:
    assert "config.json" in fails(tmp_path, "--port", 0)


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words of a token", b"\xff" * 20, b"line\none and line two", b"a" * 5000]
)
def test_a_file_without_a_token_is_named(folder: Path, tmp_path: Path, fails: Fail, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    said = fails(folder, "--port", 0, "--token-file", tmp_path / "token")
    assert str(tmp_path / "token") in said and "token" in said
    assert "cannot be read" in fails(folder, "--token-file", tmp_path / "none")
    assert "not a regular file" in fails(folder, "--token-file", tmp_path)


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client", "python_multipart"])
def test_a_missing_package_is_named(folder: Path, fails: Fail, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cmaclip_fast, "serving", serving)  # which importing it again replaces
    for name in [name for name in sys.modules if name.startswith("cmaclip_fast.serving")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    known = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return known(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert fails(folder) == f"error: serve needs {missing}: pip install 'cmaclip_fast[serve]'\n"


def test_it_listens_on_loopback_unless_told_otherwise() -> None:
    assert Settings().host == "127.0.0.1" and Settings().is_loopback
    assert not Settings(host="0.0.0.0").is_loopback and not Settings(host="example.com").is_loopback


def test_a_service_that_others_reach_without_a_token_is_warned_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opens(directory: Path, settings: Settings, device: str, precision: str, tell: Callable[[str], None]) -> None:
        tell("serving")

    monkeypatch.setattr("cmaclip_fast.serving.server.serve", opens)
    monkeypatch.setattr(sys, "argv", ["cmaclip", "serve", str(folder), "--host", "0.0.0.0"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    assert not end.value.code and said.out == "serving\n"
    assert said.err.startswith("warning: 0.0.0.0 can be reached from other machines, and no token is asked for")

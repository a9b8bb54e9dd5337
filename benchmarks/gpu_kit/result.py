"""The result file of a step: JSON that is complete whenever it is read. Imports nothing but the standard library."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCHEMA = 1
MOST_BYTES = 16 << 20
RUNNING, PASSED, FAILED, TIMED_OUT, NOT_RUN = "running", "passed", "failed", "timed out", "not run"
STATES = (RUNNING, PASSED, FAILED, TIMED_OUT, NOT_RUN)
"""`running` in a file that nothing writes any more means that the run was cut off."""
FIELDS = ("schema", "step", "status", "dry_run", "started", "seconds", "machine", "text", "failures", "data")


class Result:
    """What a step has found so far; `keep` writes it, so that a step that is stopped leaves what it had.

    Attributes:
        data: numbers, by names that `gpu_report` knows.
    """

    def __init__(self, path: Path, step: str, dry_run: bool = False) -> None:
        self.path = path
        self.started = datetime.datetime.now(datetime.timezone.utc)
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "step": step,
            "status": RUNNING,
            "dry_run": dry_run,
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": 0.0,
            "machine": {},
            "text": [],
            "failures": [],
            "data": {},
        }
        self.data: dict[str, Any] = self.record["data"]

    def say(self, line: str) -> None:
        """Add a line of text, and show it."""
        self.record["text"].append(line)
        print(f"  {line}", flush=True)

    def fail(self, reason: str) -> None:
        """Note a failure and go on; the step then ends as failed."""
        self.record["failures"].append(reason)
        self.say(f"FAILED: {reason}")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the step whose error is a failure of the step, and does not keep the next part from running."""
        try:
            yield
        except Exception as error:
            self.fail(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            traceback.print_exc(limit=-4)
        self.keep()

    def keep(self, status: str = RUNNING) -> None:
        """Write what there is, whole or not at all."""
        passed = datetime.datetime.now(datetime.timezone.utc) - self.started
        self.record |= {"status": status, "seconds": round(passed.total_seconds(), 1)}
        write(self.path, self.record)


def write(path: Path, record: dict[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".result-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
    os.replace(temporary, path)
    path.chmod(0o644)


def read(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: not a result file of this schema, with the reason.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    missing = [field for field in FIELDS if field not in record]
    if missing or record["schema"] != SCHEMA or record["status"] not in STATES:
        raise ValueError(f"{path}: not a result file of schema {SCHEMA}: {', '.join(missing) or record['status']}")
    return dict(record)


def main(run: Callable[[Result, bool], None], step: str) -> None:
    """The command line of a step's module."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("result", type=Path, help="the JSON file to write")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU; its times mean nothing")
    options = parser.parse_args()
    result = Result(options.result, step, options.dry_run)
    result.record["machine"] = machine()
    result.keep()
    with result.part(step):
        run(result, options.dry_run)
    if result.record["failures"]:
        result.keep(FAILED)
        raise SystemExit(1)
    result.keep(PASSED)


def machine() -> dict[str, Any]:
    """Python, and PyTorch and the GPU where the step has imported PyTorch."""
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    torch = sys.modules.get("torch")
    if torch is None:
        return found
    found["torch"] = str(torch.__version__)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "architecture": f"sm_{gpu.major}{gpu.minor}", "memory": gpu.total_memory}
    return found

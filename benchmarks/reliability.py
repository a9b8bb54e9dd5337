"""Counts what the tests try of bad inputs, kills and faults, and writes the tables of docs/reliability.md.

python -m benchmarks.reliability [PAGE]

Tests say it themselves, by `@pytest.mark.tried(group, ends=...)`; here they are collected, not run.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.page import insert

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
COMMAND = "make reliability"


class _Collector:
    def __init__(self) -> None:
        self.tried: list[tuple[str, str, str]] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("tried"):
                (group,), ends = mark.args, mark.kwargs["ends"]
                self.tried.append((group, ends, item.nodeid.split("::")[0]))


def collect() -> list[tuple[str, str, str]]:
    """For each marked test: its group, what it ends in, and its file."""
    collector = _Collector()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.main(
            ["--collect-only", "-q", "-m", "tried", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[collector]
        )
    if code != pytest.ExitCode.OK:
        raise SystemExit(f"the tests cannot be collected:\n{printed.getvalue()[-2000:]}")
    return collector.tried


def tables(tried: list[tuple[str, str, str]]) -> str:
    """Markdown: the groups with their numbers, then what the tests of each group end in."""
    groups = Counter(group for group, _, _ in tried)
    lines = [f"{len(tried)} cases in {len({file for *_, file in tried})} files.", "", "| group | cases |", "|---|---|"]
    lines += [f"| {group} | {number} |" for group, number in groups.most_common()]
    lines += ["", "| group | cases | each ends in | tests |", "|---|---|---|---|"]
    rows = Counter(tried)
    for (group, ends, file), number in sorted(rows.items(), key=lambda row: (-groups[row[0][0]], row[0][0], -row[1])):
        lines.append(f"| {group} | {number} | {ends} | `{file}` |")
    return "\n".join(lines)


if __name__ == "__main__":
    insert(Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE, COMMAND, tables(collect()))

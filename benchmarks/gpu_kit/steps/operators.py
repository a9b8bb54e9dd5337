"""`tests/gpu` in several processes at once: every operator, backend and dtype against float64 on the CPU."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.gpu_kit.result import Result, main

SHARDS = 8
"""Triton's compilations take most of the time, on the CPU."""
ROOT = Path(__file__).resolve().parents[3]


def run(result: Result, dry_run: bool) -> None:
    shards = 1 if dry_run else SHARDS
    counts: collections.Counter[str] = collections.Counter()
    failed: list[dict[str, str]] = []
    result.data |= {"counts": {}, "failed": failed, "by_backend": {}, "skipped": {}}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{shard}.xml") for shard in range(shards)]
        waiting = {file: _start(file, f"{shard}/{shards}", dry_run) for shard, file in enumerate(files)}
        while waiting:
            time.sleep(0.2)
            for file in [file for file, process in waiting.items() if process.poll() is not None]:
                process = waiting.pop(file)
                if not file.exists():
                    result.fail(f"a process of tests ended with exit status {process.returncode} and no report")
                    continue
                _collect(result, file, counts)
                result.data["counts"] = dict(counts)
                result.keep()
    for one in failed[:20]:
        result.say(f"{one['name']}: {one['reason'][:300]}")
    result.say(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "no test ran")
    if failed:
        result.fail(f"{len(failed)} tests failed")
    if not dry_run and not counts["passed"]:
        result.fail("no test passed")


def _start(report: Path, shard: str, dry_run: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/gpu"]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"CMACLIP_TEST_SHARD": shard}, stdout=subprocess.DEVNULL
    )


def _collect(result: Result, report: Path, counts: collections.Counter[str]) -> None:
    for case in ET.parse(report).getroot().iter("testcase"):
        name, kind, reason = f"{case.get('classname')}::{case.get('name')}", "passed", ""
        for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            found = case.find(tag)
            if found is not None:
                kind, reason = outcome, found.get("message") or ""
        counts[kind] += 1
        if kind == "failed":
            result.data["failed"].append({"name": name, "reason": reason[:1000]})
        if kind == "skipped":
            result.data["skipped"][reason[:200]] = result.data["skipped"].get(reason[:200], 0) + 1
        backend = next((one for one in ("cuda", "triton", "torch") if one in (case.get("name") or "")), "")
        by_backend = result.data["by_backend"].setdefault(backend or "all", {})
        by_backend[kind] = by_backend.get(kind, 0) + 1


if __name__ == "__main__":
    main(run, "operators")

"""`tests/gpu` in several processes at once: every operator, backend and dtype against float64 on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit.result import Result, main

SHARDS = 8
"""Triton's compilations take most of the time, on the CPU."""
ROOT = Path(__file__).resolve().parents[3]
OF_BACKEND = re.compile(r"[\[-](cuda|triton|torch)\]$")


def run(result: Result, dry_run: bool) -> None:
    shards = 1 if dry_run else SHARDS
    result.data |= {"counts": {}, "failed": [], "by_backend": {}, "skipped": {}}
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, f"{shard}.jsonl") for shard in range(shards)]
        running = [_start(report, f"{shard}/{shards}") for shard, report in enumerate(reports)]
        read = [0] * shards
        while True:
            ended = all(process.poll() is not None for process in running)
            before = sum(read)
            for shard, report in enumerate(reports):
                read[shard] += _collect(result.data, report, read[shard])
            if sum(read) > before:
                result.keep()
            if ended:
                break
            time.sleep(0.2)
        for process in running:
            if process.returncode not in (0, 1, 5):  # 1: a test failed, 5: there was none
                result.fail(f"a process of tests ended with exit status {process.returncode}")
    counts, failed = result.data["counts"], result.data["failed"]
    for one in failed[:20]:
        result.say(f"{one['name']}: {one['reason'][:300]}")
    result.say(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "no test ran")
    if failed:
        result.fail(f"{len(failed)} tests failed")
    if not dry_run and not counts.get("passed"):
        result.fail("no test passed")


def _start(report: Path, shard: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    threads = max(1, (os.cpu_count() or 1) // int(shard.partition("/")[2]))  # for the references on the CPU
    environment = os.environ | {
        "CMACLIP_TEST_SHARD": shard,
        "CMACLIP_TEST_REPORT": str(report),
        "OMP_NUM_THREADS": str(threads),
    }
    return subprocess.Popen([*command, "tests/gpu"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def _collect(data: dict[str, Any], report: Path, begin: int) -> int:
    """Count the outcomes from byte `begin` of a report on, and return how many bytes they took; see tests/gpu."""
    if not report.exists():
        return 0
    with report.open("rb") as file:
        file.seek(begin)
        whole = file.read().rpartition(b"\n")  # the last line may not be complete yet
    for line in whole[0].splitlines():
        one = json.loads(line)
        kind, name, reason = one["outcome"], one["name"], one["reason"]
        data["counts"][kind] = data["counts"].get(kind, 0) + 1
        if kind == "failed":
            data["failed"].append({"name": name, "reason": reason[:1000]})
        if kind == "skipped":
            data["skipped"][reason[:200]] = data["skipped"].get(reason[:200], 0) + 1
        backend = OF_BACKEND.search(name)
        by_backend = data["by_backend"].setdefault(backend[1] if backend else "all", {})
        by_backend[kind] = by_backend.get(kind, 0) + 1
    return len(whole[0]) + len(whole[1])


if __name__ == "__main__":
    main(run, "operators")

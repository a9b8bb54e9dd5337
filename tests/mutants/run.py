"""Puts small faults into copies of the kernels, one at a time, and runs the tests that should notice.

    python tests/mutants/run.py [WORD ...]

Words choose faults whose file or description contains one of them. Ends with how many were caught, and with an error
unless all were.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edits import EDITS, Edit
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parents[2]
TIME_LIMIT = 600
console = Console(soft_wrap=True, highlight=False)


def apply(edit: Edit, folder: Path) -> dict[str, str]:
    """Writes the changed copies under `folder` and names them as the tests' environment."""
    text = (ROOT / edit.file).read_text()
    if text.count(edit.old) != 1:
        raise SystemExit(f"{edit.file}: '{edit.old}' stands {text.count(edit.old)} times, not once ({edit.fault})")
    source, variable = (
        ("csrc/include", "CMACLIP_TEST_INCLUDE")
        if edit.file.startswith("csrc")
        else ("kernels", "CMACLIP_TEST_KERNELS")
    )
    shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / edit.file).write_text(text.replace(edit.old, edit.new))
    return {variable: str(folder / source)}


def caught(edit: Edit) -> tuple[bool, str]:
    """Whether a test fails; and the first that does, or what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        changed = apply(edit, Path(name))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *edit.tests]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | changed, capture_output=True, text=True, timeout=TIME_LIMIT
            )
        except subprocess.TimeoutExpired:
            return True, f"no end within {TIME_LIMIT} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    # A fault that does not compile, or tests that cannot run, prove nothing.
    if done.returncode not in (0, 1) or "compiling" in done.stdout or (done.returncode == 1 and not failed):
        return False, f"the tests could not run: {(failed or done.stdout.splitlines() or [done.stderr])[-1]}"
    return done.returncode == 1, failed[0].removeprefix("FAILED ") if failed else "all tests pass"


def main(words: list[str]) -> int:
    edits = [edit for edit in EDITS if not words or any(word in edit.file or word in edit.fault for word in words)]
    started = time.monotonic()
    survivors = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(caught, edits)
        for edit, (found, how) in zip(edits, track(results, "faults", len(edits), console=console), strict=True):
            console.print(f"{'caught  ' if found else 'SURVIVED'}  {edit.file}: {edit.fault}  [dim]{how}[/dim]")
            if not found:
                survivors.append(edit)
    minutes = (time.monotonic() - started) / 60
    console.print(f"{len(edits) - len(survivors)} of {len(edits)} faults caught in {minutes:.1f} minutes")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The README's example runs as it stands, on another artefact."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_python_example(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None and '"runs/openclipart-0"' in code[1]
    exec(code[1].replace('"runs/openclipart-0"', repr(str(artifact))), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and all("text weighs" in line for line in printed)

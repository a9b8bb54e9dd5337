"""The emulator for tests: kernel libraries by name, and a plain reason where there is no compiler."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from . import emulate

KERNELS = Path(__file__).parent / "kernels"


@pytest.fixture(scope="session")
def kernels() -> Callable[..., emulate.Kernels]:
    """Compiles `tests/emulator/kernels/NAME.cpp`, with the compiler's flags if any, once per session and content."""
    try:
        emulate.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    # tests/mutants puts a changed copy of the headers in their place.
    include = Path(os.environ.get("CMACLIP_TEST_INCLUDE", emulate.INCLUDE))
    loaded: dict[tuple[str, ...], emulate.Kernels] = {}

    def load(name: str, *flags: str) -> emulate.Kernels:
        key = (name, *flags)
        if key not in loaded:
            loaded[key] = emulate.Kernels(KERNELS / f"{name}.cpp", include, flags)
        return loaded[key]

    return load

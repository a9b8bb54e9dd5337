"""The page at `/`: one file that fetches nothing but the service's own answers."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path

_FOLDER = Path(__file__).parent / "page"


def _part(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


@functools.cache
def page() -> str:
    """The page, with its styles and script inline."""
    html = _part("index.html")
    return html.replace("/* style */", _part("style.css")).replace("/* script */", _part("script.js"))


@functools.cache
def policy() -> str:
    """The Content-Security-Policy: the two inline parts by their digests, the service itself, nothing else."""
    style, script = (_digest(_part(name)) for name in ("style.css", "script.js"))
    return "; ".join(
        [
            "default-src 'none'",
            f"style-src {style}",
            f"script-src {script}",
            "img-src blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _digest(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

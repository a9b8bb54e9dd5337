"""What all HTML pages share: one file that fetches nothing, with its styles and script inline."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from cmaclip_fast.errors import visible
from cmaclip_fast.files import replacing

TEXT_LENGTH, NAME_LENGTH = 2000, 120
"""The most characters of a text and of a class name or key that a page shows."""

_TEMPLATES = Path(__file__).parent / "templates"

_SPECIAL = re.compile(r"<\|?/?[A-Za-z_]+\|?>|\[[A-Z]+\]")


def is_special(token: str) -> bool:
    """Whether a token is a mark of the tokenizer (`<start_of_text>`, `<|endoftext|>`, `[CLS]`, `</s>`), not a word."""
    return _SPECIAL.fullmatch(token.strip()) is not None and token.strip() != "</w>"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(share=_share, count=_count, percent=_percent, soft=_soft)
    return environment


def _shown(value: Any) -> Any:
    """The output of a template, without control characters."""
    return type(value)(visible(value)) if isinstance(value, str) else value


def render_template(template: str, scripts: tuple[str, ...] = ("_sort.js",), **values: Any) -> str:
    """The page of a template; its `script` is the files `scripts`, one after another."""
    script = "".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _environment().get_template(template).render(script=script, script_digest=digest, **values)


def write_html(html: str, path: Path) -> None:
    with replacing(path) as temporary:
        # A lone surrogate in a user's text must not cost the page.
        temporary.write_bytes(html.encode("utf-8", errors="replace"))


def finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _share(value: Any) -> str:
    number = finite(value)
    return "\N{EN DASH}" if number is None else f"{number:.3f}"


def _count(value: Any) -> str:
    number = finite(value)
    return "\N{EN DASH}" if number is None else f"{number:,.0f}"


def _percent(value: Any) -> str:
    """A length for a style attribute, held within 0 and 100 %."""
    return f"{100 * min(max(finite(value) or 0.0, 0.0), 1.0):.2f}%"


def _soft(name: str | None) -> Markup:
    """A class name that may be broken after a slash or an underscore."""
    return Markup(re.sub(r"(?<=[/_])(?=[^/_])", "<wbr>", str(escape(name or ""))))


def word(token: str) -> str:
    """A token as a reader would write it: without the byte-pair mark for the end of a word."""
    return token.strip().removesuffix("</w>") or "␣"

"""Errors that a user can cause and fix, and how text from outside is shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

# control characters, which drive a terminal; line separators; overrides of the direction; halves of surrogate pairs
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile("[\t\n]")


class InputError(ValueError):
    """Input that cannot be used: one line that names the file, row and column where there is one, and the remedy.

    The `cmaclip` command prints the message alone and exits with code 2; Python code may catch it as a `ValueError`.
    """


def visible(text: str) -> str:
    """`text` with every character that a terminal or page would obey, not show, written as its escape.

    Tabs and line breaks stay.
    """
    return _HIDDEN.sub(_escaped, text)


def one_line(text: str) -> str:
    """As `visible`, tabs and line breaks too."""
    return _BREAKS.sub(_escaped, visible(text))


def clipped(text: str, most: int = 100) -> str:
    """The value of a cell, or a name, as messages and pages show it: no more than `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def listed(names: Sequence[str], most: int = 30) -> str:
    """Names with commas, each clipped, and how many more there are than `most`."""
    more = f", and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(clipped, names[:most])) + more


def _escaped(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode()

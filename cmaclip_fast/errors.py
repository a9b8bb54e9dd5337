"""Errors that a user can cause and mend."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: one line that names the file, row and column where there is one, and the remedy.

    The `cmaclip` command prints the message alone and exits with code 2; Python code may catch it as a `ValueError`.
    """

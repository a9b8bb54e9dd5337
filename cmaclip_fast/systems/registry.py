"""The systems that can be chosen, one file each; see docs/systems.md for how to add one.

Every module of this folder is read, and a class in it marked `@register("name")` can be trained by that name. Other
packages add theirs by an entry point of the group `cmaclip_fast.systems` that names a module."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

import cmaclip_fast.systems as systems_folder
from cmaclip_fast.data.files import near
from cmaclip_fast.errors import InputError

if TYPE_CHECKING:
    from cmaclip_fast.systems.base import System


Class = TypeVar("Class", bound="type[System]")

_REGISTERED: dict[str, type[System]] = {}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cma-clip-without-sequence-attention": ("cma-clip", {"sequence_attention": False}),
    "cma-clip-without-modality-attention": ("cma-clip", {"modality_attention": False}),
    "cma-clip-without-attention": ("cma-clip", {"sequence_attention": False, "modality_attention": False}),
    "cma-clip-random-start": ("cma-clip", {"fusion_start": "random"}),
    "cma-clip-gated": ("cma-clip", {"fusion_gate": True}),
    "clip-zero-shot-text": ("clip-zero-shot", {"use": "text"}),
    "clip-zero-shot-image": ("clip-zero-shot", {"use": "image"}),
    "imagebert": ("one-stream", {"variant": "imagebert"}),
    "fashionbert": ("one-stream", {"variant": "fashionbert"}),
    "oscar": ("one-stream", {"variant": "oscar"}),
}
"""Names for a system with some options set."""


def register(name: str) -> Callable[[Class], Class]:
    """Makes a class of systems known by a name."""

    def known(cls: Class) -> Class:
        cls.system = name
        cls.title = cls.title or name
        _REGISTERED[name] = cls
        return cls

    return known


@functools.cache
def _read_all() -> None:
    for module in pkgutil.iter_modules(systems_folder.__path__, f"{systems_folder.__name__}."):
        importlib.import_module(module.name)
    for entry in entry_points(group="cmaclip_fast.systems"):
        entry.load()


def systems() -> dict[str, type[System]]:
    """All registered classes by name."""
    _read_all()
    return dict(_REGISTERED)


def find_system(name: str) -> tuple[type[System], dict[str, Any]]:
    """The class of a name and the options that the name stands for.

    Raises:
        InputError: an unknown name.
    """
    system, options = VARIANTS.get(name, (name, {}))
    known = systems()
    if system not in known:
        names = [*known, *VARIANTS]
        raise InputError(f"--system {name}: unknown{near(name, names)}; systems: {', '.join(sorted(names))}")
    return known[system], dict(options)

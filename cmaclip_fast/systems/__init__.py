"""The systems that can be chosen, one file each; see docs/systems.md for how to add one.

Every module of this folder is read, and a class in it marked `@register("name")` can be trained by that name. Other
packages add theirs by an entry point of the group `cmaclip_fast.systems` that names a module.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cmaclip_fast.data.files import near
from cmaclip_fast.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from cmaclip_fast.data.tokenizer import Tokenizer
    from cmaclip_fast.systems.base import System

Class = TypeVar("Class", bound="type[System]")

_REGISTERED: dict[str, type[System]] = {}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cma-clip-without-sequence-attention": ("cma-clip", {"sequence_attention": False}),
    "cma-clip-without-modality-attention": ("cma-clip", {"modality_attention": False}),
    "cma-clip-without-attention": ("cma-clip", {"sequence_attention": False, "modality_attention": False}),
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
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
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


def system_config(system: type[System], name: str, options: Mapping[str, Any]) -> Any:
    """A system's configuration on the named model's towers, with that model's defaults, changed by `options`.

    Raises:
        InputError: an unknown option, or a value that does not fit.
    """
    from cmaclip_fast.model import TINY

    base: dict[str, Any] = {"name": name}
    if name == "tiny":
        base = {field: value for field, value in TINY.model_dump().items() if field in system.Config.model_fields}
    try:
        return system.Config.model_validate({**base, **options})
    except ValueError as error:
        raise InputError(f"model options: {' '.join(str(error).split())}") from None


def build_system(
    system: type[System],
    config: BaseModel,
    tasks: Mapping[str, Sequence[str]],
    pretrained: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
) -> System:
    """As `create_system`, from a class and a full configuration."""
    from cmaclip_fast.model import build_clip

    make: Any = system  # a system's class takes its towers too, which the interface leaves open
    return make(*build_clip(config, tasks, pretrained, tokenizer, system.modalities))


def create_system(
    system: str,
    name: str,
    tasks: Mapping[str, Sequence[str]],
    pretrained: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> System:
    """Builds any system on the towers of an open_clip model.

    Args:
        system: a name of `systems()` or of `VARIANTS`.
        name, tasks, pretrained, tokenizer: as for `create_model`.
        options: fields of the system's `Config` that differ from the defaults.

    Raises:
        InputError: an unknown name, tag, or option; a checkpoint that does not fit the model.
    """
    cls, chosen = find_system(system)
    return build_system(cls, system_config(cls, name, {**chosen, **options}), tasks, pretrained, tokenizer)

"""Builds a system by name: its towers with their weights, preprocessing and tokenizer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
from open_clip.coca_model import CoCa
from open_clip.model import CustomTextCLIP
from open_clip.utils import to_2tuple
from pydantic import BaseModel

from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.tokenizer import OpenClipTokenizer, Tokenizer
from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.tiny import TinyCLIP
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.systems.presets import preset
from cmaclip_fast.systems.pretrained import (
    note_open_clip,
    rebuild_open_clip,
    with_other_towers,
)
from cmaclip_fast.systems.registry import find_system


def create_model(
    name: str,
    tasks: Mapping[str, Sequence[str]],
    pretrained: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> CMACLIP:
    """Builds a CMA-CLIP on the towers of an open_clip model.

    Args:
        name: `tiny`, or any open_clip model name (`open_clip.list_models()`).
        tasks: for each task the names of its classes.
        pretrained: an open_clip tag (fetched by open_clip if it is not in its cache) or a local checkpoint; None
            starts from random weights. `tiny` takes none.
        tokenizer: for `tiny` a tokenizer trained on the data; None is the named model's own.
        options: fields of `CMACLIPConfig` that differ from the named model's defaults.

    Raises:
        InputError: an unknown name, tag, or option; a checkpoint that does not fit the model.
    """
    return CMACLIP(*build_clip(system_config(CMACLIP, name, options), tasks, pretrained, tokenizer))


def build_clip(
    config: Any,
    tasks: Mapping[str, Sequence[str]],
    pretrained: str | Path | None,
    tokenizer: Tokenizer | None,
    modalities: tuple[bool, bool] = (True, True),
) -> tuple[Any, Mapping[str, Sequence[str]], CustomTextCLIP | CoCa | TinyCLIP, ImagePreprocessing, Tokenizer]:
    """What every system is made of: its configuration, completed; tasks; towers; preprocessing and tokenizer.

    Args:
        modalities: whether the system reads the text, and the image; a model that is built again has no other tower.
    """
    if preset(config.name).is_ours:
        if pretrained is not None:
            raise InputError(
                f"'{config.name}' has no pretrained weights: leave out --pretrained, or name an open_clip model"
            )
        tokenizer = tokenizer or OpenClipTokenizer("ViT-B-32", context_length=config.context_length)
        size, context = config.image_size or preset(config.name).model["image_size"], tokenizer.context_length
        config = config.model_copy(update={"image_size": size, "context_length": context})
        try:
            pieces = tokenizer.pieces() if config.text_tower is None else [""]
            clip: CustomTextCLIP | CoCa | TinyCLIP = TinyCLIP(size, context, pieces, tokenizer.eot)
        except ValueError as error:
            raise InputError(f"model options: {error}") from None
        # white becomes 0, which is also what convolutions pad with
        preprocessing = ImagePreprocessing(size=size, mean=(1.0,) * 3, std=(0.5,) * 3, resize_mode="squash")
    elif config.clip is not None:
        assert tokenizer is not None, "an artefact has its tokenizer"
        clip = rebuild_open_clip(config, modalities)
        preprocessing = ImagePreprocessing(size=to_2tuple(clip.visual.image_size)[0])  # the artefact has the rest
    else:
        clip = _open_clip_model(config, pretrained)
        config = config.model_copy(update={"clip": note_open_clip(config, clip)})
        try:
            preprocessing = ImagePreprocessing.from_open_clip(open_clip.get_model_preprocess_cfg(clip))
        except ValueError as error:
            raise InputError(f"'{config.name}': {' '.join(str(error).split())}: choose another model") from None
        tokenizer = tokenizer or OpenClipTokenizer(config.name, context_length=config.context_length)
    if config.text_tower is not None or config.image_tower is not None:
        config, preprocessing, tokenizer = with_other_towers(config, clip, preprocessing, tokenizer)
    return config, tasks, clip, preprocessing, tokenizer


def _open_clip_model(config: Any, pretrained: str | Path | None) -> CustomTextCLIP | CoCa:
    name = config.name
    if not name.startswith(("hf-hub:", "local-dir:")) and open_clip.get_model_config(name) is None:
        import difflib

        near = difflib.get_close_matches(name, open_clip.list_models(), 3)
        hint = f": did you mean {', '.join(near)}?" if near else ": see open_clip.list_models()"
        raise InputError(f"'{name}' is neither 'tiny' nor an open_clip model{hint}")
    overrides: dict[str, Any] = {}
    if config.image_size is not None:
        overrides["force_image_size"] = config.image_size
    if config.context_length is not None:
        overrides["force_context_length"] = config.context_length
    try:
        with _quiet_open_clip():
            return open_clip.create_model(
                name,
                pretrained=None if pretrained is None else str(pretrained),
                pretrained_text=False,
                force_custom_text=True,
                weights_only=True,
                **overrides,
            )
    except Exception as error:
        # open_clip raises a bare RuntimeError for an unknown tag, a corrupt file and a missing dependency alike
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"open_clip cannot make '{name}' with weights '{pretrained}': {reason}") from error


@contextlib.contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """open_clip logs each step of loading on the root logger; its errors still show."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def system_config(system: type[System], name: str, options: Mapping[str, Any]) -> Any:
    """A system's configuration on the named model's towers, with that model's defaults, changed by `options`.

    Raises:
        InputError: an unknown option, or a value that does not fit.
    """
    defaults = preset(name).model.items()
    base = {"name": name, **{field: value for field, value in defaults if field in system.Config.model_fields}}
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

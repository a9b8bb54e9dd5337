"""The folder that training writes and everything else reads: weights, configuration, thresholds, metrics.

Weights are safetensors, the rest is JSON: nothing in the folder is code, so one from a stranger is safe to open.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import open_clip
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

import cmaclip_fast
from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.errors import InputError
from cmaclip_fast.files import write_json, write_tensors
from cmaclip_fast.pretrained import load_tokenizer
from cmaclip_fast.systems import build_system, find_system, system_config
from cmaclip_fast.systems.base import System

FORMAT = 1
WEIGHTS, CONFIG, THRESHOLDS, METRICS = "model.safetensors", "config.json", "thresholds.json", "metrics.json"
REPORT, LOG = "report.html", "train.log"

FILES = (WEIGHTS, CONFIG, THRESHOLDS, METRICS, REPORT, LOG)
"""All that is in an artefact."""


class DataColumns(BaseModel):
    """Where the training data had its pictures, texts and labels; the defaults of later commands."""

    image: str | None
    text: str | None
    tasks: list[str]
    split: str | None = None
    image_dir: str | None = None
    taxonomies: tuple[Taxonomy, ...] = ()


class ArtifactConfig(BaseModel):
    """`config.json`: all that is needed to build the model again and to read data for it.

    Attributes:
        system: a registered name (`systems.systems()`).
        model: the fields of that system's `Config`.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    system: str = "cma-clip"
    model: dict[str, Any]
    tasks: dict[str, list[str]]
    preprocessing: ImagePreprocessing
    tokenizer: dict[str, Any]
    columns: DataColumns
    source: str
    training: dict[str, Any]
    versions: dict[str, str]


def versions() -> dict[str, str]:
    """Versions of what made an artefact."""
    return {
        "cmaclip_fast": cmaclip_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


def save_model(directory: Path, model: System, columns: DataColumns, source: str, training: dict[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json` into an existing folder."""
    config = ArtifactConfig(
        system=model.system,
        model=model.config.model_dump(mode="json"),
        tasks=model.tasks,
        preprocessing=model.preprocessing,
        tokenizer=model.tokenizer.to_dict(),
        columns=columns,
        source=source,
        training=training,
        versions=versions(),
    )
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(directory / WEIGHTS, state)
    write_json(directory / CONFIG, config.model_dump(mode="json"))


def load_config(directory: str | Path) -> ArtifactConfig:
    """Reads and checks `config.json`.

    Raises:
        InputError: the folder or file is missing, damaged, or of another format.
    """
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise InputError(f"{directory}: no {CONFIG} in it: name a folder that `cmaclip train` wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(raw, dict) and raw.get("format", FORMAT) != FORMAT:
            raise InputError(
                f"{path}: format {raw['format']} is not this version's ({FORMAT}): use the cmaclip_fast that wrote it"
            )
        return ArtifactConfig.model_validate(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: damaged or not an artefact's ({reason}): train again, or restore the file") from None


def load_model(directory: str | Path, device: str | torch.device = "cpu") -> System:
    """Builds the model of an artefact, in evaluation mode.

    Raises:
        InputError: the folder is missing, incomplete, or damaged.
    """
    config = load_config(directory)
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise InputError(f"{path}: missing: restore it, or train again")
    system, _ = find_system(config.system)
    try:
        settings = system_config(system, config.model.get("name", "tiny"), config.model)
        model = build_system(system, settings, config.tasks, tokenizer=load_tokenizer(config.tokenizer))
    except InputError as error:
        raise InputError(f"{Path(directory) / CONFIG}: {error}") from None
    model.preprocessing = config.preprocessing
    model.taxonomies = config.columns.taxonomies
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: does not hold this model's weights ({reason}): restore it, or train again") from None
    return model.to(device).eval()


def check_replaceable(directory: Path, inputs: Iterable[Path] = ()) -> None:
    """Whether a folder may be replaced by a new artefact: it is one itself, with nothing else in it, or empty.

    Args:
        inputs: files and folders that must not go with it.

    Raises:
        InputError: it may not.
    """
    remedy = "move it away, or name another --output"
    if directory.is_symlink():
        raise InputError(f"{directory}: is a symbolic link, not an artefact: name the folder itself")
    if not directory.is_dir():
        raise InputError(f"{directory}: is not a folder: {remedy}")
    whole = directory.resolve()
    for path in (Path.cwd(), Path.home(), *inputs):
        if path.exists() and path.resolve().is_relative_to(whole):
            raise InputError(f"{directory}: holds '{path}', so it is not replaced: name another --output")
    paths = sorted(directory.iterdir())
    for path in paths:
        if path.name not in FILES or path.is_symlink() or not path.is_file():
            raise InputError(f"{directory}: holds '{path.name}', which is not of an artefact: {remedy}")
    if not paths:
        return
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        ours = isinstance(config["format"], int) and {"model", "tasks", "preprocessing"} <= config.keys()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise InputError(f"{directory}: is not an artefact ({CONFIG} is missing or of something else): {remedy}")

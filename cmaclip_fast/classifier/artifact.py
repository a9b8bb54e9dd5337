"""The folder that training writes and everything else reads: weights, configuration, decisions, metrics.

Weights are safetensors, the rest is JSON: nothing in the folder is code, and nothing in it is followed to another file
or address, so one from a stranger is safe to open.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import threading
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import open_clip
import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

import cmaclip_fast
from cmaclip_fast.data.named import APPLIES, applies_task
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.source import DataColumns, TrainedOn
from cmaclip_fast.errors import InputError
from cmaclip_fast.files import write_json, write_tensors
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.build import build_system, system_config
from cmaclip_fast.systems.presets import TINY, preset
from cmaclip_fast.systems.pretrained import load_tokenizer
from cmaclip_fast.systems.registry import find_system
from cmaclip_fast.systems.taxonomy import parent_numbers
from cmaclip_fast.types import IMAGE
from cmaclip_fast.untrusted import UnfitFile, first_problem, open_regular, read_json

FORMAT = 1
MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_WEIGHT_BYTES = 128 * 2**20, 16 * 2**20, 2**40
WEIGHTS, CONFIG, METRICS, REPORT, LOG = "model.safetensors", "config.json", "metrics.json", "report.html", "train.log"
CALIBRATION, THRESHOLDS, SCORES = "calibration.json", "thresholds.json", "scores.safetensors"

FILES = (WEIGHTS, CONFIG, CALIBRATION, THRESHOLDS, SCORES, METRICS, REPORT, LOG)
"""All that is in an artefact."""


Content = TypeVar("Content", bound=BaseModel)
Name = Annotated[str, Field(min_length=1)]
Measured = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
HEADLINE = {"accuracy", "macro_f1", "recall_at_precision", "rows"}


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
    tasks: dict[Name, list[Name]]
    preprocessing: ImagePreprocessing
    tokenizer: dict[str, Any]
    columns: DataColumns
    source: str
    training: dict[str, Any]
    versions: dict[str, str]

    def trained_on(self) -> TrainedOn:
        """What data commands take where none are named."""
        return TrainedOn(self.source, self.columns, self.training["seed"])

    @field_validator("tasks")
    @classmethod
    def _are_tasks(cls, tasks: dict[str, list[str]]) -> dict[str, list[str]]:
        if not tasks:
            raise ValueError("has no task")
        for task, classes in tasks.items():
            if len(classes) < 2 or len(set(classes)) < len(classes):
                raise ValueError(f"task '{task}' has fewer than two classes, or one of them twice")
        return tasks

    @field_validator("training")
    @classmethod
    def _has_a_seed(cls, training: dict[str, Any]) -> dict[str, Any]:
        seed = training.get("seed", 0)  # the split of the training data is made again by it
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError("its 'seed' is not an integer from 0 to 2**63 - 1")
        return training

    @model_validator(mode="after")
    def _fits_together(self) -> ArtifactConfig:
        for field in ("tasks", "multi_label", "applies"):
            unknown = sorted(set(getattr(self.columns, field)) - set(self.tasks))
            if unknown:
                raise ValueError(f"field 'columns.{field}': '{unknown[0]}' is not among the tasks")
        for task in self.columns.applies:
            if self.tasks.get(applies_task(task)) != list(APPLIES) or applies_task(task) in self.columns.multi_label:
                raise ValueError(f"field 'columns.applies': the task '{applies_task(task)}' is not one of no and yes")
        for taxonomy in self.columns.taxonomies:
            levels = taxonomy.levels_in(self.tasks)
            if set(levels) & set(self.columns.multi_label):
                raise ValueError(f"field 'columns.multi_label': '{taxonomy.column}' has levels of one class each")
            if not levels or not taxonomy.separator or taxonomy.levels not in (None, len(levels)):
                raise ValueError(f"field 'columns.taxonomies': '{taxonomy.column}' does not have the levels it names")
            for level, (above, below) in enumerate(pairwise(levels), 1):
                parent_numbers(taxonomy, level, self.tasks[above], self.tasks[below])
        return self


class Metrics(BaseModel):
    """What is read again of `metrics.json`: for each view of the test rows, and for each baseline, each task's numbers;
    and the time spent."""

    test: dict[str, dict[str, dict[str, Measured]]]
    baselines: dict[str, dict[str, dict[str, Measured]]] = {}
    seconds: float

    @field_validator("test")
    @classmethod
    def _are_headlines(cls, test: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
        tasks = [set(view) for view in test.values()]
        named = all(numbers.keys() >= HEADLINE for view in test.values() for numbers in view.values())
        if not tasks or not tasks[0] or any(other != tasks[0] for other in tasks) or not named:
            raise ValueError(f"does not have {', '.join(sorted(HEADLINE))} of each task in each view")
        return test


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
    if not os.path.lexists(path):
        raise InputError(f"{directory}: no {CONFIG} in it: name a folder that `cmaclip train` wrote")
    raw = read_json(path, MAX_CONFIG_BYTES)
    if raw.get("format", FORMAT) != FORMAT:
        said = str(raw["format"])[:80]
        raise InputError(f"{path}: format {said} is not this version's ({FORMAT}): use the cmaclip_fast that wrote it")
    return checked(ArtifactConfig, raw, path)


def load_metrics(directory: str | Path) -> Metrics:
    """Reads and checks `metrics.json`.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = Path(directory) / METRICS
    return checked(Metrics, read_json(path, MAX_CONFIG_BYTES), path)


def checked(kind: type[Content], raw: dict[str, Any], path: Path) -> Content:
    """What a JSON file of an artefact holds, as a pydantic model.

    Raises:
        InputError: a field is missing, unknown, or of a wrong type.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {first_problem(error)}: restore the file, or train again") from None
    except RecursionError:
        raise InputError(f"{path}: is nested too deep: restore it, or train again") from None


def load_model(directory: str | Path, device: str | torch.device = "cpu") -> System:
    """Builds the model of an artefact, in evaluation mode.

    Nothing but the artefact and installed packages is read, and before anything large is made, what `config.json` asks
    for is held against the names and shapes in the header of the weights.

    Raises:
        InputError: the folder is missing, incomplete, or damaged.
    """
    config = load_config(directory)
    path = Path(directory) / WEIGHTS
    header = read_header(path)
    try:
        model = _build(config, header, path)
    except InputError as error:
        said = str(error)
        raise InputError(said if said.startswith(str(path)) else f"{Path(directory) / CONFIG}: {said}") from None
    model.preprocessing = config.preprocessing
    model.taxonomies = config.columns.taxonomies
    model.multi_label, model.applies = config.columns.multi_label, config.columns.applies
    try:
        weights = load_file(path)
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: does not hold this model's weights ({reason}): restore it, or train again") from None
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise InputError(f"{path}: '{name}' holds NaN or infinity: restore it, or train again")
    return model.to(device).eval()


Header = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each tensor of a safetensors file."""


def read_header(path: Path, max_bytes: int = MAX_WEIGHT_BYTES) -> Header:
    """The header of a safetensors file of an artefact.

    Raises:
        InputError: the file is missing, no regular file, too large, or damaged.
    """
    try:
        with open_regular(path, max_bytes, follow_links=False) as file:
            length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise InputError(f"{path}: its header has {length:,} bytes: restore it, or train again")
        with safe_open(path, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except UnfitFile as error:
        raise InputError(f"{path}: {error}: put the file itself there") from None
    except FileNotFoundError:
        raise InputError(f"{path}: missing: restore it, or train again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): change its permissions or restore it") from None
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: is no safetensors file ({reason}): restore it, or train again") from None


def _build(config: ArtifactConfig, header: Header, weights: Path) -> System:
    """The model with random weights.

    Raises:
        InputError: the configuration is not one that can be built, or not that of the weights.
    """
    system, _ = find_system(config.system)
    name = str(config.model.get("name", TINY))
    settings = system_config(system, name, config.model)
    for field in ("text_tower", "image_tower"):
        if isinstance(getattr(settings, field, None), str):
            raise InputError(f"field 'model.{field}': names a file or folder elsewhere: train again")
    if not preset(settings.name).is_ours and settings.clip is None:
        raise InputError(f"field 'model.clip': is missing, so '{name}' would be looked for elsewhere: train again")
    tokenizer = load_tokenizer(config.tokenizer)
    most = sum(math.prod(shape) for shape, _ in header.values())
    try:
        with torch.device("meta"), _building_at_most(4 * len(header) + 2048, 4 * most + 2**25):
            plan = build_system(system, settings, config.tasks, tokenizer=tokenizer)
    except InputError:
        raise
    except Exception as error:  # sizes that do not go together end in any library's own error
        raise InputError(
            f"field 'model': cannot be built ({_reason(error)}): restore the file, or train again"
        ) from None
    _check_header(plan, header, weights)
    _check_inputs(plan, config)
    return build_system(system, settings, config.tasks, tokenizer=tokenizer)


@contextlib.contextmanager
def _building_at_most(tensors: int, numbers: int) -> Iterator[None]:
    """Ends the building of a model that registers more tensors, or larger ones, than its weights can account for."""
    thread, left = threading.get_ident(), [tensors, numbers]

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or threading.get_ident() != thread:
            return
        left[0] -= 1
        left[1] -= tensor.numel()
        if min(left) < 0:
            raise InputError(f"field 'model': asks for more or larger layers than {WEIGHTS} holds: restore the file")

    hooks = (register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_FLOATS = {"F64", "F32", "F16", "BF16"}
_INTEGERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.uint8: "U8", torch.bool: "BOOL"}


def _check_header(plan: System, header: Header, path: Path) -> None:
    """Whether the weights are those of the model that is planned, by name, shape and kind of number."""
    wanted = plan.state_dict()
    for name in wanted.keys() ^ header.keys():
        there = "lacks" if name in wanted else "holds, beside the model's own,"
        raise InputError(f"{path}: {there} '{name[:200]}': it is not that of {CONFIG}: restore both, or train again")
    for name, tensor in wanted.items():
        shape, kind = header[name]
        fits = kind in _FLOATS if tensor.is_floating_point() else kind == _INTEGERS.get(tensor.dtype)
        if shape != tuple(tensor.shape) or not fits:
            raise InputError(
                f"{path}: '{name}' is {kind} {list(shape)}, and {CONFIG} asks for {list(tensor.shape)}: "
                "restore both, or train again"
            )


def _check_inputs(plan: System, config: ArtifactConfig) -> None:
    """Whether the towers read what preprocessing and tokenizer give."""
    size, made = config.preprocessing.size, plan.preprocessing.size
    if plan.modalities[IMAGE] and size != made:
        raise InputError(f"field 'preprocessing.size': is {size}, and the image tower reads {made}: restore the file")
    text = getattr(getattr(plan, "text_tower", None), "text", None)
    if text is None:
        return
    for field in ("vocab_size", "context_length"):
        most, asked = getattr(text, field, 0), getattr(plan.tokenizer, field)
        if most and asked > most:  # 0 where the tower sets no bound
            raise InputError(
                f"field 'tokenizer': its {field} {asked} is over the text tower's {most}: restore the file"
            )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


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

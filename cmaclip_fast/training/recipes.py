"""Recipes: the options of `cmaclip train` in a YAML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from cmaclip_fast.data.files import near
from cmaclip_fast.errors import InputError


def read_recipe(file: Path, known: set[str]) -> dict[str, Any]:
    """The options that a recipe sets, by parameter name.

    A recipe maps the options' long names, without the dashes before them, to their values; `option` maps fields of
    `CMACLIPConfig` and `TrainingConfig` to theirs.

    Args:
        known: the command's parameters.

    Raises:
        InputError: the file is missing, no YAML mapping, or names an unknown option.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such recipe; name a YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file}: cannot be read as YAML ({' '.join(str(error).split())[:200]}); fix it") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds no options; write one 'name: value' a line, such as 'epochs: 10'")
    options: dict[str, Any] = {}
    for name, value in content.items():
        parameter = str(name).replace("-", "_")
        if parameter not in known - {"recipe"}:
            spelt = sorted(option.replace("_", "-") for option in known - {"recipe"})
            raise InputError(f"{file}: no option '{name}'{near(str(name), spelt)}; see `cmaclip train --help`")
        if parameter == "option":
            if not isinstance(value, dict):
                raise InputError(f"{file}: 'option' is no mapping; write 'name: value' below it, indented")
            value = [f"{field}={json.dumps(setting)}" for field, setting in value.items()]
        options[parameter] = value
    return options

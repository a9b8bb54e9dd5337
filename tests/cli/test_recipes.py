"""Recipes: options of `cmaclip train` in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import open_clip
import pytest
import typer

from cmaclip_fast.cli import app as cli
from cmaclip_fast.cli.options import parse_options
from cmaclip_fast.data.named import PUBLIC
from cmaclip_fast.systems.build import system_config
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.recipes import read_recipe

from .conftest import COLUMNS, Done

Run = Callable[..., Done]
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def _parameters() -> set[str]:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    return {parameter.name or "" for parameter in group.commands["train"].params}


def test_there_is_one_for_each_public_set() -> None:
    assert {path.stem for path in RECIPES} == set(PUBLIC)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_ours_are_valid(path: Path) -> None:
    options = read_recipe(path, _parameters())
    assert (options["model"], options["pretrained"]) in open_clip.list_pretrained()
    model, training = parse_options(options["option"], ["cma-clip"])
    system_config(CMACLIP, options["model"], model)
    names = set(TrainingConfig.model_fields) & set(options)
    TrainingConfig.model_validate({**training, **{name: options[name] for name in names}})
    first = next(line for line in path.read_text().splitlines() if "cmaclip train" in line)
    assert f"--recipe recipes/{path.name} --data {path.stem}:FOLDER" in first


def test_a_recipe_gives_defaults_and_the_command_line_goes_before(cmaclip: Run, shapes: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "quick.yaml"
    recipe.write_text(
        "model: tiny\nepochs: 1\nbatch-size: 16\nseed: 3\nmodality-attention: false\n"
        "image: picture\ntext: title\ntask: [colour, shape]\n"
        "option:\n  image_size: 32\n  width: 32\n  heads: 2\n  augmentation: null\n"
    )
    done = cmaclip("train", "--recipe", recipe, "--data", shapes, "--output", tmp_path / "a", "--seed", 4)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert list(config["tasks"]) == ["colour", "shape"] and config["model"]["width"] == 32
    assert config["model"]["modality_attention"] is False
    assert config["training"]["epochs"] == 1 and config["training"]["batch_size"] == 16
    assert config["training"]["augmentation"] is None and config["training"]["seed"] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 3", "no option 'epoch' (did you mean 'epochs'?)"),
        ("- epochs", "holds no options"),
        ("a: [", "cannot be read as YAML"),
        ("option: [depth=3]", "'option' is no mapping"),
        ("recipe: other.yaml", "no option 'recipe'"),
        ("epochs: many", "epochs"),
    ],
)
def test_bad_recipes(cmaclip: Run, shapes: Path, tmp_path: Path, content: str, message: str) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(content)
    done = cmaclip("train", "--recipe", recipe, "--data", shapes, *COLUMNS, "--output", tmp_path / "a")
    assert done.code == 2 and message in done.err and not (tmp_path / "a").exists()
    missing = cmaclip("train", "--recipe", tmp_path / "none.yaml", "--data", shapes, "--output", tmp_path / "a")
    assert missing.code == 2 and "none.yaml: no such recipe" in missing.err

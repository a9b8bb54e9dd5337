"""A small CMA-CLIP, pairs for it, and an artefact of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CustomTextCLIP
from PIL import Image

from cmaclip_fast import Classifier, create_model
from cmaclip_fast.classifier.artifact import DataColumns, save_model
from cmaclip_fast.data import TrainedTokenizer
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.cma_clip import CMACLIP, CMACLIPConfig
from tests.decided import save_decided

TASKS = {"colour": ["blue", "green", "red"], "style/cut": ["long", "short"]}
TEXTS = ["a long red dress", "short blue coat", "green skirt", None, "a short red coat", "blue dress", "long skirt"]
COLUMNS = DataColumns(image="file", text="title", tasks=list(TASKS))


def make_tokenizer() -> TrainedTokenizer:
    return TrainedTokenizer.train([text for text in TEXTS if text] * 3, context_length=10)


def make_model() -> CMACLIP:
    """Random weights, in training mode, as a model is when it is made."""
    torch.manual_seed(0)
    model = create_model(
        "tiny", TASKS, tokenizer=make_tokenizer(), image_size=32, width=32, heads=2, fusion_start="random"
    )
    # batch norms that would change in training mode
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    return model


def make_resnet() -> CMACLIP:
    """On OpenAI's `ModifiedResNet`, in training mode."""
    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "patch_size": None}
    text = {"context_length": 10, "vocab_size": 400, "width": 32, "heads": 2, "layers": 1}
    clip = CustomTextCLIP(32, vision, text)
    config = CMACLIPConfig(name="RN50", width=32, depth=1, heads=2, dropout=0.5)
    return CMACLIP(config, TASKS, clip, ImagePreprocessing(size=64), make_tokenizer())


def make_pictures() -> list[Image.Image | None]:
    """One for each of `TEXTS`, of different sizes; one absent."""
    generator = np.random.default_rng(0)
    sizes = [(40, 30), (32, 32), (60, 20), (33, 47), (31, 32), None, (64, 64)]
    return [size and Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def state(system: System) -> dict[str, Any]:
    """All that predicting must not change: modes, parameters and buffers."""
    modes = {name: module.training for name, module in system.named_modules()}
    return modes | {name: tensor.clone() for name, tensor in system.state_dict(keep_vars=False).items()}


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.fixture(scope="session")
def classifier() -> Classifier:
    return Classifier(make_model())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact, as training writes it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    save_model(folder, make_model(), COLUMNS, "here", {"seed": 0})
    save_decided(folder, make_model())
    return folder

"""`cmaclip_fast.train`: the command's result, from Python."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from cmaclip_fast import Classifier, InputError, train

from ..cli.conftest import QUICK, artifact, shapes, write_data

__all__ = ["artifact", "shapes"]
OPTIONS = {"image_size": 32, "width": 32, "heads": 2, "depth": 1, "batch_size": 16, "epochs": 2}


def test_train_gives_what_the_command_gives(artifact: Path, shapes: Path, tmp_path: Path) -> None:
    assert [f"{name}={value}" for name, value in OPTIONS.items()][:4] == QUICK[1:8:2]
    columns = {"image": "picture", "text": "title", "tasks": ["colour", "shape"]}
    classifier = train(shapes, output=tmp_path / "run", **columns, **OPTIONS)
    expected, found = Classifier.load(artifact).system.state_dict(), classifier.system.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(InputError, match="exists"):
        train(shapes, output=tmp_path / "run", **columns, **OPTIONS)


@pytest.mark.tried("call from Python", ends="one line")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "colour"}, "give a list of columns"),
        ({"tasks": ["colour"], "device": "gpu"}, "device 'gpu' is unknown"),
        ({"tasks": ["colour"], "device": "cuda:99"}, "PyTorch sees"),
        ({"tasks": ["colour"], "workers": -1}, "workers"),
        ({"tasks": ["colour"], "workers": "some"}, "workers"),
        ({"tasks": ["colour"], "mixed_precision": "fp8"}, "mixed_precision"),
        ({"tasks": ["colour"], "epoch": 2}, "epoch: no such option"),
        ({"tasks": ["colour"], "epochs": "many"}, "epochs"),
        ({"tasks": ["color"]}, "color"),
        ({"tasks": ["colour"], "system": "cma_clip"}, "did you mean"),
        ({"tasks": ["colour"], "image_dir": "nowhere"}, "nowhere"),
        ({}, "label"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        train(write_data(tmp_path, rows=24), output=tmp_path / "run", **{"image": "picture", "text": "title"} | options)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_compiled_training_gives_the_same_losses(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor takes two minutes to compile these few steps; what is traced is the same
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    columns = {"image": "picture", "text": "title", "tasks": ["colour", "shape"]}
    still = {"dropout": 0.0, "head_dropout": 0.0, "text_dropout": 0.0, "image_dropout": 0.0, "augmentation": None}
    losses = {}
    for compiled in (False, True):
        output = tmp_path / f"compiled-{compiled}"
        train(shapes, output=output, compile=compiled, **columns, **{**OPTIONS, **still, "mismatch": 0.0})
        losses[compiled] = [epoch["train_loss"] for epoch in _read(output)["history"]]
    # the towers of `tiny` keep a dropout of their own, whose draws differ in compiled code
    assert losses[True] == pytest.approx(losses[False], rel=0.2)
    assert losses[True][-1] < losses[True][0]


def _read(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())

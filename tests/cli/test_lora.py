"""`cmaclip train --option lora_rank=N`: an ordinary artefact, made the same after an interruption."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pyarrow.parquet as pq
import pytest
import torch

from cmaclip_fast.classifier.artifact import load_model
from cmaclip_fast.systems.base import System
from cmaclip_fast.training import loop as fitting

from .conftest import COLUMNS, QUICK, Done, write_data

Run = Callable[..., Done]
RANK = 2
TOWERS = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture
def towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options that name small open_clip towers, and adapters."""
    for name in ("_MODEL_CONFIG_PATHS", "_MODEL_CONFIGS"):
        monkeypatch.setattr(open_clip.factory, name, getattr(open_clip.factory, name).copy())
    (tmp_path / "small-vit.json").write_text(json.dumps(TOWERS))
    open_clip.add_model_config(tmp_path / "small-vit.json")
    return ["--model", "small-vit", "--option", f"lora_rank={RANK}", "--option", "ema_decay=0.9"]


def test_the_weights_are_those_of_the_start_and_a_low_rank_change(
    cmaclip: Run, towers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path, rows=48)
    before: dict[str, torch.Tensor] = {}
    add_adapters = fitting.add_adapters

    def noting(model: System, rank: int) -> list[Any]:
        before.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return add_adapters(model, rank)

    monkeypatch.setattr(fitting, "add_adapters", noting)
    arguments = ["train", "--data", data, *COLUMNS, *QUICK, *towers]
    assert cmaclip(*arguments, "--output", tmp_path / "whole").code == 0

    # the same, interrupted in its second epoch and resumed
    validate, calls = fitting.validate, []

    def stopping(*rest: Any) -> dict[str, float]:
        calls.append(rest)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "validate", stopping)
        assert cmaclip(*arguments, "--output", tmp_path / "resumed").code == 130
    done = cmaclip(*arguments, "--output", tmp_path / "resumed", "--option", "lora_rank=3", "--resume")
    assert done.code == 2 and "other settings (training)" in done.err
    done = cmaclip(*arguments, "--output", tmp_path / "resumed", "--resume")
    assert done.code == 0 and "resumed after epoch 1" in done.err
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("whole", "resumed"))
    assert whole.read_bytes() == resumed.read_bytes()

    # who only predicts has no peft
    monkeypatch.setitem(sys.modules, "peft", None)
    labels = tmp_path / "labels.parquet"
    assert cmaclip("predict", tmp_path / "whole", "--data", data, "--output", labels).code == 0
    assert len(pq.read_table(labels)) == 48
    after = load_model(tmp_path / "whole").state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        if "resblocks" in name and tensor.ndim == 2:
            singular = torch.linalg.svdvals((tensor - before[name]).double())
            assert singular[RANK - 1] > 1e-5 and singular[RANK] < 1e-7, name
        elif "_tower." in name:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.tried("table", ends="one line that names the remedy, exit 2, nothing left")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--option", "lora_rank=4"], "lora_rank: 'tiny' has no pretrained tower to adapt"),
        (["--option", "lora_rank=-1"], "lora_rank"),
        (["--option", "lora_rank=many"], "lora_rank"),
        (["--option", "lora_rank=1.5"], "lora_rank"),
        (["--option", "lora_rank=4", "without peft"], "pip install 'cmaclip_fast[lora]'"),
    ],
)
def test_adapters_that_cannot_be(
    cmaclip: Run, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    if options[-1] == "without peft":
        options = options[:-1]
        monkeypatch.setitem(sys.modules, "peft", None)
    done = cmaclip("train", "--data", shapes, *COLUMNS, *QUICK, *options, "--output", tmp_path / "run")
    line = done.err.strip().splitlines()[-1]
    assert done.code == 2 and message in line and "Traceback" not in done.err, done.err
    assert not list(tmp_path.iterdir())

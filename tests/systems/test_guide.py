"""docs/systems.md: its table names what there is, and its example of a new system works as it stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import cmaclip_fast.systems as package
from cmaclip_fast import Classifier, InputError
from cmaclip_fast.systems import registry
from cmaclip_fast.systems.registry import VARIANTS, systems

from ..cli.conftest import COLUMNS, Done, cmaclip, write_data

__all__ = ["cmaclip"]
GUIDE = Path(__file__).parents[2] / "docs" / "systems.md"
QUICK = ["--option", "image_size=32", "--option", "width=32", "--batch-size", "16", "--epochs", "1"]


@pytest.fixture
def gmu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of the guide's example, put into the folder of systems as a reader would."""
    (code,) = re.findall(r"```python\n(\"\"\"GMU.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    folder = tmp_path / "systems"
    folder.mkdir()
    (folder / "gmu.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    registry._read_all.cache_clear()
    yield "gmu"
    registry._REGISTERED.pop("gmu", None)
    sys.modules.pop("cmaclip_fast.systems.gmu", None)
    registry._read_all.cache_clear()


def test_the_example_trains_and_comes_back(gmu: str, cmaclip: Callable[..., Done], tmp_path: Path) -> None:
    data, output = write_data(tmp_path), tmp_path / "run"
    done = cmaclip("train", "--data", data, *COLUMNS, "--system", gmu, "--output", output, *QUICK)
    assert done.code == 0, done.err
    assert "GMU on shapes.csv" in (output / "report.html").read_text(encoding="utf-8")
    assert cmaclip("evaluate", output).code == 0
    assert cmaclip("explain", output, "--row", 1, "--output", tmp_path / "row.html").code == 0
    classifier = Classifier.load(output)
    assert classifier.system.system == gmu
    assert classifier.predict(None, "a nice square")["shape"].text_weight is None


def test_an_artefact_of_a_system_that_is_gone_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"system": "gmu", "model": {}, "tasks": {"a": ["b", "c"]}, "preprocessing": {}, "tokenizer": {}, '
        '"source": "", "columns": {"image": null, "text": null, "tasks": ["a"]}, "training": {}, "versions": {}}'
    )
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="gmu: unknown"):
        Classifier.load(tmp_path)


def test_the_guide_names_every_system() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in systems())
    named = text.replace(
        "`cma-clip-without-sequence-attention`, `-", "`cma-clip-without-sequence-attention`, `cma-clip-"
    )
    named = named.replace("`, `-without-attention`", "`, `cma-clip-without-attention`")
    for name in VARIANTS:
        assert f"`{name}`" in named or name.startswith("clip-zero-shot-"), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--system", "mmbd"], "did you mean"),
        (["--system", "vit", "--contrastive-epochs", "1"], "reads one modality alone"),
        (["--system", "mmbt", "--no-sequence-attention"], "sequence_attention"),
        (["--system", "mmbt", "--option", "latents=3"], "latents"),
        (["--system", "one-stream", "--option", "variant=uniter"], "variant"),
    ],
)
def test_what_cannot_be_trained_is_said(
    cmaclip: Callable[..., Done], tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = cmaclip("train", "--data", write_data(tmp_path), *COLUMNS, "--output", tmp_path / "run", *arguments)
    assert done.code == 2 and message in done.err and not (tmp_path / "run.partial").exists()


def test_a_system_of_one_modality_needs_its_column(cmaclip: Callable[..., Done], tmp_path: Path) -> None:
    columns = ["--text", "title", "--task", "shape"]
    done = cmaclip("train", "--data", write_data(tmp_path), *columns, "--system", "vit", "--output", tmp_path / "run")
    assert done.code == 2 and "--image" in done.err

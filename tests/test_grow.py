"""Training that starts from an artefact: what is carried over, and what old classes keep."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cmaclip_fast import Classifier, InputError, train
from cmaclip_fast.classifier.artifact import load_model
from cmaclip_fast.training.grow import described, grow

from .cli.conftest import COLUMNS, QUICK, Done, artifact, cmaclip, shapes, write_data  # noqa: F401, fixtures
from .systems.conftest import NAMES, TASKS, make, make_batch

Run = Callable[..., Done]
FIRST, *REST = TASKS
OTHERS = {
    "same": TASKS,
    "a new class": {FIRST: [*TASKS[FIRST], "a new class"], **{task: TASKS[task] for task in REST}},
    "a new task": {"before": ["x", "y", "z"], **TASKS, "after": ["x", "y"]},
    "other order": dict(reversed(TASKS.items())),
    "a task removed": {FIRST: TASKS[FIRST]},
    "one removed, one new": {FIRST: TASKS[FIRST], "new": ["x", "y"]},
}


@pytest.mark.parametrize("change", OTHERS)
@pytest.mark.parametrize("name", NAMES)
def test_old_tasks_and_classes_start_where_they_were(name: str, change: str) -> None:
    old, batch = make(name), make_batch()
    for parameter in old.parameters():  # nothing at zero, so that all must be carried
        parameter.data += 0.01 * torch.randn_like(parameter)
    new = grow(old, OTHERS[change])
    assert new.tasks == OTHERS[change] and type(new) is type(old)
    with torch.inference_mode():
        before, after = old.eval()(batch), new.eval()(batch)
    if name == "clip-zero-shot" or getattr(old.config, "variant", "") == "oscar":
        return  # these read the names of all classes
    for task in set(TASKS) & set(OTHERS[change]):
        kept = after.logits[task][:, : len(TASKS[task])]
        torch.testing.assert_close(kept, before.logits[task], atol=1e-5, rtol=1e-5)
        if before.modality_weights is not None:
            assert after.modality_weights is not None
            torch.testing.assert_close(after.modality_weights[task], before.modality_weights[task])


def test_what_happens_to_each_task_is_said() -> None:
    old = {"a": ["x", "y"], "b": ["x", "y"], "c": ["x", "y"]}
    new = {"a": ["x", "y"], "b": ["x", "y", "z"], "d": ["x", "y"]}
    assert described(old, new) == [
        "a: 2 classes carried over",
        "b: 2 classes carried over, 1 new: z",
        "d: new task with 2 classes, starts at random",
        "c: removed",
    ]


def rewritten(table: Path, folder: Path) -> Path:
    """The rows with some squares called `box`, and a new task; without `colour`."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["parity"] = "even" if number % 2 == 0 else "odd"
        if row["shape"] == "square" and number % 3 == 0:
            row["shape"] = "box"
            row["title"] = row["title"].replace("square", "box")
        row["picture"] = str(table.parent / row["picture"]) if row["picture"] else ""
    path = folder / "more.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_command_starts_from_a_folder(
    cmaclip: Run,  # noqa: F811
    artifact: Path,  # noqa: F811
    shapes: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    data, output = rewritten(shapes, tmp_path), tmp_path / "grown"
    columns = ["--image", "picture", "--text", "title", "--task", "shape", "--task", "parity", "--key", "id"]
    command = ["train", "--from", artifact, "--data", data, *columns, "--epochs", "4", "--batch-size", "16"]
    done = cmaclip(*command, "--output", output)
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert "shape: 2 classes carried over, 1 new: box" in said and "parity: new task with 2 classes" in said
    assert "colour: removed" in said
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (output, artifact))
    assert config["tasks"] == {"shape": ["circle", "square", "box"], "parity": ["even", "odd"]}
    assert config["model"] == before["model"] and config["tokenizer"] == before["tokenizer"]
    assert Classifier.load(output).predict(None, "a nice box number 9").keys() == {"shape", "parity"}

    for option in (["--model", "ViT-B-32"], ["--system", "clip"], ["--option", "depth=3"], ["--pretrained", "x"]):
        refused = cmaclip(*command, *option, "--output", tmp_path / "other")
        assert refused.code == 2 and "leave it out" in refused.err
    several = ["--text", "title", "--multi-label", "shape", "--label-separator", "r"]
    other = cmaclip("train", "--from", artifact, "--data", data, *several, "--output", tmp_path / "other")
    assert other.code == 2 and "do not name it by --multi-label" in other.err
    missing = cmaclip("train", "--from", tmp_path, "--data", data, *columns, "--output", tmp_path / "other")
    assert missing.code == 2 and "no config.json" in missing.err


@pytest.mark.slow
def test_old_classes_keep_their_accuracy(tmp_path: Path) -> None:
    """A model of two colours learns a third, from a table with all of them."""
    table = write_data(tmp_path, rows=240)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def write(name: str, chosen: list[dict[str, str]]) -> Path:
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(chosen)
        return path

    options = {"image": "picture", "text": "title", "tasks": ["colour"], "batch_size": 16}
    small = {"image_size": 32, "width": 32, "heads": 2, "depth": 1}
    two = write("two.csv", [row for row in rows if row["colour"] in ("red", "blue")])
    first = train(two, output=tmp_path / "two", epochs=8, **options, **small)
    grown = train(write("all.csv", rows), output=tmp_path / "three", start=tmp_path / "two", epochs=8, **options)
    assert grown.tasks == {"colour": ["blue", "red", "green"]}

    test = [row for row in rows if row["split"] == "test" and row["picture"]]

    def accuracy(classifier: Classifier, colours: set[str]) -> float:
        chosen = [row for row in test if row["colour"] in colours]
        said = classifier.predict([tmp_path / row["picture"] for row in chosen], None)
        return sum(one["colour"].top[0][0] == row["colour"] for one, row in zip(said, chosen, strict=True)) / len(
            chosen
        )

    old = accuracy(first, {"red", "blue"})
    assert old >= 0.9 and accuracy(grown, {"red", "blue"}) >= old - 0.1 and accuracy(grown, {"green"}) >= 0.8


def test_a_damaged_start_is_said(artifact: Path, shapes: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(InputError, match=r"no config\.json"):
        train(shapes, output=tmp_path / "x", start=tmp_path / "none", image="picture", text="title", tasks=["shape"])
    assert load_model(artifact).tasks.keys() == {"colour", "shape"}

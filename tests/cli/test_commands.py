"""The commands end to end on a small table: what they print and write."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cmaclip_fast import Classifier
from cmaclip_fast.classifier.artifact import FILES, load_config, load_model

from .conftest import COLUMNS, QUICK, Done

Run = Callable[..., Done]


def test_train_writes_the_whole_artefact_and_nothing_else(artifact: Path) -> None:
    assert {path.name for path in artifact.iterdir()} == set(FILES)
    assert [path.name for path in artifact.parent.iterdir()] == [artifact.name]
    metrics = json.loads((artifact / "metrics.json").read_text())
    assert metrics["test"]["both"]["shape"]["rows"] == 16
    assert [record["epoch"] for record in metrics["history"]] == [1, 2]
    thresholds = json.loads((artifact / "thresholds.json").read_text())
    assert thresholds["colour"]["target_precision"] == 0.9
    assert "epoch 2/2" in (artifact / "train.log").read_text()
    page = (artifact / "report.html").read_text()
    assert "a nice" in page and "data:image" in page


def test_evaluate_repeats_the_metrics_of_training(cmaclip: Run, artifact: Path, tmp_path: Path) -> None:
    done = cmaclip("evaluate", artifact, "--json", tmp_path / "m.json")
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "m.json").read_text())
    trained = json.loads((artifact / "metrics.json").read_text())
    for task, numbers in written["tasks"].items():
        assert numbers == pytest.approx(trained["test"]["both"][task])
    assert "recall at 90%" in done.out and "text alone" in done.out


def test_noise_is_applied_as_asked(cmaclip: Run, artifact: Path, tmp_path: Path) -> None:
    done = cmaclip(
        "evaluate", artifact, "--noise", "text-drop:1.0", "--json", tmp_path / "m.json", "--on-bad-rows", "skip"
    )
    assert done.code == 0, done.err
    views = json.loads((tmp_path / "m.json").read_text())["views"]
    assert views["both"] == views["image alone"]


def test_predict_writes_keys_labels_probabilities_and_weights(
    cmaclip: Run, artifact: Path, shapes: Path, tmp_path: Path
) -> None:
    output = tmp_path / "labels.parquet"
    done = cmaclip("predict", artifact, "--data", shapes, "--key", "id", "--split", "test", "--output", output)
    assert done.code == 0, done.err
    rows = pq.read_table(output).to_pylist()
    assert len(rows) == 16 and rows[0]["id"] == "item-4"
    for row in rows:
        for task, names in load_config(artifact).tasks.items():
            top = row[f"{task}_top"]
            assert row[f"{task}_status"] in ("accepted", "unsure")
            assert row[task] == (top[0]["label"] if row[f"{task}_status"] == "accepted" else None)
            assert row[f"{task}_probability"] == pytest.approx(top[0]["probability"])
            assert {entry["label"] for entry in top} == set(names)
            assert sum(entry["probability"] for entry in top) == pytest.approx(1, abs=1e-5)
            assert row[f"{task}_text_weight"] + row[f"{task}_image_weight"] == pytest.approx(1, abs=1e-5)
    again = cmaclip("predict", artifact, "--data", shapes, "--output", output)
    assert again.code == 2 and "exists already" in again.err and "--overwrite" in again.err


def test_python_predictions_equal_the_commands(cmaclip: Run, artifact: Path, shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels.parquet"
    assert cmaclip("predict", artifact, "--data", shapes, "--key", "id", "--output", output).code == 0
    row = pq.read_table(output).to_pylist()[0]
    classifier = Classifier.load(artifact)
    picture = shapes.parent / "pictures" / "0.png"
    title = next(line for line in shapes.read_text().splitlines() if line.startswith("item-0,")).split(",")[2]
    said = classifier.predict([picture, Image.open(picture), None], [title, None, title])
    assert said[0]["shape"].label == row["shape"]
    assert said[0]["shape"].probability == pytest.approx(row["shape_probability"], abs=1e-5)
    assert said[1]["shape"].image_weight == 1 and said[2]["shape"].text_weight == 1


def test_explain_writes_a_page(cmaclip: Run, artifact: Path, tmp_path: Path) -> None:
    page = tmp_path / "rows.html"
    done = cmaclip("explain", artifact, "--row", 1, "--row", 3, "--key", "id", "--output", page)
    assert done.code == 0, done.err
    text = page.read_text()
    assert "item-4" in text and "item-16" in text and "data:image" in text
    past = cmaclip("explain", artifact, "--row", 17, "--output", tmp_path / "other.html")
    assert past.code == 2 and "past the last of 16" in past.err


def test_same_seed_same_weights_other_seed_other_weights(
    cmaclip: Run, artifact: Path, shapes: Path, tmp_path: Path
) -> None:
    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return load_model(folder).state_dict()

    for name, seed in (("same", 0), ("other", 1)):
        done = cmaclip("train", "--data", shapes, *COLUMNS, "--output", tmp_path / name, *QUICK, "--seed", seed)
        assert done.code == 0, done.err
    first, same, other = weights(artifact), weights(tmp_path / "same"), weights(tmp_path / "other")
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_killed_run_goes_on_to_the_same_result(
    cmaclip: Run, artifact: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmaclip_fast.training import loop as fitting

    output = tmp_path / "killed"
    command = ["train", "--data", shapes, *COLUMNS, "--output", output, *QUICK]
    real = fitting.validate
    calls = []

    def dies_in_the_second_epoch(*arguments: object) -> dict[str, float]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(fitting, "validate", dies_in_the_second_epoch)
    done = cmaclip(*command)
    assert done.code == 130 and "--resume" in done.err
    assert not output.exists()
    monkeypatch.setattr(fitting, "validate", real)
    refused = cmaclip(*command)
    assert refused.code == 2 and "unfinished run" in refused.err
    changed = cmaclip(*command, "--resume", "--learning-rate", "0.5")
    assert changed.code == 2 and "other settings" in changed.err
    done = cmaclip(*command, "--resume")
    assert done.code == 0, done.err
    assert "resumed after epoch 1" in done.err
    expected, found = load_model(artifact).state_dict(), load_model(output).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    again = cmaclip(*command, "--resume")
    assert again.code == 0 and "complete already" in again.err


def test_contrastive_warm_start_and_ablations_train(cmaclip: Run, shapes: Path, tmp_path: Path) -> None:
    done = cmaclip(
        "train", "--data", shapes, *COLUMNS, "--output", tmp_path / "a", *QUICK, "--contrastive-epochs", 1,
        "--no-modality-attention", "--workers", 1,
    )  # fmt: skip
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert [record["contrastive"] for record in metrics["history"]] == [1.0, 0.0, 0.0]
    assert metrics["modality_weights"] is None
    done = cmaclip("train", "--data", shapes, *COLUMNS, "--output", tmp_path / "b", *QUICK, "--no-sequence-attention")
    assert done.code == 0, done.err
    explained = cmaclip("explain", tmp_path / "b", "--row", 1, "--output", tmp_path / "b.html")
    assert explained.code == 0, explained.err


@pytest.mark.parametrize("only", [["--text", "title"], ["--image", "picture"]])
def test_one_modality_alone_trains(cmaclip: Run, shapes: Path, tmp_path: Path, only: list[str]) -> None:
    done = cmaclip(
        "train", "--data", shapes, *only, "--task", "shape", "--output", tmp_path / "a", *QUICK, "--on-bad-rows", "skip"
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "empty_row" in (tmp_path / "a" / "train.log").read_text()


def test_data_commands(cmaclip: Run, shapes: Path) -> None:
    assert "openclipart" in cmaclip("data", "list").out
    shown = cmaclip("data", "show", shapes, "--image", "picture", "--text", "title", "--task", "colour")
    assert shown.code == 0 and "train 64" in shown.out and "3 classes" in shown.out, shown


@pytest.mark.parametrize(
    "command", ["env", "train", "evaluate", "predict", "explain", "serve", "data list", "data show"]
)
def test_help_shows_an_example(cmaclip: Run, command: str) -> None:
    done = cmaclip(*command.split(), "--help")
    assert done.code == 0 and f"cmaclip {command}" in " ".join(done.out.split())


def test_env_names_every_backend(cmaclip: Run) -> None:
    done = cmaclip("env")
    assert done.code == 0
    for name in ("torch", "triton", "open_clip", "reference", "cpp", "cuda"):
        assert name in done.out.lower()
    assert "backends" in json.loads(cmaclip("env", "--json").out)


def test_predict_decides_by_the_precision_that_is_asked_for(
    cmaclip: Run, artifact: Path, shapes: Path, tmp_path: Path
) -> None:
    def statuses(name: str, *options: object) -> list[str]:
        done = cmaclip("predict", artifact, "--data", shapes, "--output", tmp_path / name, *options)
        assert done.code == 0, done.err
        rows = pq.read_table(tmp_path / name).to_pylist()
        assert all((row["shape"] is None) == (row["shape_status"] == "unsure") for row in rows)
        return [row["shape_status"] for row in rows]

    assert set(statuses("certain.parquet", "--min-precision", 1.0)) == {"unsure"}
    low = statuses("low.parquet", "--min-precision", 0.01)
    assert "accepted" in low
    wrong = cmaclip("predict", artifact, "--data", shapes, "--output", tmp_path / "x.parquet", "--min-precision", 2)
    assert wrong.code == 2 and "min-precision" in wrong.err


def test_a_run_with_another_precision_is_not_resumed(
    cmaclip: Run, artifact: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmaclip_fast.classifier import bulk

    monkeypatch.setattr(bulk, "PART_ROWS", 16)
    command = ["predict", artifact, "--data", shapes, "--output", tmp_path / "labels.parquet"]
    with monkeypatch.context() as patch:
        real, calls = bulk._Parts.write, []

        def write(parts: bulk._Parts, part: bulk.Part) -> None:
            if calls:
                raise KeyboardInterrupt
            calls.append(part)
            real(parts, part)

        patch.setattr(bulk._Parts, "write", write)
        assert cmaclip(*command).code == 130
    other = cmaclip(*command, "--resume", "--min-precision", 0.5)
    assert other.code == 2 and "min_precision" in other.err
    assert cmaclip(*command, "--resume").code == 0


def test_evaluate_says_whether_the_promise_is_kept(cmaclip: Run, artifact: Path, shapes: Path, tmp_path: Path) -> None:
    done = cmaclip("evaluate", artifact, "--min-precision", 0.01, "--split", "all", "--json", tmp_path / "m.json")
    assert done.code == 0, done.err
    assert "coverage" in done.out and "kept" in done.out
    said = json.loads((tmp_path / "m.json").read_text())
    shape = said["decisions"]["shape"]
    assert shape["target_precision"] == 0.01 and shape["verdict"] == "kept"
    output = tmp_path / "labels.parquet"
    assert cmaclip("predict", artifact, "--data", shapes, "--output", output, "--min-precision", 0.01).code == 0
    rows = pq.read_table(output).to_pylist()
    accepted = [row["shape_status"] == "accepted" for row in rows]
    with shapes.open() as file:
        right = [row["shape"] == said["shape"] for row, said in zip(csv.DictReader(file), rows, strict=True)]
    assert (shape["rows"], shape["accepted"], shape["right"]) == (len(rows), sum(accepted), sum(right))
    assert 0 <= said["calibration"]["shape"]["expected_calibration_error"] <= 1


def test_a_precision_that_nothing_reaches_is_said(cmaclip: Run, shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "strict"
    done = cmaclip(
        "train", "--data", shapes, *COLUMNS, "--output", output, *QUICK, "--target-precision", 1.0, "--class-thresholds"
    )
    assert done.code == 0, done.err
    assert "all answers are unsure" in " ".join(done.err.split())
    assert "all 16 rows need a person" in (output / "report.html").read_text()
    thresholds = json.loads((output / "thresholds.json").read_text())
    assert thresholds["shape"]["threshold"] is None and thresholds["shape"]["classes"] == {}
    assert "classes have too few validation rows" in " ".join(done.err.split())


def test_train_measures_simple_baselines_and_warns_below_them(cmaclip: Run, shapes: Path, tmp_path: Path) -> None:
    """The titles of `shapes` name the shape, which two epochs are not enough to learn."""
    output = tmp_path / "run"
    done = cmaclip("train", "--data", shapes, *COLUMNS, "--output", output, *QUICK)
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert re.search(r"shape: validation accuracy 0\.\d+, below the \d\.\d+ of a TF-IDF regression", said)
    found = json.loads((output / "metrics.json").read_text())["baselines"]
    assert found["TF-IDF on the text"]["shape"]["accuracy"] >= 0.9
    assert 0.3 <= found["majority class"]["shape"]["accuracy"] <= 0.7
    assert "TF-IDF on the text" in done.out and "majority class" in (output / "report.html").read_text()

"""Tasks of several classes a row, and tasks that do not apply, through every command and from every form of table."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from sklearn.metrics import average_precision_score, f1_score

from cmaclip_fast import Classifier, InputError, train
from cmaclip_fast.cli import app as cli

from .conftest import COLOURS, QUICK, Done
from .test_bad_input import refused

Run = Callable[..., Done]
CUTS = ["long", "short", "n/a"]
ROWS = 360
OPTIONS = ["--image", "picture", "--text", "title", "--task", "cut", "--multi-label", "tags", "--key", "id"]
OPTIONS += ["--na-value", "n/a"]
EPOCHS = ["--epochs", "6"]


def items(folder: Path) -> list[dict[str, Any]]:
    """Pictures of stripes: their colours are the tags; the title names the cut, which a third of the rows has not."""
    chance = random.Random(0)
    (folder / "pictures").mkdir()
    found = []
    for row in range(ROWS):
        tags = [colour for colour in COLOURS if chance.random() < 0.5]
        cut = chance.choice(CUTS)
        picture = Image.new("RGB", (40, 40), "white")
        draw = ImageDraw.Draw(picture)
        for number, tag in enumerate(tags):
            draw.rectangle((2 + 12 * number, 5, 12 + 12 * number, 35), fill=COLOURS[tag])
        picture.save(folder / "pictures" / f"{row}.png")
        found.append(
            {
                "id": f"item-{row}",
                "picture": f"pictures/{row}.png",
                "title": f"{'plain' if cut == 'n/a' else cut} item {' '.join(tags)}",
                "tags": None if row % 12 == 9 else tags,
                "cut": None if row % 12 == 4 else cut,
                "split": ("train", "validation", "train", "validation", "test", "train")[row % 6],
            }
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`rows.jsonl`, `rows.parquet` and `rows.csv` of the same rows; the last with classes between bars."""
    folder = tmp_path_factory.mktemp("stripes")
    found = items(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    pq.write_table(pa.Table.from_pylist(found), folder / "rows.parquet")
    cells = [None if row["tags"] is None else " | ".join(row["tags"]) or "n/a" for row in found]
    pd.DataFrame(found).assign(tags=cells).to_csv(folder / "rows.csv", index=False)
    return folder


def run(*arguments: object) -> None:
    before = sys.argv
    sys.argv = ["cmaclip", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "stripes"
    run("train", "--data", folder / "rows.jsonl", *OPTIONS, "--output", output, *QUICK, *EPOCHS)
    return output


def predicted(cmaclip: Run, model: Path, data: Path, output: Path, *more: object) -> pd.DataFrame:
    done = cmaclip("predict", model, "--data", data, "--key", "id", "--output", output, *more)
    assert done.code == 0, done.err
    return pq.read_table(output).to_pandas().set_index("id")


def test_the_folder_keeps_what_the_columns_hold(artifact: Path) -> None:
    columns = json.loads((artifact / "config.json").read_text())["columns"]
    assert (columns["multi_label"], columns["na_value"], columns["label_separator"]) == (["tags"], "n/a", None)
    assert sorted(columns["applies"]) == ["cut", "tags"]
    metrics = json.loads((artifact / "metrics.json").read_text())
    assert metrics["not_applicable"].keys() == {"cut", "tags"} and metrics["not_applicable"]["cut"]["rows"] > 10
    tags = metrics["test"]["both"]["tags"]
    assert {"micro_f1", "mean_average_precision", "accuracy", "rows"} <= tags.keys()
    assert metrics["test"]["both"]["cut"].keys() == {"accuracy", "macro_f1", "recall_at_precision", "rows"}
    assert tags["mean_average_precision"] > 0.8, "the colours are in the pictures"
    log = (artifact / "train.log").read_text()
    assert "too few validation rows for a threshold of their own" in log
    assert "rows that it does not apply to" in log


def test_the_report_shows_both(artifact: Path) -> None:
    page = (artifact / "report.html").read_text()
    assert "mean average precision" in page and "micro-F1" in page
    assert "rows that it does not apply to" in page
    assert 'aria-label="Confusion of cut"' in page and 'aria-label="Confusion of tags"' not in page


def test_the_same_rows_in_every_form_train_the_same_model(artifact: Path, folder: Path, tmp_path: Path) -> None:
    weights = (artifact / "model.safetensors").read_bytes()
    for name, more in (("rows.parquet", []), ("rows.csv", ["--label-separator", "|"])):
        output = tmp_path / name
        run("train", "--data", folder / name, *OPTIONS, *more, "--output", output, *QUICK, *EPOCHS)
        assert (output / "model.safetensors").read_bytes() == weights, name


def test_metrics_follow_from_predict_proba(artifact: Path, folder: Path) -> None:
    classifier = Classifier.load(artifact)
    frame = pd.read_json(folder / "rows.jsonl", lines=True)
    frame = frame[(frame["split"] == "test") & frame["tags"].map(bool)]
    found = classifier.predict_proba(frame, image_dir=folder)
    names = classifier.tasks["tags"]
    scores = found[[f"tags={name}" for name in names]].to_numpy()
    truth = np.array([[name in tags for name in names] for tags in frame["tags"]])
    tags = json.loads((artifact / "metrics.json").read_text())["test"]["both"]["tags"]
    assert tags["rows"] == len(frame) > 30
    assert tags["accuracy"] == pytest.approx(((scores >= 0.5) == truth).all(1).mean())
    assert tags["micro_f1"] == pytest.approx(f1_score(truth, scores >= 0.5, average="micro"))
    assert tags["mean_average_precision"] == pytest.approx(average_precision_score(truth, scores), abs=1e-4)
    assert (np.abs(scores.sum(1) - 1) > 0.1).any(), "classes do not exclude each other"


def test_evaluate_prints_and_writes(cmaclip: Run, artifact: Path, folder: Path, tmp_path: Path) -> None:
    done = cmaclip("evaluate", artifact, "--json", tmp_path / "m.json")
    assert done.code == 0, done.err
    assert "mean average precision" in done.out and "not applicable" in done.out
    record = json.loads((tmp_path / "m.json").read_text())
    kept = json.loads((artifact / "metrics.json").read_text())
    assert record["tasks"]["tags"] == pytest.approx(kept["test"]["both"]["tags"])
    assert record["not_applicable"] == kept["not_applicable"]
    assert record["decisions"]["tags"] == pytest.approx(kept["decisions"]["tags"])
    text = cmaclip(
        "evaluate", artifact, "--data", folder / "rows.csv", "--label-separator", "|", "--json", tmp_path / "c.json"
    )
    assert text.code == 0, text.err
    assert json.loads((tmp_path / "c.json").read_text())["tasks"] == record["tasks"]
    one = cmaclip("evaluate", artifact, "--data", folder / "rows.jsonl", "--task", "tags_applies")
    assert one.code == 0 and "tags_applies" in one.out and "cut" not in one.out, one
    refused(cmaclip("evaluate", artifact, "--data", folder / "rows.csv"), "rows.csv, row 1", "'tags'", "not a list")


def test_predictions_are_lists(cmaclip: Run, artifact: Path, folder: Path, tmp_path: Path) -> None:
    found = predicted(cmaclip, artifact, folder / "rows.jsonl", tmp_path / "labels.parquet", "--min-precision", 0.6)
    schema = pq.read_schema(tmp_path / "labels.parquet")
    assert schema.field("tags").type == pa.list_(schema.field("tags").type.value_type)
    assert set(found["tags_status"]) <= {"accepted", "unsure", "not_applicable"}
    accepted = found[found["tags_status"] == "accepted"]
    assert len(accepted) > 20 and accepted["tags"].map(len).max() > 1
    assert found[found["tags_status"] != "accepted"]["tags"].isna().all()
    for labels, top, best in zip(accepted["tags"], accepted["tags_top"], accepted["tags_probability"], strict=True):
        assert list(labels) == [part["label"] for part in top if part["label"] in labels], "best first"
        assert best == top[0]["probability"]
    cuts = found[found["cut_status"] == "not_applicable"]
    assert len(cuts) > 50 and cuts["cut"].isna().all() and set(cuts["cut_applies"]) == {"no"}
    sure = found[found["cut_status"] == "accepted"]
    assert len(sure) and set(sure["cut_applies"]) == {"yes"} and set(sure["cut"]) == {"long", "short"}


def test_predict_does_not_look_at_labels_of_another_form(
    cmaclip: Run, artifact: Path, folder: Path, tmp_path: Path
) -> None:
    lists = predicted(cmaclip, artifact, folder / "rows.jsonl", tmp_path / "a.parquet")
    texts = predicted(cmaclip, artifact, folder / "rows.csv", tmp_path / "b.parquet")
    pd.testing.assert_frame_equal(lists, texts)


def test_a_frame_in_gives_a_frame_out(cmaclip: Run, artifact: Path, folder: Path, tmp_path: Path) -> None:
    expected = predicted(cmaclip, artifact, folder / "rows.jsonl", tmp_path / "labels.parquet", "--min-precision", 0.6)
    frame = pd.read_json(folder / "rows.jsonl", lines=True)
    found = Classifier.load(artifact, min_precision=0.6).predict(frame, image_dir=folder)
    assert list(found.columns) == list(expected.columns)
    for ours, theirs in zip(found["tags"], expected["tags"], strict=True):
        assert (ours is None) == (theirs is None) and list(ours if ours is not None else ()) == list(
            theirs if theirs is not None else ()
        )
    assert found["tags_status"].tolist() == expected["tags_status"].tolist()
    rows = Classifier.load(artifact, min_precision=0.6).predict(None, ["short item red"])
    assert isinstance(rows[0]["tags"].likely, tuple) and rows[0]["tags"].status in ("accepted", "unsure")


def test_explain_shows_sets(cmaclip: Run, artifact: Path, tmp_path: Path) -> None:
    done = cmaclip("explain", artifact, "--split", "all", "--row", 1, "--row", 2, "--output", tmp_path / "rows.html")
    assert done.code == 0, done.err
    assert "tags_applies" in (tmp_path / "rows.html").read_text()


def test_an_interrupted_training_resumes_to_the_same(
    cmaclip: Run, artifact: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmaclip_fast.training import loop

    saved = loop.save_checkpoint
    epochs = []

    def save(*arguments: Any) -> None:
        saved(*arguments)
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_checkpoint", save)
    arguments = ["train", "--data", folder / "rows.jsonl", *OPTIONS, "--output", tmp_path / "run", *QUICK, *EPOCHS]
    assert cmaclip(*arguments).code == 130
    done = cmaclip(*arguments, "--resume")
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (artifact / "model.safetensors").read_bytes()


def test_other_labels_are_another_run(
    cmaclip: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmaclip_fast.training import loop

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    data = tmp_path / "rows.jsonl"
    text = (folder / "rows.jsonl").read_text()
    data.write_text(text)
    arguments = ["train", "--data", data, "--image-dir", folder, *OPTIONS, "--output", tmp_path / "run", *QUICK]
    monkeypatch.setattr(loop, "save_checkpoint", stop)
    assert cmaclip(*arguments).code == 130
    data.write_text(text.replace('["red", "green"]', '["red"]', 1))
    refused(cmaclip(*arguments, "--resume"), "labels")


def test_training_from_python_with_the_asymmetric_loss(folder: Path, tmp_path: Path) -> None:
    classifier = train(
        folder / "rows.csv",
        output=tmp_path / "run",
        text="title",
        multi_label=["tags"],
        label_separator="|",
        na_value="n/a",
        class_weights="balanced",
        gamma_negative=4.0,
        margin=0.05,
        balanced_sampling=True,
        logit_adjustment=1.0,
        calibration="vector",
        width=32,
        heads=2,
        depth=1,
        epochs=2,
    )
    assert classifier.tasks == {"tags": ["blue", "green", "red"], "tags_applies": ["no", "yes"]}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["gamma_negative"] == 4
    with pytest.raises(InputError, match="give a list of columns"):
        train(folder / "rows.csv", output=tmp_path / "other", text="title", multi_label="tags")


@pytest.mark.tried("table", ends="one line that names the file")
@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ("rows.csv", [], ["rows.csv, row 1, column 'tags'", "not a list", "--label-separator"]),
        ("rows.csv", ["--label-separator", ";"], ["rows.csv, column 'tags'", "';'", "separator"]),
        ("rows.csv", ["--label-separator", " "], ["label separator", "leave it"]),
        ("rows.jsonl", ["--na-value", "none"], ["rows.jsonl", "'none'", "in no cell of tags, cut"]),
        ("rows.jsonl", ["--na-value", " "], ["NA value", "empty"]),
        ("mixed.jsonl", [], ["mixed.jsonl, row 3, column 'tags'", "'red' is not a list"]),
        ("rows.jsonl", ["--multi-label", "tag"], ["no column 'tag'", "tags"]),
        ("rows.jsonl", ["--class-weights", "WEIGHTS"], ["class weights", "'cut' has no class 'n/a'"]),
    ],
)
def test_bad_labels_end_in_one_line(
    cmaclip: Run, folder: Path, tmp_path: Path, data: str, options: list[str], said: list[str]
) -> None:
    lines = (folder / "rows.jsonl").read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {"tags": "red"})
    (folder / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "weights.json").write_text('{"cut": {"n/a": 2}}')
    options = [str(tmp_path / "weights.json") if option == "WEIGHTS" else option for option in options]
    done = cmaclip("train", "--data", folder / data, *OPTIONS, *options, "--output", tmp_path / "run", *QUICK)
    refused(done, *said)
    assert not (tmp_path / "run").exists()


@pytest.mark.tried("artefact", ends="one line that names file and field")
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("multi_label", ["nothing"], "columns.multi_label"),
        ("multi_label", ["tags", "cut"], "cut"),
        ("multi_label", ["tags", "cut_applies"], "columns.applies"),
        ("applies", ["nothing"], "columns.applies"),
        ("applies", ["tags_applies"], "columns.applies"),
    ],
)
def test_a_folder_whose_fields_do_not_fit(
    cmaclip: Run, artifact: Path, tmp_path: Path, field: str, value: list[str], said: str
) -> None:
    shutil.copytree(artifact, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["columns"][field] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    refused(cmaclip("evaluate", tmp_path / "model"), "model", said)

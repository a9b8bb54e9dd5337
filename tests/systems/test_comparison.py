"""The comparison: what it measures, that it goes on where it stopped, and its page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from rich.console import Console

from cmaclip_fast import InputError
from cmaclip_fast.data import Columns, TrainedTokenizer, class_names, read_table
from cmaclip_fast.data.noise import Noise, add_noise
from cmaclip_fast.evaluation.cost import forward_flops, parameters
from cmaclip_fast.pages.comparison import summary, welch, write_page
from cmaclip_fast.pages.comparison_pictures import draw_attention
from cmaclip_fast.pages.views import ExampleView
from cmaclip_fast.systems.build import create_system
from cmaclip_fast.training.comparison import LOCK, Comparison, Run, Try, compare, prepare, record_path
from cmaclip_fast.training.curves import _classify, curve

from ..cli.conftest import Done, cmaclip, write_data
from .conftest import make, make_batch

__all__ = ["cmaclip"]
SMALL = {"image_size": 32, "width": 32, "heads": 2}
BUDGET = {"epochs": 1, "batch_size": 16, "small_epochs": 0.0}
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("compared")
    table = read_table(write_data(folder), Columns(image="picture", text="title", tasks=("colour", "shape")))
    return Comparison(
        tables={"shapes": table},
        output=folder / "out",
        systems=("cma-clip", "cma-clip-without-attention", "bert"),
        seeds=(0, 1),
        model_options=SMALL,
        training_options=BUDGET,
        kinds=("text-replace", "image-drop"),
    )


@pytest.fixture(scope="module")
def records(comparison: Comparison) -> list[dict[str, Any]]:
    return compare(comparison, QUIET)


def test_every_system_and_seed_has_a_record(comparison: Comparison, records: list[dict[str, Any]]) -> None:
    assert [(r["system"], r["seed"]) for r in records] == [(s, seed) for seed in (0, 1) for s in comparison.systems]
    for record in records:
        assert set(record["test"]["both"]) == {"colour", "shape"} and record["flops"] > 0
        assert set(record["noise"]) == set(comparison.kinds)
        assert (record["weights"] is not None) == (record["system"] == "cma-clip")


def test_what_needs_modality_weights_is_off_unless_asked_for(comparison: Comparison) -> None:
    run = Run("shapes", "clip", 0)
    assert comparison.options(run)[1]["mismatch"] == 0
    assert replace(comparison, training_options={"mismatch": 0.2}).options(run)[1]["mismatch"] == 0.2


def test_what_is_finished_is_not_repeated(comparison: Comparison, records: list[dict[str, Any]]) -> None:
    one = record_path(comparison.output, Run("shapes", "bert", 1))
    others = {path: path.stat().st_mtime_ns for path in one.parent.iterdir() if path != one}
    one.unlink()
    again = compare(comparison, QUIET)
    assert [r["test"] for r in again] == [r["test"] for r in records], "training repeats exactly"
    assert one.is_file() and all(path.stat().st_mtime_ns == time for path, time in others.items())


def test_other_settings_are_not_mixed_in(comparison: Comparison, records: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"other settings \(training_options\).*--output"):
        compare(replace(comparison, training_options={**BUDGET, "epochs": 2}), QUIET)
    path = record_path(comparison.output, Run("shapes", "bert", 0))
    whole = path.read_text()
    try:
        path.write_text(whole[:100])
        with pytest.raises(InputError, match="damaged"):
            compare(comparison, QUIET)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(("kind", "point"), [("text-replace", 2), ("image-drop", 3), ("image-blur", 2)])
def test_a_curve_is_what_evaluating_damaged_rows_gives(comparison: Comparison, kind: Any, point: int) -> None:
    test = prepare(comparison, "shapes")["test"]
    classes = class_names(test, test.columns.tasks)
    tokenizer = TrainedTokenizer.train(test.texts(), context_length=10)
    torch.manual_seed(0)
    model = create_system("cma-clip", "tiny", classes, tokenizer=tokenizer, **SMALL).eval()
    said = curve(model, test, kind, _classify(model, test), 0.9)[point]
    answers = _classify(model, add_noise(test, Noise(kind, said["level"])))
    for task, numbers in answers.headlines().items():
        assert said["tasks"][task]["accuracy"] == pytest.approx(numbers["accuracy"])
        assert said["text_weight"][task] == pytest.approx(float(answers.weights[task][:, 0].mean()), abs=1e-6)


def test_of_what_is_tried_the_best_by_validation_is_taken(comparison: Comparison, tmp_path: Path) -> None:
    """The first seed runs with everything, the others with what was best; what a system does not have is not tried."""
    tries = (
        Try("off", training_options={"learning_rate": 1e-9, "tower_learning_rate": 1e-9}),
        Try("on", training_options={"epochs": 4}),
        Try("deep", {"depth": 2}, {"epochs": 4}),
    )
    systems = ("bert", "mmbt")
    tried = replace(comparison, output=tmp_path, systems=systems, tries=tries, kinds=())
    records = compare(tried, QUIET)
    assert [(r["system"], r["seed"]) for r in records] == [(s, seed) for seed in (0, 1) for s in systems]
    assert set(records[0]["tried"]) == {"off", "on"} and set(records[1]["tried"]) == {"off", "on", "deep"}
    for record in records:
        best = max(record["tried"], key=record["tried"].get)
        assert record["chosen"] == best
        if record["seed"] == 0:
            assert record["validation"] == record["tried"][best]
    page = write_page(records, tmp_path, "cmaclip compare ...").read_text()
    table = page[page.index("### What was tried") :]
    row = next(line for line in table.splitlines() if line.startswith("| bert |"))
    assert f"**{100 * max(records[0]['tried'].values()):.1f}**" in row
    assert len(list((tmp_path / "records" / "shapes").iterdir())) == 5 + 2


def test_side_by_side_is_the_same(comparison: Comparison, tmp_path: Path) -> None:
    """Two processes with a thread each do what one does with one thread."""
    few = replace(comparison, systems=("bert", "vit"), seeds=(0,), kinds=())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = compare(replace(few, output=tmp_path / "alone"), QUIET)
        together = compare(replace(few, output=tmp_path / "together"), QUIET, jobs=2)
    finally:
        torch.set_num_threads(threads)
    assert [(r["system"], r["test"]) for r in together] == [(r["system"], r["test"]) for r in alone]
    assert {r["threads"] for r in together} == {1}
    with pytest.raises(InputError, match="learning_rate"):
        compare(replace(few, output=tmp_path / "bad", training_options={"learning_rate": -1}), QUIET, jobs=2)


def test_two_do_not_work_in_one_folder(comparison: Comparison, records: list[dict[str, Any]]) -> None:
    with FileLock(comparison.output / LOCK), pytest.raises(InputError, match="another comparison runs in it"):
        compare(comparison, QUIET)
    assert len(compare(comparison, QUIET)) == len(records)


def test_one_value_trains_and_all_are_measured(comparison: Comparison, tmp_path: Path) -> None:
    table = comparison.tables["shapes"]
    value = table.labels("shape")[0]
    few = replace(
        comparison, output=tmp_path, systems=("bert",), seeds=(0,), kinds=(), train_on=("shape", value), by="shape"
    )
    splits = prepare(few, "shapes")
    assert set(splits["train"].labels("shape")) == {value} and len(set(splits["test"].labels("shape"))) > 1
    (record,) = compare(replace(few, train_on=None), QUIET)
    assert set(record["by"]) == set(splits["test"].labels("shape"))
    both = record["test"]["both"]["colour"]
    parts = [part["colour"] for part in record["by"].values()]
    assert sum(p["accuracy"] * p["rows"] for p in parts) == pytest.approx(both["accuracy"] * both["rows"], abs=1e-3)
    page = write_page([record], tmp_path, "cmaclip compare ...").read_text()
    assert "### Accuracy by value" in page and f"| {value} |" in page
    with pytest.raises(InputError, match=r"--by shap: .*did you mean 'shape'"):
        compare(replace(few, by="shap"), QUIET)
    with pytest.raises(InputError, match="--train-on shape=ring"):
        compare(replace(few, train_on=("shape", "ring")), QUIET)


def test_one_modality_is_untouched_by_damage_to_the_other(records: list[dict[str, Any]]) -> None:
    for record in records:
        if record["system"] == "bert":
            assert len({point["tasks"]["shape"]["accuracy"] for point in record["noise"]["image-drop"]}) == 1


def test_all_systems_get_the_same_rows_and_at_most_so_many(comparison: Comparison) -> None:
    limited = replace(comparison, rows={"train": 20, "test": 5})
    splits = prepare(limited, "shapes")
    assert len(splits["train"]) == 20 and len(splits["test"]) == 5
    again = prepare(limited, "shapes")
    assert splits["train"].texts() == again["train"].texts()


def test_folds_are_tested_once_each(comparison: Comparison, tmp_path: Path) -> None:
    table = comparison.tables["shapes"]
    folds = [row % 3 for row in range(len(table))]
    crossed = replace(
        comparison, output=tmp_path, systems=("bert",), seeds=(0, 1, 2), kinds=(), folds={"shapes": folds}
    )
    tested = [prepare(crossed, "shapes", fold)["test"].texts() for fold in range(3)]
    assert sorted(text for part in tested for text in part if text) == sorted(filter(None, table.texts()))
    for fold in range(3):
        parts = prepare(crossed, "shapes", fold)
        assert parts["validation"].texts() == tested[(fold + 1) % 3]
        assert sum(map(len, parts.values())) == len(table)
    records = compare(crossed, QUIET)
    assert [record["test"]["both"]["shape"]["rows"] for record in records] == [
        sum(label is not None for label in prepare(crossed, "shapes", fold)["test"].labels("shape"))
        for fold in range(3)
    ]
    with pytest.raises(InputError, match="other settings"):
        compare(replace(crossed, folds={"shapes": folds[::-1]}), QUIET)


def test_training_noise_damages_training_rows_alone(comparison: Comparison) -> None:
    noisy = prepare(replace(comparison, training_noise=Noise("text-drop", 1.0)), "shapes")
    assert set(noisy["train"].texts()) == {None} and set(noisy["test"].texts()) != {None}


def test_the_page(comparison: Comparison, records: list[dict[str, Any]], tmp_path: Path) -> None:
    page = write_page(records, tmp_path, "cmaclip compare ...").read_text()
    for heading in (
        "Accuracy",
        "Macro-F1",
        "Recall at 90% precision",
        "What each attention gives",
        "Cost",
        "Robustness",
    ):
        assert f"### {heading}" in page
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    shown = numbers["data"]["shapes"]["accuracy"]["bert"]["shape"]
    mean = sum(r["test"]["both"]["shape"]["accuracy"] for r in records if r["system"] == "bert") / 2
    assert shown["mean"] == pytest.approx(mean) and f"{100 * mean:.1f}" in page
    simple = records[0]["baselines"]["TF-IDF on the text"]["shape"]["accuracy"]
    assert all(r["baselines"] == records[0]["baselines"] for r in records), "the same rows for all"
    lines = [line for line in page.splitlines() if line.startswith("| baseline: TF-IDF on the text |")]
    assert len(lines) == 3 and f" {100 * simple:.1f} " in lines[0]
    validation = numbers["data"]["shapes"]["accuracy"]["bert"]["average, validation"]["mean"]
    assert validation == pytest.approx(sum(r["validation"] for r in records if r["system"] == "bert") / 2)
    for picture in ("robustness-shapes.png", "weights-shapes.png"):
        assert f"]({picture})" in page and (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert len(numbers["records"]) == len(records) and "test" in numbers["records"][0]


def test_attention_is_drawn_for_the_first_seed_of_systems_that_have_it(
    comparison: Comparison, records: list[dict[str, Any]]
) -> None:
    page = write_page(records, comparison.output, "cmaclip compare ...").read_text()
    pictures = sorted(path.name for path in (comparison.output / "attention" / "shapes").iterdir())
    assert pictures == ["cma-clip.png"]
    assert "](attention/shapes/cma-clip.png)" in page and "](attention/shapes/bert" not in page


def test_a_copy_without_its_records_is_made_again(
    comparison: Comparison, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    """As in a clone of a repository that holds pages but no records."""
    write_page(records, tmp_path, "cmaclip compare ...")
    again = replace(comparison, output=tmp_path, systems=("bert",), seeds=(0,), kinds=())
    assert len(compare(again, QUIET)) == 1
    assert record_path(tmp_path, Run("shapes", "bert", 0)).is_file()
    (tmp_path / "comparison.json").write_text("{}")
    shutil.rmtree(tmp_path / "records")
    with pytest.raises(InputError, match="no comparison of ours"):
        compare(again, QUIET)


def test_no_map_is_drawn_for_a_text_without_words(tmp_path: Path) -> None:
    maps, picture = np.ones((2, 3, 3)), Image.new("RGB", (9, 9))
    draw_attention([ExampleView(0, "", picture, "", ["<s>", "</s>"], maps)], tmp_path / "none.png")
    draw_attention([ExampleView(0, "", picture, "red", ["<s>", "red"], maps)], tmp_path / "one.png")
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_significance() -> None:
    assert welch([0.5, 0.51, 0.49], [0.8, 0.81, 0.79]) < 0.001
    assert welch([0.5, 0.7, 0.3], [0.6, 0.4, 0.5]) > 0.5
    assert welch([0.5], [0.8]) is None and welch([0.5, 0.5], [0.5, 0.5]) is None

    def record(system: str, seed: int, value: float) -> dict[str, Any]:
        metrics = {"accuracy": value, "rows": 4.0}
        test = {"both": {"a": metrics, "b": {"accuracy": 0.0, "rows": 0.0}}}
        return {"system": system, "seed": seed, "test": test, "validation": value}

    rows = [record("one", s, 0.5 + s / 100) for s in range(3)] + [record("two", s, 0.2 + s / 100) for s in range(3)]
    table = summary(rows, "accuracy")
    assert list(table["one"]) == ["a", "average", "average, validation"], "a task without labelled rows has no column"
    assert table["one"]["average"]["p"] is None and table["two"]["average"]["p"] < 0.05
    assert table["one"]["a"]["mean"] == pytest.approx(0.51) and table["one"]["a"]["deviation"] == pytest.approx(0.01)


def test_bad_lists_are_said(comparison: Comparison) -> None:
    with pytest.raises(InputError, match="bert is named twice"):
        compare(replace(comparison, systems=("bert", "bert")), QUIET)
    with pytest.raises(InputError, match="mmbd"):
        compare(replace(comparison, systems=("mmbd",)), QUIET)


def test_parameters_and_operations_are_counted() -> None:
    system, batch = make("perceiver-io"), make_batch(["red dress"], [True])
    counted = parameters(system)
    assert counted["all"] == sum(p.numel() for p in system.parameters()) > counted["towers"] > 0

    text = make("bert")
    layer, size, width = text.text_tower.text.transformer.resblocks[0], int(batch.text_lengths[0]), 128
    linear = sum(p.numel() for name, p in layer.named_parameters() if p.ndim == 2)
    heads = sum(p.numel() for name, p in text.heads.named_parameters() if p.ndim == 2)
    by_hand = 2 * (size * linear + heads + text.text_projection.weight.numel()) + 4 * size * size * width
    assert forward_flops(text, batch) == pytest.approx(by_hand, rel=0.01)

    # attention over packed rows counts each row's own keys
    cma, texts = make("cma-clip"), ["red dress", "long blue coat long blue coat"]
    alone = [forward_flops(cma, make_batch([text], [True])) for text in texts]
    assert alone[0] < alone[1]
    assert forward_flops(cma, make_batch(texts, [True, True])) == pytest.approx(sum(alone) / 2, rel=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_command_compares_and_goes_on(cmaclip: Callable[..., Done], tmp_path: Path) -> None:
    """One record is taken away; the command makes it again and leaves the other alone."""
    data, output = write_data(tmp_path), tmp_path / "out"
    columns = ["--image", "picture", "--text", "title", "--task", "shape"]
    options = ["--option", "image_size=32", "--option", "width=32", "--option", "batch_size=8", "--epochs", "1"]
    arguments = ["compare", "--data", data, *columns, *options, "--quick", "--systems", "bert,vit", "--seeds", "3"]
    done = cmaclip(*arguments, "--output", output)
    assert done.code == 0, done.err
    assert "| bert |" in done.out and f"`cmaclip compare --data {data}" in done.out
    first = record_path(output, Run("shapes.csv", "bert", 3))
    before = first.stat().st_mtime_ns
    record_path(output, Run("shapes.csv", "vit", 3)).unlink()
    again = cmaclip(*arguments, "--output", output)
    assert again.code == 0 and "2/2: vit" in again.err and "bert on" not in again.err
    assert first.stat().st_mtime_ns == before
    done = cmaclip(*arguments, "--option", "label_smoothing=0.5", "--output", output)
    assert done.code == 2 and "other settings" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0,x"], "--seeds 0,x"),
        (["--systems", "bert,brt"], "did you mean"),
        (["--training-noise", "text-swap:1"], "no kind"),
        (["--option", "colour=3"], "colour=3"),
        (["--try", "learning_rat=1"], "--try 'learning_rat=1'"),
        (["--train-on", "language"], "--train-on language"),
        (["--by", "languag"], "no such column"),
    ],
)
def test_bad_arguments_are_said(
    cmaclip: Callable[..., Done], tmp_path: Path, arguments: list[str], message: str
) -> None:
    columns = ["--text", "title", "--task", "shape"]
    done = cmaclip("compare", "--data", write_data(tmp_path), *columns, "--output", tmp_path / "out", *arguments)
    assert done.code == 2 and message in done.err and not (tmp_path / "out").exists()

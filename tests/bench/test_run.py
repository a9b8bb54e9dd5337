"""Workloads, timing, memory, guard, and a whole run on a small model: what it writes and when it fails."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from rich.console import Console

from cmaclip_fast.bench import guard, run, scale
from cmaclip_fast.bench.comparison import Group, Measurement
from cmaclip_fast.bench.plan import FULL, QUICK, Plan
from cmaclip_fast.bench.report import write_report
from cmaclip_fast.bench.results import BenchmarkError, Memory, Part, Report, Row, Table
from cmaclip_fast.bench.timing import MatmulRate, Spread, alternate
from cmaclip_fast.bench.workloads import SMALL, Texts, Workload, make_batch, make_batches, text_lengths
from cmaclip_fast.errors import InputError
from cmaclip_fast.systems.cma_clip import CMACLIP

from .conftest import MACHINE

PEERS = ("ours", "plain", "longest")
PLAN = Plan(
    groups=(
        Group(SMALL, 2, False, (Measurement(Texts.product, PEERS, 0, 3), Measurement(Texts.full, PEERS, 0, 1))),
        Group(SMALL, 2, True, (Measurement(Texts.product, ("ours", "plain"), 0, 1),)),
    ),
    steps_seconds=0.01,
    memory=("ours", "plain"),
    batches=(1, 2),
    lengths=(8, 16),
    tasks=(1, 8),
    classes=(10, 100),
    point_seconds=0,
    part_seconds=0.01,
    loader_seconds=0.1,
)


@pytest.mark.parametrize("count", [32, 1000])
def test_product_titles_have_the_stated_mean_and_deviation(model: CMACLIP, count: int) -> None:
    lengths = text_lengths(Texts.product, count, model)
    assert statistics.mean(lengths) == pytest.approx(20, abs=0.25)
    assert statistics.pstdev(lengths) == pytest.approx(8, abs=0.5)
    assert min(lengths) >= 3 and max(lengths) <= 77
    assert lengths == text_lengths(Texts.product, count, model) != sorted(lengths)


def test_openclipart_titles_have_the_lengths_of_its_titles(model: CMACLIP) -> None:
    from cmaclip_fast.data import read_table

    titles = sorted({title for title in read_table("openclipart").texts() if title})
    everything = model.tokenizer.encode(titles)[1].tolist()
    assert statistics.mean(text_lengths(Texts.clipart, 256, model)) == pytest.approx(
        statistics.mean(everything), rel=0.03
    )
    assert sorted(text_lengths(Texts.clipart, len(everything), model)) == sorted(everything)


def test_batches_are_whole_texts_and_the_same_in_every_run(model: CMACLIP) -> None:
    lengths = [3, 77, 20]
    batch, again = make_batch(model, lengths), make_batch(model, lengths)
    tokens, tokenizer = batch.tokens, model.tokenizer
    assert tokens.equal(again.tokens) and batch.images.equal(again.images)
    assert (tokens == tokenizer.bos).sum(1).tolist() == [1, 1, 1] and (tokens[:, 0] == tokenizer.bos).all()
    assert (tokens == tokenizer.eot).int().argmax(1).tolist() == [length - 1 for length in lengths]
    assert batch.present.all() and all(labels.min() >= 0 for labels in batch.labels.values())
    singles = make_batches(model, Workload(SMALL, Texts.product, 1))
    assert len(singles) == 8 and not singles[0].images.equal(singles[1].images)


def test_systems_take_turns_and_none_always_begins() -> None:
    order: list[str] = []
    shares: list[float] = []
    runs = {name: lambda number, name=name: order.append(f"{name}{number}") for name in "ab"}
    between: list[int] = []
    times = alternate(runs, 0, least=3, advance=shares.append, between=lambda: between.append(len(order)))
    assert between == [0, 1, 2, 3, 4, 5]
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}
    assert sum(shares) == pytest.approx(1)


def test_spread_and_limit() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Spread(2.0, 3.5, 5.0)
    rate = MatmulRate("cpu", MACHINE.dtype)
    rate.measure()
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in rate._seconds)
    # medians: one second for the first two shapes, a hundred for the third: the second has the most operations a second
    rate._seconds = [[1.0], [1.0, 9.0, 0.1], [100.0]]
    assert rate.limit == pytest.approx(2 * 1600 * 768 * 3072 / 1e9)


def row(system: str, milliseconds: float, rounds: int = 3) -> Row:
    spread, speedup = Spread(milliseconds, milliseconds, milliseconds), Spread(150, 190, 200)
    ratios = Spread(*(value / milliseconds for value in (speedup.p20, speedup.median, speedup.p80)))
    return Row(system, system, spread, 1e3 / milliseconds, ratios, 50.0, 0.5, rounds)


def made_up(rounds: int = 3) -> Report:
    rows = [row("ours", 100.0, rounds), row("plain", 190.0, rounds)]
    table = Table("a workload", SMALL, "product titles", 1, False, 20.0, 1.0, {"77": 2.0}, 100.0, "plain", rows, {})
    memory = [Memory("a step", name, name, 2, 100, 60, size, 50) for name, size in (("ours", 50), ("plain", 100))]
    parts = [Part("modality_pool", "forward", Spread(1, 1, 1), Spread(5, 5, 5), 5.0)]
    return Report("2026-01-01", "cpu", "float32", 1, False, {}, [table], memory, parts)


def test_guard_names_what_is_below_its_floor(tmp_path: Path) -> None:
    report = made_up()
    assert guard.figures(report) == {
        "a workload: speed over 'plain'": guard.Figure(1.9, 1.5),
        "a step: memory of 'plain' over ours": guard.Figure(2.0, 2.0),
        "modality_pool, forward: speed over the loop": guard.Figure(5.0, 5.0),
    }
    assert "a workload: speed over 'plain'" not in guard.figures(made_up(rounds=2))
    floors = {"a workload: speed over 'plain'": 1.95, "a step: memory of 'plain' over ours": 2.0, "not measured": 9.0}
    assert guard.below(report, floors) == ["a workload: speed over 'plain': 1.90 is below its floor 1.95"]
    assert guard.below(report, {"a workload: speed over 'plain'": 1.9}) == []
    path = tmp_path / "floors.json"
    path.write_text(json.dumps({"cuda": {"x": 1.0}, "cpu": {"not measured": 9.0}}))
    assert guard.record(report, path) == 3
    assert json.loads(path.read_text())["cuda"] == {"x": 1.0}
    floors = guard.read_floors(path, "cpu")
    assert floors["a workload: speed over 'plain'"] == 1.35 and floors["not measured"] == 9.0
    assert guard.below(report, floors) == [] and guard.read_floors(path, "cuda:1") == {"x": 1.0}
    path.write_text("[]")
    with pytest.raises(InputError, match=r"floors\.json: is no file of floors"):
        guard.read_floors(path, "cpu")


def test_growth_is_one_where_time_is_linear() -> None:
    assert scale.growth([1, 10, 100], [5.0, 3.0, 30.0]) == pytest.approx(1)
    assert scale.growth([8, 16], [1.0, 4.0]) == pytest.approx(2)


def test_plans_name_known_systems_and_all_workloads() -> None:
    names = {group.workload(one).name for group in FULL.groups for one in group.measurements}
    for tower in ("ViT-B-32", "ViT-B-16"):
        assert {f"{tower}, inference at batch {size}, product titles" for size in (1, 32, 256)} < names
        assert f"{tower}, training at batch 32, product titles" in names
    for texts in Texts:
        assert f"ViT-B-32, inference at batch 32, {texts.value}" in names
    quick = {group.workload(one).name for group in QUICK.groups for one in group.measurements}
    assert quick < names
    for plan in (FULL, QUICK):
        for group in plan.groups:
            for one in group.measurements:
                assert "ours" in one.systems and {"plain", "longest"} & set(one.systems)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "TOWER", SMALL)


@pytest.mark.slow
def test_run_writes_every_part_and_fails_below_a_floor(tmp_path: Path, small: None) -> None:
    floors = tmp_path / "floors.json"
    name = f"{SMALL}, inference at batch 2, product titles: speed over 'plain, padded to 77'"
    floors.write_text(json.dumps({"cpu": {name: 1e9}}))
    options = run.Options(tmp_path / "out", threads=MACHINE.threads, floors=floors)
    with pytest.raises(BenchmarkError, match=rf"{name}: \d+\.\d\d is below its floor 1000000000\.00"):
        run.benchmark(options, Console(quiet=True), PLAN)
    written = {path.name for path in options.output.iterdir()}
    assert written == {"performance.md", "performance.json", "performance.png"}
    page = (options.output / "performance.md").read_text()
    for part in (
        f"## {SMALL}, inference at batch 2, product titles",
        f"## {SMALL}, inference at batch 2, 77 tokens",
        f"## {SMALL}, training at batch 2, product titles",
        "## What each step gains",
        "weights laid out once",
        "## Memory of a training step",
        "## Operators of many tasks",
        "### pairs in a batch",
        "### tokens of a text",
        "### tasks",
        "### classes",
        "## Input pipeline",
        "![Speed against",
        "Load before the run",
        "H100 SXM, 989.4 TFLOP/s",
    ):
        assert part in page, part
    numbers = json.loads((options.output / "performance.json").read_text())
    assert numbers["threads"] == MACHINE.threads and numbers["machine"]["packages"]["torch"]
    for table in numbers["tables"]:
        assert table["limit_gflops"] > 0
        for one in table["rows"]:
            assert one["milliseconds"]["p20"] <= one["milliseconds"]["median"] <= one["milliseconds"]["p80"]
            assert one["limit_share"] == pytest.approx(one["useful_gflops"] / table["limit_gflops"])
    for one in numbers["memory"]:
        assert one["step"] >= one["forward_backward"] >= 0.9 * one["gradients"] > 0
    assert (options.output / "performance.png").read_bytes().startswith(b"\x89PNG")


def test_only_chooses_tables_and_systems(tmp_path: Path, small: None) -> None:
    options = run.Options(tmp_path, only="batch 2, 77/our", threads=MACHINE.threads)
    report = run.benchmark(options, Console(quiet=True), PLAN)
    (table,) = report.tables
    assert table.texts == "77 tokens" and [one.system for one in table.rows] == ["ours", "plain"]
    assert not report.memory and not report.parts and not report.curves and report.pipeline is None
    with pytest.raises(InputError, match="--only nothing: no step has this in its name"):
        run.benchmark(run.Options(tmp_path, only="nothing"), Console(quiet=True), PLAN)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--dtype int8: unknown"):
        run.benchmark(run.Options(tmp_path, dtype="int8"), Console(quiet=True), PLAN)
    with pytest.raises(InputError, match="--record: where to"):
        run.benchmark(run.Options(tmp_path, record=True), Console(quiet=True), PLAN)
    with pytest.raises(InputError, match=r"missing\.json"):
        run.benchmark(run.Options(tmp_path, floors=tmp_path / "missing.json"), Console(quiet=True), PLAN)


def test_report_shows_what_was_not_measured(tmp_path: Path) -> None:
    report = made_up()
    report.memory = [Memory("a step", "ours", "cmaclip_fast", 2, None, None, None, 50)]
    report.tables[0].not_run = {"OpenVINO": "not run: openvino is missing"}
    report.tables[0].rows[0].prepared = {"compilation": 12.34}
    write_report(report, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "OpenVINO (not run: openvino is missing)" in page and "not measured" in page
    assert "compilation 12.3 s" in page and "Left out of this table" in page

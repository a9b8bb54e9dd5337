"""The kit for a GPU, without one: what is in it, its dry run on the CPU, and what becomes of the results."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import gpu_report
from benchmarks.gpu_kit import build, competitors, result, run, tools
from benchmarks.gpu_kit.competitors import Inputs, PaddedInputs, Shape
from benchmarks.gpu_kit.steps import operator_timing, operators, triton
from benchmarks.operators import padded
from cmaclip_fast.ops import preferences
from tests.gpu import conftest as gpu_tests

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "gpu-kit"
    build.build(folder, reuse_extension=True)
    return folder


def start(kit: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        ["bash", str(kit / "run.sh"), *map(str, arguments)],
        cwd=cwd,
        env=environment | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def dry(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("dry")
    return start(kit, "out", "--dry-run", cwd=folder), folder / "out"


@pytest.mark.slow
def test_what_is_in_the_kit(kit):
    record = json.loads((kit / "kit.json").read_text())
    assert record["extension"] == "of the installation that built the kit"
    size = sum(path.stat().st_size for path in kit.rglob("*") if path.is_file())
    assert size <= build.MOST_BYTES
    names = {path.name.partition("-")[0].lower() for path in kit.glob("wheels/*.whl")}
    assert names == {"cmaclip_fast", *(name.replace("-", "_").lower() for name in build.REQUIREMENTS)}
    for wanted in (
        "run.sh",
        "emulated.json",
        "tests/gpu/test_operators.py",
        "tests/ops/support.py",
        "tests/rule.py",
        "tests/conftest.py",
    ):
        assert (kit / wanted).is_file()
    for step in run.STEPS:
        assert (kit / (step.runs.replace(".", "/") + ".py")).is_file()
    own = zipfile.ZipFile(next(kit.glob("wheels/cmaclip_fast-*.whl"))).namelist()
    assert {"cmaclip_fast/kernels/packed_attention.py", "cmaclip_fast/ops/measured.json"} <= set(own)
    assert ("cmaclip_fast/_C.abi3.so" in own) == (ROOT / "cmaclip_fast" / "_C.abi3.so").exists()
    assert len(own) == len(set(own)) and not any(path.suffix == ".pyc" for path in kit.rglob("*"))


@pytest.mark.slow
def test_everything_is_imported_from_an_empty_folder(kit, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    code = "from benchmarks.gpu_kit import run\nprint(*run.fitting_wheels()[0])"
    listed = subprocess.run([sys.executable, "-c", code], cwd=kit, capture_output=True, text=True, check=True)
    subprocess.run([*pip, *listed.stdout.split()], check=True)
    modules = [
        "cmaclip_fast",
        "cmaclip_fast.kernels",
        "cmaclip_fast.ops",
        "cmaclip_fast.classifier.engine",
        "open_clip",
        "ftfy",
    ]
    modules += [
        "datasets",
        "pydantic",
        "annotated_types",
        "typing_inspection",
        "wcwidth",
        "dill",
        "threadpoolctl",
        "platformdirs",
    ]
    code = f"import importlib\nfor name in {modules}: print(importlib.import_module(name).__file__)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert all(Path(line).is_relative_to(site) for line in done.stdout.split()), done.stdout


@pytest.mark.slow
def test_dry_run_goes_through_every_step(dry):
    done, output = dry
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    paths = sorted(output.iterdir())
    assert [path.name for path in paths] == sorted(f"{step.name}.json" for step in run.STEPS) and len(paths) <= 8
    for path in paths:
        record = result.read(path)
        assert path.stat().st_size <= result.MOST_BYTES
        assert record["status"] == "passed" and record["dry_run"] and not record["failures"]
        assert record["text"] and record["step"] == path.stem and record["machine"]["python"]
    data = {path.stem: result.read(path)["data"] for path in paths}
    assert data["load"]["env"]["extension"]["missing"] is None and data["load"]["abi"]["built"]
    assert data["operators"]["counts"] and "passed" not in data["operators"]["counts"]
    assert {row["what"] for row in data["operator-timing"]["attention"]} == {"forward", "forward+backward"}
    assert data["model-timing"]["inference"] and data["model-timing"]["training"] and data["triton"]["chosen"]
    assert all(row["emulator"]["l1_sectors"] > 0 for row in data["counters"]["launches"] if row["kernel"] == "forward")


@pytest.mark.slow
@pytest.mark.tried("artefact", ends="one line, nothing written")
def test_a_dry_run_is_not_written_to_the_page(dry, tmp_path):
    page = tmp_path / "gpu.md"
    page.write_text("before")
    with pytest.raises(SystemExit, match="is of a dry run"):
        gpu_report.main(dry[1], page=page)
    assert page.read_text() == "before"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(kit, tmp_path):
    done = start(kit, "out", cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "not run: no GPU") and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_list_names_every_step_and_its_limit(kit, tmp_path):
    done = start(kit, "--list", cwd=tmp_path)
    assert done.returncode == 0
    for line, step in zip(done.stdout.splitlines(), run.STEPS, strict=True):
        assert line.split()[:2] == [step.name, str(step.seconds)]


def test_the_whole_takes_at_most_eight_minutes():
    assert sum(step.seconds for step in run.STEPS) + run.INSTALL_SECONDS <= run.TOTAL_SECONDS
    assert run.TOTAL_SECONDS + run.GRACE_SECONDS <= 480 and len(run.STEPS) <= 8


BAD_STEPS = {
    "raises": ("raise RuntimeError('no luck')", "failed", "no luck"),
    "hangs": (
        "result.keep(); import time, subprocess; subprocess.Popen(['sleep', '60']); time.sleep(60)",
        "timed out",
        "stopped",
    ),
    "crashes": ("import os; os.abort()", "failed", "exit status -6"),
    "fails": ("result.fail('wrong'); result.say('and goes on')", "failed", "wrong"),
    "leaves without a word": ("import os; os._exit(3)", "failed", "exit status 3"),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.tried("kill or signal", ends="reported, and the next step runs"))
        for name in BAD_STEPS
    ],
)
def test_a_bad_step_is_reported_and_passed_over(name, tmp_path, capfd):
    body, status, reason = BAD_STEPS[name]
    head = "from benchmarks.gpu_kit.result import main\ndef run(result, dry_run):\n    result.data['kept'] = 1\n    "
    (tmp_path / "bad_step.py").write_text(f"{head}{body}\nmain(run, 'bad')\n")
    (tmp_path / "good_step.py").write_text(f"{head}pass\nmain(run, 'good')\n")
    steps = [run.Step("bad", 4, "", "bad_step"), run.Step("good", 60, "", "good_step")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    begin = time.monotonic()
    assert not run.run_steps(steps, tmp_path, environment, True, until=begin + 100)
    bad, good = (result.read(tmp_path / f"{step}.json") for step in ("bad", "good"))
    assert bad["status"] == status and any(reason in failure for failure in bad["failures"])
    assert good["status"] == "passed" and time.monotonic() - begin < 40
    if name == "hangs":
        assert bad["data"] == {"kept": 1}
    assert f"bad: {status}" in capfd.readouterr().out


def test_what_a_step_leaves_of_its_time_goes_to_later_ones(tmp_path, capfd):
    (tmp_path / "quick_step.py").write_text(
        "from benchmarks.gpu_kit.result import main\nmain(lambda *_: None, 'quick')\n"
    )
    steps = [run.Step(name, 50, "", "quick_step") for name in ("one", "two", "three")]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    assert run.run_steps(steps, tmp_path, environment, True, until=time.monotonic() + 120)
    limits = [int(found) for found in re.findall(r"at most (\d+) s", capfd.readouterr().out)]
    assert limits[0] == 50 and 90 <= limits[1] <= 100 and 100 < limits[2] <= 120  # the whole has 120


def test_outcomes_are_counted_as_they_come(tmp_path, monkeypatch):
    path = tmp_path / "report.jsonl"
    monkeypatch.setenv("CMACLIP_TEST_REPORT", str(path))
    text = "def test():\n>   assert 1 == 2\nE   assert 1 == 2\n\ntest.py:1: AssertionError"
    place = ("test.py", 1, "test")
    reports = [
        pytest.TestReport("t.py::test_cuda_graph[pack-dtype0-triton]", place, {}, "passed", None, "setup"),
        pytest.TestReport("t.py::test_cuda_graph[pack-dtype0-triton]", place, {}, "passed", None, "call"),
        pytest.TestReport("t.py::test[cuda]", place, {}, "failed", text, "call"),
        pytest.TestReport("t.py::test", place, {}, "skipped", ("test.py", 1, "Skipped: one GPU"), "setup"),
    ]
    for one in reports:
        gpu_tests.pytest_runtest_logreport(one)
    gpu_tests.pytest_collectreport(pytest.CollectReport("bad.py", "failed", "E   ImportError: no", None))
    data = {"counts": {}, "failed": [], "by_backend": {}, "skipped": {}}
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # a line that is being written
    read = operators._collect(data, path, 0)
    assert data["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    path.write_bytes(whole)
    assert read + operators._collect(data, path, read) == len(whole)
    assert data["counts"] == {"passed": 1, "failed": 2, "skipped": 1} and data["skipped"] == {"one GPU": 1}
    assert data["by_backend"]["triton"] == {"passed": 1} and data["by_backend"]["cuda"] == {"failed": 1}
    assert [one["reason"] for one in data["failed"]] == ["assert 1 == 2", "ImportError: no"]


def test_steps_without_time_left_are_not_run(tmp_path):
    assert not run.run_steps(run.STEPS[:2], tmp_path, dict(os.environ), True, until=time.monotonic())
    assert {result.read(path)["status"] for path in tmp_path.iterdir()} == {"not run"}


@pytest.mark.tried("output folder", ends="one line, nothing removed")
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="holds no kit"):
        build.build(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def attention_row(competitor: str, what: str, us: float, batch: int = 32, **more) -> dict:
    row = {"competitor": competitor, "what": what, "us": us, "batch": batch, "dtype": "bfloat16", "note": ""}
    row |= {"mean": 70, "size": 64, "queries": None, "longest": 127, "shape": f"{batch} rows", "sets": 2}
    return row | {"bytes_share": 0.5, "operations_share": 0.1} | more


@pytest.fixture
def real(tmp_path) -> Path:
    """A folder of results as a run on a GPU writes them, of two steps."""
    machine = {"torch": "2.11.0", "python": "3.12.3", "gpu": "GPU Model 1", "architecture": "sm_90"}
    attention = [
        attention_row(name, what, us * (batch / 32) * (3 if what != "forward" else 1), batch)
        for name, us in (("torch", 20.0), ("cuda", 10.0), ("triton", 5.0), ("varlen_attn", 18.0))
        for what in ("forward", "forward+backward")
        for batch in (32, 256)
    ]
    attention.append({"shape": "32 rows", "competitor": "padded SDPA, cudnn", "error": "RuntimeError: no kernel"})
    other = {"operator": "modality_pool", "name": "256 rows", "dtype": "bfloat16", "theirs": "eager", "their_us": 90.0}
    others = [
        other | {"backend": backend, "what": what, "us": us, "graph_us": us / 2}
        for backend, us in (("cuda", 8.0), ("torch", 9.0))
        for what in ("forward", "forward+backward")
    ]
    by_backend = {name: {"passed": 5, "failed": int(name == "triton")} for name in ("torch", "cuda", "triton")}
    failed = [{"name": "test_results[triton]", "reason": "error 0.2,\nallowed 0.1"}]
    data = {
        "operators": {"by_backend": by_backend, "skipped": {"there is only one GPU": 9}, "failed": failed},
        "operator-timing": {
            "roofs": {"bytes": 3e12, "operations": 7e14},
            "attention": attention,
            "others": others,
        },
    }
    folder = tmp_path / "out"
    folder.mkdir()
    for step, found in data.items():
        kept = result.Result(folder / f"{step}.json", step)
        kept.record |= {"machine": machine, "data": found}
        kept.keep("running" if step == "operator-timing" else "failed")
    return folder


def test_results_become_the_page_its_picture_and_the_table(real, tmp_path, monkeypatch):
    page, table = tmp_path / "gpu.md", tmp_path / "measured.json"
    page.write_text((ROOT / "docs" / "gpu.md").read_text())
    table.write_text('{"sm_80": {"measured": "before", "rows": []}}')
    gpu_report.main(real, prefer=True, page=page, table=table)
    text = page.read_text()
    assert "No run has been made" not in text and "GPU Model 1 (sm_90), PyTorch 2.11.0" in text
    assert "| operator-timing |" in text and "| cut off |" in text and "| model |" in text and "| not run |" in text
    assert "| triton | 5.0 (50%, 10%) | 40.0 (50%, 10%) | 15.0 (50%, 10%) | 120.0 (50%, 10%) |" in text
    assert "padded SDPA, cudnn: RuntimeError: no kernel" in text and "error 0.2, allowed 0.1" in text
    assert page.with_suffix(".png").stat().st_size > 5000 and "](gpu.png)" in text
    written = json.loads(table.read_text())
    assert written["sm_80"] == {"measured": "before", "rows": []}
    assert written["sm_90"]["measured"].startswith("GPU Model 1, PyTorch 2.11.0, ")
    found = {
        (row["operator"], row["direction"], row["dtype"], tuple(row["shape"])): row["backends"]
        for row in written["sm_90"]["rows"]
    }
    # triton is faster, but a test of it failed
    kind = ("bfloat16", preferences.shape_class(64, 127, 127))
    for direction in ("forward", "backward"):
        assert found[("packed_attention", direction, *kind)] == ["cuda", "torch"]
    assert found["modality_pool", "forward", "bfloat16", ()] == ["cuda", "torch"]


def test_every_section_of_the_page_takes_what_its_step_writes(dry, tmp_path):
    """The dry run's numbers in the page's tables, on a page that is thrown away."""
    page, folder = tmp_path / "gpu.md", tmp_path / "out"
    page.write_text((ROOT / "docs" / "gpu.md").read_text())
    folder.mkdir()
    for path in dry[1].iterdir():
        result.write(folder / path.name, result.read(path) | {"dry_run": False})
    gpu_report.main(folder, page=page)
    text = page.read_text()
    for title in ("Operators against float64", "The whole model", "packed_attention", "The other operators"):
        assert f"### {title}" in text
    for title in (
        "Speed of the whole model",
        "compute-sanitizer",
        "Hardware counters",
        "What Triton's autotuner chose",
    ):
        assert f"### {title}" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{}", "not a result file"), ("[", "Expecting value"), (None, "holds no result files")],
)
@pytest.mark.tried("artefact", ends="one line, nothing written")
def test_results_that_cannot_be_read(content, reason, tmp_path):
    if content is not None:
        (tmp_path / "load.json").write_text(content)
    with pytest.raises(SystemExit, match=reason):
        gpu_report.main(tmp_path, page=tmp_path / "gpu.md")


def test_prefer_needs_the_tests_results(real):
    (real / "operators.json").unlink()
    with pytest.raises(SystemExit, match="--prefer needs the results of operators"):
        gpu_report.preferred(gpu_report.read(real))


def test_backends_that_lack_a_case_are_not_ranked():
    assert gpu_report.fastest_first({"a": {"x": 2.0, "y": 2.0}, "b": {"x": 1.0}, "c": {"x": 9.0, "y": 0.1}}) == [
        "c",
        "a",
    ]


def test_what_the_tools_say():
    assert tools.sanitizer_errors("========= ERROR SUMMARY: 3 errors\n") == 3
    assert tools.sanitizer_errors("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n") == 0
    assert tools.sanitizer_errors("========= Error: no device\n") is None
    heading = '==PROF== Connected\n"ID","Kernel Name",'
    wide = heading + '"a.sum","b.sum"\n"","","byte",""\n"0","plan","1,024","n/a"\n"1","forward","7","2"\n3 calls ran\n'
    assert tools.ncu_launches(wide) == [
        {"kernel": "plan", "ID": "0", "Kernel Name": "plan", "a.sum": "1,024", "b.sum": "n/a"},
        {"kernel": "forward", "ID": "1", "Kernel Name": "forward", "a.sum": "7", "b.sum": "2"},
    ]
    long = (
        heading
        + '"Metric Name","Metric Unit","Metric Value"\n"0","plan","a.sum","byte","5"\n"0","plan","b.sum","","6"\n'
    )
    assert tools.ncu_launches(long) == [{"kernel": "plan", "a.sum": "5", "b.sum": "6"}]
    assert tools.ncu_launches("==ERROR== no") == []
    assert (tools.number("1,024"), tools.number("n/a"), tools.number(None)) == (1024.0, None, None)


def test_what_the_autotuner_chose_is_read_from_its_cache_and_forgotten(tmp_path):
    options = {"num_ctas": 1, "num_stages": 2, "maxnreg": None, "pre_hook": None, "ir_override": None}
    timings = [
        [{"kwargs": {"BLOCK_Q": block, "BLOCK_K": 64}, "num_warps": 4} | options, [time, time, time]]
        for block, time in ((16, 0.3), (64, 0.1), (128, math.inf))
    ]
    tuned = {"key": [64, False, 256, 256, "torch.bfloat16", "torch.bfloat16"], "configs_timings": timings}
    for name in ("grad_q_kernel", "forward_kernel", "another_kernel"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.autotune.json").write_text(json.dumps(tuned))
    (tmp_path / "forward_kernel" / "forward_kernel.cubin").touch()
    rows = triton.on_disk(tmp_path)
    assert [row["kernel"] for row in rows] == ["forward_kernel", "grad_q_kernel"]
    assert rows[0]["key"] == "64, False, 256, 256, torch.bfloat16"
    assert rows[0]["configuration"] == "BLOCK_Q 64, BLOCK_K 64, num_warps 4, num_stages 2"
    operator_timing.forget_tuning(tmp_path)
    assert triton.on_disk(tmp_path) == [] and (tmp_path / "forward_kernel" / "forward_kernel.cubin").exists()


@pytest.mark.parametrize("mean", [20, 70])
@pytest.mark.parametrize("batch", [32, 1024])
def test_shapes_have_the_lengths_that_they_say(mean, batch):
    shape = Shape(batch, mean, 64)
    lengths = shape.key_lengths
    assert min(lengths) >= 5 and max(lengths) <= 127 and abs(sum(lengths) / batch - mean) < 0.7
    assert math.isclose(shape.operations(True), 3.5 * shape.operations(False))
    two = Shape(batch, mean, 64, queries=2)
    assert two.operations(False) == 4 * 2 * sum(lengths) * 8 * 64
    assert two.bytes(2, False) == (4 * batch + 2 * sum(lengths)) * 8 * 64 * 2


@pytest.mark.parametrize("queries", [None, 2])
def test_competitors_compute_the_same(queries, monkeypatch):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    shape = Shape(5, 20, 16, queries, heads=2)
    torch.manual_seed(0)
    inputs = Inputs(shape, torch.float32, "cpu")
    torch.manual_seed(0)
    wide = PaddedInputs(shape, torch.float32, "cpu")
    inputs.leaves = [leaf.detach() for leaf in inputs.leaves]  # FlexAttention has no backward on a CPU
    expected = competitors.ours("reference").make(inputs)
    found = competitors.sdpa(SDPBackend.MATH, masked=True).make(wide)
    for row, length in enumerate(shape.query_lengths):
        torch.testing.assert_close(found[row, :, :length], padded(expected, shape.query_lengths)[row, :, :length])
    monkeypatch.setattr(competitors, "_flex", lambda: (create_block_mask, flex_attention))
    torch.testing.assert_close(competitors.flex(inputs), expected)

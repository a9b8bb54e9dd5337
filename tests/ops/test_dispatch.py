"""Choosing a backend: per call, in a block, by the environment, and what is said of one that cannot run."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from support import modality_pool_case

from cmaclip_fast.ops import available_backends, dispatch, modality_pool, use_backend


@pytest.fixture
def ran(monkeypatch):
    """The names of the backends that ran."""
    names = []
    choose = dispatch._implementation

    def record(operator, direction, backend, *rest):
        names.append(f"{direction} {backend}")
        return choose(operator, direction, backend, *rest)

    monkeypatch.setattr(dispatch, "_implementation", record)
    return names


def call(**options):
    case = modality_pool_case(2, 2, 4, 3).tensors(torch.float32)
    case["weight"].requires_grad_()
    return modality_pool(**case, **options)[0].sum()


def test_argument_before_block_before_environment(ran, monkeypatch):
    monkeypatch.delenv("CMACLIP_BACKEND", raising=False)
    call()
    monkeypatch.setenv("CMACLIP_BACKEND", "cpp")
    call()
    with use_backend("reference"):
        call()
        with use_backend("auto"):
            call()
        call(backend="cpp")
    call()
    assert ran == [f"forward {name}" for name in ("auto", "cpp", "reference", "auto", "cpp", "cpp")]


def test_backward_uses_the_backend_of_its_forward(ran):
    with use_backend("reference"):
        loss = call()
    loss.backward()
    assert ran == ["forward reference", "backward reference"]


def test_the_block_ends_after_an_error():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert dispatch.requested(None) == ""


threads = pytest.mark.tried("threads", ends="each thread or task has its own backend")


@threads
def test_a_block_holds_for_its_thread():
    """Four threads, each in blocks of its own at the same time, and one that is in none."""
    inside = threading.Barrier(5)

    def run(name: str) -> list[str]:
        found = [dispatch.requested(None)]
        with use_backend(name) if name else nullcontext():
            inside.wait(10)
            found.append(dispatch.requested(None))
            with use_backend("auto"):
                inside.wait(10)
                found.append(dispatch.requested(None))
            inside.wait(10)
            found.append(dispatch.requested(None))
        inside.wait(10)
        return [*found, dispatch.requested(None)]

    names = ["reference", "cpp", "triton", "cuda", ""]
    with use_backend("reference"), ThreadPoolExecutor(5) as pool:
        results = list(pool.map(run, names))
        assert dispatch.requested(None) == "reference"
    assert results == [["", name, "auto", name, ""] for name in names]


@threads
def test_operators_in_threads_run_on_their_own_backends(ran):
    def run(name: str) -> None:
        with use_backend(name):
            for _ in range(20):
                call().backward()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ["reference", "auto"]))
    assert sorted(ran) == sorted(
        20 * [f"{way} {name}" for way in ("forward", "backward") for name in ("reference", "auto")]
    )


@threads
def test_a_thread_may_be_given_the_blocks_around_it():
    with use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(contextvars.copy_context().run, dispatch.requested, None).result() == "reference"


@threads
def test_a_backward_on_another_thread_uses_the_backend_of_its_forward(ran):
    with use_backend("reference"):
        loss = call()
    with use_backend("auto"), ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert ran == ["forward reference", "backward reference"]


@threads
def test_a_block_holds_for_its_task():
    async def run(name: str) -> list[str]:
        found = []
        with use_backend(name):
            for _ in range(3):
                await asyncio.sleep(0)
                found.append(dispatch.requested(None))
        return [*found, dispatch.requested(None)]

    async def main() -> list[list[str]]:
        with use_backend("auto"):
            return await asyncio.gather(run("reference"), run("cpp"))

    assert asyncio.run(main()) == [["reference"] * 3 + ["auto"], ["cpp"] * 3 + ["auto"]]
    assert dispatch.requested(None) == ""


@threads
def test_generators_leave_their_own_blocks():
    """A generator's block lasts as long as it does, in whatever order and on whatever thread it is left."""

    def produce(name: str) -> Iterator[str]:
        with use_backend(name):
            yield dispatch.requested(None)

    first, second = produce("reference"), produce("cpp")
    assert (next(first), next(second)) == ("reference", "cpp")
    first.close()
    assert dispatch.requested(None) == "cpp"
    with use_backend("triton"):
        second.close()
        assert dispatch.requested(None) == "triton"
    assert dispatch.requested(None) == ""
    other = produce("reference")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(next, other).result() == "reference"
    other.close()
    assert dispatch.requested(None) == ""


def test_a_block_as_decorator(ran):
    @use_backend("reference")
    def run():
        call()
        return dispatch.requested(None)

    assert (run(), run(), dispatch.requested(None)) == ("reference", "reference", "")
    assert ran == ["forward reference"] * 2


def test_compiled_code_follows_the_block(ran):
    case = modality_pool_case(2, 2, 4, 3).tensors(torch.float32)
    compiled = torch.compile(lambda: modality_pool(**case)[0], backend="eager", fullgraph=True)
    torch.compiler.reset()
    compiled()
    with use_backend("reference"):
        compiled()
    compiled()
    assert ran == [f"forward {name}" for name in ("auto", "reference", "auto")]


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match=r"use_backend must be one of auto, .* not 'c'"), use_backend("c"):
        pass
    monkeypatch.setenv("CMACLIP_BACKEND", "gpu")
    with pytest.raises(ValueError, match="the environment variable CMACLIP_BACKEND must be one of"):
        call()


def test_every_backend_gives_a_reason_or_runs():
    for name, reason in available_backends().items():
        if reason is None:
            call(backend=name)
        else:
            with pytest.raises(RuntimeError, match=f"modality_pool cannot run on the backend '{name}': "):
                call(backend=name)


def test_a_dtype_that_a_backend_lacks():
    case = modality_pool_case(2, 2, 4, 3)
    with pytest.raises(RuntimeError, match="'cpp': it takes float32, bfloat16, not float64"):
        modality_pool(**case.tensors(torch.float64), backend="cpp")
    assert modality_pool(**case.tensors(torch.float64))[0].dtype == torch.float64
    assert modality_pool(**case.tensors(torch.float16))[0].dtype == torch.float16


def test_a_shape_that_a_backend_lacks():
    q = torch.zeros(1)
    cannot = (("cpp", "it takes small shapes"),)
    assert dispatch.implementation("modality_pool", "forward", "auto", q, cannot).__name__ == "run_plainly"
    with pytest.raises(RuntimeError, match="modality_pool cannot run on the backend 'cpp': it takes small shapes"):
        dispatch.implementation("modality_pool", "forward", "cpp", q, cannot)


def test_reasons_without_extension(tmp_path):
    """In a process where the extension is hidden, `auto` still works and `cpp` says what is missing."""
    (tmp_path / "hide.py").write_text(
        "import sys\n"
        "sys.modules['cmaclip_fast._build'] = None\n"
        "import torch\n"
        "from cmaclip_fast.ops import modality_pool, available_backends\n"
        "modality_pool(torch.ones(1, 2, 4), torch.ones(1, 1, 4), torch.ones(1, 2).bool())\n"
        "print(available_backends()['cpp'])\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "hide.py"], capture_output=True, text=True, check=True)
    assert "the extension was not built; install with" in done.stdout


@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "amx"])
def test_every_instruction_set_computes_the_same(name):
    """The C++ kernels in each instruction set that the processor has, in a process of its own."""
    tests = os.path.dirname(__file__)
    files = [
        os.path.join(tests, f"test_{operator}.py") for operator in (*dispatch.OPERATORS, "epilogue", "panel_linear")
    ]
    kinds = "results_and_gradients or head_sizes or query_and_key_lengths or few_queries or product or residual_sum"
    chosen = f"cpp and not slow and ({kinds})"
    command = [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CMACLIP_ISA": name})
    assert done.returncode == 0, done.stdout[-3000:]

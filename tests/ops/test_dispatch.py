"""Choosing a backend: per call, in a block, by the environment, and what is said of one that cannot run."""

from __future__ import annotations

import os
import subprocess
import sys

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

"""Which implementation of an operator runs: found on first use, on real tensors, with a reason for each that cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cmaclip_fast.ops import preferences, reference, varlen
from cmaclip_fast.ops.checks import debug

BACKENDS = ("reference", "cpp", "triton", "cuda", "torch")
OPERATORS = (
    "pack_tokens",
    "packed_attention",
    "modality_pool",
    "multitask_cross_entropy",
    "multitask_binary_cross_entropy",
)

_ON_CPU = ("cpp", "reference")
_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "torch": (torch.float16, torch.bfloat16),
}

# One entry for each `use_backend` block that this thread or task is inside of, the innermost last.
_in_use: ContextVar[tuple[list[str], ...]] = ContextVar("cmaclip_backend", default=())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the `with` block on one backend: `auto` or one of `BACKENDS`.

    Holds for the thread, or the asyncio task, that entered the block; a thread that is started inside it begins without
    (`contextvars.copy_context().run` takes it along). A `backend=` argument goes before it, the environment variable
    `CMACLIP_BACKEND` after it.
    """
    _check_name(name, "use_backend")
    block = [name]
    _in_use.set((*_in_use.get(), block))
    try:
        yield
    finally:
        # not reset by a token: a generator may leave its block after its caller entered another, or in another thread
        _in_use.set(tuple(other for other in _in_use.get() if other is not block))


def available_backends(device: torch.device | str = "cpu", operator: str = "modality_pool") -> dict[str, str | None]:
    """For each backend None if `operator` can run on it with tensors of `device`, else the reason why it cannot."""
    device_type = torch.device(device).type
    return {name: why_not(operator, name, device_type, usual_dtype(name)) for name in BACKENDS}


def usual_dtype(backend: str) -> torch.dtype:
    """float32, or where the backend does not take it the first dtype that it does."""
    return _DTYPES.get(backend, (torch.float32,))[0]


def requested(backend: str | None) -> str:
    """The backend that a call asks for: its argument, else the `use_backend` around it, else "" (decided later)."""
    if backend is not None:
        _check_name(backend, "backend")
        return backend
    blocks = _in_use.get()
    return blocks[-1][0] if blocks else ""


def implementation(
    operator: str,
    direction: str,
    backend: str,
    tensor: Tensor,
    cannot: tuple[tuple[str, str], ...] = (),
    shape: preferences.Shape = (),
) -> Callable[..., Any]:
    """The function that computes `direction` ("forward", "backward") of `operator` on `tensor`'s device and dtype.

    `cannot` names backends that this call's shapes rule out, each with the reason; `shape` is the class of shapes by
    which `auto` looks up its measurements.
    """
    device = tensor.device
    machine = device.type, preferences.architecture(device)
    return _implementation(operator, direction, decided(backend), *machine, tensor.dtype, cannot, shape)


def uses_cpp() -> bool:
    """Whether the CPU's compiled code is to run, by `use_backend` and `CMACLIP_BACKEND`, and the extension loads."""
    return decided(requested(None)) in ("auto", "cpp") and extension_missing() is None


def straight_to_cpp(backend: str | None, *tensors: Tensor) -> bool:
    """Whether nothing stands between a call and the CPU's compiled code, so that the dispatcher may be left out.

    Python's part of an operator takes longer than the compiled code of a small one. The dispatcher stays in for
    gradients, autocast, tracing, subclasses of tensors, dispatch modes, `torch.func`, and the checks that
    `CMACLIP_DEBUG` asks for.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return False
    if torch.is_autocast_enabled("cpu") or is_in_torch_dispatch_mode() or get_interpreter_stack() or debug():
        return False
    if decided(requested(backend)) not in ("auto", "cpp") or extension_missing() is not None:
        return False
    return tensors[0].dtype in _DTYPES["cpp"] and all(type(tensor) is Tensor and tensor.is_cpu for tensor in tensors)


def decided(backend: str) -> str:
    """The backend that was asked for, where "" leaves it to the environment variable `CMACLIP_BACKEND`."""
    if not backend:
        backend = os.environ.get("CMACLIP_BACKEND", "auto")
        _check_name(backend, "the environment variable CMACLIP_BACKEND")
    return backend


@functools.cache
def _implementation(
    operator: str,
    direction: str,
    backend: str,
    device_type: str,
    architecture: str,
    dtype: torch.dtype,
    cannot: tuple[tuple[str, str], ...],
    shape: preferences.Shape,
) -> Callable[..., Any]:
    def reason_against(name: str) -> str | None:
        return dict(cannot).get(name) or why_not(operator, name, device_type, dtype)

    if backend == "auto":
        candidates: tuple[str, ...] = _ON_CPU
        if device_type != "cpu":
            candidates = preferences.order(operator, direction, dtype, architecture, shape)
        backend = next(name for name in candidates if reason_against(name) is None)
    reason = reason_against(backend)
    if reason is not None:
        raise RuntimeError(f"{operator} cannot run on the backend '{backend}': {reason}")
    if backend == "reference":
        return _without_autocast(getattr(reference, f"{operator}_{direction}"), device_type)
    if backend == "torch":
        return getattr(varlen, direction)
    if backend == "triton":
        return getattr(importlib.import_module(f"cmaclip_fast.kernels.{operator}"), direction)
    return getattr(torch.ops.cmaclip, f"_{operator}_{direction}_{backend}").default


def _without_autocast(run: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    # The public functions have cast what autocast asks for; inside, sums stay wide.
    def run_plainly(*arguments: Any) -> Any:
        with torch.autocast(device_type, enabled=False):
            return run(*arguments)

    return run_plainly


def why_not(operator: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """None if `backend` can run `operator` on tensors of that device and dtype, else the reason why it cannot."""
    if backend == "reference":
        return None
    check = {"cpp": _why_not_cpp, "triton": _why_not_triton, "cuda": _why_not_cuda, "torch": _why_not_torch}[backend]
    reason = check(operator, device_type)
    if reason is None and dtype not in _DTYPES[backend]:
        names = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES[backend])
        reason = f"it takes {names}, not {str(dtype).removeprefix('torch.')}"
    return reason


def _why_not_cpp(operator: str, device_type: str) -> str | None:
    reason = extension_missing()
    if reason is not None:
        return reason
    if device_type != "cpu":
        return f"it takes tensors on the CPU, not on {device_type}"
    return _why_not_registered(operator, "cpp")


def _why_not_cuda(operator: str, device_type: str) -> str | None:
    reason = extension_missing()
    if reason is not None:
        return reason
    from cmaclip_fast import _build

    if not _build.CUDA:
        return f"the extension was built without CUDA: {_build.CUDA_REASON}"
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    if device_type != "cuda":
        return f"it takes tensors on a GPU, not on {device_type}"
    return _why_not_registered(operator, "cuda")


def _why_not_triton(operator: str, device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton

    if device_type == "cpu" and not triton.knobs.runtime.interpret:
        return "it takes tensors on a GPU; for its slow interpreter on the CPU set TRITON_INTERPRET=1"
    if device_type not in ("cpu", "cuda"):
        return f"it takes tensors on a GPU, not on {device_type}"
    if importlib.util.find_spec(f"cmaclip_fast.kernels.{operator}") is None:
        return f"it has no {operator}"
    return None


def _why_not_torch(operator: str, device_type: str) -> str | None:
    if operator != "packed_attention":
        return f"it has no {operator}"
    reason = varlen.why_not()
    if reason is None and device_type != "cuda":
        return f"it takes tensors on a GPU, not on {device_type}"
    return reason


def _why_not_registered(operator: str, backend: str) -> str | None:
    return None if hasattr(torch.ops.cmaclip, f"_{operator}_forward_{backend}") else f"it has no {operator}"


@functools.cache
def extension_missing() -> str | None:
    """None once the compiled extension is loaded, else the reason why it cannot be."""
    try:
        from cmaclip_fast import _build
    except ImportError:
        return "the extension was not built; install with `pip install -e . --no-build-isolation`"
    if not _build.EXTENSION:
        return f"the extension was not built: {_build.EXTENSION_REASON}"
    try:
        importlib.import_module("cmaclip_fast._C")
    except (ImportError, OSError) as error:
        return f"the extension does not load: {error}"
    return None


def _check_name(name: str, where: str) -> None:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{where} must be one of auto, {', '.join(BACKENDS)}, not {name!r}")

"""Builds the emulator and libraries of kernels, runs kernels, and reports what they did wrong and what they cost.

`docs/emulator.md` explains how to write device code for it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "csrc" / "emulator"
INCLUDE = ROOT / "csrc" / "include"
RUNTIME_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden")
# The sanitizers' hooks stand before every access to memory and every basic block, and call the emulator instead of
# their own runtime. The other flags keep an access one access, and a variable that other threads write a variable.
KERNEL_FLAGS = (
    "-std=c++20",
    "-O1",
    # addr2line of binutils 2.40 names wrong files from version 5.
    "-gdwarf-4",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-fsanitize=thread",
    "-fsanitize-coverage=trace-pc",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-sra",
    "-fno-ipa-reference",
    "-fno-optimize-sibling-calls",
    "-fno-tree-vectorize",
    "-fno-exceptions",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-DCMACLIP_EMULATOR",
    "-Wno-unknown-pragmas",
)
ORDERS = (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2))


def compiler() -> str:
    """The host compiler: the environment's CXX, or g++. Raises RuntimeError where there is none."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"the emulator needs the C++ compiler '{name}': install g++ 12 or later, or set CXX")
    return path


def cache_folder() -> Path:
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _digest(files: Iterable[Path], words: Iterable[str]) -> str:
    digest = hashlib.sha256(_compiler_version().encode())
    for word in words:
        digest.update(word.encode() + b"\0")
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


def _compile(target: Path, arguments: Sequence[str]) -> Path:
    """Runs the compiler unless `target`, whose name holds the hash of its inputs, is there already."""
    if target.exists():
        return target
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=target.suffix)
    os.close(handle)
    try:
        done = subprocess.run([compiler(), *arguments, "-o", temporary], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"compiling {target.name} failed:\n{done.stderr[:8000]}")
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


@functools.cache
def _module_path() -> Path:
    import pybind11

    interface = [EMULATOR / "device" / name for name in ("emulator.h", "kernel.h", "rounding.h")]
    headers = [*sorted(EMULATOR.glob("runtime/*.h")), *interface]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    objects = []
    for source in sorted([*EMULATOR.glob("runtime/*.cpp"), EMULATOR / "module.cpp"]):
        binding = source.name == "module.cpp"
        # The binding is slow to compile and quick enough without optimisation.
        flags = [*RUNTIME_FLAGS, *(["-O0", *includes] if binding else [])]
        key = _digest([source, *headers], [*flags, sys.version if binding else ""])
        objects.append(str(_compile(cache_folder() / f"{source.stem}-{key}.o", [*flags, "-c", str(source)])))
    name = "cmaclip_emulator" + sysconfig.get_config_var("EXT_SUFFIX")
    folder = cache_folder() / ("module-" + _digest([], objects))
    folder.mkdir(exist_ok=True)
    return _compile(folder / name, ["-shared", f"-Wl,-soname,{name}", *objects, "-ldl"])


@functools.cache
def module() -> ModuleType:
    """The extension module `cmaclip_emulator`, built on first use and kept by the hash of its sources."""
    path = _module_path()
    spec = importlib.util.spec_from_file_location("cmaclip_emulator", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@dataclass(frozen=True)
class Finding:
    """One fault: its kind, what happened, where, and the other place that took part, both as `file:line`."""

    kind: str
    message: str
    where: str
    other: str = ""
    block: tuple[int, int, int] = (0, 0, 0)
    thread: int = -1

    def __str__(self) -> str:
        also = f" (other: {self.other})" if self.other else ""
        return f"{self.where}: {self.kind}: {self.message}{also} [block {self.block}, thread {self.thread}]"


@dataclass
class MemoryCounts:
    """Accesses of whole warps, the 32-byte sectors and the shared memory wavefronts they take, and the fewest possible.

    The fewest sectors hold the same bytes packed; the fewest wavefronts are those of an access without bank conflict.
    """

    global_accesses: int = 0
    sectors: int = 0
    fewest_sectors: int = 0
    shared_accesses: int = 0
    wavefronts: int = 0
    fewest_wavefronts: int = 0

    @property
    def bank_conflicts(self) -> int:
        return self.wavefronts - self.fewest_wavefronts

    def add(self, values: Sequence[int]) -> None:
        self.global_accesses += values[0]
        self.sectors += values[1]
        self.fewest_sectors += values[2]
        self.shared_accesses += values[3]
        self.wavefronts += values[4]
        self.fewest_wavefronts += values[5]


@dataclass
class Report:
    """What one launch did: its faults, its counts in all and per source line, and the instructions of its warps.

    `instructions` holds blocks, block_barriers, warp_barriers, shuffles, votes, atomics (per thread), mma_f16,
    mma_bf16, mma_tf32, ldmatrix, cp_async (per thread), and distinct_sectors_read and distinct_sectors_written: the
    sectors that the launch must move at least once.
    """

    findings: list[Finding] = field(default_factory=list)
    counts: MemoryCounts = field(default_factory=MemoryCounts)
    lines: dict[str, MemoryCounts] = field(default_factory=dict)
    instructions: Mapping[str, int] = field(default_factory=dict)

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.findings}

    def check(self) -> Report:
        """Raises AssertionError with all findings where there are any."""
        if self.findings:
            raise AssertionError("\n".join(str(finding) for finding in self.findings))
        return self


class Kernels:
    """A library of kernels, compiled from one C++ file that names them with CMACLIP_EMULATE.

    `include` holds the folder `cmaclip` of the device headers: another one tests a changed copy of them.
    """

    def __init__(self, source: Path | str, include: Path = INCLUDE, flags: Sequence[str] = ()) -> None:
        source = Path(source)
        self.include = include
        self._shown: dict[int, str] = {}
        runtime = _module_path()
        # What is compiled from a changed copy goes away with it.
        cache = cache_folder() if include == INCLUDE else include
        device = sorted((EMULATOR / "device").glob("*.h"))
        headers = sorted([*include.rglob("*.cuh"), *source.parent.glob("*.cuh")])
        arguments = [*KERNEL_FLAGS, *flags, f"-I{EMULATOR / 'device'}", f"-I{include}"]
        # Paths count: reports name the files that were compiled.
        key = _digest([source, *headers, *device], [*arguments, str(source)])
        compiled = _compile(cache / f"{source.stem}-{key}.o", [*arguments, "-c", "-x", "c++", str(source)])
        # Linked without the sanitizers, whose runtime the emulator replaces.
        link = ["-shared", "-nostartfiles", "-Wl,-Bsymbolic", f"-Wl,-rpath,{runtime.parent}"]
        link += [str(compiled), str(runtime)]
        self.path = _compile(cache / f"{source.stem}-{_digest([], link)}.so", link)
        self.loaded = module().Library(str(self.path))

    @property
    def names(self) -> list[str]:
        return list(self.loaded.names)

    def call(self, name: str, *arguments: int | float) -> int | float:
        """Calls a host function of numbers."""
        return self.loaded.call(name, arguments)

    def launch(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any],
        *,
        dynamic_shared: int = 0,
        order: str = "forward",
        seed: int = 0,
        step_limit: int = 1 << 30,
    ) -> Report:
        """Runs one kernel once.

        Pointers are NumPy arrays (C-contiguous, changed in place), Buffers, Buffer.at(n) or None; the element's size
        must be the parameter's, so bfloat16 travels as uint16. Structures are bytes. `dynamic_shared` is in bytes,
        `order` is forward, reverse or random (drawn with `seed`).
        """
        buffers: dict[int, tuple[np.ndarray, Any]] = {}
        given = []
        for position, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                if id(argument) not in buffers:
                    buffers[id(argument)] = (argument, module().Buffer(argument, f"argument {position}"))
                argument = buffers[id(argument)][1]
            given.append(argument)
        raw = self.loaded.launch(
            name, _three(grid), _three(block), given, dynamic_shared, order, seed, step_limit=step_limit
        )
        for array, buffer in buffers.values():
            if array.flags.writeable:
                array[...] = buffer.numpy()
        return self._report(raw)

    def launch_in_orders(
        self,
        name: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any],
        *,
        dynamic_shared: int = 0,
        orders: Sequence[tuple[str, int]] = ORDERS,
    ) -> Report:
        """Runs one kernel from the same memory in several orders; results that differ in any bit are a finding.

        `arguments` are arrays and numbers. Memory keeps the first order's results; the counts are the first order's.
        """
        arrays = {id(argument): argument for argument in arguments if isinstance(argument, np.ndarray)}
        before = {key: array.copy() for key, array in arrays.items()}
        first: Report | None = None
        results: dict[int, np.ndarray] = {}
        for order, seed in orders:
            for key, array in arrays.items():
                if array.flags.writeable:
                    array[...] = before[key]
            report = self.launch(name, grid, block, arguments, dynamic_shared=dynamic_shared, order=order, seed=seed)
            if first is None:
                first = report
                results = {key: array.copy() for key, array in arrays.items()}
                continue
            seen = {(finding.kind, finding.where, finding.other) for finding in first.findings}
            first.findings += [f for f in report.findings if (f.kind, f.where, f.other) not in seen]
            for position, argument in enumerate(arguments):
                if isinstance(argument, np.ndarray) and argument.tobytes() != results[id(argument)].tobytes():
                    message = f"argument {position} differs between order {orders[0]} and order {(order, seed)}"
                    first.findings.append(Finding("order", message, name))
        assert first is not None
        for key, array in arrays.items():
            if array.flags.writeable:
                array[...] = results[key]
        return first

    def _report(self, raw: Mapping[str, Any]) -> Report:
        findings = [*raw["findings"], *raw["doubtful"]]
        sites = {site for finding in findings for site in finding[2:4]} | {entry[0] for entry in raw["sites"]}
        self._resolve(sites)
        report = Report(instructions=raw["totals"])
        for kind, message, site, other, block, thread in findings:
            where, elsewhere = self._shown.get(site, ""), self._shown.get(other, "")
            report.findings.append(Finding(kind, message, where, elsewhere, tuple(block), thread))
        # A line that the compiler has doubled is still one place.
        doubtful = report.findings[len(raw["findings"]) :]
        report.findings = report.findings[: len(raw["findings"])] + [f for f in doubtful if f.where != f.other]
        for site, *values in raw["sites"]:
            report.counts.add(values)
            report.lines.setdefault(self._shown[site], MemoryCounts()).add(values)
        return report

    def _resolve(self, sites: Iterable[int]) -> None:
        """Finds the source lines of instructions: the innermost that is not the emulator's or isa.cuh's."""
        unknown = sorted(site for site in sites if site and site not in self._shown)
        if not unknown:
            return
        command = ["addr2line", "-a", "-i", "-e", str(self.path)]
        text = "\n".join(hex(site) for site in unknown)
        output = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
        frames: dict[int, list[str]] = {}
        current = 0
        for line in output.splitlines():
            if line.startswith("0x"):
                current = int(line, 16)
                frames[current] = []
            else:
                frames[current].append(line.split(" (discriminator")[0])
        for site, found in frames.items():
            outside = [frame for frame in found if not self._is_plumbing(frame)]
            self._shown[site] = self._short((outside or found)[0])

    def _is_plumbing(self, frame: str) -> bool:
        path = Path(frame.rpartition(":")[0])
        return path.name == "isa.cuh" or (EMULATOR / "device") in path.parents or str(path).startswith("/usr/")

    def _short(self, frame: str) -> str:
        path, _, line = frame.rpartition(":")
        for base in (self.include, ROOT):
            if path.startswith(str(base) + os.sep):
                return f"{os.path.relpath(path, base)}:{line}"
        return f"{Path(path).name}:{line}"


def _three(size: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    padded = (*sizes, 1, 1)[:3]
    return int(padded[0]), int(padded[1]), int(padded[2])

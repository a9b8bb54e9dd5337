"""Builds the compiled extension `cmaclip_fast._C`: C++ always, CUDA where PyTorch has CUDA and a toolkit is found.

Without PyTorch or a C++ compiler in the build environment the package is built in pure Python, with one warning.
`CMACLIP_NO_EXTENSION=1` and `CMACLIP_NO_CUDA=1` leave the extension or its CUDA sources out. `CMACLIP_SLIM=1` leaves
out line numbers of CUDA code and symbols, which debuggers and profilers read; `TORCH_CUDA_ARCH_LIST` chooses GPUs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET_VERSION = "0x020a000000000000"
ARCHITECTURES = "8.0;9.0;10.0+PTX"


def switched_on(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def why_no_extension() -> str:
    """Why the extension cannot be built here, or "" if it can."""
    if switched_on("CMACLIP_NO_EXTENSION"):
        return "CMACLIP_NO_EXTENSION is set"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not in the build environment; install it first, then use `pip install --no-build-isolation`"
    compiler = cxx_compiler()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n")
        command = [*compiler, "-std=c++17", "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        try:
            works = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            works = False
    return "" if works else f"the C++ compiler '{shlex.join(compiler)}' is missing or does not work"


def cxx_compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


def cuda_toolkit() -> tuple[str, str]:
    """The folder of a CUDA toolkit that fits PyTorch, and why there is none (one of the two is "")."""
    if switched_on("CMACLIP_NO_CUDA"):
        return "", "CMACLIP_NO_CUDA is set"
    import torch

    if torch.version.cuda is None:
        return "", "this PyTorch has no CUDA"
    stated = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(stated, "bin", "nvcc")) if stated else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        # nvcc may be a wrapper script or a link; only nvcc itself knows the toolkit's folder.
        plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    except OSError:
        return "", f"there is no CUDA toolkit ('{nvcc}' does not run)"
    release, top = re.search(r"release (\d+)\.(\d+)", version), re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if release is None or top is None:
        return "", f"'{nvcc}' does not state its version and folder"
    if release[1] != torch.version.cuda.split(".")[0]:
        return (
            "",
            f"the CUDA toolkit is {release[1]}.{release[2]}, but PyTorch was built with CUDA {torch.version.cuda}",
        )
    return str(Path(top[1]).resolve()), ""


def configuration() -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `setup`, and the record of how the extension was built."""
    record: dict[str, Any] = {"EXTENSION": False, "EXTENSION_REASON": why_no_extension(), "CUDA": False}
    if record["EXTENSION_REASON"]:
        return {}, record | {"CUDA_REASON": "the extension was not built"}
    toolkit, reason = cuda_toolkit()
    if toolkit:
        os.environ["CUDA_HOME"] = toolkit
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)

    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cpu/*.cpp"))
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
    cxx = ["-O3", "-g0", "-std=c++20", "-Wall", "-Wextra", "-Wno-unused-parameter", *defines]
    extension: Any = CppExtension
    flags = {"cxx": cxx}
    slim = switched_on("CMACLIP_SLIM")
    if toolkit:
        sources += sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/*.cu"))
        extension = CUDAExtension
        cxx.append("-DUSE_CUDA")
        flags["nvcc"] = ["-O3", "-std=c++20", *([] if slim else ["-lineinfo"]), "-DUSE_CUDA", *defines]
    record |= {
        "EXTENSION": True,
        "CUDA": bool(toolkit),
        "CUDA_REASON": reason,
        "CUDA_TOOLKIT": toolkit,
        "ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if toolkit else "",
        "COMPILER": compiler_version(),
        "TORCH": str(torch.__version__),
    }
    ninja = has_ninja()

    class IncrementalBuild(BuildExtension):
        """Keeps its objects, so that ninja compiles only what has changed."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, use_ninja=ninja)

        def finalize_options(self) -> None:
            super().finalize_options()
            self.build_temp = str(ROOT / "build" / "objects")

    module = extension(
        "cmaclip_fast._C",
        sources,
        include_dirs=[str(ROOT / "csrc/include")],
        extra_compile_args=flags,
        extra_link_args=["-Wl,-s"] if slim else [],
        depends=[path.as_posix() for path in ROOT.glob("csrc/**/*.*h")],
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": IncrementalBuild},
    }, record


def compiler_version() -> str:
    return subprocess.run([*cxx_compiler(), "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def has_ninja() -> bool:
    # The scripts of the environment that builds need not be on PATH.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return shutil.which("ninja") is not None


ARGUMENTS, RECORD = configuration()


class RecordedBuild(build_py):
    """Writes `cmaclip_fast/_build.py`, from which `cmaclip env` tells how the extension was built."""

    def run(self) -> None:
        if RECORD["EXTENSION_REASON"]:
            self.warn(f"building without the compiled extension: {RECORD['EXTENSION_REASON']}")
        elif RECORD["CUDA_REASON"]:
            self.warn(f"building without CUDA: {RECORD['CUDA_REASON']}")
        lines = ['"""How this installation\'s extension was built; written by setup.py."""', ""]
        lines += [f"{name} = {value!r}" for name, value in RECORD.items()]
        super().run()
        folder = ROOT if self.editable_mode else Path(self.build_lib)
        path = folder / "cmaclip_fast" / "_build.py"
        temporary = path.with_suffix(".tmp")
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(path)


setup(
    packages=[*find_packages(include=["cmaclip_fast", "cmaclip_fast.*"]), "cmaclip_fast.kernels"],
    package_dir={"cmaclip_fast.kernels": "kernels"},
    **{
        **ARGUMENTS,
        "cmdclass": {"build_py": RecordedBuild} | ARGUMENTS.get("cmdclass", {}),
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}} if ARGUMENTS else {},
    },
)

"""Writes the kit: `python -m benchmarks.gpu_kit.build dist/gpu-kit`.

Its wheel of this project has CUDA code for sm_80 and sm_90 alone, no line numbers and no symbols. Beside it lie wheels
of what a machine with PyTorch lacks, for CPython 3.12 on x86-64, the tests and scripts that run there, and `run.sh`.
What does not change is kept in `build/gpu-kit` and used again.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "gpu-kit"
MOST_BYTES = 45 << 20
ARCHITECTURES = "8.0;9.0"
REQUIREMENTS = (
    *("open_clip_torch", "ftfy", "wcwidth"),
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "typing_extensions"),
    *("datasets", "dill", "multiprocess", "xxhash"),
    "platformdirs",
    "threadpoolctl",  # of the tests
)
"""What a machine with PyTorch and its usual company lacks, in the versions of constraints.txt."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
SOURCES = ("cmaclip_fast", "kernels", "csrc/cpu", "csrc/cuda", "csrc/include")
SOURCE_FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
CARRIED = ("benchmarks/gpu_kit", "benchmarks/operators.py", "tests/gpu", "tests/ops/__init__.py")
CARRIED_FILES = (
    *("tests/__init__.py", "tests/conftest.py", "tests/rule.py", "tests/ops/support.py"),
    *("pyproject.toml", "LICENSE"),
)
BUILT_FILES = ("_C.abi3.so", "_build.py")
MARK = "kit.json"


def build(output: Path, reuse_extension: bool = False) -> dict[str, str]:
    """Write the kit into `output`, which is emptied first, and return what `kit.json` says.

    Args:
        reuse_extension: take the compiled extension of this installation, with whatever architectures it has, instead
            of compiling it; for tests.

    Raises:
        SystemExit: the folder holds something else, or the kit is larger than it may be.
    """
    if output.exists() and any(output.iterdir()) and not (output / MARK).exists():
        raise SystemExit(f"{output}: is not empty and holds no kit: name another folder")
    shutil.rmtree(output, ignore_errors=True)
    wheels = output / "wheels"
    wheels.mkdir(parents=True)
    own = own_wheel(reuse_extension)
    for wheel in (own, *requirements()):
        shutil.copy2(wheel, wheels)
    for name in (*CARRIED, *CARRIED_FILES):
        for path in files(ROOT / name):
            target = output / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    # else another installed package of this name would come before a folder without this file
    (output / "benchmarks" / "__init__.py").touch()
    shutil.copy2(Path(__file__).with_name("run.sh"), output / "run.sh")
    (output / "emulated.json").write_text(json.dumps(emulated(), indent=1) + "\n", encoding="utf-8")
    record = {
        "wheel": own.name,
        "extension": "of the installation that built the kit" if reuse_extension else f"built for {ARCHITECTURES}",
        "commit": _commit(),
    }
    (output / MARK).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in files(output))
    if size > MOST_BYTES:
        raise SystemExit(f"{output}: takes {size / 2**20:.1f} MiB, more than {MOST_BYTES >> 20} MiB")
    print(f"wrote {output}, {size / 2**20:.1f} MiB")
    return record


def files(path: Path) -> Iterator[Path]:
    """The files in a folder, or the file itself; no caches, no links to folders."""
    if path.is_file():
        yield path
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        yield from (Path(folder, name) for name in sorted(names) if not name.endswith((".pyc", ".so")))


def own_wheel(reuse_extension: bool) -> Path:
    """The project's wheel: the one that is there if it was made from the same sources, else a new one."""
    sources = [path for name in (*SOURCES, *SOURCE_FILES) for path in files(ROOT / name) if path.name != "_build.py"]
    built = [ROOT / "cmaclip_fast" / name for name in BUILT_FILES] if reuse_extension else []
    digest = hashlib.sha256(repr((ARCHITECTURES, reuse_extension)).encode())
    for path in (*sources, *built):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    folder = CACHE / ("reused" if reuse_extension else "own") / digest.hexdigest()[:20]
    if not any(folder.glob("*.whl")):
        shutil.rmtree(folder.parent, ignore_errors=True)
        _build_wheel(sources, folder, reuse_extension)
        if reuse_extension:
            _add(next(folder.glob("*.whl")), built)
    return next(folder.glob("*.whl"))


def _build_wheel(sources: list[Path], folder: Path, reuse_extension: bool) -> None:
    # A copy of the sources has objects of its own, which stay for the next build.
    copy = CACHE / ("source-pure" if reuse_extension else "source")
    wanted = {copy / path.relative_to(ROOT): path for path in sources}
    for old in [path for name in SOURCES for path in files(copy / name) if path not in wanted]:
        old.unlink()
    shutil.rmtree(copy / "build" / "lib", ignore_errors=True)
    for target, path in wanted.items():
        if not target.exists() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    switch = {"CMACLIP_NO_EXTENSION": "1"} if reuse_extension else {"CMACLIP_SLIM": "1"}
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": ARCHITECTURES} | switch
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(copy)], check=True, env=environment)


def _add(wheel: Path, built: list[Path]) -> None:
    """Put the extension and the record of its build into a wheel without one."""
    whole = wheel.with_suffix(".new")
    with zipfile.ZipFile(wheel) as pure, zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        names = {f"cmaclip_fast/{path.name}": path.read_bytes() for path in built}
        for entry in pure.infolist():
            if entry.filename in names:
                continue
            data = pure.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                kept = [line for line in data.decode().splitlines() if line.partition(",")[0] not in names]
                data = "\n".join([*kept, *(_recorded(name, one) for name, one in names.items()), ""]).encode()
            target.writestr(entry, data)
        for name, one in names.items():
            target.writestr(name, one)
    whole.replace(wheel)


def _recorded(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}"


def requirements() -> list[Path]:
    """The wheels of `REQUIREMENTS`, downloaded once."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].replace("_", "-").lower(): line for line in lines}
    wanted = [pins[name.replace("_", "-")] for name in REQUIREMENTS]
    folder = CACHE / "wheels" / hashlib.sha256(repr((wanted, PLATFORMS)).encode()).hexdigest()[:20]
    if not folder.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        unfinished = folder.with_suffix(".unfinished")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
        command += [f"--platform={platform}" for platform in PLATFORMS]
        subprocess.run([*command, "--dest", str(unfinished), *wanted], check=True)
        unfinished.replace(folder)
    return sorted(folder.glob("*.whl"))


def emulated() -> dict[str, list[dict[str, object]]]:
    """The emulator's counts of the launches that the step `counters` reads, or nothing without a C++ compiler."""
    from tests.emulator.emulate import compiler

    try:
        compiler()
    except RuntimeError as error:
        print(f"without the emulator's counts: {error}")
        return {}
    # in a process of its own: kernels register themselves once in a process, with whoever loads them first
    command = [sys.executable, "-m", "benchmarks.gpu_kit.emulated"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    counts: dict[str, list[dict[str, object]]] = json.loads(done.stdout)
    return counts


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder of the kit")
    parser.add_argument("--reuse-extension", action="store_true", help="take this installation's compiled extension")
    options = parser.parse_args()
    build(options.output, options.reuse_extension)


if __name__ == "__main__":
    main()

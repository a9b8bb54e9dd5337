"""The wheel in an environment of its own: what is in it, `cmaclip env`, and one prediction."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from cmaclip_fast import env

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for old in (ROOT / "build").glob("lib*"):  # modules that are gone would be packed
        shutil.rmtree(old)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder, ROOT], check=True)
    return next(folder.glob("cmaclip_fast-*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_package_its_data_and_no_package_called_kernels(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cmaclip_fast"}
    for wanted in (
        "kernels/modality_pool.py",
        "data/openclipart/openclipart.parquet",
        "data/openclipart/README.md",
        "pages/templates/report.html",
        "serving/page/index.html",
        "bench/configs/cmaclip-small.json",
    ):
        assert f"cmaclip_fast/{wanted}" in names
    assert ("cmaclip_fast/_C.abi3.so" in names) == (env.backends()["cpp"] is None)
    sources = {f"cmaclip_fast/{path.relative_to(ROOT / 'cmaclip_fast')}" for path in ROOT.glob("cmaclip_fast/**/*.py")}
    packed = {name for name in names if name.endswith(".py")}
    assert packed - sources == {f"cmaclip_fast/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    assert sources <= packed


@pytest.mark.slow
def test_wheel_works_in_a_second_environment(wheel: Path, artifact: Path, shapes: Path, tmp_path: Path) -> None:
    home = tmp_path / "second"
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # the dependencies come from this environment; a path in a .pth file does not run its editable install
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True)

    def run(*command: object) -> str:
        done = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(
        python, "-c", "import cmaclip_fast, cmaclip_fast.kernels as k; print(cmaclip_fast.__file__, k.__file__)"
    )
    assert where.split() == [str(site / "cmaclip_fast" / "__init__.py"), str(site / "cmaclip_fast/kernels/__init__.py")]
    backends = json.loads(run(home / "bin" / "cmaclip", "env", "--json"))["backends"]
    assert (backends["cpp"] is None) == (env.backends()["cpp"] is None)
    output = tmp_path / "labels.parquet"
    said = run(home / "bin" / "cmaclip", "predict", artifact, "--data", shapes, "--output", output)
    assert "96 rows" in said and output.is_file()

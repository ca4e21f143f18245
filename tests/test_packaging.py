"""Building and loading: the content of the wheel, and builds in which a compiler, a toolkit or torch is missing."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from helpers.train_runs import SAFETY_NET
from ltat_fast import __version__, _ext

ROOT = Path(__file__).parents[1]
NEEDS_EXT = pytest.mark.skipif(not _ext.HAS_EXT, reason=f"no C++ extension: {_ext.WHY_NOT}")


def copy_sources(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    for name in ("ltat_fast", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def build(source: Path, *command: str, **environment: str) -> tuple[int, str]:
    """Run ``python COMMAND`` in ``source``. Return its exit status and output."""
    ran = subprocess.run(
        [sys.executable, *command],
        cwd=source,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SAFETY_NET,
        check=False,
    )
    return ran.returncode, ran.stdout


def build_wheel(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel from a copy of the sources. Return it and the output of the build."""
    source = copy_sources(tmp_path)
    pip_wheel = "-m pip wheel -v --no-build-isolation --no-deps -w dist ."
    status, printed = build(source, *pip_wheel.split(), **environment)
    assert status == 0, printed
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel, printed


def files_of(wheel):
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_wheel_without_the_extension(tmp_path):
    wheel, printed = build_wheel(tmp_path, LTAT_BUILD_EXT="0")
    assert "LTAT_BUILD_EXT=0: installing without the C++ extension" in printed
    assert wheel.name.startswith(f"ltat_fast-{__version__}-")
    files = files_of(wheel)
    kernels = {f"ltat_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ltat_fast").rglob("*.py")}
    assert kernels | modules == {name for name in files if name.endswith(".py")}
    package = (ROOT / "ltat_fast").rglob("*")
    data = {str(path.relative_to(ROOT)) for path in package if path.suffix in (".json", ".j2", ".css", ".typed")}
    assert data == {name for name in files if not name.endswith((".py", ".so"))}
    assert not [name for name in files if name.startswith(("tests", "csrc"))]
    if not any(name.endswith(".so") for name in files):
        assert wheel.name.endswith("py3-none-any.whl")

    # The unpacked wheel imports and runs from any directory.
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "import torch, ltat_fast.kernels; from ltat_fast import _ext, ops\n"
        "assert 'site' in ops.__file__ and not _ext.HAS_EXT and 'not built' in _ext.WHY_NOT, _ext.WHY_NOT\n"
        "x = torch.rand(2, 3); assert ops.pgd_step(x, x, x, 0.1, 0.2).shape == x.shape"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}, check=True
    )


def test_a_failing_compiler_gives_a_wheel_without_the_extension(tmp_path):
    wheel, printed = build_wheel(tmp_path, CXX="false", CC="false")
    assert "the C++ extension did not build" in printed
    assert not [name for name in files_of(wheel) if "_C." in name]


def test_a_failing_compiler_is_an_error_if_the_extension_is_required(tmp_path):
    source = copy_sources(tmp_path)
    status, printed = build(source, "setup.py", "build_ext", CXX="false", CC="false", LTAT_REQUIRE_EXT="1")
    assert status != 0
    assert "'false'" in printed, printed


def test_missing_torch_gives_a_wheel_without_the_extension(tmp_path):
    no_torch = tmp_path / "no_torch"
    no_torch.mkdir()
    (no_torch / "torch.py").write_text("raise ImportError('No module named torch')\n")
    wheel, printed = build_wheel(tmp_path, PYTHONPATH=str(no_torch))
    assert "no C++ extension: No module named torch. Install torch first" in printed
    assert "ltat_fast/kernels/pgd.py" in files_of(wheel)


NVCC = """#!/bin/sh
echo 'nvcc: NVIDIA (R) Cuda compiler driver'
echo 'Cuda compilation tools, release {0}, V{0}.99'
"""


@pytest.mark.parametrize(
    ("release", "header", "complaint"),
    [
        ("13.2", True, ""),
        ("12.4", True, "is CUDA 12.4, torch is built for 13.0"),
        ("13.0", False, "has no include/cuda_runtime.h; set CUDA_HOME"),
        (None, True, "its nvcc does not run"),
    ],
)
def test_a_toolkit_that_does_not_fit_gives_an_extension_without_cuda_operators(
    release, header, complaint, tmp_path, monkeypatch, capsys
):
    """This is the usual case on a machine with an old toolkit: torch from PyPI for Linux is a CUDA build."""
    from torch.utils import cpp_extension

    for folder in ("bin", "include"):
        (tmp_path / folder).mkdir()
    if release:
        (tmp_path / "bin" / "nvcc").write_text(NVCC.format(release))
        (tmp_path / "bin" / "nvcc").chmod(0o755)
    if header:
        (tmp_path / "include" / "cuda_runtime.h").touch()
    described = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.delenv("LTAT_REQUIRE_EXT", raising=False)
    monkeypatch.delenv("LTAT_BUILD_EXT", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("setuptools.setup", lambda **keywords: described.update(keywords))
    runpy.run_path("setup.py")
    (module,) = described["ext_modules"]
    assert any(source.endswith("igdm.cu") for source in module.sources) is not bool(complaint)
    assert any(source.startswith("csrc/cpu/") for source in module.sources)
    assert complaint in capsys.readouterr().err
    if complaint:
        monkeypatch.setenv("LTAT_REQUIRE_EXT", "1")
        with pytest.raises(RuntimeError, match=re.escape(complaint)):
            runpy.run_path("setup.py")


def test_torch_is_not_a_build_requirement():
    build_system = (ROOT / "pyproject.toml").read_text().split("[project]")[0]
    requires = re.search(r"^requires = (.*)$", build_system, re.MULTILINE).group(1)
    assert "torch" not in requires


@NEEDS_EXT
def test_the_extension_describes_its_build():
    info = _ext.C.build_info()
    assert info["schema_version"] == _ext.SCHEMA_VERSION
    assert info["torch"] == torch.__version__
    assert info["cpu_isa"] in info["cpu_builds"].split()
    assert (info["cuda"] is None) == (info["cuda_archs"] == "")
    assert re.search(r"(gcc|clang) \d+", info["compiler"])
    assert _ext.WHY_NOT == ""


@NEEDS_EXT
@pytest.mark.skipif(not _ext.HAS_EXT or "avx512" not in _ext.C.build_info()["cpu_builds"], reason="one build only")
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_avx_instructions_are_only_in_the_builds_for_avx():
    """One AVX-512 instruction elsewhere, for example in an inline function of two builds, would crash an older CPU."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", _ext.C.__file__], capture_output=True, text=True, check=True
    ).stdout
    users = {"%zmm": set(), "%ymm": set()}
    function = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
        for register, functions in users.items():
            if register in line:
                functions.add(function)
    assert users["%zmm"]
    assert not [name for name in users["%zmm"] if "ltat::avx512::" not in name]
    assert not [name for name in users["%ymm"] if "ltat::avx512::" not in name and "ltat::avx2::" not in name]


@NEEDS_EXT
@pytest.mark.parametrize(
    ("change", "why_not"),
    [
        (lambda binary: re.sub(rb":schema=\d+;", b":schema=1;", binary), r"has op schema 1, this code needs \d"),
        (lambda binary: binary.replace(b";torch=2", b";torch=1"), r"was built for torch 1.*, this is 2"),
        (lambda binary: binary.replace(b"ltat-fast-build:", b"xxxx-xxxx-xxxxx:"), "has no build stamp"),
        (lambda binary: b"", "has no build stamp"),
    ],
    ids=["old schema", "old torch", "unknown", "empty"],
)
def test_a_library_from_another_build_is_not_loaded(tmp_path, change, why_not):
    library = Path(_ext.C.__file__)
    (tmp_path / library.name).write_bytes(change(library.read_bytes()))
    module, reason = _ext._load(tmp_path)
    assert module is None
    assert re.search(why_not, reason), reason
    assert "rebuild with pip install" in reason


@NEEDS_EXT
def test_the_package_runs_on_plain_torch_if_its_library_is_broken(tmp_path):
    """In a copy of the package, whose library has a good stamp and no valid header."""
    package = tmp_path / "ltat_fast"
    shutil.copytree(ROOT / "ltat_fast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library = Path(_ext.C.__file__)
    (package / library.name).write_bytes(b"\0" * 64 + library.read_bytes()[64:])
    code = (
        "import torch; from ltat_fast import _ext, ops\n"
        "assert not _ext.HAS_EXT and _ext.C is None\n"
        "x = torch.rand(2, 3); ops.pgd_step(x, x, x, 0.1, 0.2)\n"
        "print(_ext.__file__, ops.backend_info()['pgd_step']['cpu'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path) in ran.stdout
    assert "does not load" in ran.stdout
    assert "rebuild with pip install" in ran.stdout


def test_a_library_for_another_python_is_named_and_not_loaded(tmp_path):
    assert _ext._load(tmp_path) == (None, f"C++ extension not built: {_ext.INSTALL}")
    (tmp_path / "_C.cpython-38-x86_64-linux-gnu.so").touch()
    module, why_not = _ext._load(tmp_path)
    assert module is None
    assert "built only for another Python (_C.cpython-38" in why_not
    assert "_C.cpython-38-x86_64-linux-gnu.so" not in [f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]

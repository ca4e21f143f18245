"""The part of the build that pyproject.toml cannot express.

It installs ``kernels/`` as ``ltat_fast.kernels`` and builds the C++ extension ``ltat_fast._C``.

The extension is optional. Without torch or a compiler, or with LTAT_BUILD_EXT=0, the package is installed without it,
prints a notice, and runs plain torch instead. With LTAT_REQUIRE_EXT=1 a failed build is an error. The CUDA sources are
built if torch has CUDA and a matching CUDA toolkit is found, for TORCH_CUDA_ARCH_LIST (default: the GPU of this
machine, or 8.0 and 9.0 without a GPU). Without a toolkit the extension contains only the CPU operators.
"""

import os
import re
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

CUDA_SOURCES = sorted([*glob("csrc/*_cuda.cpp"), *glob("csrc/cuda/*.cu")])
SCHEMA_VERSION = re.search(r'^SCHEMA_VERSION = "(\d+)"', Path("ltat_fast/_ext.py").read_text(), re.MULTILINE)[1]
# No -ffast-math: NaN and infinity must keep their meaning. These flags only allow the compiler to vectorise.
CXX_FLAGS = ["-O3", "-g0", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


def print_notice(message):
    print(f"\n{'*' * 100}\n*** ltat_fast: {message}\n{'*' * 100}\n", file=sys.stderr)


def toolkit_mismatch(torch_cuda, home):
    """Return the reason why the toolkit in ``home`` cannot build for a torch with CUDA ``torch_cuda``, or None."""
    if not Path(home, "include", "cuda_runtime.h").exists():
        return f"{home} has no include/cuda_runtime.h; set CUDA_HOME to the toolkit"
    try:
        version = subprocess.run(
            [Path(home, "bin", "nvcc"), "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"its nvcc does not run ({error})"
    found = re.search(r"release ((\d+)\.\d+)", version)
    if found is None or found[2] != torch_cuda.split(".")[0]:
        return f"{home} is CUDA {found[1] if found else '?'}, torch is built for {torch_cuda}"
    return None


def extension():
    """Return the keyword arguments of setup() that build ltat_fast._C, or print why not and return an empty dict."""
    if os.environ.get("LTAT_BUILD_EXT") == "0":
        print_notice("LTAT_BUILD_EXT=0: installing without the C++ extension; the ops will run plain torch.")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if os.environ.get("LTAT_REQUIRE_EXT") == "1":
            raise
        print_notice(f"no C++ extension: {error}. Install torch first, then pip install --no-build-isolation .")
        return {}

    with_cuda = torch.version.cuda is not None and CUDA_HOME is not None
    if with_cuda and (reason := toolkit_mismatch(torch.version.cuda, CUDA_HOME)):
        if os.environ.get("LTAT_REQUIRE_EXT") == "1":
            raise RuntimeError(f"no CUDA operators: {reason}")
        print_notice(f"no CUDA operators in the C++ extension: {reason}. Triton and CPU operators are not affected.")
        with_cuda = False
    if with_cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    macros = [("LTAT_TORCH_VERSION", f'"{torch.__version__}"'), ("LTAT_SCHEMA_VERSION", f'"{SCHEMA_VERSION}"')]
    if with_cuda:
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "{}.{}".format(*torch.cuda.get_device_capability())
        macros += [("LTAT_CUDA", f'"{torch.version.cuda}"'), ("LTAT_CUDA_ARCHS", f'"{archs}"')]

    class OptionalBuild(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if os.environ.get("LTAT_REQUIRE_EXT") == "1":
                    raise
                print_notice(f"the C++ extension did not build ({error}); the ops will run plain torch.")
                self.extensions = []  # so that setuptools does not try to copy the library

    sources = sorted({*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")} - set(CUDA_SOURCES))
    module = (CUDAExtension if with_cuda else CppExtension)(
        "ltat_fast._C",
        sources + (CUDA_SOURCES if with_cuda else []),
        depends=[*glob("csrc/**/*.h", recursive=True), "ltat_fast/_ext.py"],
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3"]},
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


setup(
    packages=[*find_packages(include=["ltat_fast", "ltat_fast.*"]), "ltat_fast.kernels"],
    package_dir={"ltat_fast.kernels": "kernels"},
    **extension(),
)

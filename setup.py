"""What pyproject.toml cannot say: ``kernels/`` is installed as ``ltat_fast.kernels``, and the C++ extension ``_C``.

The extension is optional. Without torch or a compiler, or with LTAT_BUILD_EXT=0, the package installs without it, says
so, and runs plain torch in its place. LTAT_REQUIRE_EXT=1 makes a failed build an error. CUDA sources are built where
torch has CUDA and a toolkit that fits it is found, for TORCH_CUDA_ARCH_LIST (default: the GPU present, else 8.0 and
9.0); without one the extension has the CPU operators alone.
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


def loud(message):
    print(f"\n{'*' * 100}\n*** ltat_fast: {message}\n{'*' * 100}\n", file=sys.stderr)


def misfit(torch_cuda, home):
    """Why the toolkit in ``home`` cannot build for a torch of CUDA ``torch_cuda``, or None."""
    if not Path(home, "include", "cuda_runtime.h").exists():
        return f"{home} has no include/cuda_runtime.h; set CUDA_HOME to the toolkit"
    try:
        said = subprocess.run(
            [Path(home, "bin", "nvcc"), "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"its nvcc does not run ({error})"
    found = re.search(r"release ((\d+)\.\d+)", said)
    if found is None or found[2] != torch_cuda.split(".")[0]:
        return f"{home} is CUDA {found[1] if found else '?'}, torch is built for {torch_cuda}"
    return None


def extension():
    """Keyword arguments for setup() that build ltat_fast._C, or none with the reason printed."""
    if os.environ.get("LTAT_BUILD_EXT") == "0":
        loud("LTAT_BUILD_EXT=0: installing without the C++ extension; the ops will run plain torch.")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if os.environ.get("LTAT_REQUIRE_EXT") == "1":
            raise
        loud(f"no C++ extension: {error}. Install torch first, then pip install --no-build-isolation .")
        return {}

    with_cuda = torch.version.cuda is not None and CUDA_HOME is not None
    if with_cuda and (reason := misfit(torch.version.cuda, CUDA_HOME)):
        if os.environ.get("LTAT_REQUIRE_EXT") == "1":
            raise RuntimeError(f"no CUDA operators: {reason}")
        loud(f"no CUDA operators in the C++ extension: {reason}. Those of Triton and of the CPU are not concerned.")
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
                loud(f"the C++ extension did not build ({error}); the ops will run plain torch.")
                self.extensions = []  # nothing to copy next to the package

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

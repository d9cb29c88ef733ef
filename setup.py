"""The one part of the build that pyproject.toml cannot say: C kernels that may fail to build.

    python setup.py build_ext --inplace     after a change of a C source in an editable install

No -march: a function names its instructions and is chosen at run time, so one build runs everywhere. OpenMP is compiled
in but not linked: torch has loaded a runtime already, and a second one would be a second pool of threads.
-fno-strict-aliasing: the kernels read the same memory as floats, as integers, and as vectors of either.
"""

import platform
import sys
from glob import glob

from setuptools import Extension, setup

SOURCES = "kernels/tolkernels/cpu"

kernels = Extension(
    "tolkernels._cpu",
    sources=sorted(glob(f"{SOURCES}/*.c")),
    depends=sorted(glob(f"{SOURCES}/*.h")),
    extra_compile_args=["-std=gnu11", "-O3", "-fno-strict-aliasing", "-fopenmp", "-Wall", "-Wextra"],
    optional=True,  # without a compiler the package installs all the same, and torch computes
)

setup(ext_modules=[kernels] if sys.platform == "linux" and platform.machine() == "x86_64" else [])

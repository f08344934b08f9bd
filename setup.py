"""The optional compiled kernels. Everything else about the package is in pyproject.toml.

No OpenMP library is linked: the module takes the runtime torch has loaded (see the head of _kernels.c). Where the build
fails, for want of a compiler say, the package installs without it and uses plain PyTorch.
"""

import sys

from setuptools import Extension, setup

CPU = "src/strassen_tile/ops/cpu"
kernels = [
    Extension(
        f"strassen_tile.ops.cpu.{name}",
        [f"{CPU}/{name}.c"],
        depends=[f"{CPU}/vectors.h"],
        extra_compile_args=["-O3", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi"],
        py_limited_api=True,
        optional=True,
    )
    for name in ("_kernels", "_taps")
]
setup(ext_modules=kernels if sys.platform == "linux" else [])

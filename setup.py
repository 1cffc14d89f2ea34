"""The native module: one extension for Python, one plain library that the dynamic linker binds MLX to."""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup

# optional: without a compiler the sidecar still installs, runs, and says in `stats` what it lacks.
modules = [
    Pybind11Extension(
        "mlx_sidecar.native._core",
        sources=[
            f"native/src/{name}.cpp" for name in ("frames", "module", "pages", "ping", "pulse", "writer")
        ],
        include_dirs=["native/include"],
        depends=[str(header) for header in Path("native/include").glob("*/*.hpp")],
        cxx_std=17,
        extra_compile_args=["-pthread", "-Wall", "-Wextra", "-Werror"],
        extra_link_args=["-pthread"],
        optional=True,
    )
]
if sys.platform == "linux":
    modules.append(
        Extension(
            "mlx_sidecar.native._blas",
            sources=["native/src/blas.cpp"],
            include_dirs=["native/include"],
            extra_compile_args=["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"],
            libraries=["dl"],
            language="c++",
            optional=True,
        )
    )

setup(ext_modules=modules, cmdclass={"build_ext": build_ext})

"""The one thing that pyproject.toml cannot say: the CPU kernels, compiled if there is a compiler."""

from pathlib import Path

from setuptools import Extension, setup

kernels = Path("src/kvmosaic/kernels")
native = Extension(
    "kvmosaic.kernels._native",
    [str(kernels / "native.c")],
    depends=[str(path) for pattern in ("*.h", "*/*.c") for path in kernels.glob(pattern)],
    # no -march: each function names its own instruction set. No contraction: encoding is the codec bit by bit
    extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=off"],
    py_limited_api=True,
    optional=True,
)
setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp311"}})

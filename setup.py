"""The compiled CPU kernels; everything else about the package is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))  # an isolated build does not start here

from kernels import build


class BuildKernels(build_ext):
    """Compile as a checkout does."""

    def build_extension(self, ext: Extension) -> None:
        try:
            build.build(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildError as error:
            raise CompileError(str(error)) from error


sources = [f"kernels/{name}" for name in build.SOURCES]
setup(
    # Optional: without a compiler the installation goes on, and `bench.py env` tells.
    ext_modules=[Extension("kernels._cpu", sources, optional=True)],
    cmdclass={"build_ext": BuildKernels},
)

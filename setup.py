"""The compiled CPU kernels; everything else about the package is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).parent))  # an isolated build does not start here

from kernels import build


class BuildKernels(build_ext):
    """Compile as a checkout does, into a file that names no Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(build.LIBRARY.suffix))

    def build_extension(self, ext: Extension) -> None:
        try:
            build.build(Path(self.get_ext_fullpath(ext.name)))
        except build.BuildError as error:
            raise CompileError(str(error)) from error


class PlatformWheel(bdist_wheel):
    """One wheel for every Python of a platform: ctypes loads the library, which uses no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# Without a compiler an installation goes on, and `bench.py env` tells; a release must not.
required = os.environ.get("ROBUQ_REQUIRE_CPU_KERNELS") == "1"
sources = [f"kernels/{name}" for name in build.SOURCES]
setup(
    ext_modules=[Extension("kernels._cpu", sources, optional=not required)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)

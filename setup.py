"""Two packages from two source roots: `vlmr1` here, `vlmr1_kernels` in kernels/, with the native CPU library that
CMake builds. Without CMake or a C++ compiler the packages install without it. Metadata: pyproject.toml."""

import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
LIBRARY = Extension("vlmr1_kernels.native.libvlmr1_kernels", sources=[], optional=True)


class CMakeBuild(build_ext):
    """The library beside the Python files that load it; a plain C interface, so no Python version in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).parent.absolute()
        build = Path(self.build_temp).absolute()
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DVLMR1_OUTPUT={output}"]
        try:
            for command in (configure, ["cmake", "--build", str(build), "--parallel"]):
                subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.warn(f"the native CPU library is left out, the reference runs instead: {error}")


setup(
    packages=find_packages(".", include=["vlmr1*"]) + find_packages("kernels", include=["vlmr1_kernels*"]),
    package_dir={"vlmr1_kernels": "kernels/vlmr1_kernels"},
    package_data={
        "vlmr1": [
            "planner/configs/*.json",
            "recipes/*.yaml",
            "distributed/configs/*.json",
            "report/*.css",
            "report/templates/*.html",
            "tiny/checkpoint/*",
            "tiny/controls.json",
            "tiny/digits.npz",
            "tiny/digits.txt",
        ]
    },
    include_package_data=False,
    ext_modules=[LIBRARY],
    cmdclass={"build_ext": CMakeBuild},
)

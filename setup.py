"""Build entry point; the metadata is in pyproject.toml. Needs neither nvcc nor torch.

Where both are there, an install also compiles csrc; an editable one leaves that to first use unless
RLSD_BUILD_CUDA=1. csrc goes into the package either way.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

# By its path: the package itself imports torch.
spec = importlib.util.spec_from_file_location(
    "extension", Path(__file__).parent / "rlsd_kernels" / "extension.py"
)
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)


class BuildPy(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            if extension.build_setting():
                extension.install(extension.HERE)
            return
        package = Path(self.build_lib) / "rlsd_kernels"
        shutil.copytree(extension.source_folder(), package / "csrc", dirs_exist_ok=True)
        extension.install(package)


class BdistWheel(bdist_wheel):
    """The extension knows torch's stable ABI and no Python: one wheel serves every Python 3."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


class Platform(Distribution):
    """A wheel with the extension in it is for one platform."""

    def has_ext_modules(self):
        return extension.why_not_installed() is None


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel}, distclass=Platform)

"""What pyproject.toml cannot say: a wheel holds ``assets/`` as ``labkit/assets/``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithAssets(build_py):
    """An editable install finds the assets beside the package; a wheel needs its own copy."""

    def run(self):
        package = Path(self.build_lib) / "labkit"
        if self.editable_mode:
            return super().run()
        shutil.rmtree(package, ignore_errors=True)  # files of an earlier build, deleted since
        super().run()
        shutil.copytree("assets", package / "assets", ignore=shutil.ignore_patterns(".*", "__pycache__"))


setup(cmdclass={"build_py": BuildWithAssets})

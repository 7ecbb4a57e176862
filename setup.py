"""Copy what a checkout keeps at its root into the wheel: presets and the template of the model card.

Everything else stands in setup.cfg.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithResources(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # tinystories_slm.resources finds the files of the checkout
        target = Path(self.build_lib) / "tinystories_slm" / "resources"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "model_card.md", target / "model_card.md")
        shutil.copytree(ROOT / "configs", target / "configs", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithResources})

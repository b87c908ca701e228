"""Only for `make wheel`: with BESTIARY_PREBUILT=<folder> the wheel holds the shared libraries that lie there.

Without that variable this file does nothing: `pip install .` and `pip install -e .` need no compiler, and the kernels
are built on first use.
"""

import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

FOLDER = os.environ.get("BESTIARY_PREBUILT")


class WithLibraries(build_py):
    """Adds the libraries beside the sources they were made from."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # an editable install follows its sources; a library would go stale
            return
        libraries = sorted(Path(FOLDER or "").glob("bestiary_*.so"))
        if not libraries:
            raise SystemExit(f"BESTIARY_PREBUILT={FOLDER} holds no bestiary_*.so")
        target = Path(self.build_lib, "bestiary", "kernels", "csrc", "lib")
        self.mkpath(str(target))
        for path in libraries:
            self.copy_file(str(path), str(target / path.name))


class PlatformDistribution(Distribution):
    """Not pure: the wheel is tagged with the platform."""

    def has_ext_modules(self) -> bool:
        return True


if FOLDER:
    setup(
        cmdclass={"build_py": WithLibraries},
        distclass=PlatformDistribution,
        # build_base: a plain build must never find these libraries in build/lib
        options={
            "bdist_wheel": {"py_limited_api": "cp311"},
            "build": {"build_base": str(Path(FOLDER, "build"))},
        },
    )
else:
    setup()

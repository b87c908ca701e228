"""A copy of the project to change."""

import shutil

import pytest


@pytest.fixture(scope="session")
def copy_tree(root):
    """`copy_tree(target)`: what is packaged, symlinks kept as symlinks, without caches."""

    def copy(target):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "*.so")
        for name in ("src", "kernels", "shared", "projects", "conf"):
            shutil.copytree(root / name, target / name, symlinks=True, ignore=ignore)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            if (root / name).exists():
                shutil.copy(root / name, target / name)
        return target

    return copy

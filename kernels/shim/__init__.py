"""mamba-ssm, causal-conv1d and selective_scan_cuda for machines where they cannot be installed.

``install()`` makes their import names resolve to :mod:`bestiary.kernels`, so that research code runs as it is::

    from bestiary.kernels import shim
    shim.install()
    from mamba_ssm import Mamba
    from causal_conv1d import causal_conv1d_fn

or, without touching the code::

    python -m bestiary.kernels.shim train.py --epochs 3        # as: python train.py --epochs 3
    python -m bestiary.kernels.shim -m package.train           # as: python -m package.train

which also prints at exit, to stderr, which functions were called and on which backend they ran. What can be imported
is left alone unless ``force`` (``--force``) says otherwise.

Stood in for: ``mamba_ssm`` (ops, the Mamba and Mamba2 modules with the vision forks' arguments, the language model and
its decoding), ``causal_conv1d``, and the raw modules ``selective_scan_cuda``, ``causal_conv1d_cuda``, VMamba's
``selective_scan_cuda_core`` and ``selective_scan_cuda_oflex``. Not offered: Mamba-3, attention layers, tensor
parallelism, complex A; asking for them says so.

Out of its reach: a script that says ``.cuda()`` or ``device="cuda"`` needs a GPU whatever stands behind the imports,
and a process that is spawned (not forked), such as a DataLoader worker on macOS, must call ``install()`` itself.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

from bestiary.kernels.shim.names import MODULES, OUTSIDE, VERSIONS

__all__ = ["TOP_LEVEL", "install", "installed", "uninstall"]

TOP_LEVEL = tuple(dict.fromkeys(name.split(".")[0] for name in MODULES))
"""The import names that can be stood in for."""


def install(force: bool = False) -> tuple[str, ...]:
    """Stand in for those of :data:`TOP_LEVEL` that cannot be imported.

    Args:
        force: stand in for all, also for what is installed or imported already.

    Returns:
        The names that are stood in for now.
    """
    for name in TOP_LEVEL:
        if name not in _finder.active and (force or not _importable(name)):
            _forget(name)
            _finder.active.add(name)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)  # first: a package that is installed but broken would be found again
    importlib.invalidate_caches()
    return installed()


def uninstall() -> None:
    """Take the import names back; what was imported from them stays usable."""
    for name in tuple(_finder.active):
        _finder.active.discard(name)
        _forget(name)
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


def installed() -> tuple[str, ...]:
    """The names that are stood in for."""
    return tuple(name for name in TOP_LEVEL if name in _finder.active)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the table and fills them; a name is looked up when it is first asked for."""

    def __init__(self) -> None:
        self.active: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] not in self.active:
            return None
        if fullname not in MODULES:
            raise ModuleNotFoundError(f"No module named {fullname!r}: bestiary's shim does not offer it", name=fullname)
        is_package = any(name.startswith(f"{fullname}.") for name in MODULES)
        return importlib.machinery.ModuleSpec(fullname, self, origin="bestiary.kernels.shim", is_package=is_package)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        homes = MODULES[name]
        if name in VERSIONS:
            module.__version__ = VERSIONS[name]  # type: ignore[attr-defined]

        def get(attribute: str) -> Any:
            if f"{name}.{attribute}" in MODULES:
                return importlib.import_module(f"{name}.{attribute}")
            if attribute not in homes:
                raise AttributeError(f"module {name!r} (bestiary's shim) has no attribute {attribute!r}")
            home, _, own = homes[attribute].partition(":")
            value = getattr(_home(home), own or attribute)
            setattr(module, attribute, value)
            return value

        module.__getattr__ = get  # type: ignore[method-assign]
        module.__all__ = [n for n, home in homes.items() if home not in OUTSIDE]  # type: ignore[attr-defined]
        module.__doc__ = f"{name}, by bestiary.kernels.shim."


def _home(name: str) -> ModuleType:
    return importlib.import_module(name if name in OUTSIDE else f"bestiary.kernels.{name}")


_finder = _Finder()


def _importable(name: str) -> bool:
    """Whether the real one can be imported; a broken installation can fail in any way."""
    if name in sys.modules:
        return True
    try:
        importlib.import_module(name)
    except Exception:
        _forget(name)
        return False
    return True


def _forget(name: str) -> None:
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
        del sys.modules[module]

"""What the tests of the kernels share: the backends that run here, and oracles that others wrote."""

from __future__ import annotations

import pytest

from bestiary.kernels.backends import why_absent


def usable(op: str) -> list[str]:
    """The backends that can run `op` on this machine's CPU."""
    return [name for name in ("reference", "cpu") if why_absent(op, name) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `backend` runs once for each backend of its module's `OP`."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", usable(metafunc.module.OP))

"""The sandbox on each strong rung that works here."""

import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.rl.sandbox import Call, Sandbox


@pytest.fixture(scope="module", params=("nobody_bwrap", "root_unshare"))
def sandbox(request):
    try:
        return Sandbox({"seconds": 2.0}, rung=request.param)
    except ConfigError as error:
        pytest.skip(f"{request.param} does not work here: {error}")


@pytest.fixture(scope="module")
def ask(sandbox):
    """Calls f(21), f(22), … of some code; 42 is the answer to the first, and never goes in."""

    def run(code, calls=1, seconds=None):
        return sandbox.run_calls(code, [Call("f", [21 + i]) for i in range(calls)], seconds)

    return run

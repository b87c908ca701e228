"""The command: run somebody's script with the shim installed, and say at exit what ran where."""

from __future__ import annotations

import atexit
import importlib.util
import os
import runpy
import sys

from bestiary.kernels.shim import install, installed

USAGE = "usage: python -m bestiary.kernels.shim [--force] (SCRIPT | -m MODULE) [ARGUMENT …]"


def main(arguments: list[str]) -> int:
    """Run a script or module as ``__main__``, with what cannot be imported of mamba-ssm stood in for.

    Args:
        arguments: ``[--force] (SCRIPT | -m MODULE) [ARGUMENT …]``.

    Returns:
        The exit code: 2 for bad usage, else 0; the script's own ``sys.exit`` passes through.
    """
    rest = list(arguments)
    force = bool(rest) and rest[0] == "--force"
    if force:
        rest.pop(0)
    if rest and rest[0] in ("-h", "--help"):
        import bestiary.kernels.shim as package

        print(USAGE, package.__doc__, sep="\n\n")
        return 0
    as_module = bool(rest) and rest[0] == "-m"
    if as_module:
        rest.pop(0)
    if not rest:
        return _refuse("-m needs the name of a module" if as_module else "no script was named")
    if rest[0].startswith("-"):
        return _refuse(f"unknown option {rest[0]}; options of the script come after it")
    name = rest[0]
    if not sys.flags.safe_path:  # with -P there is no such entry, for a script neither
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.abspath(name))
    problem = _module_problem(name) if as_module else _script_problem(name)
    if problem:
        return _refuse(problem)
    sys.argv = rest
    install(force)
    atexit.register(_report, os.getpid())
    if as_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
    return 0


def _script_problem(name: str) -> str | None:
    if os.path.isfile(name) or os.path.isfile(os.path.join(name, "__main__.py")):
        return None
    return f"there is no script {name}"


def _module_problem(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
        is_package = spec is not None and spec.submodule_search_locations is not None
        if is_package and importlib.util.find_spec(f"{name}.__main__") is None:
            return f"{name} is a package without __main__ and cannot be run"
    except ModuleNotFoundError as error:
        if not error.name or not (name + ".").startswith(error.name + "."):
            raise  # the module is there; what it imports is not
        spec = None
    return None if spec is not None else f"there is no module {name}"


def _refuse(problem: str) -> int:
    print(f"bestiary shim: {problem} ({USAGE})", file=sys.stderr)
    return 2


def _report(pid: int) -> None:
    if os.getpid() != pid:  # a forked worker that ends by itself
        return
    from bestiary.kernels.shim.counts import report

    print(f"bestiary shim: stood in for {', '.join(installed()) or 'nothing: all can be imported'}", file=sys.stderr)
    print(report(), file=sys.stderr)

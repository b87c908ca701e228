"""The shim runs a script or module as python would, and stands in for nothing that is there."""

import importlib
import os
import sys

import pytest

SCRIPT = """
import sys, os
import bestiary.kernels.shim as shim, bestiary.kernels.shim.__main__ as twin
print(__name__, sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals())
import causal_conv1d, mamba_ssm
import mamba_ssm as again
print(causal_conv1d.__version__, again is mamba_ssm, shim.installed())
print([m for m in sys.modules if "shim" in m and m.endswith("__main__")])
try: import mamba_ssm.modules.mamba3
except ModuleNotFoundError as error: print(error)
try: mamba_ssm.nothing
except AttributeError as error: print(error)
sys.exit(7)
"""


def test_a_script_runs_as_if_python_ran_it(run, tmp_path):
    result = run(SCRIPT, "--lr", "1e-3", "-m")
    assert result.returncode == 7, result.stderr
    lines = result.stdout.splitlines()
    script = str(tmp_path / "script.py")
    assert lines[0] == f"__main__ {[script, '--lr', '1e-3', '-m']} {tmp_path} True"
    assert lines[1].startswith("1.6.0+bestiary True ('mamba_ssm', 'causal_conv1d'")
    assert lines[2] == "['bestiary.kernels.shim.__main__']"
    assert "mamba3" in lines[3]
    assert "nothing" in lines[4]
    assert "no function of the shim was called" in result.stderr
    assert "Warning" not in result.stderr


def test_a_failing_script_shows_its_traceback_and_the_report(run):
    result = run("import mamba_ssm\nraise KeyError('mine')\n")
    assert result.returncode == 1
    assert "KeyError: 'mine'" in result.stderr
    assert "bestiary shim: stood in for" in result.stderr


def test_modules_run_too(shim, tmp_path):
    package = tmp_path / "research"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text("import sys, mamba_ssm\nprint(__name__, __package__, sys.argv[1:], sys.path[0])")
    (package / "broken.py").write_text("import not_there_at_all")
    result = shim("-m", "research.train", "a", "-b")
    assert result.stdout == f"__main__ research ['a', '-b'] {tmp_path}\n", result.stderr
    for name, problem in (("research", "without __main__"), ("research.nope", "no module"), ("nope.nope", "no module")):
        result = shim("-m", name)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
        assert problem in result.stderr
    result = shim("-m", "research.broken")
    assert result.returncode == 1
    assert "No module named 'not_there_at_all'" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--force"], ["-m"], ["--nope", "x.py"], ["missing.py"], ["."]], ids=str)
def test_bad_usage_is_one_line(arguments, shim):
    result = shim(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("bestiary shim: ")
    assert result.stderr.count("\n") == 1


def test_what_can_be_imported_is_left_alone(run, tmp_path, root):
    real = tmp_path / "site"
    (real / "causal_conv1d").mkdir(parents=True)
    (real / "causal_conv1d" / "__init__.py").write_text("__version__ = 'real'\n")
    (real / "selective_scan_cuda.py").write_text("raise OSError('undefined symbol: _ZN3c10')\n")
    text = "import causal_conv1d, selective_scan_cuda, sys\nprint(causal_conv1d.__version__, selective_scan_cuda.fwd)"
    env = {"PYTHONPATH": os.pathsep.join([str(real), str(root / "src")])}
    result = run(text, env=env)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("real <function scan_fwd")
    result = run(text, options=["--force"], env=env)
    assert result.stdout.startswith("1.6.0+bestiary <function scan_fwd"), result.stderr


def test_install_and_uninstall():
    from bestiary.kernels import shim

    before = [name for name in shim.TOP_LEVEL if name in sys.modules]
    if before:
        pytest.skip(f"imported already: {before}")
    try:
        names = shim.install()
        assert set(names) <= set(shim.TOP_LEVEL)
        assert shim.install() == names
        assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 1
        if "mamba_ssm" in names:
            from mamba_ssm.modules.mamba_simple import Mamba

            assert Mamba.__module__ == "bestiary.kernels.shim.mamba"
    finally:
        shim.uninstall()
    assert not shim.installed()
    if "mamba_ssm" in names:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm")


def test_every_name_of_the_table_exists():
    """And has the calls of upstream: the shim's names are resolved one by one."""
    from bestiary.kernels.shim.names import MODULES, OUTSIDE

    for module, names in MODULES.items():
        for name, where in names.items():
            home, _, own = where.partition(":")
            home = home if home in OUTSIDE else f"bestiary.kernels.{home}"
            assert hasattr(importlib.import_module(home), own or name), f"{module}.{name}"

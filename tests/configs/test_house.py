"""The rules of the house, each with a planted violation that its checker must catch."""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOMS = ("kernels", "shared", "projects")
CODE = (*ROOMS, "conf", "tools", "src/bestiary/__init__.py", "src/bestiary/kernels/__init__.py")
MAX_LINES = 400
# Loaded only where used: each costs seconds, or is optional.
HEAVY = {"transformers", "monai", "timm", "wandb", "music21", "peft", "torchaudio", "torchvision", "nibabel", "trl"}


# --- what the checkers walk over ---------------------------------------------------------------------------------


def sources(root: Path, rooms: tuple[str, ...] = CODE) -> Iterator[tuple[Path, ast.Module]]:
    """Every Python file of these rooms with its syntax tree."""
    for room in rooms:
        path = root / room
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        for file in files:
            yield file, ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported(node: ast.AST) -> list[str]:
    """Dotted names an import statement names; relative imports give none."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def dotted(node: ast.AST) -> str:
    """`torch.hub.load` for that attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return f"{left}.{node.attr}" if left else ""
    return ""


def at(root: Path, file: Path, node: ast.AST | None = None) -> str:
    """Where a violation stands."""
    line = f":{node.lineno}" if node is not None and hasattr(node, "lineno") else ""
    return f"{file.relative_to(root)}{line}"


# --- the checkers: each takes a root and returns violations ------------------------------------------------------


def bare_imports(root: Path) -> list[str]:
    """Rule 2: `import shared` instead of `import bestiary.shared`."""
    forbidden = {*ROOMS, "tools", "tests", "conf"}
    found = []
    for file, tree in sources(root, (*CODE, "tests")):
        for node in ast.walk(tree):
            found += [f"{at(root, file, node)} {n}" for n in imported(node) if n.split(".")[0] in forbidden]
    return found


def sideways_imports(root: Path) -> list[str]:
    """Rule 1, by reading: a project that imports another (import-linter sees it too, where it can be installed)."""
    found = []
    for file, tree in sources(root, ("projects",)):
        own = file.relative_to(root / "projects").parts[0]
        for node in ast.walk(tree):
            for name in imported(node):
                parts = name.split(".")
                if parts[:2] == ["bestiary", "projects"] and len(parts) > 2 and parts[2] != own:
                    found.append(f"{at(root, file, node)} {name}")
    return found


def kernels_init(root: Path) -> list[str]:
    """Rule 2: kernels/__init__.py."""
    return ["kernels/__init__.py"] if (root / "kernels" / "__init__.py").exists() else []


def shadowing_tools(root: Path) -> list[str]:
    """Rule 2: a script in tools/ (sys.path[0] of every script) with the name of another module."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    return [path.name for path in sorted((root / "tools").glob("*.py")) if path.stem in taken - {"bestiary"}]


def instantiate_calls(root: Path) -> list[str]:
    """Rule 4: Hydra's instantiate outside shared/core/build.py."""
    found = []
    for file, tree in sources(root):
        if file == root / "shared" / "core" / "build.py":
            continue
        for node in ast.walk(tree):
            names = [n for n in imported(node) if n in ("hydra.utils.instantiate", "hydra.utils.call")]
            if names or (isinstance(node, ast.Attribute) and node.attr == "instantiate"):
                found.append(at(root, file, node))
    return found


def unsafe_loads(root: Path) -> list[str]:
    """Rule 4: torch.load without weights_only=True, and its relatives that run what they read."""
    found = []
    for file, tree in sources(root, (*CODE, "tests")):
        for node in ast.walk(tree):
            if "torch.load" in imported(node):
                found.append(at(root, file, node))
            if not isinstance(node, ast.Call):
                continue
            name = dotted(node.func)
            safe = any(
                k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
                for k in node.keywords
            )
            if name in ("torch.load", "pickle.load") and not safe:
                found.append(at(root, file, node))
    return found


def downloads(root: Path) -> list[str]:
    """Rule 5: anything but tools/fetch.py that obtains files."""
    modules = ("urllib.request", "requests", "httpx", "aiohttp", "wget", "ftplib", "http.client", "gdown")
    names = ("hf_hub_download", "snapshot_download", "load_state_dict_from_url", "urlopen", "urlretrieve")
    chains = ("torch.hub.load", "torch.hub.download_url_to_file", "datasets.load_dataset")
    commands = {("pip", "download"), ("apt-get", "download"), ("pip", "install")}
    found = []
    for file, tree in sources(root):
        if file == root / "tools" / "fetch.py":
            continue
        for node in ast.walk(tree):
            bad = any(
                n == m or n.startswith(f"{m}.") or n.split(".")[-1] in names for n in imported(node) for m in modules
            )
            if isinstance(node, ast.Attribute):
                bad = bad or node.attr in names or dotted(node) in chains
            if isinstance(node, ast.List | ast.Tuple):
                words = [e.value for e in node.elts if isinstance(e, ast.Constant)]
                bad = bad or any(pair in itertools.pairwise(words) for pair in commands)
            if bad:
                found.append(at(root, file, node))
    return found


def heavy_imports(root: Path) -> list[str]:
    """Rule 3: a heavy or optional package imported when a module loads."""
    found = []
    for file, tree in sources(root, (*ROOMS, "conf", "tools")):
        for node in tree.body:
            found += [f"{at(root, file, node)} {n}" for n in imported(node) if n.split(".")[0] in HEAVY]
    return found


def long_files(root: Path) -> list[str]:
    """Files of more than MAX_LINES lines."""
    counts = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for room in (*ROOMS, "tools")
        for path in sorted((root / room).rglob("*.py"))
    }
    return [f"{at(root, path)} has {n} lines" for path, n in counts.items() if n > MAX_LINES]


def unmatched_projects(root: Path) -> list[str]:
    """projects/<p>/, conf/project/<p>.yaml and projects/<p>/metafile.yaml are one to one to one."""
    skip = ("__pycache__", "_template")
    folders = {p.name for p in (root / "projects").iterdir() if p.is_dir() and p.name not in skip and any(p.iterdir())}
    configs = {p.stem for p in (root / "conf" / "project").glob("*.yaml")}
    metafiles = {p.parent.name for p in (root / "projects").glob("*/metafile.yaml")} - set(skip)
    return sorted((folders | configs | metafiles) - (folders & configs & metafiles))


def false_defaults(root: Path) -> list[str]:
    """What a metafile says of its project's default selection, and conf/project/ says otherwise."""
    yaml = pytest.importorskip("yaml")
    found = []
    for path in sorted((root / "projects").glob("*/metafile.yaml")):
        config = root / "conf" / "project" / f"{path.parent.name}.yaml"
        if not config.exists():
            continue  # unmatched_projects says so
        chosen = {}
        for item in yaml.safe_load(config.read_text()).get("defaults") or []:
            chosen |= {k.removeprefix("override").strip().lstrip("/"): v for k, v in item.items()}
        said = yaml.safe_load(path.read_text()).get("default") or {}
        found += [f"{path.parent.name}: {k} is {chosen.get(k)}, not {v}" for k, v in said.items() if chosen.get(k) != v]
    return found


def foreign_kernels(root: Path, env: dict[str, str], *how: str) -> list[str]:
    """Rule 2: after transformers' probe, is there a module `kernels` that is a file of ours?"""
    result = subprocess.run(
        [sys.executable, *how], cwd=root, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return [] if result.returncode == 0 else [result.stderr[-2000:] or f"exit {result.returncode}"]


def loaded(code: str, env: dict[str, str], cwd: Path) -> set[str]:
    """Top-level modules that are loaded after this code ran in a fresh interpreter."""
    code += "\nimport sys; print('LOADED', *sorted({m.split('.')[0] for m in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split("LOADED")[-1].split())


def lint_imports(root: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """import-linter with the contracts of this root's pyproject.toml."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    env = env | {"PYTHONPATH": str(root / "src")}
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)


# --- the tests ---------------------------------------------------------------------------------------------------

PLANTED = [
    (bare_imports, "shared/nn/a.py", "from shared.core import specs\n"),
    (bare_imports, "tests/unit/a.py", "import kernels.ssd\n"),
    (sideways_imports, "projects/asm_unet/a.py", "from bestiary.projects.qad import model\n"),
    (kernels_init, "kernels/__init__.py", ""),
    (shadowing_tools, "tools/profile.py", ""),
    (shadowing_tools, "tools/torch.py", ""),
    (instantiate_calls, "shared/nn/a.py", "from hydra.utils import instantiate\n"),
    (instantiate_calls, "tools/a.py", "import hydra\nhydra.utils.instantiate({})\n"),
    (unsafe_loads, "shared/hub/a.py", "import torch\ntorch.load('x')\n"),
    (unsafe_loads, "shared/hub/a.py", "import torch\ntorch.load('x', weights_only=False)\n"),
    (unsafe_loads, "shared/hub/a.py", "from torch import load\n"),
    (downloads, "shared/data/a.py", "import urllib.request\n"),
    (downloads, "shared/data/a.py", "def f():\n    from requests import get\n"),
    (downloads, "shared/hub/a.py", "import huggingface_hub as h\nh.snapshot_download('x')\n"),
    (downloads, "tools/a.py", "import sys\nrun([sys.executable, '-m', 'pip', 'download', 'x'])\n"),
    (heavy_imports, "projects/asm_unet/a.py", "import monai.transforms\n"),
    (long_files, "kernels/ssd/a.py", "x = 1\n" * (MAX_LINES + 1)),
    (unmatched_projects, "projects/lonely/metafile.yaml", "title: x\n"),
    (unmatched_projects, "conf/project/lonely.yaml", "# @package _global_\n"),
]
CHECKERS = [false_defaults, *dict.fromkeys(checker for checker, _, _ in PLANTED)]


@pytest.mark.parametrize("checker", CHECKERS, ids=lambda c: c.__name__)
def test_repository_obeys(checker, root):
    assert checker(root) == [], checker.__doc__


@pytest.mark.parametrize(("checker", "path", "text"), PLANTED, ids=lambda v: getattr(v, "__name__", None))
def test_planted_violation_is_caught(checker, path, text, tmp_path):
    for room in ("kernels", "shared", "projects", "conf/project", "tools", "tests"):
        (tmp_path / room).mkdir(parents=True)
    for name in ("src/bestiary/__init__.py", "src/bestiary/kernels/__init__.py", "tools/fetch.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert checker(tmp_path) == []
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(text)
    assert len(checker(tmp_path)) == 1


def test_a_false_default_is_caught(tmp_path):
    for name, text in {
        "projects/x/metafile.yaml": "default: {backbone: b, dataset: c}\n",
        "conf/project/x.yaml": "defaults:\n  - override /backbone: a\n  - override /dataset: c\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    assert false_defaults(tmp_path) == ["x: backbone is a, not b"]


def test_arrows_point_one_way(root, clean_env):
    result = lint_imports(root, clean_env())
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("shared/nn/planted.py", "from bestiary.projects import asm_unet"),
        ("projects/_examples/planted.py", "import bestiary.projects.asm_unet"),
        ("kernels", "import bestiary.shared.core.errors"),
    ],
)
def test_a_planted_arrow_is_caught(path, line, copy_tree, clean_env, tmp_path):
    copy = copy_tree(tmp_path)
    target = copy / path
    if path == "kernels":  # the package's own __init__ is a real file; the op folders are links
        target = copy / "src" / "bestiary" / "kernels" / "__init__.py"
    with target.open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(copy, clean_env())
    assert result.returncode != 0
    assert "BROKEN" in result.stdout, result.stdout + result.stderr


PROBE = """
import sys
import transformers.integrations.hub_kernels
from transformers import MambaConfig, MambaForCausalLM
assert getattr(sys.modules.get("kernels"), "__file__", None) is None, sys.modules["kernels"]
"""


def test_transformers_does_not_find_our_kernels(root, clean_env, tmp_path):
    pytest.importorskip("transformers")
    assert foreign_kernels(root, clean_env(PYTHONPATH=str(root / "src")), "-c", PROBE) == []
    # -m too puts the working directory first; the module itself comes from elsewhere.
    (tmp_path / "bestiary_probe.py").write_text(PROBE)
    env = clean_env(PYTHONPATH=f"{root / 'src'}{os.pathsep}{tmp_path}")
    assert foreign_kernels(root, env, "-m", "bestiary_probe") == []


def test_a_planted_kernels_package_is_caught(clean_env, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.18.2'\n")
    assert foreign_kernels(tmp_path, clean_env(), "-c", PROBE) != []


@pytest.mark.parametrize("room", ["shared", "projects"])
def test_a_bare_import_raises(room, root, clean_env):
    result = subprocess.run(
        [sys.executable, "-c", f"import {room}"], cwd=root, env=clean_env(), capture_output=True, text=True
    )
    assert result.returncode == 1
    assert f"import 'bestiary.{room}' instead" in result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import bestiary",
        "import bestiary.kernels",
        "import runpy, sys; sys.argv = ['list_zoo']; runpy.run_path({tool!r})",
    ],
)
def test_light_imports_load_no_torch(code, root, clean_env):
    code = code.format(tool=str(root / "tools" / "list_zoo.py"))
    modules = loaded(code, clean_env(PYTHONPATH=str(root / "src")), root)
    assert not modules & {"torch", "numpy", "hydra", "omegaconf", *HEAVY}


def test_a_planted_torch_is_caught(clean_env, tmp_path):
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "planted.py").write_text("import torch\n")
    assert "torch" in loaded("import planted", clean_env(), tmp_path)


def test_a_missing_extra_is_named():
    from bestiary.shared.core.errors import MissingExtraError, require

    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[medical\]'"):
        require("no_such_package_of_ours", "medical")

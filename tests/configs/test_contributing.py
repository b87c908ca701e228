"""CONTRIBUTING.md names what exists: every path, script and choice in it."""

from __future__ import annotations

import re
import shlex

import pytest

from bestiary.shared.core.config import options
from bestiary.shared.core.errors import UserError

ROOMS = "shared|projects|kernels|conf|tools|tests|src"


@pytest.fixture(scope="module")
def text(root):
    return (root / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_path_exists(text, root):
    paths = set(re.findall(rf"(?<![\w/.])(?:{ROOMS})/[\w/.]*[\w/]", text))
    assert len(paths) > 30
    # my_paper is the reader's, and conf/local is ignored by git.
    missing = [p for p in paths if "my_paper" not in p and "conf/local" not in p and not (root / p).exists()]
    assert sorted(missing) == []


def test_every_choice_exists(text):
    commands = [line.strip() for line in text.splitlines() if line.startswith("    python ")]
    given = [
        word.lstrip("+").split("=") for line in commands for word in shlex.split(line, comments=True) if "=" in word
    ]
    assert len(given) > 6
    unknown = [f"{group}={name}" for group, name in given if name != "my_paper" and name not in options(group)]
    assert unknown == []


def test_every_selection_of_tests_selects_something(text, root):
    code = (root / "tests/configs/test_house.py").read_text(encoding="utf-8")
    words = [w for names in re.findall(r'test_house\.py -k "?([\w ]+?)"?`', text) for w in names.split(" or ")]
    assert len(words) > 8
    assert [w for w in words if not re.search(rf"def \w*{w}", code)] == []


def test_every_table_exists(text, root):
    from bestiary.shared.results.tables import load_table

    names = set(re.findall(r"reproduce\.py (?:run|report|show) (\S+)", text))
    assert names
    for name in names:
        assert load_table(root / "projects", name)
    with pytest.raises(UserError):
        load_table(root / "projects", "asm_unet/none")

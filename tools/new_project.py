#!/usr/bin/env python
"""Begin a project: a folder, configs, a table and tests for a new paper, which train from the first minute.

    python tools/new_project.py my_paper
    python tools/new_project.py my_paper --task seg --title "My Paper: a Subtitle" --arxiv 2508.07237

`text` (the default) is a language model on dataset=tiny_talk, `seg` a segmentation net on dataset=icbm152. What is
written comes from tools/templates/<task>/, whose paths are those of the repository; TODO marks what is yours to say.
Nothing that exists is changed: all files are written, or none. Exit status: 0, or 2 with one message.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import keyword
import re
import sys
import tomllib
from pathlib import Path

# The package is found from any folder and before any install.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bestiary.shared.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("text", "seg")
LONGEST = 30  # so that no generated line of code outgrows 120 characters


def check_name(name: str, root: Path = ROOT) -> None:
    """Refuse a name that is not snake_case, or that already means something.

    Raises:
        UserError: with the reason.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or not 2 <= len(name) <= LONGEST:
        hint = re.sub(r"_+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name)).strip("_").lower()
        good = hint if hint and hint != name and hint[0].isalpha() and 2 <= len(hint) <= LONGEST else "my_paper"
        raise UserError(f"{name!r} is not a name in snake_case of 2 to {LONGEST} characters, such as {good}")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in sys.stdlib_module_names:
        raise UserError(f"{name!r} is a word or module of Python itself; take another name")
    if name in packages(root):
        raise UserError(f"{name!r} is the name of a Python package; take another, so that nobody mistakes one for it")
    rooms = {p.name for p in root.iterdir() if p.is_dir()} | {"bestiary", "none", "default", "name"}
    if name in rooms | {p.name for p in (root / "conf").iterdir() if p.is_dir()}:
        raise UserError(f"{name!r} has a meaning in this repository; take another name")


def packages(root: Path) -> set[str]:
    """Names of installed packages and of those that pyproject.toml asks for, as Python would import them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    named = {m[0] for d in wanted if (m := re.match(r"[\w.-]+", d))}
    installed = importlib.metadata.packages_distributions()
    named |= set(installed) | {d for distributions in installed.values() for d in distributions}
    return {re.sub(r"[-.]+", "_", n).lower() for n in named}


def check_line(what: str, text: str) -> None:
    """Refuse a text that cannot stand in a heading, a comment and a YAML value."""
    if not text.strip() or not text.isprintable():
        raise UserError(f"{what} must be one line of text, not {text!r}")


def rendered(name: str, task: str, title: str, arxiv: str | None, root: Path = ROOT) -> dict[Path, str]:
    """Path in the repository to content, for every template of the task."""
    values = {
        "NAME": name,
        "CLASS": "".join(word.capitalize() for word in name.split("_")),
        "TITLE": title,
        "TITLE_YAML": json.dumps(title, ensure_ascii=False),
        "ARXIV": f"arXiv:{arxiv}" if arxiv else "no arXiv number yet",
        "ARXIV_YAML": json.dumps(arxiv),
    }
    folder = root / "tools" / "templates" / task
    return {
        Path(path.relative_to(folder).as_posix().replace("NAME", name).removesuffix(".tmpl")): re.sub(
            r"@([A-Z_]+)@", lambda match: values[match[1]], path.read_text(encoding="utf-8")
        )
        for path in sorted(folder.rglob("*.tmpl"))
    }


def check_free(name: str, files: dict[Path, str], root: Path = ROOT) -> None:
    """Refuse to write where something is, in the project's folders too.

    Raises:
        UserError: naming what is there.
    """
    own = {root / room / name for room in ("projects", "tests/projects", "conf/paper", "conf/tuned", "conf/experiment")}
    own |= {root / path for path in files} | {root / "conf/project" / f"{name}.yaml"}
    there = {path for path in own if path.exists()}
    taken = sorted(p.relative_to(root).as_posix() for p in there if not there & set(p.parents))
    if taken:
        raise UserError(f"{name!r} is taken: {', '.join(taken)} {'is' if len(taken) == 1 else 'are'} there already")


def write(files: dict[Path, str], root: Path = ROOT) -> None:
    """Write all files, or none: whatever stops it, what was written is taken back."""
    made: list[Path] = []
    try:
        for path, text in files.items():
            missing = [p for p in (root / path).parents if not p.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                made.append(folder)
            with (root / path).open("x", encoding="utf-8") as file:
                made.append(root / path)
                file.write(text)
    except BaseException:
        for path in reversed(made):
            path.rmdir() if path.is_dir() else path.unlink()
        raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Begin a project.", epilog="Then: CONTRIBUTING.md")
    parser.add_argument("name", help="snake_case, the same everywhere: projects/NAME, +project=NAME")
    parser.add_argument("--task", choices=TASKS, default="text", help="what it starts from (default: %(default)s)")
    parser.add_argument("--title", help="the paper's title")
    parser.add_argument("--arxiv", help="its arXiv number, such as 2508.07237")
    args = parser.parse_args(argv)
    name, arxiv = args.name, args.arxiv
    title = args.title if args.title is not None else name.replace("_", " ").capitalize()
    try:
        check_name(name)
        check_line("the title", title)
        if arxiv is not None and not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv := arxiv.lower().removeprefix("arxiv:")):
            raise UserError(f"--arxiv {args.arxiv!r} is not like 2508.07237 (the version goes into the table)")
        files = rendered(name, args.task, title, arxiv)
        check_free(name, files)
        write(files)
    except (UserError, OSError) as error:
        print(f"new_project.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"wrote {path}" for path in files))
    print(
        "\nNext:\n"
        f"  python tools/train.py +project={name} debug=fast\n"
        f"  python -m pytest tests/projects/{name}\n"
        f"  grep -rn TODO projects/{name} conf tests/projects/{name}   # what is yours to say\n"
    )
    if args.task == "seg":
        print("The default data is fetched with: python tools/fetch.py icbm152")
    return 0


if __name__ == "__main__":
    sys.exit(main())

